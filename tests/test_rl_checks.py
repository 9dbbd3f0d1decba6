"""Every wrong argument of shape_rewards and the losses is an error that names the argument, says what came and what to do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastkl.rl.losses import dpo_loss, grpo_loss, ppo_loss
from fastkl.rl.rewards import shape_rewards

S, KL, M, CU = torch.zeros(3), torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool), torch.tensor([0, 5, 10, 15])
L = torch.zeros(2, 3, requires_grad=True)
PPO = {"logprob": L, "old_logprob": torch.zeros(2, 3), "advantages": torch.zeros(2)}
DPO = {"chosen": torch.zeros(2), "rejected": torch.zeros(2), "ref_chosen": torch.zeros(2), "ref_rejected": torch.zeros(2)}
SCORED = {"scores": S, "kl": KL, "beta": 0.1}
RIGHT = {shape_rewards: SCORED, ppo_loss: PPO, grpo_loss: PPO, dpo_loss: DPO}
REWARDS, BOTH, GRPO = (shape_rewards,), (ppo_loss, grpo_loss), (grpo_loss,)
CONSTANT, FLAT = torch.zeros(2, 3), torch.zeros(6)
# Who may get it, what is changed of the right arguments, the error, the argument that it names, words of it.
WRONG = [
    (REWARDS, {"scores": [0.0] * 3}, TypeError, "scores", "got list"),
    (REWARDS, {"scores": S.long()}, TypeError, "scores", ".float()"),
    (REWARDS, {"scores": torch.zeros(4)}, ValueError, "scores", "one per sequence, (3,), or one per token, (3, 5)"),
    (REWARDS, {"scores": torch.zeros(3, 1)}, ValueError, "scores", "got (3, 1)"),
    (REWARDS, {"kl": torch.zeros(15)}, ValueError, "scores", "pass cu_seqlens"),
    (REWARDS, {"scores": S.to("meta")}, ValueError, "scores", "got meta"),
    (REWARDS, {"kl": [[0.0]]}, TypeError, "kl", "got list"),
    (REWARDS, {"kl": KL.long()}, TypeError, "kl", ".float()"),
    (REWARDS, {"kl": M}, TypeError, "kl", "got torch.bool"),
    (REWARDS, {"kl": torch.zeros(())}, ValueError, "kl", "got a scalar"),
    (REWARDS, {"mask": M.float()}, TypeError, "mask", ".bool()"),
    (REWARDS, {"mask": M[:, :4]}, ValueError, "mask", "got (3, 4)"),
    (REWARDS, {"mask": M.to("meta")}, ValueError, "mask", "got meta"),
    (REWARDS, {"beta": None}, TypeError, "beta", "got NoneType"),
    (REWARDS, {"beta": True}, TypeError, "beta", "got bool"),
    (REWARDS, {"beta": "0.1"}, TypeError, "beta", "got str"),
    (REWARDS, {"beta": -0.1}, ValueError, "beta", "reward divergence"),
    (REWARDS, {"beta": math.inf}, ValueError, "beta", "finite"),
    (REWARDS, {"beta": math.nan}, ValueError, "beta", "finite"),
    (REWARDS, {"beta": KL}, ValueError, "beta", "got shape (3, 5)"),
    (REWARDS, {"beta": torch.tensor(1)}, TypeError, "beta", "got torch.int64"),
    (REWARDS, {"beta": torch.zeros((), device="meta")}, ValueError, "beta", "got meta"),
    (REWARDS, {"beta": SimpleNamespace(beta=-1.0)}, ValueError, "beta", "got -1.0"),
    (REWARDS, {"kl": KL.flatten(), "cu_seqlens": [0, 15]}, TypeError, "cu_seqlens", "got list"),
    (REWARDS, {"kl": KL.flatten(), "cu_seqlens": CU.float()}, TypeError, "cu_seqlens", ".int()"),
    (REWARDS, {"kl": KL.flatten(), "cu_seqlens": CU[:0]}, ValueError, "cu_seqlens", "got (0,)"),
    (REWARDS, {"kl": KL.flatten(), "cu_seqlens": CU[None]}, ValueError, "cu_seqlens", "got (1, 4)"),
    (REWARDS, {"kl": KL.flatten(), "cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens", "got meta"),
    (REWARDS, {"cu_seqlens": CU}, ValueError, "kl", "without cu_seqlens"),
    (REWARDS, {"scores": torch.zeros(4), "kl": KL.flatten(), "cu_seqlens": CU}, ValueError, "scores", "one entry more"),
    (REWARDS, {"scores": S.to("meta"), "kl": KL.flatten(), "cu_seqlens": CU}, ValueError, "scores", "got meta"),
    *((BOTH, {name: [0.0]}, TypeError, name, "got list") for name in ("logprob", "old_logprob", "advantages")),
    *((BOTH, {name: CONSTANT.long()}, TypeError, name, ".float()") for name in ("logprob", "old_logprob", "advantages")),
    (BOTH, {"logprob": torch.zeros(())}, ValueError, "logprob", "got a scalar"),
    (BOTH, {"old_logprob": FLAT}, ValueError, "old_logprob", "shape of logprob, (2, 3), got (6,)"),
    (BOTH, {"old_logprob": L}, ValueError, "old_logprob", "pass old_logprob.detach()"),
    (BOTH, {"old_logprob": CONSTANT.to("meta")}, ValueError, "old_logprob", "got meta"),
    (BOTH, {"advantages": torch.zeros(3)}, ValueError, "advantages", "one per sequence, (2,), or one per token, (2, 3)"),
    (BOTH, {"advantages": torch.zeros(2, 1)}, ValueError, "advantages", "got (2, 1); squeeze"),
    (BOTH, {"advantages": torch.zeros(2, device="meta")}, ValueError, "advantages", "got meta"),
    (BOTH, {"mask": torch.ones(2, 3)}, TypeError, "mask", ".bool()"),
    (BOTH, {"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask", "got (2,)"),
    (BOTH, {"clip": "0.2"}, TypeError, "clip", "got str"),
    (BOTH, {"clip": True}, TypeError, "clip", "got bool"),
    (BOTH, {"clip": (0.1, 0.2, 0.3)}, TypeError, "clip", "got tuple"),
    (BOTH, {"clip": torch.tensor(0.2)}, TypeError, "clip", "float(clip)"),
    (BOTH, {"clip": -0.1}, ValueError, "clip", "got -0.1"),
    (BOTH, {"clip": 1.2}, ValueError, "clip", "pair (low within 0 … 1"),
    (BOTH, {"clip": (0.2, -0.1)}, ValueError, "clip", "got -0.1"),
    (BOTH, {"clip": (0.2, math.nan)}, ValueError, "clip", "got nan"),
    (BOTH, {"reduction": "mean"}, ValueError, "reduction", "got 'mean'"),
    ((ppo_loss,), {"reduction": "grpo"}, ValueError, "reduction", "'token_mean', 'sequence_mean', 'sum'"),
    *(((ppo_loss,), {"dual_clip": value}, ValueError, "dual_clip", "above 1") for value in (1.0, 0.5, math.inf, math.nan)),
    ((ppo_loss,), {"dual_clip": "3"}, TypeError, "dual_clip", "got str"),
    (GRPO, {"level": "word"}, ValueError, "level", "'token', 'sequence'"),
    (GRPO, {"reduction": "token_mean"}, ValueError, "reduction", "'dr_grpo'"),
    (GRPO, {"reduction": "dr_grpo"}, TypeError, "max_length", "got NoneType"),
    (GRPO, {"reduction": "dr_grpo", "max_length": 2.5}, TypeError, "max_length", "got float"),
    (GRPO, {"reduction": "dr_grpo", "max_length": 0}, ValueError, "max_length", "at least 1"),
    (GRPO, {"max_length": 9}, ValueError, "max_length", "None with reduction='grpo'"),
    (GRPO, {"beta": 0.1}, ValueError, "kl", "pass kl=kl_divergence"),
    (GRPO, {"beta": torch.tensor(0.1)}, ValueError, "kl", "got neither"),
    (GRPO, {"beta": -0.1, "ref_logprob": CONSTANT}, ValueError, "beta", "reward divergence"),
    (GRPO, {"beta": "0.1", "ref_logprob": CONSTANT}, TypeError, "beta", "got str"),
    (GRPO, {"beta": 0.1, "ref_logprob": CONSTANT, "kl": L}, ValueError, "kl", "got both"),
    (GRPO, {"beta": 0.1, "ref_logprob": FLAT}, ValueError, "ref_logprob", "got (6,)"),
    (GRPO, {"beta": 0.1, "ref_logprob": CONSTANT.long()}, TypeError, "ref_logprob", ".float()"),
    (GRPO, {"beta": 0.1, "kl": FLAT}, ValueError, "kl", "got (6,)"),
    (GRPO, {"beta": 0.1, "kl": 0.5}, TypeError, "kl", "got float"),
    (GRPO, {"beta": 0.1, "kl": CONSTANT}, ValueError, "kl", "with gradient"),
    (GRPO, {"beta": 0.1, "kl": L, "correct_kl": True}, ValueError, "correct_kl", "got True"),
    *(((dpo_loss,), {name: [0.0]}, TypeError, name, "got list") for name in DPO),
    *(((dpo_loss,), {name: torch.zeros(2, dtype=torch.int64)}, TypeError, name, ".float()") for name in DPO),
    *(((dpo_loss,), {name: torch.zeros(3)}, ValueError, name, "shape of chosen, (2,), got (3,)") for name in list(DPO)[1:]),
    *(((dpo_loss,), {name: torch.zeros(2, device="meta")}, ValueError, name, "got meta") for name in list(DPO)[1:]),
    *(((dpo_loss,), {"beta": value}, ValueError, "beta", "above 0") for value in (0, -0.1, math.inf, math.nan)),
    ((dpo_loss,), {"beta": SimpleNamespace(beta=0.1)}, TypeError, "beta", "got SimpleNamespace"),
    *(((dpo_loss,), {"label_smoothing": value}, ValueError, "label_smoothing", "less than 0.5") for value in (-0.1, 0.5, math.nan)),
    ((dpo_loss,), {"label_smoothing": None}, TypeError, "label_smoothing", "got NoneType"),
]


@pytest.mark.parametrize("call, change, error, name, words", [(call, *wrong[1:]) for wrong in WRONG for call in wrong[0]])
def test_wrong_arguments(call, change, error, name, words) -> None:
    """Each is an error of the right type that starts with the argument's name."""
    call(**RIGHT[call])
    with pytest.raises(error) as raised:
        call(**{**RIGHT[call], **change})
    assert str(raised.value).startswith(f"{name}: expected") and words in str(raised.value), raised.value
