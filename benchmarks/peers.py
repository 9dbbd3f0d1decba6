"""Other packages as providers (benchmarks/providers.py): each loader says in its docstring which work it does and what it leaves out.

Every peer gets the same logits as the others, used the way its documentation shows and with float32 softmaxes wherever the caller decides. Nothing of
a peer is loaded before its loader is called; one that is not installed or cannot run here raises, and the reason becomes a row of the results.
"""
import os
import warnings

import torch
import torch.nn.functional as F

ROWS_BY_CALLS = 64  # a loss that knows only a scalar is called per row up to here: right for errors, no measure of its speed


class NotOfferedError(RuntimeError):
    """A provider does not do this size or gradient; the text says why, and stands in its row."""


def _log_probs(logits):
    return F.log_softmax(logits, -1, dtype=torch.float32)


def _needs_gpu(device):
    """Raises for Triton kernels without a GPU, unless this process runs them in Triton's interpreter (benchmarks/interpreted.py)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("its Triton kernels need a GPU")


def load_trl(device):
    """TRL. KL: GKDTrainer.generalized_jsd_loss, one F.kl_div on two log_softmax, summed over the vocabulary. Log-prob and entropy: its one function.

    The KL is the mode that a trainer would take: beta = 1 with the first argument as student, beta = 0 with the second. The loss softmaxes in the
    type of the logits, so they are cast to float32 here, as they come out of TRL's mixed precision. Its kernel for log-prob and entropy (GPU only)
    reads 16-bit logits; on a CPU they are cast as well. It has no token_stats.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental may change
        from trl.experimental.gkd import GKDTrainer
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def kl_divergence(i):
        student, teacher, beta = (i.p, i.q, 1) if i.wrt == "p" else (i.q, i.p, 0)
        return (GKDTrainer.generalized_jsd_loss(student.float(), teacher.float(), beta=beta, reduction="none").sum(-1),)

    def logits(i):
        return i.p if i.p.is_cuda else i.p.float()

    return {
        "kl_divergence": kl_divergence,
        "logprob": lambda i: (selective_log_softmax(logits(i), i.tokens),),
        "logprob_entropy": lambda i: selective_log_softmax_and_entropy(logits(i), i.tokens),
    }


def load_liger_kldiv(device):
    """Liger-Kernel's LigerKLDIVLoss(reduction="none", log_target=True), summed over the vocabulary; the two log_softmax before it are plain torch.

    It writes [N, V] of losses, as F.kl_div does, and has no gradient to its target: KL(P‖Q) to Q only.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="none", log_target=True)

    def kl_divergence(i):
        if i.wrt == "p":
            raise NotOfferedError("LigerKLDIVLoss has no gradient to its target, P of KL(P‖Q)")
        log_p, log_q = (_log_probs(x).flatten(0, -2) for x in (i.p, i.q))
        return (loss(log_q, log_p).sum(-1).view(i.p.shape[:-1]),)

    return {"kl_divergence": kl_divergence}


def load_liger_jsd(device):
    """Liger-Kernel's LigerJSD: beta = 1 is KL(P‖Q) with its gradient to P, beta = 0 the same with its gradient to Q; the log_softmax are plain torch.

    It knows one scalar for all tokens, so a KL per token takes a call per row: done for few rows, to see the error; refused for many, where the time
    would be that of the calls.
    """
    _needs_gpu(device)
    from liger_kernel.transformers import LigerJSD

    losses = {"p": LigerJSD(beta=1.0), "q": LigerJSD(beta=0.0)}

    def kl_divergence(i):
        rows = i.p.shape[:-1].numel()
        if rows > ROWS_BY_CALLS:
            raise NotOfferedError(f"LigerJSD gives one scalar for all tokens; KL per token would be {rows} calls")
        log_p, log_q = (_log_probs(x).flatten(0, -2) for x in (i.p, i.q))
        student, teacher = (log_p, log_q) if i.wrt == "p" else (log_q, log_p)
        return (torch.stack([losses[i.wrt](s[None], t[None]) for s, t in zip(student, teacher, strict=True)]).view(i.p.shape[:-1]),)

    return {"kl_divergence": kl_divergence}


PEERS = {"TRL": load_trl, "Liger KLDIVLoss": load_liger_kldiv, "Liger JSD": load_liger_jsd}
