"""Public Triton kernels of other packages, counted like ours, and the memory traffic of their ways
from logits to a KL divergence.

    python -m benchmarks.static_costs --peers --json FILE

Each adapter calls the peer's own public function on tensors without storage (device "meta", 8192 ×
128256, bfloat16 logits) and catches the launch of the kernel in question: its arguments, constants,
warps and stages are what the peer would launch, not our reading of it. Then the kernel is compiled
for sm_90 and read back as ours are (benchmarks/static_costs.py). Nothing runs and no driver is
needed. A peer that is not installed, that no longer fits its adapter or that does not compile is a
row with the reason.

Two tables. Kernels: instructions and exponentials per pair of logits (or per logit, where the
kernel reads one tensor) and the bytes that this kernel has to move. Pipelines: bytes of memory
traffic per pair from the logits to the KL, forward and backward, every kernel on the way reading
its inputs once and writing its outputs once, the least there is for tensors of gigabytes. Formulas,
not measurements; what is per token is left out.
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks import roofline, static_costs
from benchmarks.record import provenance, version, write_json

N, V = 8192, 128256
ARCH = "sm_90"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "u1",
}


class PeerError(RuntimeError):
    """A peer that does not fit its adapter any more."""


class _Launched(Exception):  # noqa: N818 - not an error
    """Ends the peer's function at the launch."""


@dataclass(frozen=True)
class Launch:
    """One launch of a triton.jit function: its arguments by name, and the options that are not
    arguments (warps, stages).
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def catch_launch(kernel, call, skip=()):
    """The Launch of `kernel` that call() arrives at. Launches of the kernels in `skip` before it do
    nothing; any other one fails.
    """
    caught = []

    def record(*args, grid, warmup=False, **kwargs):
        signature = inspect.signature(kernel.fn)
        options = {key: kwargs.pop(key) for key in set(kwargs) - set(signature.parameters)}
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        caught.append(Launch(kernel, dict(bound.arguments), options))
        raise _Launched

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernel, "run", record))
        for other in skip:
            stack.enter_context(mock.patch.object(other, "run", lambda *args, **kwargs: None))
        with contextlib.suppress(_Launched):
            call()
    if not caught:
        raise PeerError(f"expected a launch of {kernel.fn.__name__}, got none")
    return caught[0]


def specialize(launch):
    """(signature, constexprs, attrs) for triton.compile, by the rules of Triton's launcher: None
    and 1 are constants, 16 divides or it does not.

    tests/test_peer_kernels.py holds it to Triton's own.
    """
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], position = (
                f"*{TYPES[value.dtype]}",
                value.storage_offset() * value.element_size(),
            )
        elif isinstance(value, bool | float):
            signature[name], position = ("u1" if isinstance(value, bool) else "fp32"), None
        else:
            signature[name], position = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
        if (
            position is not None
            and position % 16 == 0
            and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        ):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attrs


def meta(*shape, dtype=torch.bfloat16, grad=False):
    """A tensor that has everything but storage."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


# The adapters: how each peer is called
# ------------------------------------------------------------------


def liger_kl_div(step, dtype=torch.bfloat16):
    """Liger-Kernel's KLDivLoss(log_target=True, reduction="sum") of log-probabilities."""
    ops = importlib.import_module("liger_kernel.ops.kl_div")
    scores, target = meta(N, V, dtype=dtype, grad=True), meta(N, V, dtype=dtype)

    def run():
        ops.LigerKLDivLossFunction.apply(scores, target, "sum", True).backward()

    if step == "forward":
        return catch_launch(ops._kldiv_kernel_forward, run)
    return catch_launch(ops._kldiv_kernel_backward, run, skip=[ops._kldiv_kernel_forward])


def liger_jsd(beta, dtype=torch.bfloat16):
    """Liger-Kernel's JSD of log-probabilities in its Triton implementation; value and gradient in
    one kernel.
    """
    ops = importlib.import_module("liger_kernel.ops.jsd")
    student, teacher = meta(N, V, dtype=dtype, grad=True), meta(N, V, dtype=dtype)
    return catch_launch(
        ops._jsd_kernel,
        lambda: ops.LigerJSDFunction.apply(student, teacher, None, beta, -100, "nvidia-triton"),
    )


def liger_grpo(step):
    """Liger-Kernel's GRPO loss with a KL penalty (beta 0.04, k3 of the sampled tokens), and the
    log-probabilities that it needs of the reference.
    """
    ops = importlib.import_module("liger_kernel.ops.grpo_loss")
    sequences = 8
    length = N // sequences - 1
    logits = meta(sequences, length + 1, V, grad=step != "reference")
    tokens, mask = (
        meta(sequences, length, dtype=torch.int64),
        meta(sequences, length, dtype=torch.int64),
    )
    if step == "reference":
        return catch_launch(
            ops._selective_log_softmax_kernel,
            lambda: ops.fused_selective_log_softmax(logits, tokens, 1.0, mask),
        )
    per_token, advantages = (
        meta(sequences, length, dtype=torch.float32),
        meta(sequences, dtype=torch.float32),
    )

    def run():
        ops.GrpoLossFunction.apply(
            logits, per_token, per_token, tokens, advantages, mask, 1.0, 0.04, 0.2, 0.2, False
        )[0].backward()

    if step == "forward":
        return catch_launch(ops._grpo_loss_fwd_kernel, run)
    return catch_launch(ops._grpo_loss_bwd_kernel, run, skip=[ops._grpo_loss_fwd_kernel])


def trl_logprob_entropy(step):
    """TRL's log-probability of the sampled token and entropy, with gradient to both."""
    ops = importlib.import_module("trl.kernels.logprob_entropy")
    logits, tokens = meta(N, V, grad=True), meta(N, dtype=torch.int64)

    def run():
        sum(
            output.sum() for output in ops.selective_log_softmax_and_entropy(logits, tokens)
        ).backward()

    if step == "forward":
        return catch_launch(ops._forward_kernel, run)
    return catch_launch(ops._backward_kernel, run, skip=[ops._forward_kernel])


def trl_divergence(step):
    """TRL's distillation kernels, KL(student||teacher) from hidden states: the part that reads the
    logits tiles, float32 sums of its products.
    """
    ops = importlib.import_module("trl.kernels.chunked_divergence")
    student, teacher, head = meta(N, 4096, grad=True), meta(N, 4096), meta(V, 4096)

    def run():
        ops.ChunkedDivergenceFunction.apply(student, head, None, teacher, head, None, 1.0)[
            0
        ].sum().backward()

    # They ask for a GPU and for its autocast; the tensors here are on none.
    with mock.patch.multiple(
        ops, _use_triton=lambda device: True, _compute_dtype=lambda hidden: hidden.dtype
    ):
        if step == "forward":
            return catch_launch(ops._stats_kernel, run)
        return catch_launch(ops._backward_kernel, run, skip=[ops._stats_kernel])


# The kernels
# ----


@dataclass(frozen=True)
class Kernel:
    """One kernel of a peer.

    unit: "pair" of logits or "logit". block: its constant for vocabulary entries per iteration.
    reads, writes: its arguments of the size of the logits. loop_free: its grid covers the
    vocabulary. work: what it computes, and what has to run beside it.
    """

    name: str
    package: str
    launch: Callable[[], Launch] | None
    unit: str
    block: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    work: str
    loop_free: bool = False


def _liger(name, launch, unit, block, reads, writes, work):
    return Kernel(f"liger {name}", "liger-kernel", launch, unit, block, reads, writes, work)


KERNELS = (
    _liger(
        "_kldiv_kernel_forward",
        lambda: liger_kl_div("forward"),
        "pair",
        "BLOCK_SIZE",
        ("y_ptr", "gt_ptr"),
        (),
        "KL(target||input) of log-probabilities, log_target, summed; log_softmax of both tensors "
        "before it",
    ),
    _liger(
        "_kldiv_kernel_backward",
        lambda: liger_kl_div("backward"),
        "pair",
        "BLOCK_SIZE",
        ("target_ptr",),
        ("new_grads_ptr",),
        "its gradient to input only, as log-probability; log_softmax's backward after it",
    ),
    _liger(
        "_jsd_kernel beta=0",
        lambda: liger_jsd(0.0),
        "pair",
        "BLOCK_SIZE",
        ("X_ptr", "Y_ptr"),
        ("loss_ptr", "dX_ptr"),
        "KL(target||input) per entry and its gradient to input; a clone, a sum, both log_softmax "
        "and one backward of it beside. "
        "Where the CuTe DSL is installed on Hopper and later, Liger takes that implementation "
        "instead",
    ),
    _liger(
        "_jsd_kernel beta=1",
        lambda: liger_jsd(1.0),
        "pair",
        "BLOCK_SIZE",
        ("X_ptr", "Y_ptr"),
        ("loss_ptr", "dX_ptr"),
        "KL(input||target), the RLHF direction; otherwise the same",
    ),
    _liger(
        "_selective_log_softmax_kernel",
        lambda: liger_grpo("reference"),
        "logit",
        "BLOCK_N",
        ("LOGITS",),
        (),
        "log-probability of the sampled token of one tensor: no KL, only sampled estimates of it",
    ),
    _liger(
        "_grpo_loss_fwd_kernel",
        lambda: liger_grpo("forward"),
        "logit",
        "BLOCK_N",
        ("LOGITS",),
        (),
        "the same and the GRPO loss with k3 of the sampled token",
    ),
    _liger(
        "_grpo_loss_bwd_kernel",
        lambda: liger_grpo("backward"),
        "logit",
        "BLOCK_N",
        ("LOGITS",),
        ("DLOGITS",),
        "its gradient",
    ),
    Kernel(
        "trl logprob_entropy._forward_kernel",
        "trl",
        lambda: trl_logprob_entropy("forward"),
        "logit",
        "BLOCK_SIZE",
        ("logits_ptr",),
        (),
        "log-probability of the sampled token and entropy of one tensor: no KL, only sampled "
        "estimates of it",
    ),
    Kernel(
        "trl logprob_entropy._backward_kernel",
        "trl",
        lambda: trl_logprob_entropy("backward"),
        "logit",
        "BLOCK_SIZE",
        ("logits_ptr",),
        ("grad_logits_ptr",),
        "its gradient",
        loop_free=True,
    ),
    Kernel(
        "trl chunked_divergence._stats_kernel",
        "trl",
        lambda: trl_divergence("forward"),
        "pair",
        "BLOCK_SIZE",
        ("s_ptr", "t_ptr"),
        (),
        "KL of both directions and entropy, from float32 logits tiles that its matrix products "
        "wrote just before",
    ),
    Kernel(
        "trl chunked_divergence._backward_kernel",
        "trl",
        lambda: trl_divergence("backward"),
        "pair",
        "BLOCK_SIZE",
        ("s_ptr", "t_ptr"),
        ("s_ptr",),
        "gradient of KL(student||teacher) to the student's tile, in place",
        loop_free=True,
    ),
    Kernel(
        "cut-cross-entropy",
        "cut-cross-entropy",
        None,
        "",
        "",
        (),
        (),
        "not counted: its kernels are matrix products that keep a log-sum-exp; logits never reach "
        "memory and it has no KL",
    ),
)

# Ours that do comparable work: (name in the compile plan, element type, unit).
OURS = (
    ("kl_divergence.forward", "bf16", "pair"),
    ("kl_divergence.backward_p", "bf16", "pair"),
    ("token_stats.forward", "bf16", "pair"),
    ("token_stats.backward_p", "bf16", "pair"),
    ("kl_divergence.forward", "fp32", "pair"),
    ("kl_divergence.backward_p", "fp32", "pair"),
    ("token_stats_policy_only.forward", "bf16", "logit"),
    ("token_stats_policy_only.backward", "bf16", "logit"),
)


def kernel_bytes(kernel, launch):
    """Bytes per unit that the kernel reads and writes, by the element types of the launch;
    PeerError if its large tensors are others.
    """
    large = {
        name
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor) and value.numel() > 64 * N
    }
    expected = {*kernel.reads, *kernel.writes}
    if large != expected:
        raise PeerError(
            f"expected {sorted(expected)} to be the arguments as large as the logits, got "
            f"{sorted(large)}"
        )
    return sum(launch.arguments[name].element_size() for name in (*kernel.reads, *kernel.writes))


def specialization(kernel, launch):
    """The launch as static_costs.measure takes it."""
    from fastkl.kernels.compile_plan import Specialization

    options = dict(launch.options)
    warps = options.pop("num_warps", 4)  # Triton's default
    if kernel.block not in launch.arguments:
        raise PeerError(f"expected a constant {kernel.block}, got {sorted(launch.arguments)}")
    per_thread = launch.arguments[kernel.block] // (32 * warps)
    return Specialization(
        kernel.name, launch.kernel, *specialize(launch), warps, per_thread, options
    )


def measure(kernel):
    """One row: the kernel's costs, or the reason why there are none."""
    row = {
        "kernel": kernel.name,
        "package": kernel.package,
        "version": version(kernel.package),
        "unit": kernel.unit,
        "work": kernel.work,
    }
    if row["version"] is None:
        return {**row, "reason": f"not installed: pip install {kernel.package}"}
    if kernel.launch is None:
        return {**row, "reason": kernel.work}
    try:
        launch = kernel.launch()
        moved = kernel_bytes(kernel, launch)
        dtype = TYPES[launch.arguments[kernel.reads[0]].dtype]
        cost = static_costs.measure(
            specialization(kernel, launch), ARCH, dtype, True, loop_free=kernel.loop_free
        )
    except (
        Exception
    ) as error:  # whatever a peer or the compiler raises: the other rows must not get lost
        return {
            **row,
            "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }
    return {**row, **costs_row(cost, moved)}


def costs_row(cost, moved):
    """The figures of a row."""
    figures = {key: value for key, value in asdict(cost).items() if key != "kernel"}
    return {
        **figures,
        "kernel_bytes": moved,
        "upper_bound_of_peak_bandwidth": asdict(roofline.upper_bound(cost, moved)),
    }


def measure_ours():
    """The rows of OURS."""
    from fastkl.kernels.compile_plan import plan

    rows = []
    for name, dtype, unit in OURS:
        (found,) = [item for item in plan(dtype, True, ARCH) if item.name == name]
        cost = static_costs.measure(found, ARCH, dtype, True)
        figures = costs_row(cost, roofline.bytes_per_pair(name, dtype))
        rows.append(
            {
                "kernel": f"fastkl {name}",
                "package": "fastkl",
                "version": version("fastkl"),
                "unit": unit,
                **figures,
            }
        )
    return rows


# The pipelines
# ----


@dataclass(frozen=True)
class Step:
    """One kernel on the way: how many tensors of the size of the logits it reads and writes, by
    element type.
    """

    name: str
    logits: int = 0
    log_probs: int = 0
    floats: int = 0  # always float32

    def bytes(self, log_prob_bytes):
        """Bytes read and written per pair of bf16 logits."""
        return 2 * self.logits + log_prob_bytes * self.log_probs + 4 * self.floats


@dataclass(frozen=True)
class Pipeline:
    """All kernels from two tensors of logits to a KL and back to the logits' gradient."""

    name: str
    gives: str
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]


SOFTMAX_BOTH = Step(
    "log_softmax of both: read logits, write log-probabilities", logits=2, log_probs=2
)
SOFTMAX_BACKWARD = Step(
    "log_softmax's backward: read gradient and log-probabilities, write gradient",
    logits=1,
    log_probs=2,
)
LIGER_JSD_FORWARD = (
    SOFTMAX_BOTH,
    Step("clone of the input", log_probs=2),
    Step("zeros for the loss", floats=1),
    Step("_jsd_kernel", log_probs=3, floats=1),
    Step("sum of the loss", floats=1),
)
# Upstream gradient 1 and reduction "sum" where there is a choice: the fewest passes.
PIPELINES = (
    Pipeline(
        "fastkl kl_divergence, token_stats",
        "exact KL per token, gradient to the first logits",
        (Step("forward", logits=2),),
        (Step("backward", logits=3),),
    ),
    Pipeline(
        "liger kl_div",
        "exact KL(target||input), summed; gradient to input, so not to the policy of "
        "KL(policy||reference)",
        (SOFTMAX_BOTH, Step("_kldiv_kernel_forward", log_probs=2)),
        (Step("_kldiv_kernel_backward", log_probs=2), SOFTMAX_BACKWARD),
    ),
    Pipeline(
        "liger jsd, beta 0 and 1",
        "exact KL(target||input) and KL(input||target), summed; gradient to input",
        LIGER_JSD_FORWARD,
        (SOFTMAX_BACKWARD,),
    ),
    Pipeline(
        "liger grpo_loss, beta > 0",
        "k3 of the sampled token: an estimate, not the KL",
        (
            Step("_selective_log_softmax_kernel of the reference", logits=1),
            Step("_grpo_loss_fwd_kernel", logits=1),
        ),
        (Step("_grpo_loss_bwd_kernel", logits=2),),
    ),
    Pipeline(
        "trl selective_log_softmax of both",
        "log-probabilities of the sampled token, for an estimate such as k3, not the KL",
        (Step("_forward_kernel of both", logits=2),),
        (Step("_backward_kernel", logits=2),),
    ),
)


def formula(steps):
    """The sum of the steps as text: 2 bytes per bf16 logit, L per log-probability, 4 per float32."""
    variable = sum(step.log_probs for step in steps)
    return str(sum(step.bytes(0) for step in steps)) + (f" + {variable}L" if variable else "")


def pipelines():
    """The records of PIPELINES."""
    rows = []
    for pipeline in PIPELINES:
        row = {"pipeline": pipeline.name, "gives": pipeline.gives}
        for direction in ("forward", "backward"):
            steps = getattr(pipeline, direction)
            row[direction] = {
                "formula": formula(steps),
                "steps": [asdict(step) for step in steps],
                "bytes_bf16_log_probs": sum(step.bytes(2) for step in steps),
                "bytes_fp32_log_probs": sum(step.bytes(4) for step in steps),
            }
        rows.append(row)
    return rows


# The report
# ----


def kernel_table(rows):
    """The kernels as lines of text."""
    titles = (
        "kernel",
        "type",
        "unit",
        "instr",
        "fp32",
        "ex2",
        "registers",
        "spill B",
        "load B",
        "bytes",
        "bound %",
        "  limited by",
    )
    line = "{:<42}{:<6}{:<7}{:>7}{:>7}{:>6}{:>11}{:>9}{:>8}{:>7}{:>9}{:<12}".format
    lines = [line(*titles)]
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['kernel']:<42}{row['reason']}")
            continue
        bound = row["upper_bound_of_peak_bandwidth"]
        figures = [
            row[key]
            for key in (
                "instructions_per_pair",
                "fp32_per_pair",
                "ex2_per_pair",
                "registers",
                "spill_bytes",
                "widest_load_bytes",
            )
        ]
        lines.append(
            line(
                row["kernel"],
                row["dtype"],
                row["unit"],
                *figures,
                row["kernel_bytes"],
                bound["percent"],
                f"  {bound['limited_by']}",
            )
        )
    return "\n".join(
        [
            *lines,
            f"per unit of the row; compiled for {ARCH}, V = {V}; bound %: "
            f"{roofline.GPUS[ARCH].name}, {roofline.MODEL}",
        ]
    )


def pipeline_table(rows):
    """The pipelines as lines of text."""
    line = "{:<36}{:<12}{:>8}{:>8}  {:<12}{:>8}{:>8}  {}".format
    lines = [
        line("from bf16 logits to KL", "forward", "L=2", "L=4", "backward", "L=2", "L=4", "gives")
    ]
    for row in rows:
        sides = [
            row[side][key]
            for side in ("forward", "backward")
            for key in ("formula", "bytes_bf16_log_probs", "bytes_fp32_log_probs")
        ]
        lines.append(line(row["pipeline"], *sides, row["gives"]))
    note = "bytes read and written per pair, every kernel on the way, each input once: a formula, not a measurement; L: bytes of a log-probability"
    return "\n".join([*lines, note])


def report(json_file, command):
    """Prints both tables, writes them to json_file if there is one; the exit code: 1 where one of
    our kernels is missing, never for a peer.
    """
    try:
        ours, errors = measure_ours(), []
    except (static_costs.StaticCostError, ValueError) as error:
        ours, errors = [], [f"{type(error).__name__}: {error}"]
    rows = ours + [measure(kernel) for kernel in KERNELS]
    flows = pipelines()
    print(f"{kernel_table(rows)}\n\n{pipeline_table(flows)}")
    if json_file:
        write_json(
            json_file,
            {
                **provenance(command),
                "model": roofline.MODEL,
                "kernels": rows,
                "pipelines": flows,
                "errors": errors,
            },
        )
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0
