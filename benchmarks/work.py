"""Define a provider's work, build it from functions on tensors, and implement all of it in plain
torch.

PLAIN computes every operation by the textbook formula, with softmaxes in float32 or, for float64
input, in float64. Its token_stats returns the fields of TokenStats; logprob_kl only the two terms
of a GRPO loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

# Operations on one logits tensor.
ONE_TENSOR = {"logprob", "logprob_entropy", "entropy"}
# Divergences of a teacher P and a student Q other than the KL, by their names in fastkl: kind and
# share of fastkl/f_divergences.py. The top-k KL takes a list of the teacher's log-probs instead of
# its logits, and their ids instead of tokens.
JS_BETA, TOPK, TOP_K = 0.5, "topk_kl_divergence", 64
FAMILY = {
    "js_divergence": ("js", JS_BETA),
    "skew_kl_divergence": ("skew_kl", 0.1),
    "renyi_divergence": ("renyi", 0.5),
    "total_variation": ("total_variation", 0.0),
    "jeffreys_divergence": ("jeffreys", 0.0),
    TOPK: ("kl", 0.0),
}
# The modes from hidden states, and the minimum number of N x H x V GEMMs: two for the logits (one
# for "logprob"), one for each gradient. For "stats" and "grpo" this assumes that all logits are
# kept; with recomputed logits it is six, and four for "logprob".
PRODUCTS = {
    "loss": 4,
    "forward": 2,
    "grpo": 4,
    "distillation": 4,
    "js": 4,
    "logprob": 3,
    "stats": 4,
    "frozen": 3,
}
# The GRPO step's clip range of the ratio, and its weight of the KL.
CLIP, BETA = 0.2, 0.04


def grpo_terms(logprob, kl, old_logprob, advantages):
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages) + BETA * kl


class NotOfferedError(RuntimeError):
    """A provider does not support this size or gradient; the message goes into its row."""


@dataclass(frozen=True)
class Work:
    """One operation of a provider, with one line that describes its work.

    products: its N x H x V GEMMs from hidden states, None if not known.
    """

    run: Callable
    note: str
    products: int | None = None

    def __call__(self, inputs):
        return self.run(inputs)


def gradients(inputs, outputs, **options):
    """Return the gradients of inputs.leaves; options: of torch.autograd.grad. An output without a
    gradient (ref_logprob) takes no upstream; an output that lost its gradient makes the result
    wrong, and the gate detects it.
    """
    pairs = zip(outputs, inputs.upstream, strict=True)
    pairs = [(out, up) for out, up in pairs if up is not None and out.requires_grad]
    outs, upstream = ([pair[i] for pair in pairs] for i in range(2))
    return torch.autograd.grad(outs, inputs.leaves, upstream, **options) if inputs.leaves else ()


def logits_works(functions, note, **notes):
    """Make {operation: Work} from functions of (p_logits, q_logits, tokens). notes: for operations
    that differ from `note`.
    """
    return {
        name: Work(lambda i, call=function: call(i.p, i.q, i.tokens), notes.get(name, note))
        for name, function in functions.items()
    }


def on_hidden(functions):
    def made(operation, function):
        def run(hidden, weight, ref_hidden, ref_weight, tokens):
            second = None if operation in ONE_TENSOR else F.linear(ref_hidden, ref_weight)
            return function(F.linear(hidden, weight), second, tokens)

        return run

    return {name: made(name, function) for name, function in functions.items()}


def linear_works(functions, products, note, **notes):
    """Make {"linear_" + mode: Work} for the modes in `products`.

    functions: of (hidden, weight, ref_hidden, ref_weight, tokens), by "kl_divergence", "mean_kl",
    "token_stats", "logprob" and "logprob_kl"; "reverse_mean_kl" is the mean of KL(Q‖P) for policy
    P, by default mean_kl with the models swapped; "mean_js" takes the teacher, which is the
    reference, first. notes: for modes that differ from `note`.
    """

    def call(name):
        return lambda i: functions[name](i.hidden, i.weight, i.ref_hidden, i.ref_weight, i.tokens)

    def teacher_first(name, i):
        return functions[name](i.ref_hidden, i.ref_weight, i.hidden, i.weight, i.tokens)

    def grpo(i):
        logprob, kl = call("logprob_kl")(i)
        return (grpo_terms(logprob, kl, i.old_logprob, i.advantages).mean(),)

    def distillation(i):
        if "reverse_mean_kl" in functions:
            return call("reverse_mean_kl")(i)
        return teacher_first("mean_kl", i)

    runs = {
        "forward": call("kl_divergence"),
        "loss": call("mean_kl"),
        "frozen": call("mean_kl"),
        "stats": call("token_stats"),
        "logprob": call("logprob"),
        "grpo": grpo,
        "distillation": distillation,
        "js": partial(teacher_first, "mean_js"),
    }
    said = {mode: f"{count} products; " if count else "" for mode, count in products.items()}
    return {
        f"linear_{mode}": Work(runs[mode], said[mode] + notes.get(mode, note), count)
        for mode, count in products.items()
    }


# Plain torch: functions of (p_logits, q_logits, tokens)


def log_softmax(logits):
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _chosen(log_p, tokens):
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def _kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def plain_kl_divergence(p, q, tokens=None):
    return (_kl(log_softmax(p), log_softmax(q)),)


def log_probs(operation, p, q, tokens):
    """Compute the log-probabilities that one of FAMILY compares: of all tokens or, for the top-k
    KL, of K tokens and the rest as one more.
    """
    if operation != TOPK:
        return log_softmax(p), log_softmax(q)
    listed = p, log_softmax(q).gather(-1, tokens)
    rests = (1 - x.exp().sum(-1, keepdim=True) for x in listed)
    least = torch.finfo(listed[1].dtype).eps
    pairs = zip(listed, rests, strict=True)
    return tuple(torch.cat([x, rest.clamp_min(least).log()], -1) for x, rest in pairs)


def textbook(log_p, log_q, kind, share):
    if kind == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if kind == "renyi":
        return (share * log_p + (1 - share) * log_q).logsumexp(-1) / (share - 1)
    if kind == "jeffreys":
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    if kind == "kl":
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    of_p = _kl(log_p, log_m)
    return share * of_p + (1 - share) * _kl(log_q, log_m) if kind == "js" else of_p


def plain_divergence(operation, p, q, tokens=None):
    return (textbook(*log_probs(operation, p, q, tokens), *FAMILY[operation]),)


def plain_logprob_entropy(p, q, tokens):
    log_p = log_softmax(p)
    return _chosen(log_p, tokens), _entropy(log_p)


def plain_token_stats(p_logits, q_logits, tokens):
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    p = log_p.exp()
    return (
        _chosen(log_p, tokens),
        -(p * log_p).sum(-1),
        _chosen(log_q, tokens),
        (p * (log_p - log_q)).sum(-1),
        _kl(log_q, log_p),
    )


def plain_logprob_kl(p, q, tokens):
    log_p, log_q = log_softmax(p), log_softmax(q)
    return _chosen(log_p, tokens), _kl(log_p, log_q)


PLAIN = {
    "kl_divergence": plain_kl_divergence,
    "mean_kl": lambda p, q, tokens: (plain_kl_divergence(p, q)[0].mean(),),
    "token_stats": plain_token_stats,
    "logprob": lambda p, q, tokens: (_chosen(log_softmax(p), tokens),),
    "logprob_entropy": plain_logprob_entropy,
    "entropy": lambda p, q, tokens: (_entropy(log_softmax(p)),),
    "logprob_kl": plain_logprob_kl,
    **{name: partial(plain_divergence, name) for name in FAMILY},
    "mean_js": lambda p, q, tokens: (plain_divergence("js_divergence", p, q)[0].mean(),),
}
