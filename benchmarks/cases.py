"""Define the cases on logits: shapes, random data, minimum bytes moved, float64 truth.

A case is an operation on `rows` tokens; suites.py lists the measured ones. Cases from hidden states
are in linear_cases.py.
"""

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

from benchmarks.work import FAMILY, ONE_TENSOR, TOP_K, TOPK, gradients, log_probs, log_softmax
from fastkl import f_divergences, testing

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
PHASES = ("forward", "backward", "both")
# The statistics of a policy-gradient step, without log-sum-exps.
FIELDS = testing.FIELDS[:5]
# Outputs of an operation, by their names in fastkl.testing, or a divergence of FAMILY; "mean_kl"
# and "mean_js" are losses over all tokens.
OUTPUTS = {
    "kl_divergence": ("kl",),
    "mean_kl": ("kl",),
    "token_stats": FIELDS,
    "logprob": ("logprob",),
    "logprob_entropy": ("logprob", "entropy"),
    "entropy": ("entropy",),
    **{name: (name,) for name in FAMILY},
    "mean_js": ("js_divergence",),
}
MEANS = ("mean_kl", "mean_js")
DIFFERENTIATED = ("logprob", "entropy", "kl", *FAMILY)  # outputs that get an upstream gradient
CHECKED_ROWS = 256  # compared with float64, slower than any provider
# Relative errors of a row. Rounding the gradient alone costs 2^-9 (bf16), 2^-12 (fp16).
VALUE_LIMIT = 1e-3
GRADIENT_LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-3}
# Errors of a result: L2 norm over all rows, 90th percentile of rows, worst row.
ERRORS = ("", ", nine of ten rows", ", worst row")


class Case:
    def as_dict(self):
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Workload(Case):
    """An operation on two logits tensors, or on `p` alone, and its gradient to one of them.

    operation: a key of OUTPUTS; MEANS are means over the tokens, losses with an upstream gradient
    of 1. wrt: the tensor of the gradient, "p" or "q"; "q" for the top-k KL. layout: "rows" is a
    contiguous [rows, vocabulary]; "sliced" is logits[:, :-1] of [8, rows / 8 + 1, vocabulary], as
    in trainers that shift by one token.
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
        """Count the minimum bytes moved. Forward reads the logits, backward reads them again and
        writes one gradient; a top-k list is negligible.
        """
        read = 1 if self.operation in (*ONE_TENSOR, TOPK) else 2
        tensors = {"forward": read, "backward": read + 1, "both": 2 * read + 1}[phase]
        return tensors * self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def rates(self, phase, milliseconds, copy):
        moved = self.moved_bytes(phase)
        rate = moved / milliseconds / 1e6
        return {"bytes": moved, "gb_per_s": rate, "percent_of_copy": 100 * rate / copy}


def inputs_of(p, q, wrt, **others):
    """Return the tensors of a workload: p, q, wrt, leaves (the tensor with a gradient) and
    others.
    """
    leaf = (p if wrt == "p" else q).requires_grad_()
    return SimpleNamespace(p=p, q=q, wrt=wrt, leaves=(leaf,), **others)


def make_inputs(workload, device, seed=0):
    """Make logits p, N(0, 3²), and q = p + N(0, 1): a KL of a few tenths of a nat.

    Also tokens, and upstream for each output, None for an output without one. If the operation
    reads one logits tensor, q is empty. For the top-k KL p and tokens are the teacher's list.
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
    p, tokens = top_k(p) if workload.operation == TOPK else (p, tokens)
    upstream = (torch.ones((), device=device),)
    if workload.operation not in MEANS:
        upstream = tuple(
            torch.randn(p.shape[:-1], **options) if name in DIFFERENTIATED else None
            for name in OUTPUTS[workload.operation]
        )
    return inputs_of(p, q, workload.wrt, tokens=tokens, upstream=upstream)


def top_k(logits):
    """Return log-probs and ids of the most probable tokens, [..., K] each."""
    return log_softmax(logits).topk(min(TOP_K, logits.shape[-1]))


# The gate


class Known(NamedTuple):
    """The float64 truth of a result: a number, or rows of numbers or of vectors.

    scale: the denominator of each row's error. limits: one for each of ERRORS. shape: of the whole
    result. at: the rows compared, by default all.
    """

    true: torch.Tensor
    scale: torch.Tensor
    limits: tuple = ()
    shape: tuple = ()
    at: object = ...

    def errors(self, result):
        """Return the errors of a result, one for each of ERRORS. A NaN stays NaN and fails every
        limit.
        """
        off = sizes(result.detach()[self.at].double() - self.true)
        relative = (off / self.scale).flatten()
        found = off.norm() / self.scale.norm(), relative.quantile(0.9), relative.max()
        return [error.item() for error in found]


def evenly(count, total):
    """Choose `count` indices below `total`: the first, the last and evenly spaced ones between."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def sizes(rows):
    return rows.norm(dim=-1) if rows.dim() > 1 else rows.abs()


def exact(operation, p, q, tokens):
    """Compute the outputs of an operation in float64, by formulas accurate near 0."""
    names = OUTPUTS[operation]
    if (name := names[0]) in FAMILY:
        pair = log_probs(name, p.double(), q.double(), tokens)
        return {name: f_divergences.divergence(*pair, *FAMILY[name])}
    found = testing.truth(p, q).stats(tokens)
    return {name: found[name] for name in names}


def truth(workload, inputs):
    """Compute {output or "gradient": Known}.

    The rows compared are the first, the last and evenly spaced ones between; a mean is one number,
    over ALL tokens. Errors of values are relative to the value, or to 1e-3 nats if that is more.
    """
    operation, leading = workload.operation, inputs.p.shape[:-1]
    mean, count = operation in MEANS, leading.numel()
    rows = torch.unravel_index(evenly(CHECKED_ROWS, count).to(inputs.p.device), leading)
    pair = (inputs.p, inputs.q if inputs.q.numel() else inputs.p)
    p, q = (x.detach()[rows].double() for x in pair)
    share = count if mean else 1
    upstream = [u if u is None else u.expand(leading)[rows] / share for u in inputs.upstream]
    some = inputs_of(p, q, workload.wrt, upstream=upstream)
    values, shape, at = exact(operation, some.p, some.q, inputs.tokens[rows]), leading, rows
    (gradient,) = gradients(some, values.values())
    if mean:
        whole = (x.detach().flatten(0, -2) for x in (*pair, inputs.tokens[..., None]))
        blocks = zip(*(x.split(CHECKED_ROWS) for x in whole), strict=True)
        each = [exact(operation, p, q, tokens[:, 0]) for p, q, tokens in blocks]
        values = {name: torch.cat([one[name] for one in each]).mean() for name in values}
        shape, at = (), ...
    limits, whole = (VALUE_LIMIT,) * 3, inputs.leaves[0].shape
    known = {
        name: Known(true.detach(), true.detach().abs().clamp_min(1e-3), limits, shape, at)
        for name, true in values.items()
    }
    limits = (GRADIENT_LIMITS[workload.dtype],) * 3
    return {**known, "gradient": Known(gradient, sizes(gradient), limits, whole, rows)}


def fault(known, results):
    """Return (errors, description of the fault or None): the gate before a provider is timed.

    results: all outputs, then all gradients, each compared with its `known` truth. Rows that are
    not compared must be finite.
    """
    shapes, right = ([tuple(x.shape) for x in some] for some in (results, known.values()))
    if shapes != right:
        return {}, f"outputs and gradients have the shapes {shapes}, expected {right}"
    errors, wrong = {}, []
    for (name, one), result in zip(known.items(), results, strict=True):
        for kind, error, limit in zip(ERRORS, one.errors(result), one.limits, strict=True):
            errors[name + kind] = error
            if not error <= limit:
                wrong.append(f"{name}{kind} off by {error:.1e}, limit {limit:.1e}")
        # The infinity norm takes one read and no copy, and propagates NaN.
        if not torch.linalg.vector_norm(result.detach(), math.inf).isfinite():
            wrong.append(f"{name} not finite everywhere")
    return errors, "; ".join(wrong) or None
