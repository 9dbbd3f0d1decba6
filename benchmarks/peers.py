"""Load other packages as providers (providers.py); each loader describes its work.

All peers get the same tensors, and are used as documented, with float32 softmaxes if the caller
decides. A peer is imported when its loader is called; one that is not installed or cannot run here
raises, and the reason becomes a row of the results.
"""

import inspect
import os
import warnings
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.work import JS_BETA, TOPK, NotOfferedError, Work, linear_works, log_softmax

ASKS = "its backward asks the GPU whether the upstream gradient is 1"
ROWS_BY_CALLS = 64  # up to here a scalar loss is called per row, to see its error


def _needs_gpu(device):
    """Raise for Triton kernels without a GPU, unless the process is one of processes.py."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("its Triton kernels need a GPU")


def load_trl(device):
    """Load TRL: GKDTrainer.generalized_jsd_loss, and its log-prob and entropy functions.

    The KL is the mode that a trainer would use: beta = 1 with the first argument as student,
    beta = 0 with the second. The loss computes softmaxes in the logits' dtype, so they are cast to
    float32 here, as TRL's mixed precision returns them. Its kernel for log-prob and entropy (GPU
    only) reads 16-bit logits; on a CPU they are cast as well. There is no token_stats. The top-k KL
    is built from parts of SDPOTrainer's loss.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about trl.experimental
        from trl.experimental.gkd import GKDTrainer
        from trl.experimental.sdpo import loss_utils
    from trl.trainer import utils

    def loss(i, reduction, beta=0):
        # beta: the share of P, or of the teacher.
        student, teacher, beta = (i.q, i.p, beta) if i.wrt == "q" else (i.p, i.q, 1 - beta)
        # [N, V]: the loss divides by the first dimension.
        pair = (x.float().flatten(0, -2) for x in (student, teacher))
        return GKDTrainer.generalized_jsd_loss(*pair, beta=beta, reduction=reduction)

    def each(i, beta=0):
        return (loss(i, "none", beta).sum(-1).view(i.p.shape[:-1]),)

    def topk(i):
        student = i.q.float().log_softmax(-1).gather(-1, i.tokens)
        pair = (loss_utils.add_tail_bucket(x) for x in (student, i.p))
        return (loss_utils.compute_divergence(*pair, alpha=0.0),)

    def logits(i):
        return i.p if i.p.is_cuda else i.p.float()

    note = (
        "more work: float32 copies of the logits, divided by a temperature, two log_softmax; "
        "writes [N, V] of losses"
    )
    fused = "one kernel for log-probability and entropy, whichever is asked for"
    mixed = f"{note}, and a stack of both log_softmax in [2, N, V]"
    return {
        "kl_divergence": Work(each, note),
        "mean_kl": Work(lambda i: (loss(i, "batchmean"),), note),
        "js_divergence": Work(partial(each, beta=JS_BETA), mixed),
        "mean_js": Work(lambda i: (loss(i, "batchmean", JS_BETA),), mixed),
        TOPK: Work(topk, "the same work: a float32 copy of the logits and its log_softmax"),
        "logprob": Work(lambda i: (utils.selective_log_softmax(logits(i), i.tokens),), fused),
        "logprob_entropy": Work(
            lambda i: utils.selective_log_softmax_and_entropy(logits(i), i.tokens), fused
        ),
        "entropy": Work(lambda i: (utils.entropy_from_logits(logits(i)),), fused),
    }


def load_liger_kldiv(device):
    """Load Liger-Kernel's LigerKLDIVLoss(log_target=True) after two float32 log_softmax by
    torch. There is no gradient to the target: KL(P‖Q) to Q only.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerKLDIVLoss

    each, mean = (LigerKLDIVLoss(reduction=kind, log_target=True) for kind in ("none", "batchmean"))

    def log_probs(i):
        if i.wrt == "p":
            raise NotOfferedError("LigerKLDIVLoss has no gradient to its target, P of KL(P‖Q)")
        return (log_softmax(x).flatten(0, -2) for x in (i.q, i.p))

    note = "the same work: two float32 log_softmax by torch first"
    return {
        "kl_divergence": Work(
            lambda i: (each(*log_probs(i)).sum(-1).view(i.p.shape[:-1]),),
            f"{note}, writes [N, V] of losses",
        ),
        "mean_kl": Work(lambda i: (mean(*log_probs(i)),), f"{note}; {ASKS}"),
    }


def load_liger_jsd(device):
    """Load Liger-Kernel's LigerJSD after two log_softmax by torch.

    beta = 1 is KL(P‖Q) with its gradient to P, beta = 0 the same with its gradient to Q. The result
    is one scalar, the mean over all tokens, so a value per token takes a call per row: done for few
    rows, to see the error; refused for many, where the calls would dominate the time.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerJSD

    def loss_and_sides(i, beta):
        # beta: the share of P; Liger's is the teacher's. The student has the gradient.
        log_p, log_q = (log_softmax(x).flatten(0, -2) for x in (i.p, i.q))
        if i.wrt == "p":
            log_p, log_q, beta = log_q, log_p, 1.0 - beta
        return LigerJSD(beta=beta), log_q, log_p

    def mean(i, beta=0.0):
        loss, student, teacher = loss_and_sides(i, beta)
        return (loss(student, teacher),)

    def per_token(i, beta=0.0):
        if (rows := i.p.shape[:-1].numel()) > ROWS_BY_CALLS:
            raise NotOfferedError(
                f"LigerJSD gives one scalar for all tokens; one per token would be {rows} calls"
            )
        loss, *sides = loss_and_sides(i, beta)
        pairs = zip(*(side.split(1) for side in sides), strict=True)
        return (torch.stack([loss(*pair) for pair in pairs]).view(i.p.shape[:-1]),)

    note = (
        "the same work: two float32 log_softmax by torch first; value and gradient in one kernel, "
        "[N, V] of losses"
    )
    return {
        "kl_divergence": Work(per_token, f"{note}, a call per row"),
        "mean_kl": Work(mean, f"{note}; {ASKS}"),
        "js_divergence": Work(partial(per_token, beta=JS_BETA), f"{note}, a call per row"),
        "mean_js": Work(partial(mean, beta=JS_BETA), f"{note}; {ASKS}"),
    }


def load_liger_tvd(device):
    """Load Liger-Kernel's LigerTVDLoss on float32 softmaxes by torch. The gradient is to the first
    argument only.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerTVDLoss

    loss = LigerTVDLoss(reduction="none")

    def total_variation(i):
        pair = (i.p, i.q) if i.wrt == "p" else (i.q, i.p)
        each = loss(*(log_softmax(x).exp().flatten(0, -2) for x in pair))
        return (each.sum(-1).view(i.p.shape[:-1]),)

    note = "the same work: two float32 softmaxes by torch first, writes [N, V] of losses, gradients"
    return {"total_variation": Work(total_variation, note)}


def load_speculators(device):
    """Load speculators' fused losses, with a gradient to the draft's logits only."""
    _needs_gpu(device)
    from speculators.losses import fused

    def of(to_q, to_p, mean=False):
        def run(i):
            loss, draft, target = (to_q, i.q, i.p) if i.wrt == "q" else (to_p, i.p, i.q)
            each = loss(*(x.flatten(0, -2)[None] for x in (draft, target)))
            return (each.mean() if mean else each.view(i.p.shape[:-1]),)

        return Work(run, "the same work: forward reads the logits three times")

    kl = (fused.fused_kl_div_loss, fused.fused_reverse_kl_div_loss)
    js = (fused.fused_js_div_loss,) * 2
    return {
        "kl_divergence": of(*kl),
        "mean_kl": of(*kl, mean=True),
        "js_divergence": of(*js),
        "mean_js": of(*js, mean=True),
        "total_variation": of(fused.fused_tv_loss, fused.fused_tv_loss),
    }


# From hidden states


def load_trl_fused(device):
    """Load TRL's ChunkedDivergenceFunction, as its trainer calls it, and ChunkedLogProbFunction.

    beta 1: KL(student‖teacher), 0: KL(teacher‖student), each with the student's entropy, which
    cannot be left out. Logits are computed in tiles, and recomputed in backward; gradients are
    summed in float32.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE  # its trainers pass it

    def kl(beta, h, w, rh, rw, tokens):
        return ChunkedDivergenceFunction.apply(h, w, None, rh, rw, None, beta)[0]

    def logprob(hidden, weight, ref_hidden, ref_weight, tokens):
        inputs = (hidden, weight, None, tokens, 1.0, TILE, None, 1.0, ())
        return (ChunkedLogProbFunction.apply(*inputs)[0],)

    functions = {
        "kl_divergence": lambda *inputs: (kl(1.0, *inputs),),
        "mean_kl": lambda *inputs: (kl(1.0, *inputs).mean(),),
        "reverse_mean_kl": lambda *inputs: (kl(0.0, *inputs).mean(),),
        "mean_js": lambda h, w, *policy: (kl(JS_BETA, *policy[:2], h, w, policy[2]).mean(),),
        "logprob": logprob,
    }
    products = dict.fromkeys(("forward", "loss", "frozen", "distillation", "js", "logprob"))
    tiles = "float32 logits in tiles, again in backward; gradients summed in float32"
    entropy = f"more work: {tiles}; the student's entropy comes with it"
    return linear_works(functions, products, entropy, logprob=f"the same work: {tiles}")


def load_liger(device):
    """Load Liger-Kernel's LigerFusedLinearJSD: only losses, no divergence per token.

    The fused GRPO loss uses k3 of the sampled tokens, not the exact KL, so mode grpo is not
    offered. The weight's gradient is summed in float32, as ours, if the release supports it
    (accum_dtype).
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerFusedLinearJSD

    known = inspect.signature(LigerFusedLinearJSD).parameters
    options = {"accum_dtype": torch.float32} if "accum_dtype" in known else {}
    reverse, forward, js = (
        LigerFusedLinearJSD(jsd_beta=beta, **options) for beta in (1.0, 0.0, JS_BETA)
    )
    functions = {
        "mean_kl": lambda h, w, rh, rw, tokens: (reverse(h, w, rh, rw, None),),
        "reverse_mean_kl": lambda h, w, rh, rw, tokens: (forward(h, w, rh, rw, None),),
        "mean_js": lambda rh, rw, h, w, tokens: (js(h, w, rh, rw, None),),
    }
    summed = f"the weight's gradient summed in {'float32' if options else 'its type'}"
    products = {"loss": 4, "frozen": 3, "distillation": 4, "js": 4}
    return linear_works(functions, products, f"the same work, gradient with the value; {summed}")


def load_liger_chunked(device):
    """Load Liger-Kernel's LigerFusedLinearJSDLoss, set as in TRL's trainers.

    Softmaxes are computed in the logits' dtype, so bf16 may fail the gate; then the error is shown
    and no time. The gradient of the weight is computed even if the weight is frozen.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    betas = (1.0, JS_BETA)
    kl, js = (LigerFusedLinearJSDLoss(beta=beta, compiled=False, **weights) for beta in betas)
    note = "more work: a cross-entropy weighted by 0; softmaxes in the type of the logits"
    works = {
        "mean_kl": lambda *inputs: (kl(*inputs),),
        "mean_js": lambda rh, rw, h, w, tokens: (js(h, w, rh, rw, tokens),),
    }
    return linear_works(works, {"loss": 4, "frozen": 4, "js": 4}, note)


def load_cut_cross_entropy(device, work="less work: small gradients are left out", **options):
    _needs_gpu(device)
    from cut_cross_entropy import linear_cross_entropy

    return _cross_entropy(linear_cross_entropy, f"{work}, logits never reach memory", **options)


def _cross_entropy(function, note, **options):
    """Make mode logprob from a linear cross-entropy that recomputes the logits in backward."""

    def logprob(hidden, weight, ref_hidden, ref_weight, tokens):
        return (-function(hidden, weight, tokens, reduction="none", **options),)

    return linear_works({"logprob": logprob}, {"logprob": 4}, f"{note}; logits again in backward")


PEERS = {
    "TRL": load_trl,
    "Liger KLDIVLoss": load_liger_kldiv,
    "Liger JSD": load_liger_jsd,
    "Liger TVD": load_liger_tvd,
    "speculators": load_speculators,
}
LINEAR_PEERS = {
    "TRL fused": load_trl_fused,
    "liger": load_liger,
    "liger chunked": load_liger_chunked,
    "torch linear_cross_entropy": lambda device: _cross_entropy(
        F.linear_cross_entropy, "logits in chunks", options=torch.nn.LinearCrossEntropyOptions()
    ),
    "cut-cross-entropy": load_cut_cross_entropy,
    "cut-cross-entropy, unfiltered": partial(
        load_cut_cross_entropy, work="no gradient left out", filter_eps=None
    ),
}
