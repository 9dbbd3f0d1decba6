"""Other packages as providers (benchmarks/providers.py): each loader says in its docstring which work it does and what it leaves out.

Every peer gets the same logits as the others, used the way its documentation shows and with float32 softmaxes wherever the caller decides. Nothing of
a peer is loaded before its loader is called; one that is not installed or cannot run here raises, and the reason becomes a row of the results.
"""
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROWS_BY_CALLS = 64  # a loss that knows only a scalar is called per row up to here: right for errors, no measure of its speed


class NotOfferedError(RuntimeError):
    """A provider does not do this size or gradient; the text says why, and stands in its row."""


@dataclass(frozen=True)
class Work:
    """One operation of a provider: a function of the inputs, and in one line which work it does."""

    run: Callable
    note: str

    def __call__(self, inputs):
        return self.run(inputs)


def _log_probs(logits):
    return F.log_softmax(logits, -1, dtype=torch.float32)


def _needs_gpu(device):
    """Raises for Triton kernels without a GPU, unless this process runs them in Triton's interpreter (benchmarks/interpreted.py)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("its Triton kernels need a GPU")


def load_trl(device):
    """TRL. KL: GKDTrainer.generalized_jsd_loss, one F.kl_div on two log_softmax, summed over the vocabulary, or batchmean over the tokens.
    Log-probability, entropy and both: its functions of those names.

    The KL is the mode that a trainer would take: beta = 1 with the first argument as student, beta = 0 with the second. The loss softmaxes in the
    type of the logits, so they are cast to float32 here, as they come out of TRL's mixed precision. Its kernel for log-prob and entropy (GPU only)
    reads 16-bit logits; on a CPU they are cast as well. It has no token_stats.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental may change
        from trl.experimental.gkd import GKDTrainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

    def loss(i, reduction):
        student, teacher, beta = (i.p, i.q, 1) if i.wrt == "p" else (i.q, i.p, 0)
        # [N, V]: it divides by the first dimension.
        return GKDTrainer.generalized_jsd_loss(student.float().flatten(0, -2), teacher.float().flatten(0, -2), beta=beta, reduction=reduction)

    def logits(i):
        return i.p if i.p.is_cuda else i.p.float()

    note = "more work: float32 copies of the logits, divided by a temperature, two log_softmax; writes [N, V] of losses"
    fused = "one kernel for log-probability and entropy, whichever is asked for"
    return {
        "kl_divergence": Work(lambda i: (loss(i, "none").sum(-1).view(i.p.shape[:-1]),), note),
        "mean_kl": Work(lambda i: (loss(i, "batchmean"),), note),
        "logprob": Work(lambda i: (selective_log_softmax(logits(i), i.tokens),), fused),
        "logprob_entropy": Work(lambda i: selective_log_softmax_and_entropy(logits(i), i.tokens), fused),
        "entropy": Work(lambda i: (entropy_from_logits(logits(i)),), fused),
    }


def load_liger_kldiv(device):
    """Liger-Kernel's LigerKLDIVLoss(log_target=True) after two float32 log_softmax by torch: reduction "batchmean" for the mean, "none" summed over
    the vocabulary for the KL of each token.

    It has no gradient to its target: KL(P‖Q) to Q only.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerKLDIVLoss

    each, mean = (LigerKLDIVLoss(reduction=reduction, log_target=True) for reduction in ("none", "batchmean"))

    def log_probs(i):
        if i.wrt == "p":
            raise NotOfferedError("LigerKLDIVLoss has no gradient to its target, P of KL(P‖Q)")
        return (_log_probs(x).flatten(0, -2) for x in (i.q, i.p))

    note = "the same work: two float32 log_softmax by torch first"
    return {
        "kl_divergence": Work(lambda i: (each(*log_probs(i)).sum(-1).view(i.p.shape[:-1]),), f"{note}, writes [N, V] of losses"),
        "mean_kl": Work(lambda i: (mean(*log_probs(i)),), f"{note}; its backward asks the GPU whether the upstream gradient is 1"),
    }


def load_liger_jsd(device):
    """Liger-Kernel's LigerJSD: beta = 1 is KL(P‖Q) with its gradient to P, beta = 0 the same with its gradient to Q; the log_softmax are plain torch.

    It gives one scalar, the mean over all tokens. A KL per token therefore takes a call per row: done for few rows, to see the error; refused for
    many, where the time would be that of the calls.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerJSD

    losses = {"p": LigerJSD(beta=1.0), "q": LigerJSD(beta=0.0)}

    def student_and_teacher(i):
        log_p, log_q = (_log_probs(x).flatten(0, -2) for x in (i.p, i.q))
        return (log_p, log_q) if i.wrt == "p" else (log_q, log_p)

    def kl_divergence(i):
        rows = i.p.shape[:-1].numel()
        if rows > ROWS_BY_CALLS:
            raise NotOfferedError(f"LigerJSD gives one scalar for all tokens; KL per token would be {rows} calls")
        pairs = zip(*student_and_teacher(i), strict=True)
        return (torch.stack([losses[i.wrt](student[None], teacher[None]) for student, teacher in pairs]).view(i.p.shape[:-1]),)

    note = "the same work: two float32 log_softmax by torch first; value and gradient in one kernel, [N, V] of losses"
    return {
        "kl_divergence": Work(kl_divergence, f"{note}, a call per row"),
        "mean_kl": Work(lambda i: (losses[i.wrt](*student_and_teacher(i)),), f"{note}; its backward asks the GPU whether the upstream gradient is 1"),
    }


class _OnWhole(torch.autograd.Function):
    """A function of all of [B, L + 1, V] as one of its slice [:, :-1], without a copy of either the logits or their gradient."""

    @staticmethod
    def forward(ctx, sliced, function):
        batch, length, vocabulary = sliced.shape
        whole = sliced.detach().as_strided((batch, length + 1, vocabulary), sliced.stride(), sliced.storage_offset()).requires_grad_()
        with torch.enable_grad():
            ctx.value = function(whole)
        ctx.whole = whole
        return ctx.value.detach()

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = torch.autograd.grad(ctx.value, ctx.whole, upstream)
        return gradient[:, :-1], None


def load_liger_grpo(device):
    """Liger-Kernel's GRPO kernels for the log-probability. Its fused_selective_log_softmax has no gradient; GrpoLossFunction, forward and backward,
    computes the log-probability inside the loss: loss_type "cispo" with advantages of -1 and no old log-probabilities is exactly that.

    It takes contiguous [B, L + 1, V] logits and leaves the last position out, so it is measured on layout "sliced". By default it would write the
    gradient over the logits, which the others still need (inplace=False): the same bytes move, and a gradient more is allocated.
    """
    _needs_gpu(device)
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    def logprob(i):
        length, vocabulary = i.p.shape[-2:]
        if i.p.dim() != 3 or i.p.stride() != ((length + 1) * vocabulary, vocabulary, 1):
            raise NotOfferedError('its kernels take [B, L + 1, V] logits and leave out the last position: layout "sliced" only')
        minus_one = torch.full((len(i.p),), -1.0, device=i.p.device)

        def loss(whole):
            # temperature, beta of the KL, lower and upper clip, inplace, type of the loss, longest completion, reduced
            return GrpoLossFunction.apply(whole, None, None, i.tokens, minus_one, None, 1.0, 0.0, 0.2, 1.0, False, "cispo", None, False)[0]

        return (_OnWhole.apply(i.p, loss),)

    return {"logprob": Work(logprob, "more work: inside a GRPO loss per token, which also counts what is clipped; the logits' gradient not in place")}


PEERS = {"TRL": load_trl, "Liger KLDIVLoss": load_liger_kldiv, "Liger JSD": load_liger_jsd}
PEERS_WITHOUT_KL = {"Liger GRPO": load_liger_grpo}
