"""Other trainers' losses of distillation by their formulas, and the names that the lines of
docs/trainers find in a training step.
"""

import torch
import torch.nn.functional as F

from fastkl import testing


def names() -> dict[str, object]:
    student, teacher = (x.view(2, 3, -1).double() for x in testing.pair("normal1", 6, 64, 1.0))
    student, labels = student.requires_grad_(), torch.tensor([[1, -100, 2], [3, 4, -100]])
    log_p, tokens = teacher.log_softmax(-1), labels.clamp(min=0)[..., None]
    listed = log_p.topk(4)
    return {
        **{"student_logits": student, "logits": student, "teacher_logits": teacher},
        **{"labels": labels, "mask": labels != -100, "temperature": 0.7, "global_valid_toks": 9},
        **{"topk_logprobs": listed.values, "topk_ids": listed.indices, "mixed_kl_weight": 0.3},
        "topk_logits": teacher.gather(-1, listed.indices),
        "sampled_logprobs": log_p.gather(-1, tokens)[..., 0],
        "logprob": student.log_softmax(-1).gather(-1, tokens)[..., 0],
        "ref_logprob": log_p.gather(-1, tokens)[..., 0],
    }


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_rest(listed: torch.Tensor) -> torch.Tensor:
    return torch.cat([listed, (1 - listed.exp().sum(-1, keepdim=True)).log()], -1)


def formulas(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute what the names of docs/trainers stand for, from those that its lines find."""
    student, teacher, mask = (given[name] for name in ("logits", "teacher_logits", "mask"))
    log_p, log_q, warm = (
        (x / t).log_softmax(-1) for x, t in ((teacher, 1.0), (student, 1.0), (student, 0.7))
    )
    p, q, q_warm = (x.gather(-1, given["topk_ids"]) for x in (log_p, log_q, warm))
    # Of the listed tokens alone.
    own_p, own_q, own_warm = (x.log_softmax(-1) for x in (p, q, q_warm))
    one_p, one_q = (
        with_rest(x.gather(-1, given["labels"].clamp(min=0)[..., None])) for x in (log_p, warm)
    )
    d = given["logprob"] - given["ref_logprob"]
    cross_entropy = F.cross_entropy(student.flatten(0, 1), given["labels"].flatten())
    halves = (x.log_softmax(-1) for x in (teacher / 2, student / 2))
    return {
        "cross_entropy": cross_entropy,
        "distillation": 0.5 * cross_entropy + 0.5 * 4 * kl(*halves)[mask].mean(),
        "server_topk": kl(with_rest(p), with_rest(q_warm))[mask].mean(),
        "server_topk_alone": kl(own_p, own_warm)[mask].mean(),
        "server_sampled": kl(one_q, one_p)[mask].mean(),
        "verl_topk": kl(p, q),
        "nemo_forward": kl(own_p, own_q)[mask].sum() / 9,
        "nemo_reverse": kl(own_q, own_p)[mask].sum() / 9,
        "nemo_mixed": (0.3 * kl(own_p, own_q) + 0.7 * kl(own_q, own_p))[mask].sum() / 9,
        "nemo_forward_outside": kl(own_p, q)[mask].sum() / 9,
        "k3": (-d).exp() - 1 + d,
        # Without the teacher's entropy, which has no gradient.
        "openrlhf": (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean(),
    }
