"""What is computed: shapes and random data, the bytes that have to move, and the answer in float64."""
import math
from dataclasses import asdict, dataclass

import torch

from benchmarks.providers import PLAIN, arguments, plain_kl_divergence

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Of the outputs of an operation, those that get an upstream gradient; of token_stats: logprob, entropy, kl.
DIFFERENTIATED = {"kl_divergence": (0,), "mean_kl": (0,), "token_stats": (0, 1, 3), "logprob": (0,), "logprob_entropy": (0, 1), "entropy": (0,)}
ONE_TENSOR = {"logprob", "logprob_entropy", "entropy"}  # operations that read no second logits tensor
SCALARS = {"mean_kl"}  # operations whose output is one number for all tokens
CHECKED_ROWS = 512  # at most so many are compared with float64, which is slower than what is measured


@dataclass(frozen=True)
class Workload:
    """An operation on `rows` tokens of two logits tensors, or of `p` alone; the gradient is with respect to the one named by `wrt`.

    operation: a key of DIFFERENTIATED; "mean_kl" is the mean over the tokens of KL(P‖Q), a loss with an upstream gradient of 1.
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
    if workload.operation in SCALARS:
        upstream = (torch.ones((), device=device),)
    else:
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


@dataclass
class Truth:
    """The answer in float64 for the rows that are compared.

    rows: their indices, a tensor [K] per leading dimension. outputs: [K] each, or of a scalar operation its one number, over ALL tokens.
    gradient: [K, V], in float32 where the logits have no more: large enough to be kept small.
    """

    rows: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    gradient: torch.Tensor


def checked_rows(leading, device):
    """The indices of at most CHECKED_ROWS rows, the first, the last and others evenly between them, as an index of the leading dimensions."""
    count = leading.numel()
    flat = torch.linspace(0, count - 1, min(CHECKED_ROWS, count), dtype=torch.float64).round().long().to(device)
    return torch.unravel_index(flat, leading)


def truth(workload, inputs):
    """The Truth of a workload. Its temporaries, a block of rows in float64, are gone when it returns."""
    leading = inputs.p.shape[:-1]
    rows = checked_rows(leading, inputs.p.device)
    parts = [_block_truth(workload, inputs, tuple(index[block] for index in rows))
             for (block,) in row_blocks((len(rows[0]),), workload.vocabulary)]
    outputs = tuple(torch.cat(values) for values in zip(*(values for values, _ in parts), strict=True))
    if workload.operation in SCALARS:
        outputs = (_mean_kl(inputs, workload.vocabulary),)
    return Truth(rows, outputs, torch.cat([gradient for _, gradient in parts]))


def _block_truth(workload, inputs, index):
    """(outputs, gradient) of some rows in float64, by autograd through plain torch."""
    some = Inputs(inputs.p.detach()[index].double(), inputs.q.detach(), inputs.tokens[index], (), inputs.wrt)
    if workload.operation not in ONE_TENSOR:
        some.q = some.q[index].double()
    some.leaf.requires_grad_()
    operation = "kl_divergence" if workload.operation in SCALARS else workload.operation
    outputs = PLAIN[operation](*arguments(operation, some))
    upstream = [(u / inputs.tokens.numel()).expand(index[0].shape) if u.dim() == 0 else u[index] for u in inputs.upstream]
    (gradient,) = torch.autograd.grad(differentiated(workload, outputs), some.leaf, [u.double() for u in upstream])
    return [o.detach() for o in outputs], gradient.to(torch.promote_types(inputs.p.dtype, torch.float32))


@torch.no_grad()
def _mean_kl(inputs, vocabulary):
    """The mean over all tokens in float64."""
    leading = inputs.p.shape[:-1]
    sums = [plain_kl_divergence(inputs.p[block].double(), inputs.q[block].double())[0].sum() for block in row_blocks(leading, vocabulary)]
    return torch.stack(sums).sum() / leading.numel()


def errors(workload, outputs, gradient, known):
    """{"values", "gradient"}: the worst error of a checked row against the Truth, values relative to 1e-3 nats or more, gradients by their norm.

    A NaN gives NaN, which no limit admits.
    """
    worst = {"values": [], "gradient": []}
    for output, true in zip(outputs, known.outputs, strict=True):
        found = output if workload.operation in SCALARS else output[known.rows]
        worst["values"].append(((found.detach().double() - true).abs() / true.abs().clamp_min(1e-3)).max())
    for (block,) in row_blocks((len(known.gradient),), workload.vocabulary):
        true = known.gradient[block].double()
        difference = gradient[tuple(index[block] for index in known.rows)].double() - true
        worst["gradient"].append((difference.norm(dim=-1) / true.norm(dim=-1)).max())
    return {key: torch.stack(values).max().item() for key, values in worst.items()}


# The element type of the gradient alone rounds by 2^-9 (bf16) and 2^-12 (fp16).
LIMITS = {
    "bf16": {"values": 1e-3, "gradient": 1e-2}, "fp16": {"values": 1e-3, "gradient": 2e-3},
    "fp32": {"values": 1e-3, "gradient": 1e-3}, "fp64": {"values": 1e-9, "gradient": 1e-9},
}


def fault(workload, inputs, outputs, gradient, known=None):
    """(errors, what is wrong or None): the gate that a provider passes before it is timed.

    known: the Truth of these inputs, computed here where it is not given. Rows that are not compared with it have to be finite, as all others.
    """
    expected = torch.Size() if workload.operation in SCALARS else inputs.p.shape[:-1]
    shapes = [tuple(o.shape) for o in outputs]
    if any(shape != tuple(expected) for shape in shapes):
        return {}, f"outputs have the shapes {shapes}, expected {tuple(expected)} each"
    if gradient.shape != inputs.leaf.shape:
        return {}, f"the gradient has the shape {tuple(gradient.shape)}, expected {tuple(inputs.leaf.shape)}"
    found = errors(workload, outputs, gradient, known or truth(workload, inputs))
    # "not <=" instead of ">": a NaN has to fail.
    over = [f"{key} off by {found[key]:.1e}, limit {limit:.0e}" for key, limit in LIMITS[workload.dtype].items() if not found[key] <= limit]
    over += [f"{name} not finite everywhere" for name, tensors in (("values", outputs), ("gradient", (gradient,))) if not all(map(finite, tensors))]
    return found, "; ".join(over) or None


def finite(tensor):
    """Whether all of a tensor is finite: its largest magnitude is, which takes one read and no copy; a NaN is the largest of all."""
    return bool(torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite())
