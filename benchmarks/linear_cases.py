"""Define the cases from hidden states: shapes, random data, the floor, the gate in float64."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, FIELDS, Case, Known, evenly, sizes
from benchmarks.work import PLAIN, PRODUCTS, gradients, grpo_terms, plain_token_stats
from fastkl import testing

# Modes whose output is a mean over the tokens.
MEANS = ("loss", "frozen", "grpo", "distillation", "js")
OUTPUTS = {
    "forward": ("kl",),
    "loss": ("kl",),
    "frozen": ("kl",),
    "stats": FIELDS,
    "grpo": ("loss",),
    "distillation": ("loss",),
    "js": ("loss",),
    "logprob": ("logprob",),
}
# Log-ratios of the GRPO step, inside and outside the clip. None is near log(0.8) or log(1.2), where
# the gradient jumps: a 16-bit logit's rounding, up to 0.03, could move a token across.
LOG_RATIOS = (-0.4, -0.1, 0.1, 0.4)
BLOCK = 256  # tokens whose logits are in float64 at once

CHECKED_WEIGHT_ROWS = 64  # rows of the weight's gradient compared, evenly spaced
# A provider's errors (cases.ERRORS) may be these multiples of plain torch's in the same dtype on
# the same inputs, and no row's error more than WORST. The error over all rows and that of nine of
# ten rows compare accuracy; nine of ten, because the sum over all hides errors in small rows. The
# limit on the worst row detects a wrong row: a missing row is off by 1, a row too large by half is
# off by 0.5 (among 64 rows, roundings as good as torch's but independent of them were off by up to
# 3.2 times as much).
TOLERANCE, TOLERANCES, WORST = 1.5, (1.5, 1.5, 5), 0.4
# A row's error is relative to its norm, or to this part of the root mean square norm of all rows if
# that is more: if one token has all the probability the gradient is nearly 0, and its rounding is
# as large. A row where plain torch is equally far off does not count either: if two tokens share a
# row's probability, the rounding of their 16-bit logits may be two thirds of its gradient for every
# provider, in one row of some thousands.
SMALL_ROW = 0.1
# Added for float32: the order of a sum alone can double an error of 1e-6.
LEAST = 1e-5

FLOOR = "cuBLAS products"


@dataclass(frozen=True)
class LinearWorkload(Case):
    """KL(policy‖reference) of `rows` tokens from hidden states and two weights.

    mode: "forward" is the KL per token without gradient; "loss" its mean and the gradient to hidden
    and weight; "frozen" the same with the gradient to hidden only; "stats" all fields of
    token_stats, an upstream gradient on each, and the gradient to hidden and weight. Three whole
    losses, with the gradient to hidden and weight: "grpo" is the clipped policy loss of the tokens
    plus BETA times the exact KL, "distillation" the mean of KL(teacher‖student) with the reference
    as teacher, "js" the mean of their Jensen-Shannon divergence. "logprob" is only the
    log-probability of the tokens, without a reference, as in fused cross-entropies.
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
    """Make hidden and weight with logits near N(0, 3²), and ref_hidden, ref_weight at a KL of a few
    tenths of a nat.

    Also tokens; upstream for each output; for the GRPO step old_logprob, from a policy near this
    one, and advantages, [rows] float32; leaves, the tensors with a gradient: hidden, or hidden and
    weight, or none.
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
    i.advantages = torch.randn(rows, **options)
    if mode == "grpo":
        (logprob,) = PLAIN["logprob"](F.linear(i.hidden, i.weight), None, i.tokens)
        chosen = torch.randint(len(LOG_RATIOS), (rows,), **options)
        i.old_logprob = logprob - torch.tensor(LOG_RATIOS, device=device)[chosen]
    i.leaves = {"forward": (), "frozen": (i.hidden,)}.get(mode, (i.hidden, i.weight))
    for leaf in i.leaves:
        leaf.requires_grad_()
    return i


# The gate


def answer(workload, inputs, dtype):
    """Compute {name: tensor} by plain torch in one dtype, for everything that the gate compares; in
    float64 it is the truth.

    Every output [N] and, if the mode has them, dhidden [N, H] and dweight [checked rows, H]. Runs a
    block of tokens at a time, so that the float64 copies stay small; the weight's gradient is one
    GEMM over all tokens.
    """
    models = (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
    hidden, weight, ref_hidden, ref_weight = (tensor.detach().to(dtype) for tensor in models)
    share = workload.rows if workload.mode in MEANS else 1
    checked = evenly(CHECKED_WEIGHT_ROWS, workload.vocabulary)
    upstream, parts = [u.expand(workload.rows) / share for u in inputs.upstream], defaultdict(list)
    for some in torch.arange(workload.rows, device=hidden.device).split(BLOCK):
        logits = F.linear(hidden[some], weight).requires_grad_(bool(inputs.leaves))
        ref_logits, tokens = F.linear(ref_hidden[some], ref_weight), inputs.tokens[some]
        values = (
            testing.truth(logits, ref_logits).stats(tokens)
            if dtype == torch.float64
            else dict(zip(FIELDS, plain_token_stats(logits, ref_logits, tokens), strict=True))
        )
        values["loss"] = values["ref_kl"]
        if workload.mode == "js":
            (values["loss"],) = PLAIN["js_divergence"](ref_logits, logits)
        if workload.mode == "grpo":
            step = inputs.old_logprob[some], inputs.advantages[some]
            values["loss"] = grpo_terms(values["logprob"], values["kl"], *step)
        found = {name: values[name] for name in OUTPUTS[workload.mode]}
        if inputs.leaves:
            chunk = SimpleNamespace(leaves=(logits,), upstream=[u[some] for u in upstream])
            (grad,) = gradients(chunk, found.values())
            found |= {"dhidden": grad @ weight, "columns": grad[:, checked]}
        for name, value in found.items():
            parts[name].append(value.detach())
    found = {name: torch.cat(values) for name, values in parts.items()}
    columns = found.pop("columns", None)
    return found if len(inputs.leaves) < 2 else {**found, "dweight": columns.t() @ hidden}


def linear_truth(workload, inputs):
    """Compute {output, "dhidden" or "dweight": Known}. A mean gets the limit of its tokens: plain
    torch's mean may be accurate by chance, because errors of both signs cancel in it.
    """
    exact = answer(workload, inputs, torch.float64)
    plain = answer(workload, inputs, DTYPES[workload.dtype])
    shapes = dict(zip(("dhidden", "dweight"), (x.shape for x in inputs.leaves), strict=False))
    places, known = {"dweight": evenly(CHECKED_WEIGHT_ROWS, workload.vocabulary)}, {}
    for name, true in exact.items():
        size, off = sizes(true), sizes(plain[name].double() - true)
        least = SMALL_ROW * size.square().mean().sqrt()
        # If plain torch is off by more than WORST in a row, the limit is TOLERANCE times that.
        scale = size.clamp_min(least).maximum(TOLERANCE / WORST * off)
        pairs = zip(TOLERANCES, Known(true, scale).errors(plain[name]), strict=True)
        limits = tuple(min(times * error, WORST) + LEAST for times, error in pairs)
        at, shape = places.get(name, ...), shapes.get(name, true.shape)
        known[name] = Known(true, scale, limits, shape, at)
    if workload.mode in MEANS:
        (name,) = OUTPUTS[workload.mode]
        true, limits = exact[name], known[name].limits[:1] * 3
        known[name] = Known(true.mean(), true.abs().mean(), limits, ())
    return known


# The floor


def bare_products(workload, inputs, chunk):
    """Make a function that runs only the workload's GEMMs, with cuBLAS.

    It takes `chunk` tokens at a time, into buffers allocated here. Choices favour the floor: the
    gradient GEMMs use the policy's logits as operand, so nothing else is read or written; each
    chunk overwrites the weight's gradient instead of adding to it, in the 16-bit dtype.
    """
    with_reference = workload.mode != "logprob"
    count = PRODUCTS[workload.mode] - 1 - with_reference
    logits, ref_logits = (inputs.hidden.new_empty(chunk, workload.vocabulary) for _ in range(2))
    buffers = [torch.empty_like(x.detach()) for x in (inputs.hidden, inputs.weight)]

    @torch.no_grad()
    def run(inputs):
        whole = (inputs.hidden, inputs.ref_hidden, buffers[0])
        for some, ref_some, grad in zip(*(x.split(chunk) for x in whole), strict=True):
            policy = torch.mm(some, inputs.weight.t(), out=logits[: len(some)])
            products = [(policy, inputs.weight, grad), (policy.t(), some, buffers[1])][:count]
            if with_reference:
                products.append((ref_some, inputs.ref_weight.t(), ref_logits[: len(some)]))
            for left, right, out in products:
                torch.mm(left, right, out=out)
        return ()

    return run
