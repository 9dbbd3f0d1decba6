"""Define the cases on logits: shapes, random data, bytes that have to move, answers in float64.

A case is an operation on `rows` tokens. Cases from hidden states are in linear_cases.py.
"""

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch

from benchmarks.work import ONE_TENSOR
from fastkl import testing

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
PHASES = ("forward", "backward", "both")
# Outputs of an operation, as fastkl.testing names them; "mean_kl" is a loss over all tokens.
OUTPUTS = {
    "kl_divergence": ("kl",),
    "mean_kl": ("kl",),
    "token_stats": testing.FIELDS,
    "logprob": ("logprob",),
    "logprob_entropy": ("logprob", "entropy"),
    "entropy": ("entropy",),
}
DIFFERENTIATED = ("logprob", "entropy", "kl")  # outputs that get an upstream gradient
CHECKED_ROWS = 256  # compared with float64, which is slower than any provider
# Relative errors of a row. The gradient's element type alone rounds by 2^-9 (bf16), 2^-12 (fp16).
LIMITS = {
    "bf16": {"values": 1e-3, "gradient": 1e-2},
    "fp16": {"values": 1e-3, "gradient": 2e-3},
    "fp32": {"values": 1e-3, "gradient": 1e-3},
}


class Case:
    def as_dict(self):
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Workload(Case):
    """Define an operation on two logits tensors, or on `p` alone, and its gradient to one of them.

    operation: a key of OUTPUTS; "mean_kl" is the mean over the tokens of KL(P‖Q), a loss
    with an upstream gradient of 1. wrt: the tensor of the gradient, "p" or "q". layout: "rows" is a
    contiguous [rows, vocabulary]; "sliced" is logits[:, :-1] of [8, rows / 8 + 1, vocabulary], as
    trainers shift by one token.
    """

    operation: str = "kl_divergence"
    rows: int = 8192
    vocabulary: int = 128256
    dtype: str = "bf16"
    wrt: str = "p"
    layout: str = "rows"
    phases = PHASES

    @property
    def name(self):
        shape = f"{self.rows}x{self.vocabulary}-{self.dtype}-d{self.wrt}-{self.layout}"
        return f"{self.operation}-{shape}".removesuffix("-rows")

    def moved_bytes(self, phase):
        """Count the least that has to move. Forward reads the logits, backward reads them
        again and writes one gradient."""
        read = 1 if self.operation in ONE_TENSOR else 2
        tensors = {"forward": read, "backward": read + 1, "both": 2 * read + 1}[phase]
        return tensors * self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def rates(self, phase, milliseconds, copy):
        moved = self.moved_bytes(phase)
        rate = moved / milliseconds / 1e6
        return {"bytes": moved, "gb_per_s": rate, "percent_of_copy": 100 * rate / copy}


def inputs_of(p, q, wrt, **others):
    """Hold the tensors of a workload: p, q, wrt, leaves (the one of the two with a gradient)
    and others."""
    leaf = (p if wrt == "p" else q).requires_grad_()
    return SimpleNamespace(p=p, q=q, wrt=wrt, leaves=(leaf,), **others)


def make_inputs(workload, device, seed=0):
    """Make logits p, N(0, 3²), and q = p + N(0, 1): a KL of a few tenths of a nat.

    Beside them tokens, and upstream: of each output, None for one without. Where the operation
    reads one logits tensor, q is empty.
    """
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    sliced = workload.layout == "sliced"
    leading = (8, workload.rows // 8 + 1) if sliced else (workload.rows,)
    shape = {"size": (*leading, workload.vocabulary), "dtype": DTYPES[workload.dtype]}
    p, q = (torch.randn(**shape, **options) for _ in range(2))
    q += p.mul_(3)
    p, q = (x[:, :-1] if sliced else x for x in (p, q))
    q = q.new_empty(0) if workload.operation in ONE_TENSOR else q
    tokens = torch.randint(workload.vocabulary, p.shape[:-1], **options)
    upstream = (torch.ones((), device=device),)
    if workload.operation != "mean_kl":
        upstream = tuple(
            torch.randn(p.shape[:-1], **options) if name in DIFFERENTIATED else None
            for name in OUTPUTS[workload.operation]
        )
    return inputs_of(p, q, workload.wrt, tokens=tokens, upstream=upstream)


def truth(workload, inputs):
    """Compute (rows, outputs, gradient) in float64.

    rows: the indices of the rows that are compared, the first, the last and some evenly between.
    outputs: of these rows, or of "mean_kl" its one number, over ALL tokens.
    """
    leading, mean = inputs.p.shape[:-1], workload.operation == "mean_kl"
    count = leading.numel()

    def exact(index):
        rows = torch.unravel_index(index.long().to(inputs.p.device), leading)
        pair = (x.detach()[rows] for x in (inputs.p, inputs.q if inputs.q.numel() else inputs.p))
        return rows, testing.truth(*pair)

    few = torch.linspace(0, count - 1, min(CHECKED_ROWS, count), dtype=torch.float64).round()
    rows, some = exact(few)
    tokens, names = inputs.tokens[rows], OUTPUTS[workload.operation]
    upstream = {
        name: (u / count if mean else u).expand(leading)[rows]
        for name, u in zip(names, inputs.upstream, strict=True)
        if u is not None
    }
    gradient = testing.gradients(some, upstream, tokens)[workload.wrt == "q"]
    if mean:
        blocks = torch.arange(count).split(CHECKED_ROWS)
        return rows, [torch.cat([exact(block)[1].kl for block in blocks]).mean()], gradient
    return rows, [some.stats(tokens)[name] for name in names], gradient


def fault(workload, inputs, known, outputs, grads):
    """Return (errors, what is wrong or None): the gate that a provider passes before it is timed.

    errors: {"values", "gradient"}, the worst of a row that is compared with `known`, what truth
    returned: values relative to themselves or to 1e-3 nats, gradients by their norm. Every other
    row has to be finite.
    """
    (rows, values, true), (gradient,) = known, grads
    scalar = workload.operation == "mean_kl"
    shapes = [tuple(result.shape) for result in (*outputs, gradient)]
    leading = () if scalar else tuple(inputs.p.shape[:-1])
    if shapes != (expected := [*[leading] * len(values), tuple(inputs.leaves[0].shape)]):
        return {}, f"outputs and gradient have the shapes {shapes}, expected {expected}"
    found = torch.stack([x.detach() if scalar else x.detach()[rows] for x in outputs])
    values = torch.stack(values)
    off = (found.double() - values).abs() / values.abs().clamp_min(1e-3)
    difference = (gradient[rows].double() - true).norm(dim=-1) / true.norm(dim=-1)
    errors = {"values": off.max().item(), "gradient": difference.max().item()}
    # The largest magnitude takes one read and no copy; a NaN is the largest of all.
    wrong = over(errors, LIMITS[workload.dtype]) + [
        f"{name} not finite everywhere"
        for name, tensors in (("values", outputs), ("gradient", grads))
        if not all(torch.linalg.vector_norm(t.detach(), math.inf).isfinite() for t in tensors)
    ]
    return errors, "; ".join(wrong) or None


def over(errors, limits):
    return [
        f"{name} off by {error:.1e}, limit {limits[name]:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
