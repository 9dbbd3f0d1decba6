"""Defines the cases on logits: shapes, random data, the bytes that have to move, and the answer in float64.

A case is an operation of OPERATIONS on `rows` tokens. Cases from hidden states are in linear_cases.py.
"""

import math
from dataclasses import asdict, dataclass

import torch

from benchmarks.plain import PLAIN
from benchmarks.work import ONE_TENSOR, arguments

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
PHASES = ("forward", "backward", "both")
# Outputs of an operation that get an upstream gradient; of token_stats: logprob, entropy, kl.
DIFFERENTIATED = {
    "kl_divergence": (0,),
    "mean_kl": (0,),
    "token_stats": (0, 1, 3),
    "logprob": (0,),
    "logprob_entropy": (0, 1),
    "entropy": (0,),
}
SCALARS = {"mean_kl"}  # operations whose output is one number for all tokens
CHECKED_ROWS = 256  # compared with float64, which is slower than any provider
# Relative errors of a row. The element type of the gradient alone rounds by 2^-9 (bf16) and 2^-12 (fp16).
LIMITS = {
    "bf16": {"values": 1e-3, "gradient": 1e-2},
    "fp16": {"values": 1e-3, "gradient": 2e-3},
    "fp32": {"values": 1e-3, "gradient": 1e-3},
    "fp64": {"values": 1e-9, "gradient": 1e-9},
}


@dataclass(frozen=True)
class Workload:
    """An operation on `rows` tokens of two logits tensors, or of `p` alone, with the gradient to the one named by `wrt`.

    operation: a key of DIFFERENTIATED; "mean_kl" is the mean over the tokens of KL(P‖Q), a loss
    with an upstream gradient of 1. layout: "rows" is a contiguous [rows, vocabulary]; "sliced" is
    logits[:, :-1] of [8, rows / 8 + 1, vocabulary], as trainers shift by one token.
    """

    operation: str = "kl_divergence"
    rows: int = 8192
    vocabulary: int = 128256
    dtype: str = "bf16"
    wrt: str = "p"
    layout: str = "rows"

    def __post_init__(self):
        if self.operation in ONE_TENSOR and self.wrt != "p":
            raise ValueError(
                f"wrt: expected 'p', the only logits of {self.operation}, got {self.wrt!r}"
            )

    @property
    def name(self):
        """Names the workload in one word, for tables and test ids."""
        layout = "" if self.layout == "rows" else f"-{self.layout}"
        shape = f"{self.rows}x{self.vocabulary}-{self.dtype}"
        return f"{self.operation}-{shape}-d{self.wrt}{layout}"

    def as_dict(self):
        """Returns the workload as it stands in the results."""
        return {"name": self.name, **asdict(self)}

    @property
    def read_bytes(self):
        """Counts the bytes of the logits, which forward reads once."""
        tensors = 1 if self.operation in ONE_TENSOR else 2
        return tensors * self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def moved_bytes(self, phase):
        """Counts the least that has to move: forward reads the logits, backward reads them again and writes one gradient."""
        gradient = self.rows * self.vocabulary * DTYPES[self.dtype].itemsize
        reads = {"forward": 1, "backward": 1, "both": 2}[phase] * self.read_bytes
        return reads + gradient * (phase != "forward")


@dataclass
class Inputs:
    """Holds the tensors of one workload; `p` or `q` requires a gradient. Where the operation reads one logits tensor, `q` is empty."""

    p: torch.Tensor
    q: torch.Tensor
    tokens: torch.Tensor
    upstream: tuple[torch.Tensor, ...]
    wrt: str

    @property
    def leaf(self):
        """Returns the tensor that the gradient is taken with respect to."""
        return self.p if self.wrt == "p" else self.q


def make_inputs(workload, device, seed=0):
    """Makes logits N(0, 3²) and a second tensor that differs from them by N(0, 1): a KL of a few tenths of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, view = (workload.rows, workload.vocabulary), slice(None)
    if workload.layout == "sliced":
        shape = (8, workload.rows // 8 + 1, workload.vocabulary)
        view = (slice(None), slice(None, -1))
    options = {"generator": generator, "device": device}
    p, q = (torch.randn(shape, dtype=DTYPES[workload.dtype], **options) for _ in range(2))
    p *= 3
    q += p
    p, q = p[view], q.new_empty(0) if workload.operation in ONE_TENSOR else q[view]
    tokens = torch.randint(workload.vocabulary, p.shape[:-1], **options)
    if workload.operation in SCALARS:
        upstream = (torch.ones((), device=device),)
    else:
        outputs = DIFFERENTIATED[workload.operation]
        upstream = tuple(torch.randn(p.shape[:-1], **options) for _ in outputs)
    leaf = p if workload.wrt == "p" else q
    leaf.requires_grad_()
    return Inputs(p, q, tokens, upstream, workload.wrt)


def gradient_of(workload, inputs, outputs, **options):
    """Returns the gradient to the leaf; options: of torch.autograd.grad."""
    chosen = [outputs[i] for i in DIFFERENTIATED[workload.operation]]
    (gradient,) = torch.autograd.grad(chosen, inputs.leaf, inputs.upstream, **options)
    return gradient


@dataclass
class Truth:
    """Holds the answer in float64 for the rows that are compared.

    rows: their indices, a tensor [K] per leading dimension. outputs: [K] each, or of a scalar
    operation its one number, over ALL tokens. gradient: [K, V].
    """

    rows: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    gradient: torch.Tensor


def truth(workload, inputs):
    """Computes the Truth of a workload by autograd through plain torch in float64, for the first row, the last and rows evenly between."""
    leading = inputs.p.shape[:-1]
    count = leading.numel()
    few = torch.linspace(0, count - 1, min(CHECKED_ROWS, count), dtype=torch.float64)
    rows = torch.unravel_index(few.round().long().to(inputs.p.device), leading)
    some = _in_float64(inputs, rows)
    some.leaf.requires_grad_()
    operation = workload.operation
    if operation in SCALARS:
        # The mean's gradient is that of its tokens, divided by their number.
        share = (inputs.upstream[0] / count).double()
        some.upstream = (share.expand(len(few)),)
        operation = "kl_divergence"
    outputs = PLAIN[operation](*arguments(operation, some.p, some.q, some.tokens))
    gradient = gradient_of(Workload(operation, wrt=workload.wrt), some, outputs)
    if workload.operation in SCALARS:
        outputs = (_mean(workload.operation, inputs, leading),)
    return Truth(rows, tuple(output.detach() for output in outputs), gradient)


def _in_float64(inputs, index):
    """Returns the inputs at some rows, in float64."""
    p, q = inputs.p.detach()[index].double(), inputs.q.detach()
    upstream = tuple(u[index].double() for u in inputs.upstream if u.dim())
    return Inputs(
        p, q[index].double() if q.numel() else q, inputs.tokens[index], upstream, inputs.wrt
    )


@torch.no_grad()
def _mean(operation, inputs, leading):
    """Computes a mean over all tokens in float64, a block of rows at a time."""
    total = 0
    for block in torch.arange(leading.numel(), device=inputs.p.device).split(CHECKED_ROWS):
        some = _in_float64(inputs, torch.unravel_index(block, leading))
        (mean,) = PLAIN[operation](some.p, some.q)
        total = total + mean * len(block)
    return total / leading.numel()


def fault(workload, inputs, outputs, gradient, known):
    """Returns (errors, what is wrong or None): the gate that a provider passes before it is timed.

    errors: {"values", "gradient"}, the worst of a row that is compared with `known`, the Truth:
    values relative to themselves or to 1e-3 nats, gradients by their norm. Every other row has to
    be finite.
    """
    expected = torch.Size() if workload.operation in SCALARS else inputs.p.shape[:-1]
    if any(output.shape != expected for output in outputs):
        shapes = [tuple(output.shape) for output in outputs]
        return {}, f"outputs have the shapes {shapes}, expected {tuple(expected)} each"
    if gradient.shape != inputs.leaf.shape:
        return (
            {},
            f"the gradient has the shape {tuple(gradient.shape)}, expected {tuple(inputs.leaf.shape)}",
        )
    rows = () if workload.operation in SCALARS else known.rows
    values = [
        ((output.detach()[rows].double() - true).abs() / true.abs().clamp_min(1e-3)).max()
        for output, true in zip(outputs, known.outputs, strict=True)
    ]
    off = (gradient[known.rows].double() - known.gradient).norm(dim=-1)
    found = {
        "values": torch.stack(values).max().item(),
        "gradient": (off / known.gradient.norm(dim=-1)).max().item(),
    }
    wrong = over(found, LIMITS[workload.dtype])
    results = {"values": outputs, "gradient": (gradient,)}
    for name, tensors in results.items():
        # The largest magnitude takes one read and no copy; a NaN is the largest of all.
        if not all(torch.linalg.vector_norm(t.detach(), math.inf).isfinite() for t in tensors):
            wrong.append(f"{name} not finite everywhere")
    return found, "; ".join(wrong) or None


def over(errors, limits):
    """Lists the errors that are not within their limits; a NaN never is."""
    return [
        f"{name} off by {error:.1e}, limit {limits[name]:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
