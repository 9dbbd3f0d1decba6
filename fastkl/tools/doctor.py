"""`fastkl doctor`: checks that fastkl is right and fast on this machine, one line per check.

Checks run in a process of their own: a crash or a hang costs one check and not the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path

import torch
from torch.utils import collect_env

import fastkl

from .. import testing
from .files import json_text, write_whole

# Seconds of one check, of a process's first with its imports; number of processes.
HANG, START, STARTS = 30.0, 120.0, 4
# After these a process can no longer use its GPU.
LOST = (
    r"process crashed|still running|(CUDA|HIP) error|Triton Error|illegal memory|misaligned"
    r"|launch failure|device-side"
)
# Variables that change what runs, and those among them that cost time or precision.
VARIABLES = r"TRITON_|FASTKL_|(CUDA|HIP|ROCR)_VISIBLE|CUDA_LAUNCH|PYTORCH_|DISABLE_PTXAS|.*TF32"
COSTLY = r"TRITON_(INTERPRET|ALWAYS|DEBUG|KERNEL_OVERRIDE)|CUDA_LAUNCH|DISABLE_PTXAS|.*TF32"
# Limits of a gradient's error over its norm: of a row of logits, as its type rounds; of hidden
# states and weight, from products that may be TF32. The most used type comes first.
LIMITS = {"bfloat16": (4e-3, 2e-2), "float32": (1e-5, 2e-3), "float16": (1e-3, 5e-3)}
# Above the vocabularies that have a configuration of their own, and not a multiple of a tile.
VOCABULARY, LARGE_VOCABULARY = 5000, 128256
# Standard deviations of the difference between the logits of each row: KL from 5e-4 to 4 nats.
SIZES = (0.03, 0.1, 0.3, 1.0, 2.0, 3.0)
MIX = {"kl": 1.1, "logprob": 0.7, "entropy": -0.3, "ref_logprob": 0.5, "ref_kl": -0.9}
SIDES = ("gradient to the first", "gradient to the second")
HOME = f"{Path.home()}/"  # left out of the report, which is for others to read
Fields = Mapping[str, torch.Tensor]
Function = Callable[..., Fields]
Pair = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a check: ok, warning, skipped or FAIL, in words, in figures, and a traceback."""

    status: str
    text: str
    figures: Mapping[str, object] = dataclasses.field(default_factory=dict)
    traceback: str | None = None


def check_versions(device: torch.device) -> Outcome:
    """Report versions; the figures are all that torch.utils.collect_env finds."""
    figures: dict[str, str] = {}
    with contextlib.suppress(Exception):  # it runs programs that may be missing
        found = collect_env.get_env_info()._asdict()
        figures = {name: str(value) for name, value in found.items() if name != "cpu_info"}
    text = f"fastkl {fastkl.__version__} in {os.path.dirname(fastkl.__file__).replace(HOME, '~/')}"
    text += f", Python {sys.version.split()[0]}, {figures.get('os', sys.platform)}"
    for name in ("torch", "triton", "transformers", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            text += f", {name} {importlib.metadata.version(name)}"
    wanted = re.search(r"\btriton==([\d.]+)", "\n".join(importlib.metadata.requires("torch") or ()))
    if wanted and f"triton {wanted[1]}" not in text:
        return Outcome("warning", f"{text}; this torch asks for triton {wanted[1]}", figures)
    return Outcome("ok", text, figures)


def check_gpu(device: torch.device) -> Outcome:
    """Report the GPU and its free memory, or that the driver has one that torch does not see."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        text = (
            f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
        figures = {"count": count, "free_bytes": free, "total_bytes": total}
        return Outcome("warning" if free < 2e9 else "ok", text, figures)
    listed = collect_env.get_gpu_info(collect_env.run)
    text = f"torch sees {count}, the driver {listed or 'none'}; none is used here"
    return Outcome("warning" if listed and not count else "skipped", text, {"count": count})


def check_backend(device: torch.device) -> Outcome:
    """Report which implementation takes logits on this device, and why."""
    found = fastkl.explain(torch.zeros(1, 8, device=device))
    return Outcome("FAIL" if found.problems else "ok", str(found), {"backend": found.backend})


def check_environment(device: torch.device) -> Outcome:
    """Report variables that change what runs, with a warning if they cost."""
    found = {n: v for n, v in sorted(os.environ.items()) if re.match(VARIABLES, n)}
    text = ", ".join(map("=".join, found.items())).replace(HOME, "~/")
    if any(re.match(COSTLY, name) and value not in ("", "0") for name, value in found.items()):
        return Outcome("warning", f"{text}; one of these costs time or precision", found)
    return Outcome("ok", text or "no variable is set that matters here", found)


def _kl(p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None = None) -> Fields:
    return {"kl": fastkl.kl_divergence(p, q, mask=mask)}


def _weights(p: torch.Tensor) -> torch.Tensor:
    """Weights of both signs; for float16 as large as a GradScaler makes them."""
    values = torch.linspace(-1.5, 2.0, p[..., 0].numel(), device=p.device)
    return values.view(p.shape[:-1]) * (4096.0 if p.dtype == torch.float16 else 1.0)


def _results(function: Function, inputs: Pair, upstream: Fields) -> Fields:
    """Return fields, and the gradients of Σ upstream·fields to both inputs."""
    leaves = [testing.leaf(value) for value in inputs]
    fields = function(*leaves)
    sums = [(upstream[name].to(fields[name]) * fields[name]).sum() for name in upstream]
    gradients = torch.autograd.grad(sums, leaves)
    return {**fields, **dict(zip(SIDES, gradients, strict=True))}


def _compare(
    function: Function, truth: Function, inputs: Pair, upstream: Fields, limit: float
) -> Outcome:
    """Compare a function's fields and gradients with those of float64."""
    results = _results(function, inputs, upstream)
    exact = _results(truth, [value.double() for value in inputs], upstream)
    error = testing.assert_stats({name: results[name] for name in MIX if name in results}, exact)
    # The absolute tolerance of divergences would hide an error of one near 1e-6.
    testing.assert_near(results["kl"], exact["kl"], 1e-4, 0.0, "kl")
    worst = max(testing.assert_gradient(results[n], exact[n], n, limit) for n in SIDES)
    figures = {"value_error": error, "gradient_error": worst, "mean_kl": exact["kl"].mean().item()}
    return Outcome("ok", f"within {error:.0e}, gradients {worst:.0e}", figures)


def _strided(dtype: torch.dtype) -> Pair:
    """Views that start in the middle of a block, of rows that do not merge."""
    bases = (
        side.view(4, 5, 6, 503) for side in testing.pair("normal3", 120, 503, 0.3, dtype=dtype)
    )
    return [testing.LAYOUTS["time without the first"](base)[..., 1:] for base in bases]


_ordinary = partial(testing.sizes_pair, "normal3", SIZES, (0.0,))
_small = partial(testing.pair, "normal1", len(SIZES), VOCABULARY, 1.5e-3)


def check_agreement(
    make: Callable[..., Pair], device: torch.device, dtype: str, names: Sequence[str] = ("kl",)
) -> Outcome:
    """Compare kl_divergence, or fields of token_stats, and the gradients of their mix."""
    pair = [side.to(device) for side in make(dtype=getattr(torch, dtype))]
    tokens, weights = torch.full(pair[0].shape[:-1], 17, device=device), _weights(pair[0])
    upstream = {name: MIX[name] * weights for name in names}
    stats = lambda p, q: fastkl.token_stats(p, tokens, q)._asdict()  # noqa: E731
    truth = lambda p, q: testing.truth(p, q).stats(tokens)  # noqa: E731
    return _compare(_kl if names == ("kl",) else stats, truth, pair, upstream, LIMITS[dtype][0])


def check_linear(device: torch.device, dtype: str) -> Outcome:
    """Compare linear_kl_divergence, and its gradients to hidden states and weight."""
    # Of -1, 0, 1 and eighths, so that every element type holds the logits.
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(3))
    drawn = (draw(-1, 2, (6, 64)), draw(-4, 5, (VOCABULARY, 64)) / 8, draw(-1, 2, (6, 64)))
    hidden, weight, other = (value.to(device, getattr(torch, dtype)) for value in drawn)
    other[:, :56] = hidden[:, :56]
    scale, one = _weights(hidden.float()), {"kl": torch.ones((), device=device)}
    linear = partial(fastkl.linear_kl_divergence, weights=scale, reduction="sum")
    rows, wide, ref = (
        partial(torch.reshape, shape=(-1, 64)),
        scale.double(),
        other @ weight.T,
    )
    ours = lambda x, w: {"kl": linear(rows(x), rows(w), other, weight)}  # noqa: E731
    truth = lambda x, w: {"kl": wide @ testing.truth(rows(x) @ rows(w).T, ref).kl}  # noqa: E731
    # Flat, so that a gradient counts as a whole.
    return _compare(ours, truth, (hidden.flatten(), weight.flatten()), one, LIMITS[dtype][1])


def check_bits(device: torch.device, dtype: str, masked: bool) -> Outcome:
    """Check that a row alone, or among masked rows of NaN, is as in a batch; masked rows are 0."""
    pair = [side.to(device) for side in _ordinary(VOCABULARY, getattr(torch, dtype))]
    weights = _weights(pair[0])
    batch = _results(_kl, pair, {"kl": weights})
    for row in range(len(SIZES)):
        mask = torch.arange(len(SIZES), device=device) == row
        at = slice(None) if masked else slice(row, row + 1)
        function = partial(_kl, mask=mask) if masked else _kl
        given = [side.where(mask[:, None], torch.nan)[at] for side in pair]
        for name, result in _results(function, given, {"kl": weights[at]}).items():
            expected = batch[name].where(mask.view(-1, *[1] * (result.dim() - 1)), 0.0)[at]
            what = f"{name} of row {row} {'beside masked rows' if masked else 'alone'}"
            testing.assert_near(result, expected, 0.0, 0.0, what)
    return Outcome("ok", "the same as in a batch" + ", and exactly 0" * masked)


def check_fused(shape: tuple[int, int], device: torch.device) -> Outcome:
    """Compare a KL's sum and gradient from one launch, whose programs wait for one another."""
    from fastkl.kernels import config

    config.fuses = lambda arch: True  # for the rest of this process
    p, q = testing.pair("normal3", *shape, 0.1, dtype=torch.bfloat16, device=device)
    leaf, exact = testing.leaf(p), testing.truth(p, q)
    with fastkl.use_backend("triton"):
        loss = fastkl.kl_divergence(leaf, q, reduction="sum")
    if "SummedKL" not in str(loss.grad_fn):
        raise AssertionError("row_fused did not take the rows")
    testing.assert_near(loss, exact.kl.sum(), testing.KL_LIMIT, 0.0, "sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = testing.kl_gradients(exact, torch.ones(len(p))).p
    testing.assert_gradient(gradient, expected, "gradient", LIMITS["bfloat16"][0])
    return Outcome("ok", "as exact as two launches")


def check_speed(device: torch.device) -> Outcome:
    """Measure kl_divergence in bfloat16, in percent of a copy's bandwidth."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    # Both logits, a copy, a gradient and the one before it.
    rows = min(8192, int(0.8 * free / (5 * LARGE_VOCABULARY * 2)) // 64 * 64)
    if rows < 1024 or os.environ.get("TRITON_INTERPRET", "0") != "0":
        return Outcome("skipped", "not timed: no GPU, too little free memory, or the interpreter")
    from triton.testing import do_bench

    p, q = torch.randn(2, rows, LARGE_VOCABULARY, dtype=torch.bfloat16, device=device)
    q += p.mul_(3)
    leaf, copy = testing.leaf(p), torch.empty_like(p)
    kl = fastkl.kl_divergence(leaf, q)
    backward = partial(torch.autograd.grad, kl, leaf, torch.rand_like(kl), True)
    with torch.cuda.device(device):
        # Milliseconds for each of the tensors that are read or written.
        unit = do_bench(lambda: copy.copy_(p), return_mode="median") / 2
        forward = do_bench(lambda: fastkl.kl_divergence(p, q), return_mode="median") / 2
        percents = [100 * unit / forward, 300 * unit / do_bench(backward, return_mode="median")]
    figures = {
        "rows": rows,
        "vocabulary": LARGE_VOCABULARY,
        "copy_gb_per_s": p.nbytes / unit / 1e6,
        "forward_percent_of_copy": percents[0],
        "backward_percent_of_copy": percents[1],
    }
    text = "forward {:.0f} %, backward {:.0f} % of a copy's bandwidth".format(*percents)
    slow = "; low: is something else running on this GPU?" * (min(percents) < 50)
    return Outcome("warning" if slow else "ok", text + slow, figures)


def checks_for(device: str) -> dict[str, Callable[[torch.device], Outcome]]:
    """List all checks for a device as "group: name", in the order in which they run."""
    everyday = partial(_ordinary, VOCABULARY)
    runs: dict[str, Callable[..., Outcome]] = {
        "kl_divergence": partial(check_agreement, everyday),
        "KL near 1e-6": partial(check_agreement, _small),
        "token_stats": partial(check_agreement, everyday, names=tuple(MIX)),
        "linear": check_linear,
        "masked rows": partial(check_bits, masked=True),
        "strided view": partial(check_agreement, _strided),
        "vocabulary 128256": partial(check_agreement, partial(_ordinary, LARGE_VOCABULARY)),
        "alone and in batch": partial(check_bits, masked=False),
    }
    machine = (check_versions, check_gpu, check_backend, check_environment)
    listed: dict[str, Callable[[torch.device], Outcome]] = {
        f"this machine: {run.__name__.removeprefix('check_')}": run for run in machine
    }
    for dtype in LIMITS:
        for name, run in runs.items():
            listed[f"{dtype} beside float64: {name}"] = partial(run, dtype=dtype)
        listed.setdefault("speed: kl_divergence", check_speed)  # its kernels are compiled now
    if device.startswith("cuda"):
        for shape in ((8, 128256), (3000, 4096)):
            listed[f"kernels: one launch {shape}"] = partial(check_fused, shape)
    return listed


def run_check(device: str, key: str) -> Outcome:
    """Run a check here; an exception is a FAIL with its first and last line."""
    try:
        outcome = checks_for(device)[key](torch.device(device))
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)  # shows a kernel's error
        return outcome
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:400]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome("FAIL", kind + text, traceback=traceback.format_exc())


class Isolated:
    """Runs checks in a process, and in a new one after a crash, a hang or an error of the GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.starts = device, 0
        self.pool: futures.ProcessPoolExecutor | None = None

    def run(self, key: str) -> Outcome:
        """Return the outcome of a check, whatever happens to the process that runs it."""
        wait = HANG
        if self.pool is None:
            if self.starts == STARTS:
                return Outcome("skipped", f"{STARTS} processes crashed or hung before")
            self.starts, wait = self.starts + 1, START
            spawn = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
            group = getattr(os, "setpgrp", None)  # so that its compilers end with it
            self.pool = futures.ProcessPoolExecutor(1, spawn, group)
        try:
            outcome = self.pool.submit(run_check, self.device, key).result(wait)
        except futures.BrokenExecutor:
            outcome = Outcome("FAIL", "the process crashed; its last words are on standard error")
        except futures.TimeoutError:
            outcome = Outcome("FAIL", f"still running after {wait:.0f} s, and stopped")
        if outcome.status == "FAIL" and re.search(LOST, outcome.text):
            self.close()
        return outcome

    def close(self) -> None:
        """End the process, and what it started."""
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.killpg(child.pid or 0, signal.SIGKILL)
            child.kill()
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def run_doctor(device: str, json_to: str | None = None) -> int:
    """Run and print all checks, write them as JSON to a file or "-"; return 1 if one failed."""
    out = sys.stderr if json_to == "-" else sys.stdout
    checks, started = checks_for(device), time.monotonic()
    issue, results, figures = ["fastkl doctor"], list[dict[str, object]](), dict[str, object]()
    print(f"fastkl doctor: {len(checks)} checks on {device}, in about a minute\n", file=out)
    with contextlib.closing(Isolated(device)) as isolated:
        for key in checks:
            outcome = isolated.run(key)
            group, _, name = key.partition(": ")
            results.append({"group": group, "name": name, **dataclasses.asdict(outcome)})
            figures |= outcome.figures
            text = f"{outcome.status:<8} {key}: {outcome.text}"
            text = textwrap.fill(text, 80, subsequent_indent=" " * 9, break_on_hyphens=False)
            print(text, file=out, flush=True)
            if outcome.status in ("FAIL", "warning") or group == "this machine":
                issue.append(text)
    counts = Counter(str(row["status"]) for row in results)
    data = {
        "device": device,
        "gpus_seen": figures.get("count", 0),
        "backend": figures.get("backend"),
        "ok": not counts["FAIL"],
        "seconds": round(time.monotonic() - started, 1),
        "checks": results,
        "issue": "\n".join(issue) if counts["FAIL"] else None,
    }
    advice = "Nothing was found to be wrong."
    if data["issue"]:
        advice = f"Something is wrong. Paste this into an issue:\n\n{data['issue']}"
    elif not data["gpus_seen"]:
        advice += " NO GPU WAS SEEN: where there must be one, as in CI, use --device cuda."
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"\n{summary} in {data['seconds']} s. {advice}", file=out)
    if json_to == "-":
        print(json_text(data), end="")
    elif json_to is not None:
        try:
            write_whole(Path(json_to), json_text(data))
        except OSError as error:
            print(f"fastkl doctor: error: {json_to!r}: {error.strerror}", file=sys.stderr)
            return 1
    return 1 if counts["FAIL"] else 0
