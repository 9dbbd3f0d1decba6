"""Define the cases from hidden states: shapes, random data, the floor, the gate in float64."""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, Case, over
from benchmarks.work import CLIP, PLAIN, PRODUCTS, grpo_terms, plain_token_stats
from fastkl import testing
from fastkl.testing import FIELDS

# Modes whose output is a mean over the tokens.
MEANS = ("loss", "frozen", "grpo", "distillation")
OUTPUTS = {
    "forward": ("kl",),
    "loss": ("kl",),
    "frozen": ("kl",),
    "stats": FIELDS,
    "grpo": ("loss",),
    "distillation": ("loss",),
    "logprob": ("logprob",),
}
# No log-ratio of the data is so near to one where the clip begins: there the gradient jumps, and
# the rounding of a 16-bit logit, up to 0.03, would decide on which side a token falls.
CLIP_MARGIN = 0.05
BLOCK = 256  # tokens whose logits are in float64 at once

CHECKED_WEIGHT_ROWS = 64  # rows of the weight's gradient that are compared, evenly spread
# A provider may be off by so many times the error of plain torch in the same type on the same
# inputs: over all tokens, and in nine of ten rows.
TOLERANCE = 1.5
# In the worst token or row, by so many times plain torch's worst, and never by so much of its size
# or more: the limit finds a row that is wrong and does not compare digits (among 64 rows, roundings
# as good as torch's but independent of them were up to 3.2 times as far off in their worst). A row
# that is missing is off by 1, one that is half too large by 0.5. A row in which plain torch is off
# as much passes: where two tokens share a row's probability, the rounding of their 16-bit logits
# may be two thirds of its gradient, for everybody; that is one row in some thousands.
WORST_TOLERANCE, WORST = 5, 0.4
# A row's error is relative to its own norm, or to this part of the root mean square norm of all
# rows if that is more: where one token has all the probability the gradient is nearly 0, and its
# rounding is as large.
SMALL_ROW = 0.1
# Added for float32, where the order of a sum alone can double an error of 1e-6.
LEAST = 1e-5

FLOOR = "cuBLAS products"


@dataclass(frozen=True)
class LinearWorkload(Case):
    """Define KL(policy‖reference) of `rows` tokens from hidden states and two weights.

    mode: "forward" is the KL per token without gradient; "loss" its mean and the gradient to hidden
    and weight; "frozen" the same with the gradient to hidden only; "stats" all fields of
    token_stats, an upstream gradient on each, and the gradient to hidden and weight. Two whole
    losses, with the gradient to hidden and weight: "grpo" is the clipped policy loss of the tokens
    plus BETA times the exact KL, "distillation" the mean of KL(teacher‖student), where the
    reference is the teacher. "logprob" is the log-probability of the tokens alone, without a
    reference: what fused cross-entropies compute.
    """

    mode: str = "loss"
    rows: int = 8192
    hidden: int = 4096
    vocabulary: int = 128256
    dtype: str = "bf16"

    @property
    def name(self):
        return f"linear-{self.mode}-{self.rows}x{self.hidden}x{self.vocabulary}-{self.dtype}"

    @property
    def operation(self):
        return f"linear_{self.mode}"

    @property
    def phases(self):
        return ("forward",) if self.mode == "forward" else ("both",)

    def moved_bytes(self, phase):
        return 2 * self.vocabulary * self.hidden * DTYPES[self.dtype].itemsize

    def rates(self, phase, milliseconds, copy):
        flop = PRODUCTS[self.mode] * 2 * self.rows * self.hidden * self.vocabulary
        return {"flop": flop, "tflop_per_s": flop / milliseconds / 1e9}


def make_linear_inputs(workload, device, seed=0):
    """Make hidden and weight with logits near N(0, 3²), and ref_hidden, ref_weight at a KL of some
    tenths of a nat.

    Beside them tokens; upstream, of each output; for the GRPO step old_logprob, of a policy near
    this one, and advantages, [rows] float32; leaves, the tensors of the gradient: hidden, or hidden
    and weight, or none.
    """
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    rows, size, mode = workload.rows, workload.hidden, workload.mode
    noise = partial(torch.randn, dtype=DTYPES[workload.dtype], **options)
    i = SimpleNamespace(hidden=noise(rows, size))
    i.weight = noise(workload.vocabulary, size).mul_(3 / size**0.5)
    i.ref_hidden = noise(rows, size).mul_(0.25).add_(i.hidden)
    i.ref_weight = noise(workload.vocabulary, size).mul_(0.6 / size**0.5).add_(i.weight)
    i.tokens = torch.randint(workload.vocabulary, (rows,), **options)
    i.upstream = tuple(torch.randn(rows, **options) for _ in OUTPUTS[mode])
    if mode in MEANS:
        i.upstream = (torch.ones((), device=device),)
    i.old_logprob, i.advantages = (torch.randn(rows, **options) for _ in range(2))
    if mode == "grpo":
        pairs = zip(i.hidden.split(BLOCK), i.tokens.split(BLOCK), strict=True)
        near = [PLAIN["logprob"](F.linear(h, i.weight), None, chosen)[0] for h, chosen in pairs]
        i.old_logprob = torch.cat(near) - off_the_clip(0.2 * i.old_logprob)
    i.leaves = {"forward": (), "frozen": (i.hidden,)}.get(mode, (i.hidden, i.weight))
    for leaf in i.leaves:
        leaf.requires_grad_()
    return i


def off_the_clip(log_ratio):
    """Move the log-ratios that are within CLIP_MARGIN of where the clip begins that far away."""
    for edge in (math.log(1 - CLIP), math.log(1 + CLIP)):
        moved = edge + torch.where(log_ratio < edge, -CLIP_MARGIN, CLIP_MARGIN)
        log_ratio = torch.where((log_ratio - edge).abs() < CLIP_MARGIN, moved, log_ratio)
    return log_ratio


# The gate


def checked_rows(workload):
    last = workload.vocabulary - 1
    return [round(i * last / (CHECKED_WEIGHT_ROWS - 1)) for i in range(CHECKED_WEIGHT_ROWS)]


def answer(workload, inputs, dtype):
    """Compute {name: tensor} by plain torch in one type, for all that the gate compares; in
    float64 it is the truth.

    Every output [N] and, where the mode has them, dhidden [N, H] and dweight [checked rows, H]. A
    block of tokens at a time, so that the float64 copies stay small; the weight's gradient is one
    product over all tokens.
    """
    models = (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
    hidden, weight, ref_hidden, ref_weight = (tensor.detach().to(dtype) for tensor in models)
    parts = {name: [] for name in (*OUTPUTS[workload.mode], "dhidden", "columns")}
    for some in torch.arange(workload.rows, device=hidden.device).split(BLOCK):
        logits = F.linear(hidden[some], weight).requires_grad_(bool(inputs.leaves))
        ref_logits, tokens = F.linear(ref_hidden[some], ref_weight), inputs.tokens[some]
        values = (
            testing.truth(logits, ref_logits).stats(tokens)
            if dtype == torch.float64
            else dict(zip(FIELDS, plain_token_stats(logits, ref_logits, tokens), strict=True))
        )
        values["loss"] = values["ref_kl"]
        if workload.mode == "grpo":
            step = inputs.old_logprob[some], inputs.advantages[some]
            values["loss"] = grpo_terms(values["logprob"], values["kl"], *step)
        if inputs.leaves:
            grad = _logits_gradient(workload, inputs, values, logits, some)
            values |= {"dhidden": grad @ weight, "columns": grad[:, checked_rows(workload)]}
        for name in parts.keys() & values.keys():
            parts[name].append(values[name].detach())
    found = {name: torch.cat(values) for name, values in parts.items() if values}
    columns = found.pop("columns", None)
    return found if len(inputs.leaves) < 2 else {**found, "dweight": columns.t() @ hidden}


def _logits_gradient(workload, inputs, values, logits, some):
    share = workload.rows if workload.mode in MEANS else 1
    pairs = zip(map(values.get, OUTPUTS[workload.mode]), inputs.upstream, strict=True)
    taken = [(x, u.expand(workload.rows)[some] / share) for x, u in pairs if x.requires_grad]
    grads = [upstream.to(value.dtype) for value, upstream in taken]
    return torch.autograd.grad([value for value, _ in taken], logits, grads)[0]


def expected(workload, inputs):
    """Compute what the gate compares with: (answer in float64, limits, granted). limits: of a
    provider's errors. granted: by how much each row of a gradient may be off, whatever its size
    is."""
    exact = answer(workload, inputs, torch.float64)
    plain = answer(workload, inputs, DTYPES[workload.dtype])
    limits, granted = {}, {}
    for name, true in exact.items():
        for what, value in errors(name, plain[name], true).items():
            worst = min(WORST_TOLERANCE * value, WORST)
            limits[what] = (worst if "worst" in what else TOLERANCE * value) + LEAST
        granted[name] = TOLERANCE * (plain[name].double() - true).norm(dim=-1)
    return exact, limits, granted


def errors(name, value, true, granted=0.0):
    """Compute {what: error}: relative in the L2 norm, over all, and of the worst token or row.

    A row of a gradient is compared with its own norm, but see SMALL_ROW; the worst of the rows that
    are off by more than `granted` counts. Nine of ten rows of dhidden are within the third error,
    each of its own norm: the sum over all hides a part of the gradient that only small rows have. A
    token's field is compared with the root mean square of all, since a KL near 0 has no digits in
    bf16. A NaN stays NaN, which no limit admits.
    """
    if not value.dim():
        # Relative to the size of the tokens' losses: in their mean either sign cancels.
        off = (value.detach().double() - true.mean()).abs()
        return {name: (off / true.abs().mean()).item()}
    difference = value.detach().double() - true
    found = {name: difference.norm() / true.norm()}
    if true.dim() == 2:
        off, size = difference.norm(dim=-1), true.norm(dim=-1)
        least = SMALL_ROW * size.square().mean().sqrt()
        counted = torch.where(off <= granted, 0.0, off)
        found[f"{name}, worst row"] = (counted / size.clamp_min(least)).max()
        if name == "dhidden":
            found[f"{name}, nine of ten rows"] = (off / size).quantile(0.9)
    else:
        found[f"{name}, worst token"] = difference.abs().max() / true.square().mean().sqrt()
    return {what: error.item() for what, error in found.items()}


def linear_fault(workload, inputs, known, outputs, grads):
    """Return (errors, what is wrong or None): the gate that a provider passes before it is
    timed. A mean is held to the limit of its tokens: plain torch's own mean may be right by
    luck."""
    exact, limits, granted = known
    leading = () if workload.mode in MEANS else (workload.rows,)
    shapes = [tuple(result.shape) for result in (*outputs, *grads)]
    right = [leading] * len(OUTPUTS[workload.mode]) + [tuple(leaf.shape) for leaf in inputs.leaves]
    if shapes != right:
        return {}, f"outputs and gradients have the shapes {shapes}, expected {right}"
    found = {}
    for (name, true), result in zip(exact.items(), (*outputs, *grads), strict=True):
        result = result[checked_rows(workload)] if name == "dweight" else result
        found |= errors(name, result, true, granted[name])
    return found, "; ".join(over(found, limits)) or None


# The floor


def bare_products(workload, inputs, chunk):
    """Make a function that does the workload's products with cuBLAS, and nothing else.

    `chunk` tokens at a time, into buffers allocated here. Every doubt goes to the floor: the
    products of the gradients take the policy's logits for their operand, so nothing else is read or
    written; the gradient of the weight is overwritten by each chunk instead of added to, in the
    16-bit type.
    """
    with_reference = workload.mode != "logprob"
    gradients = PRODUCTS[workload.mode] - 1 - with_reference
    logits, ref_logits = (inputs.hidden.new_empty(chunk, workload.vocabulary) for _ in range(2))
    buffers = [torch.empty_like(x.detach()) for x in (inputs.hidden, inputs.weight)]

    @torch.no_grad()
    def run(inputs):
        whole = (inputs.hidden, inputs.ref_hidden, buffers[0])
        for some, ref_some, grad in zip(*(x.split(chunk) for x in whole), strict=True):
            policy = torch.mm(some, inputs.weight.t(), out=logits[: len(some)])
            products = [(policy, inputs.weight, grad), (policy.t(), some, buffers[1])][:gradients]
            if with_reference:
                products.append((ref_some, inputs.ref_weight.t(), ref_logits[: len(some)]))
            for left, right, out in products:
                torch.mm(left, right, out=out)
        return ()

    return run
