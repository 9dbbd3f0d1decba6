"""What is computed: shapes and random data, the bytes that have to move, and the answer in float64."""
from dataclasses import asdict, dataclass

import torch

from benchmarks.providers import plain_kl_divergence, plain_logprob, plain_logprob_entropy, plain_token_stats

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Of the outputs of an operation, those that get an upstream gradient.
DIFFERENTIATED = {"kl_divergence": (0,), "token_stats": (0, 1, 3), "logprob": (0,), "logprob_entropy": (0, 1)}  # token_stats: logprob, entropy, kl
ONE_TENSOR = {"logprob", "logprob_entropy"}  # operations that read no second logits tensor


@dataclass(frozen=True)
class Workload:
    """An operation on `rows` tokens of two logits tensors, or of `p` alone; the gradient is with respect to the one named by `wrt`.

    layout: "rows" is a contiguous [rows, vocabulary]; "sliced" is logits[:, :-1] of [8, rows / 8 + 1, vocabulary], as trainers shift by one token.
    """

    operation: str = "kl_divergence"
    rows: int = 8192
    vocabulary: int = 128256
    dtype: str = "bf16"
    wrt: str = "p"
    layout: str = "rows"

    def __post_init__(self):
        if self.operation in ONE_TENSOR and self.wrt != "p":
            raise ValueError(f"wrt: expected 'p', the only logits of {self.operation}, got {self.wrt!r}")

    @property
    def name(self):
        """The workload in one word, for tables and test ids."""
        layout = "" if self.layout == "rows" else f"-{self.layout}"
        return f"{self.operation}-{self.rows}x{self.vocabulary}-{self.dtype}-d{self.wrt}{layout}"

    def as_dict(self):
        """The workload as it stands in the results."""
        return {"name": self.name, **asdict(self)}

    @property
    def tensor_bytes(self):
        """Bytes of one logits tensor."""
        return self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def moved_bytes(self, phase):
        """The least that has to move: forward reads each logits tensor once, backward reads them again and writes one gradient."""
        read = 1 if self.operation in ONE_TENSOR else 2
        return {"forward": read, "backward": read + 1, "both": 2 * read + 1}[phase] * self.tensor_bytes


@dataclass
class Inputs:
    """The tensors of one workload; `p` or `q` requires a gradient. Where the operation reads one logits tensor, `q` is empty."""

    p: torch.Tensor
    q: torch.Tensor
    tokens: torch.Tensor
    upstream: tuple[torch.Tensor, ...]
    wrt: str

    @property
    def leaf(self):
        """The tensor that the gradient is taken with respect to."""
        return self.p if self.wrt == "p" else self.q


def make_inputs(workload, device, seed=0):
    """Random logits N(0, 3²), and a second tensor that differs from them by N(0, 1): a KL of a few tenths of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, view = (workload.rows, workload.vocabulary), slice(None)
    if workload.layout == "sliced":
        sequences = 8
        shape, view = (sequences, workload.rows // sequences + 1, workload.vocabulary), (slice(None), slice(None, -1))
    dtype = DTYPES[workload.dtype]
    p, q = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    p *= 3
    q += p
    p, q = p[view], q.new_empty(0) if workload.operation in ONE_TENSOR else q[view]
    leading = p.shape[:-1]
    tokens = torch.randint(workload.vocabulary, leading, generator=generator, device=device)
    upstream = tuple(torch.randn(leading, generator=generator, device=device) for _ in DIFFERENTIATED[workload.operation])
    return Inputs(p.requires_grad_(workload.wrt == "p"), q.requires_grad_(workload.wrt == "q"), tokens, upstream, workload.wrt)


def differentiated(workload, outputs):
    """The outputs that get an upstream gradient."""
    return tuple(outputs[i] for i in DIFFERENTIATED[workload.operation])


# The answer in float64 ------------------------------------------------------------------------------------------


def row_blocks(leading, vocabulary, limit=2**25):
    """Indices that cut a leading shape of one or two dimensions into blocks of at most `limit` logits: float64 copies stay small."""
    step = max(limit // vocabulary, 1)
    for first in range(0, leading[-1], step):
        block = slice(first, first + step)
        if len(leading) == 1:
            yield (block,)
        else:
            yield from ((i, block) for i in range(leading[0]))


PLAIN = {
    "kl_divergence": lambda p, q, tokens: plain_kl_divergence(p, q),
    "token_stats": lambda p, q, tokens: plain_token_stats(p, tokens, q),
    "logprob": lambda p, q, tokens: plain_logprob(p, tokens),
    "logprob_entropy": lambda p, q, tokens: plain_logprob_entropy(p, tokens),
}


def _truth(workload, inputs, block):
    """(outputs, gradient) of a block of rows in float64, by autograd through plain torch."""
    p = inputs.p[block].detach().double()
    q = None if workload.operation in ONE_TENSOR else inputs.q[block].detach().double()
    leaf = (p if inputs.wrt == "p" else q).requires_grad_()
    outputs = PLAIN[workload.operation](p, q, inputs.tokens[block])
    upstream = [u[block].double() for u in inputs.upstream]
    (gradient,) = torch.autograd.grad(differentiated(workload, outputs), leaf, upstream)
    return [o.detach() for o in outputs], gradient


def errors(workload, inputs, outputs, gradient):
    """{"values", "gradient"}: the worst error of a row against float64, values relative to 1e-3 nats or more, gradients by their norm.

    A NaN gives NaN, which no limit admits.
    """
    worst = {"values": torch.zeros((), dtype=torch.float64), "gradient": torch.zeros((), dtype=torch.float64)}
    worst = {key: value.to(inputs.p.device) for key, value in worst.items()}
    for block in row_blocks(inputs.p.shape[:-1], workload.vocabulary):
        true_outputs, true_gradient = _truth(workload, inputs, block)
        for output, true in zip(outputs, true_outputs, strict=True):
            relative = (output[block].detach().double() - true).abs() / true.abs().clamp_min(1e-3)
            worst["values"] = torch.maximum(worst["values"], relative.max())
        difference = (gradient[block].double() - true_gradient).norm(dim=-1) / true_gradient.norm(dim=-1)
        worst["gradient"] = torch.maximum(worst["gradient"], difference.max())
    return {key: value.item() for key, value in worst.items()}


# The element type of the gradient alone rounds by 2^-9 (bf16) and 2^-12 (fp16).
LIMITS = {
    "bf16": {"values": 1e-3, "gradient": 1e-2}, "fp16": {"values": 1e-3, "gradient": 2e-3},
    "fp32": {"values": 1e-3, "gradient": 1e-3}, "fp64": {"values": 1e-9, "gradient": 1e-9},
}


def fault(workload, inputs, outputs, gradient):
    """(errors, what is wrong or None): the gate that a provider passes before it is timed."""
    expected = inputs.p.shape[:-1]
    shapes = [tuple(o.shape) for o in outputs]
    if any(shape != tuple(expected) for shape in shapes):
        return {}, f"outputs have the shapes {shapes}, expected {tuple(expected)} each"
    if gradient.shape != inputs.leaf.shape:
        return {}, f"the gradient has the shape {tuple(gradient.shape)}, expected {tuple(inputs.leaf.shape)}"
    found = errors(workload, inputs, outputs, gradient)
    # "not <=" instead of ">": a NaN has to fail.
    over = [f"{key} off by {found[key]:.1e}, limit {limit:.0e}" for key, limit in LIMITS[workload.dtype].items() if not found[key] <= limit]
    return found, "; ".join(over) or None
