"""Defines the cases from hidden states: shapes, random data, the floor, and the gate in float64."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, over
from benchmarks.plain import plain_token_stats
from benchmarks.work import CLIP, PRODUCTS, Work, grpo_terms

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
MEANS = ("loss", "frozen", "grpo", "distillation")  # modes whose output is a mean over the tokens
OUTPUTS = {"stats": FIELDS, "grpo": ("loss",), "distillation": ("loss",), "logprob": ("logprob",)}
# No log-ratio of the data is so near to one where the clip begins: there the gradient jumps, and the
# rounding of a 16-bit logit, up to 0.03, would decide on which side a token falls.
CLIP_MARGIN = 0.05
BLOCK = 2**25  # logits in float64 at once

CHECKED_WEIGHT_ROWS = 64  # rows of the weight's gradient that are compared, evenly spread
# A provider may be off by so many times the error of plain torch in the same type on the same
# inputs: over all tokens, and in nine of ten rows.
TOLERANCE = 1.5
# In the worst token or row, by so many times plain torch's worst, and never by so much of its size
# or more: the limit finds a row that is wrong and does not compare digits (among 64 rows, roundings
# as good as torch's but independent of them were up to 3.2 times as far off in their worst). A row
# that is missing is off by 1, one that is half too large by 0.5. A row in which plain torch is off
# as much passes: where two tokens share a row's probability, the rounding of their 16-bit logits may
# be two thirds of its gradient, for everybody; that is one row in some thousands.
WORST_TOLERANCE, WORST = 5, 0.4
# A row's error is relative to its own norm, or to this part of the root mean square norm of all rows
# if that is more: where one token has all the probability the gradient is nearly 0, and its rounding
# is as large.
SMALL_ROW = 0.1
# Added for float32, where the order of a sum alone can double an error of 1e-6; bf16 is far above it.
LEAST = 1e-5

FLOOR = "cuBLAS products"


@dataclass(frozen=True)
class LinearWorkload:
    """KL(policy‖reference) of `rows` tokens from hidden states and two weights [vocabulary, hidden].

    mode: "forward" is the KL per token without gradient; "loss" its mean and the gradient to hidden
    and weight; "frozen" the same with the gradient to hidden only; "stats" all fields of
    token_stats, an upstream gradient on each, and the gradient to hidden and weight. Two whole
    losses, with the gradient to hidden and weight: "grpo" is the clipped policy loss of the tokens
    plus BETA times the exact KL, "distillation" the mean of KL(teacher‖student), where the reference
    is the teacher. "logprob" is the log-probability of the tokens alone, without a reference: what
    fused cross-entropies compute.
    """

    mode: str = "loss"
    rows: int = 8192
    hidden: int = 4096
    vocabulary: int = 128256
    dtype: str = "bf16"

    @property
    def name(self):
        """Names the workload in one word, for tables and test ids."""
        return f"linear-{self.mode}-{self.rows}x{self.hidden}x{self.vocabulary}-{self.dtype}"

    def as_dict(self):
        """Returns the workload as it stands in the results."""
        return {"name": self.name, **asdict(self)}

    @property
    def operation(self):
        """Names the operation that a provider has to offer for it."""
        return f"linear_{self.mode}"

    @property
    def phase(self):
        """Names what is timed: forward alone where there is no gradient, else forward and backward."""
        return "forward" if self.mode == "forward" else "both"

    @property
    def outputs(self):
        """Names the operation's outputs."""
        return OUTPUTS.get(self.mode, ("kl",))

    @property
    def read_bytes(self):
        """Counts the bytes of the two weights."""
        return 2 * self.vocabulary * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def flop(self):
        """Counts the floating-point operations of the products that have to be done."""
        return PRODUCTS[self.mode] * 2 * self.rows * self.hidden * self.vocabulary


@dataclass
class LinearInputs:
    """Holds the tensors of one workload; `upstream` belongs to the outputs, in their order.

    old_logprob, advantages: [rows] float32, for the GRPO step; the log-probabilities of a policy
    near this one.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    tokens: torch.Tensor
    upstream: tuple[torch.Tensor, ...]
    old_logprob: torch.Tensor
    advantages: torch.Tensor

    @property
    def leaves(self):
        """Returns the tensors that the gradient is taken to: hidden, or hidden and weight, or none."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def gradients(self, outputs):
        """Returns the gradients of the leaves; an output without one (ref_logprob) takes no upstream."""
        if not self.leaves:
            return ()
        pairs = [p for p in zip(outputs, self.upstream, strict=True) if p[0].requires_grad]
        return torch.autograd.grad([o for o, _ in pairs], self.leaves, [u for _, u in pairs])


def make_linear_inputs(workload, device, seed=0):
    """Makes policy logits near N(0, 3²), and a reference that differs a little: a KL of a few tenths of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    rows, size = workload.rows, workload.hidden

    def noise(*shape):
        return torch.randn(shape, dtype=DTYPES[workload.dtype], **options)

    hidden = noise(rows, size)
    weight = noise(workload.vocabulary, size).mul_(3 / size**0.5)
    ref_hidden = noise(rows, size).mul_(0.25).add_(hidden)
    ref_weight = noise(workload.vocabulary, size).mul_(0.6 / size**0.5).add_(weight)
    tokens = torch.randint(workload.vocabulary, (rows,), **options)
    if workload.mode in MEANS:
        upstream = (torch.ones((), device=device),)
    else:
        upstream = tuple(torch.randn(rows, **options) for _ in workload.outputs)
    old_logprob, advantages = (torch.randn(rows, **options) for _ in range(2))
    if workload.mode == "grpo":
        chosen = [
            F.linear(hidden[some], weight).float().log_softmax(-1).gather(-1, tokens[some, None])
            for some in blocks(workload)
        ]
        old_logprob = torch.cat(chosen)[:, 0] - off_the_clip(0.2 * old_logprob)
    hidden.requires_grad_(workload.mode != "forward")
    weight.requires_grad_(workload.mode not in ("forward", "frozen"))
    return LinearInputs(
        hidden, weight, ref_hidden, ref_weight, tokens, upstream, old_logprob, advantages
    )


def blocks(workload):
    """Cuts the tokens into slices of at most BLOCK logits: float64 copies stay small."""
    step = max(BLOCK // workload.vocabulary, 1)
    return [slice(first, first + step) for first in range(0, workload.rows, step)]


def off_the_clip(log_ratio):
    """Moves the log-ratios that are within CLIP_MARGIN of where the clip begins that far away."""
    for edge in (math.log(1 - CLIP), math.log(1 + CLIP)):
        moved = edge + torch.where(log_ratio < edge, -CLIP_MARGIN, CLIP_MARGIN)
        log_ratio = torch.where((log_ratio - edge).abs() < CLIP_MARGIN, moved, log_ratio)
    return log_ratio


# The gate


def checked_rows(workload, device):
    """Chooses the rows of the weight's gradient that are compared."""
    rows = torch.linspace(0, workload.vocabulary - 1, CHECKED_WEIGHT_ROWS, dtype=torch.float64)
    return rows.long().unique().to(device)


def answer(workload, inputs, dtype):
    """Computes {name: tensor} by plain torch in one type: every field [N] and, where the mode has them, dhidden [N, H] and dweight [checked rows, H].

    A block of tokens at a time, so that the float64 copies stay small; the weight's gradient is one
    product over all tokens.
    """
    hidden, weight, ref_hidden, ref_weight = (
        tensor.detach().to(dtype)
        for tensor in (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
    )
    columns = checked_rows(workload, hidden.device)
    upstream = dict(zip(workload.outputs, inputs.upstream, strict=True))
    if workload.mode in MEANS:
        upstream = {name: (u / workload.rows).expand(workload.rows) for name, u in upstream.items()}
    parts = {}
    for some in blocks(workload):
        logits = F.linear(hidden[some], weight).requires_grad_(bool(inputs.leaves))
        ref_logits = F.linear(ref_hidden[some], ref_weight)
        stats = plain_token_stats(logits, inputs.tokens[some], ref_logits)
        values = dict(zip(FIELDS, stats, strict=True))
        if workload.mode == "distillation":
            values["loss"] = values["ref_kl"]
        elif workload.mode == "grpo":
            step = inputs.old_logprob[some], inputs.advantages[some]
            values["loss"] = grpo_terms(values["logprob"], values["kl"], *step)
        if inputs.leaves:
            taken = [name for name in upstream if values[name].requires_grad]
            grads = [upstream[name][some].to(values[name].dtype) for name in taken]
            (grad,) = torch.autograd.grad([values[name] for name in taken], logits, grads)
            values.update(dhidden=grad @ weight, columns=grad[:, columns])
        for name, value in values.items():
            parts.setdefault(name, []).append(value.detach())
        del logits, ref_logits, stats, values
    found = {name: torch.cat(values) for name, values in parts.items()}
    if len(inputs.leaves) > 1:
        found["dweight"] = found["columns"].t() @ hidden
    return {name: found[name] for name in compared(workload, inputs)}


@dataclass
class Expected:
    """Holds the answer in float64, the limits of a provider's errors, and by how much each row of a gradient may be off whatever its size is."""

    answer: dict[str, torch.Tensor]
    limits: dict[str, float]
    granted: dict[str, torch.Tensor]


def expected(workload, inputs):
    """Computes what the gate compares with; it takes three products in float64."""
    exact = answer(workload, inputs, torch.float64)
    plain = answer(workload, inputs, DTYPES[workload.dtype])
    limits, granted = {}, {}
    for name, true in exact.items():
        for what, value in errors(name, plain[name], true).items():
            worst = min(WORST_TOLERANCE * value, WORST)
            limits[what] = (worst if "worst" in what else TOLERANCE * value) + LEAST
        if true.dim() == 2:
            granted[name] = TOLERANCE * (plain[name].double() - true).norm(dim=-1)
    return Expected(exact, limits, granted)


def compared(workload, inputs):
    """Names all that the gate compares: the outputs, then the gradients."""
    return (*workload.outputs, *("dhidden", "dweight")[: len(inputs.leaves)])


def errors(name, value, true, granted=None):
    """Computes {what: error}: relative in the L2 norm, over all, and of the worst token or row.

    A row of a gradient is compared with its own norm, but see SMALL_ROW; the worst of the rows that
    are off by more than `granted` counts. Nine of ten rows of dhidden are within the third error,
    each of its own norm: the sum over all hides a part of the gradient that only small rows have. A
    token's field is compared with the root mean square of all, since a KL near 0 has no digits in
    bf16. A NaN stays NaN, which no limit admits.
    """
    difference = value.detach().double() - true
    found = {name: difference.norm() / true.norm()}
    if true.dim() == 2:
        off, size = difference.norm(dim=-1), true.norm(dim=-1)
        counted = off if granted is None else torch.where(off <= granted, 0.0, off)
        least = SMALL_ROW * size.square().mean().sqrt()
        found[f"{name}, worst row"] = (counted / size.clamp_min(least)).max()
        if name == "dhidden":
            found[f"{name}, nine of ten rows"] = (off / size).quantile(0.9)
    else:
        found[f"{name}, worst token"] = difference.abs().max() / true.square().mean().sqrt()
    return {what: error.item() for what, error in found.items()}


def linear_fault(workload, inputs, known, outputs, gradients):
    """Returns (errors, what is wrong or None): the gate that a provider passes before it is timed.

    A mean is held to the limit of its tokens: plain torch's own mean may be right by luck.
    """
    leading = () if workload.mode in MEANS else (workload.rows,)
    shapes = [tuple(result.shape) for result in (*outputs, *gradients)]
    right = [leading] * len(workload.outputs) + [tuple(leaf.shape) for leaf in inputs.leaves]
    if shapes != right:
        return {}, f"outputs and gradients have the shapes {shapes}, expected {right}"
    found = {}
    for name, result in zip(known.answer, (*outputs, *gradients), strict=True):
        true = known.answer[name]
        if name == "dweight":
            result = result[checked_rows(workload, result.device)]
        if result.dim() == 0:
            # Relative to the size of the tokens' losses: losses of either sign cancel in their mean.
            off = (result.detach().double() - true.mean()).abs()
            found[name] = (off / true.abs().mean()).item()
        else:
            found.update(errors(name, result, true, known.granted.get(name)))
    return found, "; ".join(over(found, known.limits)) or None


# The floor


def bare_products(workload, inputs, chunk):
    """Makes a function that does nothing but the workload's products with cuBLAS, `chunk` tokens at a time, into buffers allocated here.

    Every doubt goes to the floor: the products of the gradients take the policy's logits for their
    operand, so nothing else is read or written; the gradient of the weight is overwritten by each
    chunk instead of added to, in the 16-bit type.
    """
    with_reference = workload.mode != "logprob"
    gradients = PRODUCTS[workload.mode] - 1 - with_reference
    logits, ref_logits = (inputs.hidden.new_empty(chunk, workload.vocabulary) for _ in range(2))
    grad_hidden = torch.empty_like(inputs.hidden, requires_grad=False)
    grad_weight = torch.empty_like(inputs.weight, requires_grad=False)

    @torch.no_grad()
    def run(inputs):
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        chunks = zip(
            *(x.split(chunk) for x in (hidden, inputs.ref_hidden, grad_hidden)), strict=True
        )
        for some, ref_some, grad_some in chunks:
            policy, reference = logits[: len(some)], ref_logits[: len(some)]
            torch.mm(some, weight.t(), out=policy)
            if with_reference:
                torch.mm(ref_some, inputs.ref_weight.t(), out=reference)
            if gradients > 0:
                torch.mm(policy, weight, out=grad_some)
            if gradients > 1:
                torch.mm(policy.t(), some, out=grad_weight)

    return Work(run, f"{PRODUCTS[workload.mode]} products into 16-bit buffers, and nothing else")
