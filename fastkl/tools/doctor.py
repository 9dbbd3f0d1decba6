"""`fastkl doctor`: verifies fastkl's results on this machine, one line per check.

Checks run in a separate process: a crash or hang fails one check and not the report.
"""

import contextlib
import faulthandler
import importlib.metadata
import multiprocessing.connection
import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import collect_env

import fastkl

from .. import f_divergences, testing
from .files import STDOUT, json_text, write_whole

# Timeout of a check, in seconds; crashes and timeouts after which the rest is skipped.
HANG, CRASHES = 120.0, 4
STDERR = 2  # the file descriptor, even if sys.stderr is replaced
# Variables that affect the run, and those that cost time or precision.
VARIABLES = r"TRITON_|FASTKL_|(CUDA|HIP|ROCR)_VISIBLE|CUDA_LAUNCH|PYTORCH_|DISABLE_PTXAS|.*TF32"
COSTLY = (
    r"(TRITON_(INTERPRET|ALWAYS|DEBUG|KERNEL_OVERRIDE)|CUDA_LAUNCH|DISABLE_PTXAS|.*TF32).*=[^0]"
)
# Limits of a gradient's relative L2 error: for a row of logits, the dtype's rounding; for hidden
# states and weight, GEMMs that may be TF32. The most used dtype comes first.
LIMITS = {"bfloat16": (4e-3, 2e-2), "float32": (1e-5, 2e-3), "float16": (1e-3, 5e-3)}
# VOCABULARY is above the sizes with a configuration of their own, and not a multiple of a tile.
VOCABULARY, LARGE_VOCABULARY = 5000, 128256
# Standard deviations of each row's logit differences: KL from 5e-4 to 4 nats.
SIZES = (0.03, 0.1, 0.3, 1.0, 2.0, 3.0)
MIX = {
    "kl": 1.1,
    "logprob": 0.7,
    "entropy": -0.3,
    "ref_logprob": 0.5,
    "ref_kl": -0.9,
    "lse": 0.4,
    "ref_lse": -0.6,
}
FAMILY = {
    ("js", 0.5): fastkl.js_divergence,
    ("skew_kl", 0.1): partial(fastkl.skew_kl_divergence, alpha=0.1),
    ("renyi", 2.0): partial(fastkl.renyi_divergence, alpha=2.0),
    ("total_variation", 0.0): fastkl.total_variation,
    ("jeffreys", 0.0): fastkl.jeffreys_divergence,
}
SIDES = ("gradient to the first", "gradient to the second")
Fields = Mapping[str, torch.Tensor]
Function = Callable[..., Fields]
Pair = Sequence[torch.Tensor]


class Outcome(NamedTuple):
    """Result of a check: ok, warning, skipped or FAIL, with text and figures."""

    status: str
    text: str
    figures: Mapping[str, object] = {}


# ---- the machine


def check_machine(device: torch.device) -> Outcome:
    """Report versions, GPU, backend and variables; the figures are torch.utils.collect_env's."""
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = {name: installed.get(name, "none") for name in ("torch", "triton")}
    variables = [f"{n}={v}" for n, v in sorted(os.environ.items()) if re.match(VARIABLES, n)]
    found, cuda = fastkl.explain(torch.zeros(1, 8, device=device)), device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if cuda else collect_env.get_gpu_info(collect_env.run)
    needs = re.findall(r"\btriton==([\d.]+)", "\n".join(importlib.metadata.requires("torch") or ()))
    faults = {
        "less than 2 GB of its memory are free": cuda and torch.cuda.mem_get_info(device)[0] < 2e9,
        "torch does not see the GPU": not cuda and gpu and not torch.cuda.device_count(),
        **{
            f"this torch asks for triton {wanted}": not versions["triton"].startswith(wanted)
            for wanted in needs
        },
        "one of the variables costs time or precision": any(re.match(COSTLY, v) for v in variables),
    }
    said = [fault for fault, there in faults.items() if there]
    named = [f"fastkl {fastkl.__version__}", *map(" ".join, versions.items()), f"GPU: {gpu}"]
    return Outcome(
        "FAIL" if found.problems else "warning" if said else "ok",
        "; ".join([", ".join([*named, *variables]), str(found), *said]),
        {name: str(value) for name, value in collect_env.get_env_info()._asdict().items()},
    )


# ---- comparison with float64


def _kl(p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None = None) -> Fields:
    return {"kl": fastkl.kl_divergence(p, q, mask=mask)}


def _weights(p: torch.Tensor) -> torch.Tensor:
    """Return weights of both signs, at a GradScaler's magnitude for float16."""
    values = torch.linspace(-1.5, 2.0, p[..., 0].numel(), device=p.device)
    return values.view(p.shape[:-1]) * (4096.0 if p.dtype == torch.float16 else 1.0)


def _results(function: Function, inputs: Pair, upstream: Fields) -> Fields:
    """Return fields, and the gradients of Σ upstream·fields to the inputs."""
    leaves = [testing.leaf(value) for value in inputs]
    fields = function(*leaves)
    sums = [(upstream[name].to(fields[name]) * fields[name]).sum() for name in upstream]
    return {**fields, **dict(zip(SIDES, torch.autograd.grad(sums, leaves), strict=False))}


def _compare(
    function: Function, truth: Function, inputs: Pair, upstream: Fields, limit: float
) -> Outcome:
    results = _results(function, inputs, upstream)
    exact = _results(truth, [value.double() for value in inputs], upstream)
    fields, wanted = (
        {name: each[name] for name in MIX if name in results} for each in (results, exact)
    )
    error = testing.assert_stats(fields, wanted)
    # The absolute tolerance of divergences would hide an error in a KL near 1e-6.
    testing.assert_near(results["kl"], exact["kl"], 1e-4, 0.0, "kl")
    worst = max(
        testing.assert_gradient(results[n], exact[n], n, limit) for n in SIDES[: len(inputs)]
    )
    return Outcome(
        "ok",
        f"within {error:.0e}, gradients {worst:.0e}",
        {"value_error": error, "gradient_error": worst, "mean_kl": exact["kl"].mean().item()},
    )


def _strided(dtype: torch.dtype) -> Pair:
    """Return misaligned views whose leading dimensions do not merge."""
    bases = testing.pair("normal3", 120, 503, 0.3, dtype=dtype)
    view = testing.LAYOUTS["time without the first"]
    return [view(base.view(4, 5, 6, 503))[..., 1:] for base in bases]


_ordinary = partial(testing.sizes_pair, "normal3", SIZES, (0.0,))


def check_agreement(
    make: Callable[..., Pair], device: torch.device, dtype: str, names: Sequence[str] = ("kl",)
) -> Outcome:
    """Compare kl_divergence, or fields of token_stats, and gradients of their weighted sum."""
    pair = [side.to(device) for side in make(dtype=getattr(torch, dtype))]
    tokens, weights = torch.full(pair[0].shape[:-1], 17, device=device), _weights(pair[0])
    return _compare(
        _kl if names == ("kl",) else lambda p, q: fastkl.token_stats(p, tokens, q)._asdict(),
        lambda p, q: testing.truth(p, q).stats(tokens),
        pair,
        {name: MIX[name] * weights for name in names},
        LIMITS[dtype][0],
    )


def check_family(device: torch.device, dtype: str) -> Outcome:
    """Compare the divergences other than the KL; return the least accurate result."""
    pair = [side.to(device) for side in _ordinary(VOCABULARY, getattr(torch, dtype))]
    found = [
        _compare(
            lambda p, q, function=function: {"kl": function(p, q)},
            lambda p, q, how=how: {
                "kl": f_divergences.divergence(p.log_softmax(-1), q.log_softmax(-1), *how)
            },
            pair,
            {"kl": _weights(pair[0])},
            LIMITS[dtype][0],
        )
        for how, function in FAMILY.items()
    ]
    return max(found, key=lambda outcome: float(str(outcome.figures["gradient_error"])))


def check_topk(device: torch.device, dtype: str) -> Outcome:
    """Compare topk_kl_divergence, and its gradient to the student."""
    student, teacher = _ordinary(VOCABULARY, getattr(torch, dtype))
    listed, ids = teacher.double().log_softmax(-1).topk(20)
    student, listed, ids = (value.to(device) for value in (student, listed, ids))
    log_p = torch.cat([listed, (-listed.exp().sum(-1, keepdim=True)).log1p()], -1)

    def truth(logits: torch.Tensor) -> Fields:
        log_q = logits.log_softmax(-1)
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(-1, ids), rest], -1)
        return {"kl": (log_p.exp() * (log_p - log_q)).sum(-1)}

    return _compare(
        lambda logits: {"kl": fastkl.topk_kl_divergence(logits, listed, ids)},
        truth,
        [student],
        {"kl": _weights(student)},
        LIMITS[dtype][0],
    )


def check_linear(device: torch.device, dtype: str) -> Outcome:
    """Compare linear_kl_divergence, and its gradients to hidden states and weight."""
    # Draw from -1, 0, 1 and eighths, so that the logits are exact in every dtype.
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(3))
    drawn = (draw(-1, 2, (6, 64)), draw(-4, 5, (VOCABULARY, 64)) / 8, draw(-1, 2, (6, 64)))
    hidden, weight, other = (value.to(device, getattr(torch, dtype)) for value in drawn)
    other[:, :56] = hidden[:, :56]
    scale, ref = _weights(hidden.float()), other @ weight.T
    linear = partial(fastkl.linear_kl_divergence, weights=scale, reduction="sum")
    # Flatten the inputs, so that each gradient is compared as one row.
    return _compare(
        lambda x, w: {"kl": linear(x.view(6, 64), w.view(-1, 64), other, weight)},
        lambda x, w: {
            "kl": scale.double() @ testing.truth(x.view(6, 64) @ w.view(-1, 64).T, ref).kl
        },
        [hidden.flatten(), weight.flatten()],
        {"kl": torch.ones(())},
        LIMITS[dtype][1],
    )


def check_sum(shape: tuple[int, int], device: torch.device, dtype: str) -> Outcome:
    """Compare a sum and its gradient to P only; with Triton in one launch, whose programs wait for
    each other.
    """
    p, q = testing.pair("normal3", *shape, 0.3, dtype=getattr(torch, dtype), device=device)
    # A float16 gradient is computed in backward, when its scale is known.
    together = fastkl.explain(p).backend == "triton" and dtype != "float16"
    if together:
        from fastkl.kernels import config

        config.fuses = lambda arch: True  # for the rest of this process

    def ours(x: torch.Tensor) -> Fields:
        loss = fastkl.kl_divergence(x, q, reduction="sum")
        if together and "SummedKL" not in str(loss.grad_fn):
            raise AssertionError("row_fused did not take the rows")
        return {"kl": loss}

    return _compare(
        ours,
        lambda x: {"kl": testing.truth(x, q).kl.sum()},
        [p],
        {"kl": torch.ones(())},
        LIMITS[dtype][0],
    )


def check_bits(device: torch.device, dtype: str) -> Outcome:
    """Check that a row has the same bits alone and in a batch, and that masked rows give 0."""
    pair = [side.to(device) for side in _ordinary(VOCABULARY, getattr(torch, dtype))]
    weights, mask = _weights(pair[0]), torch.arange(len(SIZES), device=device) % 2 == 0
    batch = _results(_kl, pair, {"kl": weights})
    parts = (side.split(1) for side in (*pair, weights))
    alone = [_results(_kl, sides, {"kl": weight}) for *sides, weight in zip(*parts, strict=True)]
    spoilt = [side.where(mask[:, None], torch.nan) for side in pair]
    masked = _results(partial(_kl, mask=mask), spoilt, {"kl": weights})
    for name, value in batch.items():
        shown = value.where(mask.view(-1, *[1] * (value.dim() - 1)), 0.0)
        rows = torch.cat([each[name] for each in alone])
        testing.assert_near(rows, value, 0.0, 0.0, f"{name} of a row alone")
        testing.assert_near(masked[name], shown, 0.0, 0.0, f"{name} beside masked rows")
    return Outcome("ok", "the same alone, in a batch and beside masked rows, which are 0")


# ---- the report


def all_checks() -> dict[str, Callable[[torch.device], Outcome]]:
    """Return the checks by name, in the order in which they run."""
    everyday = partial(_ordinary, VOCABULARY)
    runs: dict[str, Callable[..., Outcome]] = {
        "kl_divergence": partial(check_agreement, everyday),
        "KL near 1e-6": partial(
            check_agreement, partial(testing.pair, "normal1", len(SIZES), VOCABULARY, 1.5e-3)
        ),
        "token_stats": partial(check_agreement, everyday, names=tuple(MIX)),
        "linear": check_linear,
        "divergences": check_family,
        "top-k": check_topk,
        "strided view": partial(check_agreement, _strided),
        "vocabulary 128256": partial(check_agreement, partial(_ordinary, LARGE_VOCABULARY)),
        "sum of 8 rows": partial(check_sum, (8, LARGE_VOCABULARY)),
        "sum of 3000 rows": partial(check_sum, (3000, 4096)),
        "bits of rows": check_bits,
    }
    return {
        "this machine": check_machine,
        **{
            f"{dtype} beside float64: {name}": partial(run, dtype=dtype)
            for dtype in LIMITS
            for name, run in runs.items()
        },
    }


def run_check(device: str, key: str) -> Outcome:
    """Run a check; report an exception as FAIL with its first and last line; exit on a timeout."""
    faulthandler.dump_traceback_later(HANG, exit=True, file=STDERR)
    try:
        outcome = all_checks()[key](torch.device(device))
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)  # surface errors of kernels
        return outcome
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:400]
        return Outcome(
            "FAIL", f"{type(error).__name__}: {text}", {"traceback": traceback.format_exc()}
        )
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_checks(
    device: str, keys: Sequence[str], send: multiprocessing.connection.Connection
) -> None:
    """Run checks in this process, as leader of a new process group, and send their outcomes."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # so that its compilers are killed with it
    faulthandler.enable(STDERR)
    for key in keys:
        send.send(run_check(device, key))


def outcomes(device: str, keys: Sequence[str]) -> Generator[Outcome, None, None]:
    """Run checks in a child process and yield their outcomes, even if it crashes.

    A failed check may have lost the GPU, so a new process runs the remaining checks.
    """
    spawn = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
    done = crashes = 0
    while done < len(keys) and crashes < CRASHES:
        receive, send = spawn.Pipe(duplex=False)
        child = spawn.Process(target=run_checks, args=(device, keys[done:], send), daemon=True)
        outcome = Outcome("ok", "")
        child.start()
        try:
            send.close()
            while done < len(keys) and outcome.status != "FAIL":
                try:
                    outcome = receive.recv()
                except EOFError:
                    crashes += 1
                    outcome = Outcome(
                        "FAIL",
                        f"it crashed, or hung for {HANG:.0f} s; its stack is on standard error",
                    )
                done += 1
                yield outcome
        finally:
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.killpg(child.pid or 0, signal.SIGKILL)
            child.kill()
            child.join()
    yield from [Outcome("skipped", f"{CRASHES} checks crashed or hung before")] * (len(keys) - done)


def run_doctor(device: str, json_to: Path | None = None) -> int:
    """Run and print all checks, write them as JSON to a file or STDOUT; return 1 if any failed."""
    out = sys.stderr if json_to == STDOUT else sys.stdout
    checks, rows = all_checks(), []
    print(f"fastkl doctor: {len(checks)} checks on {device}, in about a minute\n", file=out)
    with contextlib.closing(outcomes(device, [*checks])) as found:
        for key in checks:
            print(f"{key}: ", end="", file=out, flush=True)
            outcome = next(found)
            rows.append({"check": key, **outcome._asdict()})
            print(f"{outcome.status}, {outcome.text}", file=out, flush=True)
    counts = Counter(row["status"] for row in rows)
    print(
        "\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + ".",
        "Something is wrong: paste this report into an issue."
        if counts["FAIL"]
        else "No check failed.",
        file=out,
    )
    if json_to:
        write_whole(
            json_to, [json_text({"device": device, "ok": not counts["FAIL"], "checks": rows})]
        )
    return 1 if counts["FAIL"] else 0
