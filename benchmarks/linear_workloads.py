"""What is computed from hidden states: shapes and random data, the matrix products that have to be done, and the gate against float64."""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.providers import plain_token_stats
from benchmarks.workloads import DTYPES, row_blocks

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
# What a mode asks of a provider, and the products of N x H x V that it takes at least: two for the logits (one for "logprob"), one for each gradient.
# For "stats" and "grpo" that is what keeping all logits takes, and three for "logprob"; a provider that computes them again in backward does six, or
# four, and its ratio to the floor says so.
OPERATIONS = {"forward": "per_token_kl", "loss": "mean_kl", "frozen": "mean_kl", "stats": "token_stats", "grpo": "grpo_loss",
              "distillation": "distillation_loss", "logprob": "logprob"}
PRODUCTS = {"forward": 2, "loss": 4, "frozen": 3, "stats": 4, "grpo": 4, "distillation": 4, "logprob": 3}
# Operations whose one output is a scalar, a mean over the tokens.
MEANS = ("mean_kl", "grpo_loss", "distillation_loss")
# Of the GRPO step: how far a ratio may move before its gradient stops, and the weight of the KL.
CLIP, BETA = 0.2, 0.04
# No log-ratio of the data is so near to one where the clip begins: there the gradient jumps, and the rounding of a 16-bit logit, up to 0.03, would
# decide on which side a token falls.
CLIP_MARGIN = 0.05

# Rows of the weight's gradient that are compared: the first, the last, and others spread evenly between them.
CHECKED_WEIGHT_ROWS = 64
# A provider may be off by so many times the error of plain torch in the same type on the same inputs: over all tokens, and in nine of ten rows.
TOLERANCE = 1.5
# In the worst token or row, by so many times plain torch's worst, and never by so much of its size or more: this is there to find a row that is
# wrong, not to compare digits (among 64 rows, roundings as good as torch's but independent of them were up to 3.2 times as far off in their worst).
# A row that is missing is off by 1, one that is half too large by 0.5. A row in which plain torch is off as much is let pass: where two tokens share
# a row's probability, the rounding of their 16-bit logits may be two thirds of its gradient, for everybody; that is one row in some thousands.
WORST_TOLERANCE, WORST = 5, 0.4
# A row's error is relative to its own norm, or to this part of the root mean square norm of all rows if that is more: where one token has all the
# probability the gradient is nearly 0, and its rounding is as large. A row so small is less than a hundredth of the average of the squared norms.
SMALL_ROW = 0.1
# Added for float32, where the order of a sum alone can double an error of 1e-6; bf16 is far above it.
LEAST = 1e-5


@dataclass(frozen=True)
class LinearWorkload:
    """KL(policy‖reference) of `rows` tokens from hidden states of `hidden` numbers and two weights [vocabulary, hidden].

    mode: "forward" is the KL per token without gradient; "loss" its mean and the gradient to hidden and weight; "frozen" the same with the
    gradient to hidden only; "stats" all fields of token_stats, an upstream gradient on each, and the gradient to hidden and weight. Two whole losses,
    with the gradient to hidden and weight: "grpo" is the clipped policy loss of the tokens plus BETA times the exact KL, "distillation" the mean of
    KL(teacher‖student), where the reference is the teacher. "logprob" is the log-probability of the tokens alone, without a reference: what fused
    cross-entropies compute.
    """

    mode: str = "loss"
    rows: int = 8192
    hidden: int = 4096
    vocabulary: int = 128256
    dtype: str = "bf16"

    @property
    def name(self):
        """The workload in one word, for tables and test ids."""
        return f"linear-{self.mode}-{self.rows}x{self.hidden}x{self.vocabulary}-{self.dtype}"

    def as_dict(self):
        """The workload as it stands in the results."""
        return {"name": self.name, **asdict(self)}

    @property
    def operation(self):
        """What a provider has to offer for it."""
        return OPERATIONS[self.mode]

    @property
    def phase(self):
        """What is timed: forward alone where there is no gradient, else forward and backward."""
        return "forward" if self.mode == "forward" else "both"

    @property
    def tensor_bytes(self):
        """Bytes of one weight, the smallest of what is read from one end to the other."""
        return self.vocabulary * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def flop(self):
        """Floating-point operations of the products that have to be done."""
        return PRODUCTS[self.mode] * 2 * self.rows * self.hidden * self.vocabulary


@dataclass
class LinearInputs:
    """The tensors of one workload; `upstream` belongs to the outputs of its operation, in their order.

    old_logprob, advantages: [rows] float32, for the GRPO step; the log-probabilities of a policy near this one.
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
        """The tensors that the gradient is taken with respect to: hidden, or hidden and weight, or none."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def gradients(self, outputs):
        """The gradients of the leaves. An output without a gradient (ref_logprob) takes no upstream; one that lost it makes the others wrong."""
        if not self.leaves:
            return ()
        pairs = [(output, upstream) for output, upstream in zip(outputs, self.upstream, strict=True) if output.requires_grad]
        return torch.autograd.grad([output for output, _ in pairs], self.leaves, [upstream for _, upstream in pairs])


def make_linear_inputs(workload, device, seed=0):
    """Random policy logits near N(0, 3²), and a reference whose hidden states and weight both differ a little: a KL of a few tenths of a nat."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[workload.dtype]

    def noise(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    hidden = noise(workload.rows, workload.hidden)
    weight = noise(workload.vocabulary, workload.hidden).mul_(3 / workload.hidden**0.5)
    ref_hidden = noise(workload.rows, workload.hidden).mul_(0.25).add_(hidden)
    ref_weight = noise(workload.vocabulary, workload.hidden).mul_(0.6 / workload.hidden**0.5).add_(weight)
    tokens = torch.randint(workload.vocabulary, (workload.rows,), generator=generator, device=device)
    if workload.mode == "stats":
        upstream = tuple(torch.randn(workload.rows, generator=generator, device=device) for _ in FIELDS)
    elif workload.mode == "logprob":
        upstream = (torch.randn(workload.rows, generator=generator, device=device),)
    else:
        upstream = (torch.ones((), device=device),)
    jitter, advantages = (torch.randn(workload.rows, generator=generator, device=device) for _ in range(2))
    old_logprob = logprobs(workload, hidden, weight, tokens) - off_the_clip(0.2 * jitter) if workload.mode == "grpo" else jitter
    hidden.requires_grad_(workload.mode != "forward")
    weight.requires_grad_(workload.mode not in ("forward", "frozen"))
    return LinearInputs(hidden, weight, ref_hidden, ref_weight, tokens, upstream, old_logprob, advantages)


def logprobs(workload, hidden, weight, tokens):
    """log π of the tokens in float32, a block at a time."""
    blocks = [F.linear(hidden[block], weight).float().log_softmax(-1).gather(-1, tokens[block][:, None])[:, 0]
              for (block,) in row_blocks((workload.rows,), workload.vocabulary)]
    return torch.cat(blocks)


def off_the_clip(log_ratio):
    """The log-ratios, those within CLIP_MARGIN of where the clip begins moved that far away from it."""
    for edge in (math.log(1 - CLIP), math.log(1 + CLIP)):
        side = torch.where(log_ratio < edge, -CLIP_MARGIN, CLIP_MARGIN)
        log_ratio = torch.where((log_ratio - edge).abs() < CLIP_MARGIN, edge + side, log_ratio)
    return log_ratio


def grpo_terms(logprob, kl, old_logprob, advantages):
    """The GRPO loss of each token in plain torch."""
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages) + BETA * kl


# The gate -------------------------------------------------------------------------------------------------------


def output_fields(workload):
    """The names of the operation's outputs."""
    return {"stats": FIELDS, "grpo": ("loss",), "distillation": ("loss",), "logprob": ("logprob",)}.get(workload.mode, ("kl",))


def checked_rows(workload, device):
    """Which rows of the weight's gradient are compared."""
    return torch.linspace(0, workload.vocabulary - 1, CHECKED_WEIGHT_ROWS, dtype=torch.float64).long().unique().to(device)


def answer(workload, inputs, dtype):
    """{name: tensor}: every field [N] and, where the mode has them, dhidden [N, H] and dweight [checked rows, H], by plain torch in one type.

    A block of tokens at a time, so that the float64 copies stay small; the weight's gradient is one product over all tokens.
    """
    leaves = len(inputs.leaves)
    hidden, weight, ref_hidden, ref_weight = (
        tensor.detach().to(dtype) for tensor in (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
    )
    columns = checked_rows(workload, hidden.device)
    upstream = dict(zip(output_fields(workload), inputs.upstream, strict=True))
    if workload.operation in MEANS:
        upstream = {name: (value / workload.rows).expand(workload.rows) for name, value in upstream.items()}
    parts = {}
    for (block,) in row_blocks((workload.rows,), workload.vocabulary):
        logits = F.linear(hidden[block], weight).requires_grad_(leaves > 0)
        values = dict(zip(FIELDS, plain_token_stats(logits, inputs.tokens[block], F.linear(ref_hidden[block], ref_weight)), strict=True))
        if workload.mode == "distillation":
            values["loss"] = values["ref_kl"]
        elif workload.mode == "grpo":
            values["loss"] = grpo_terms(values["logprob"], values["kl"], inputs.old_logprob[block], inputs.advantages[block])
        if leaves:
            taken = [name for name in upstream if values[name].requires_grad]
            grads = [upstream[name][block].to(values[name].dtype) for name in taken]
            (grad_logits,) = torch.autograd.grad([values[name] for name in taken], logits, grads)
            values.update(dhidden=grad_logits @ weight, columns=grad_logits[:, columns])
        for name, value in values.items():
            parts.setdefault(name, []).append(value.detach())
        del logits, values
    result = {name: torch.cat(blocks) for name, blocks in parts.items()}
    if leaves > 1:
        result["dweight"] = result["columns"].t() @ hidden
    return result


@dataclass
class Expected:
    """The answer in float64, what a provider's errors may be, and by how much each row of a gradient may be off whatever its size is."""

    answer: dict[str, torch.Tensor]
    limits: dict[str, float]
    granted: dict[str, torch.Tensor]


def expected(workload, inputs):
    """What the gate compares with: computed once for all providers, since it takes three products in float64."""
    exact = answer(workload, inputs, torch.float64)
    plain = answer(workload, inputs, DTYPES[workload.dtype])
    names = compared(workload, inputs)
    limits, granted = {}, {}
    for name in names:
        for what, value in errors(name, plain[name], exact[name]).items():
            limits[what] = (min(WORST_TOLERANCE * value, WORST) if "worst" in what else TOLERANCE * value) + LEAST
        if exact[name].dim() == 2:
            granted[name] = TOLERANCE * (plain[name].double() - exact[name]).norm(dim=-1)
    return Expected({name: exact[name] for name in names}, limits, granted)


def compared(workload, inputs):
    """The names of all that the gate compares: the outputs, then the gradients."""
    return (*output_fields(workload), *("dhidden", "dweight")[: len(inputs.leaves)])


def errors(name, value, true, granted=None):
    """{what: error}: relative in the L2 norm, over all, and of the worst token or row. A NaN stays NaN, which no limit admits.

    A row of a gradient is compared with its own norm, but see SMALL_ROW; the worst of those that are off by more than `granted` counts. Nine of ten
    rows of dhidden are within the third error, each of its own norm: the sum over all hides a part of the gradient that only small rows have. A
    token's field is compared with the root mean square of all, since a KL near 0 has no digits in bf16.
    """
    difference = value.detach().double() - true
    found = {name: difference.norm() / true.norm()}
    if true.dim() == 2:
        off, size = difference.norm(dim=-1), true.norm(dim=-1)
        counted = off if granted is None else torch.where(off <= granted, 0.0, off)
        found[f"{name}, worst row"] = (counted / size.clamp_min(SMALL_ROW * size.square().mean().sqrt())).max()
        if name == "dhidden":
            found[f"{name}, nine of ten rows"] = (off / size).quantile(0.9)
    else:
        found[f"{name}, worst token"] = difference.abs().max() / true.square().mean().sqrt()
    return {what: error.item() for what, error in found.items()}


def linear_fault(workload, inputs, known, outputs, gradients):
    """(errors, what is wrong or None): the gate that a provider passes before it is timed.

    A mean is held to the limit of its tokens: plain torch's own mean may be right by luck.
    """
    leading = () if workload.operation in MEANS else (workload.rows,)
    results = (*outputs, *gradients)
    shapes = [tuple(result.shape) for result in results]
    right = [leading] * len(output_fields(workload)) + [tuple(leaf.shape) for leaf in inputs.leaves]
    if shapes != right:
        return {}, f"outputs and gradients have the shapes {shapes}, expected {right}"
    found = {}
    for name, result in zip(compared(workload, inputs), results, strict=True):
        true = known.answer[name]
        if name == "dweight":
            result = result[checked_rows(workload, result.device)]
        if result.dim() == 0:
            # Relative to the size of the tokens' losses: those of either sign cancel in their mean.
            found[name] = ((result.detach().double() - true.mean()).abs() / true.abs().mean()).item()
        else:
            found.update(errors(name, result, true, known.granted.get(name)))
    # "not <=" instead of ">": a NaN has to fail.
    over = [f"{name} off by {found[name]:.1e}, limit {known.limits[name]:.1e}" for name in found if not found[name] <= known.limits[name]]
    return found, "; ".join(over) or None
