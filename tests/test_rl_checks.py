"""Every wrong argument of shape_rewards and the losses is an error that names the argument, says what came and what to do; and the shared checks."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastkl.rl import _checks
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
# A pack of two sequences; PPO then gets a reduction that asks for them, as GRPO's default does.
PACKED = {"logprob": FLAT, "old_logprob": FLAT, "advantages": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2, 6])}
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
    (REWARDS, {"beta": SimpleNamespace(weight=1.0)}, TypeError, "beta", "got SimpleNamespace"),
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
    (BOTH, {"old_logprob": CONSTANT.double()}, TypeError, "old_logprob", "expected float64 like logprob or neither"),
    (BOTH, {**PACKED, "cu_seqlens": None}, ValueError, "cu_seqlens", "boundaries of the sequences packed into logprob, (6,)"),
    (BOTH, {**PACKED, "cu_seqlens": [0, 6]}, TypeError, "cu_seqlens", "got list"),
    (BOTH, {**PACKED, "cu_seqlens": torch.tensor([0, 2, 7])}, ValueError, "cu_seqlens", "rise from 0 to 6, the length of logprob"),
    (BOTH, {**PACKED, "cu_seqlens": torch.tensor([6])}, ValueError, "cu_seqlens", "rise from 0 to 6"),
    (BOTH, {**PACKED, "advantages": torch.zeros(3)}, ValueError, "advantages", "one per sequence, (2,), or one per token, (6,)"),
    (BOTH, {"cu_seqlens": torch.tensor([0, 2, 6])}, ValueError, "logprob", "got (2, 3); pass a padded [B, T] without cu_seqlens"),
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
    ((ppo_loss,), {"reduction": "grpo"}, ValueError, "reduction", "'token_mean', 'mean', 'sequence_mean', 'sum'"),
    (BOTH, {"reduction": "sum", "normalizer": 3}, ValueError, "normalizer", "None with reduction='sum', got int; it is for means"),
    *(((ppo_loss, grpo_loss, dpo_loss), {"normalizer": value}, error, "normalizer", words) for value, error, words in (
        (0, ValueError, "above 0, got 0"), (-1.0, ValueError, "above 0"), (math.inf, ValueError, "got inf"), (True, TypeError, "got bool"),
        ("3", TypeError, "got str"), (torch.ones(2), ValueError, "of one number"), (torch.tensor(True), TypeError, "torch.bool"),
        (torch.ones((), device="meta"), ValueError, "got meta"))),
    *(((ppo_loss,), {"dual_clip": value}, ValueError, "dual_clip", "above 1") for value in (1.0, 0.5, math.inf, math.nan)),
    ((ppo_loss,), {"dual_clip": "3"}, TypeError, "dual_clip", "got str"),
    (GRPO, {"level": "word"}, ValueError, "level", "'token', 'sequence'"),
    *((GRPO, {"reduction": name}, ValueError, "reduction", "'grpo', 'bnpo'") for name in ("mean", "sequence_mean")),
    *((GRPO, {"correct_kl": value}, TypeError, "correct_kl", "pass correct_kl=True") for value in ("no", 0, None, np.True_)),
    (GRPO, {"reduction": "token_mean"}, ValueError, "reduction", "'dr_grpo'"),
    (GRPO, {"reduction": "dr_grpo"}, TypeError, "max_length", "got NoneType"),
    (GRPO, {"reduction": "dr_grpo", "max_length": 2.5}, TypeError, "max_length", "got float"),
    (GRPO, {"reduction": "dr_grpo", "max_length": 0}, ValueError, "max_length", "at least 1"),
    (GRPO, {"reduction": "dr_grpo", "max_length": 2}, ValueError, "max_length", "at least the tokens of each sequence, 3, got 2"),
    *((GRPO, {**PACKED, "cu_seqlens": None, "level": level, "reduction": reduction, "max_length": 3 if reduction == "dr_grpo" else None}, ValueError,
       "cu_seqlens", "[1, T]") for level, reduction in (("token", "grpo"), ("token", "dr_grpo"), ("sequence", "sum"), ("sequence", "bnpo"))),
    (GRPO, {"max_length": 9}, ValueError, "max_length", "None with reduction='grpo'"),
    (GRPO, {"beta": 0.1}, ValueError, "kl", "pass kl=kl_divergence"),
    (GRPO, {"beta": torch.tensor(0.1)}, ValueError, "kl", "got neither"),
    (GRPO, {"beta": -0.1, "ref_logprob": CONSTANT}, ValueError, "beta", "reward divergence"),
    (GRPO, {"beta": "0.1", "ref_logprob": CONSTANT}, TypeError, "beta", "got str"),
    (GRPO, {"beta": 0.1, "ref_logprob": CONSTANT, "kl": L}, ValueError, "kl", "got both"),
    (GRPO, {"beta": 0.1, "ref_logprob": FLAT}, ValueError, "ref_logprob", "got (6,)"),
    (GRPO, {"beta": 0.1, "ref_logprob": CONSTANT.double()}, TypeError, "ref_logprob", "expected float64 like logprob or neither"),
    (GRPO, {"beta": 0.1, "kl": L.double()}, TypeError, "kl", "expected float64 like logprob or neither"),
    (GRPO, {"kl_clamp": 0.0}, ValueError, "kl_clamp", "above 0 and up to 50"),
    (GRPO, {"kl_clamp": 51, "ref_logprob": CONSTANT}, ValueError, "kl_clamp", "above 0 and up to 50"),
    (GRPO, {"kl_clamp": "5"}, TypeError, "kl_clamp", "got str"),
    (GRPO, {"beta": 0.1, "kl": L, "kl_clamp": 5.0}, ValueError, "kl_clamp", "None with an exact kl, got 5.0"),
    (GRPO, {"beta": 0.1, "ref_logprob": CONSTANT.long()}, TypeError, "ref_logprob", ".float()"),
    (GRPO, {"beta": 0.1, "kl": FLAT}, ValueError, "kl", "got (6,)"),
    (GRPO, {"beta": 0.1, "kl": 0.5}, TypeError, "kl", "got float"),
    (GRPO, {"beta": 0.1, "kl": CONSTANT}, ValueError, "kl", "with gradient"),
    (GRPO, {"beta": 0.1, "kl": L, "correct_kl": True}, ValueError, "correct_kl", "got True"),
    *(((dpo_loss,), {name: [0.0]}, TypeError, name, "got list") for name in DPO),
    *(((dpo_loss,), {name: torch.zeros(2, dtype=torch.int64)}, TypeError, name, ".float()") for name in DPO),
    *(((dpo_loss,), {name: torch.zeros(3)}, ValueError, name, "shape of chosen, (2,), got (3,)") for name in list(DPO)[1:]),
    *(((dpo_loss,), {name: torch.zeros(2, device="meta")}, ValueError, name, "got meta") for name in list(DPO)[1:]),
    *(((dpo_loss,), dict.fromkeys(DPO, value), ValueError, "chosen", "sum over the response's tokens")
      for value in (CONSTANT, torch.zeros(()))),
    *(((dpo_loss,), {name: torch.zeros(2, dtype=torch.float64)}, TypeError, name, "expected float64 like chosen") for name in list(DPO)[1:]),
    *(((dpo_loss,), {"beta": value}, ValueError, "beta", "above 0") for value in (0, -0.1, math.inf, math.nan)),
    ((dpo_loss,), {"beta": SimpleNamespace(beta=0.1)}, TypeError, "beta", "got SimpleNamespace"),
    *(((dpo_loss,), {"label_smoothing": value}, ValueError, "label_smoothing", "less than 0.5") for value in (-0.1, 0.5, math.nan)),
    ((dpo_loss,), {"label_smoothing": None}, TypeError, "label_smoothing", "got NoneType"),
]


@pytest.mark.parametrize("call, change, error, name, words", [(call, *wrong[1:]) for wrong in WRONG for call in wrong[0]])
def test_wrong_arguments(call, change, error, name, words) -> None:
    """Each is an error of the right type that starts with the argument's name, and says what to do where that is not plain."""
    right = RIGHT[call] | ({"reduction": "sequence_mean"} if call is ppo_loss and change.keys() >= PACKED.keys() else {})
    call(**right)
    with pytest.raises(error) as raised:
        call(**{**right, **change})
    assert str(raised.value).startswith(f"{name}: expected") and words in str(raised.value), raised.value
    assert "; " in str(raised.value), "no remedy"


# ---- the checks that the others share


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.float64(2)], ids=repr)
@pytest.mark.parametrize("tensor", [False, True])
def test_numbers(value, tensor) -> None:
    """Python's and numpy's, as a float."""
    result = _checks.number("x", value, "a number above 0", _checks.positive, "pass 1", tensor=tensor)
    assert result == 2.0 and type(result) is float


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_of_one(shape, dtype) -> None:
    """A number where a tensor may be one, also with gradient; else an error that says how to make it one."""
    value = torch.full(shape, 2, dtype=dtype).requires_grad_(dtype.is_floating_point)
    assert _checks.number("x", value, "a number above 0", _checks.positive, "pass 1", tensor=True) == 2.0
    with pytest.raises(TypeError, match=r"^x: expected a number above 0, got torch.\w+ tensor; pass float\(x\)$"):
        _checks.number("x", value, "a number above 0", _checks.positive, "pass 1")


@pytest.mark.parametrize("value, error, got", [
    (None, TypeError, "NoneType"), (True, TypeError, "bool"), ("1", TypeError, "str"), (1j, TypeError, "complex"), (np.ones(3), TypeError, "ndarray"),
    (np.bool_(True), TypeError, "bool"), (torch.ones(1, dtype=torch.complex64), TypeError, "torch.complex64 tensor"),
    (torch.ones(1, dtype=torch.bool), TypeError, "torch.bool tensor"), (torch.ones(3), ValueError, r"a tensor of shape \(3,\)"),
    (torch.ones(0), ValueError, r"a tensor of shape \(0,\)"), (0, ValueError, "0"), (math.nan, ValueError, "nan"), (math.inf, ValueError, "inf"),
    (torch.tensor(-1.5), ValueError, "-1.5"), (10**400, ValueError, "an integer of 1329 bits"),
    pytest.param(-10**5000, ValueError, "an integer of 16610 bits", id="long"),
    pytest.param(Fraction(10**400), ValueError, "inf", id="fraction"),
    (torch.ones((), dtype=torch.float8_e5m2), TypeError, "torch.float8_e5m2 tensor"),
    (torch.ones((), device="meta"), ValueError, "a tensor on the meta device, which has no values"),
], ids=repr)
def test_what_is_no_number(value, error, got) -> None:
    """Every message has all four parts."""
    with pytest.raises(error, match=rf"^x: expected a number above 0, got {got}\w*; pass 1$"):
        _checks.number("x", value, "a number above 0", _checks.positive, "pass 1", tensor=True)


def test_whole_numbers() -> None:
    """Every message has all four parts."""
    _checks.whole_number("x", 1, "a count", "pass 1")
    for value, error, got in ((1.0, TypeError, "float"), (True, TypeError, "bool"),
                              (None, TypeError, "NoneType"), (0, ValueError, "0"),
                              (2**31, ValueError, "2147483648"),
                              (10**400, ValueError, "an integer of 1329 bits")):
        with pytest.raises(error, match=rf"^x: expected a count.*, got {got}; pass 1$"):
            _checks.whole_number("x", value, "a count", "pass 1")


@pytest.mark.parametrize("wrong, got", [
    (None, "entries a, class, got NoneType; pass what"), ({}, "entries a, class, got none; pass what"), ({"class": "C"}, "got class; pass what"),
    ({"class": "C", "a": 1, "b": 2}, "got a, b, class; pass what"), ({"class": "D"}, "class 'C', got 'D'; load it"),
], ids=str)
def test_states(wrong, got) -> None:
    """The same class and the same entries."""
    _checks.state({"class": "C", "a": 2}, {"class": "C", "a": 1})
    with pytest.raises(ValueError, match=f"^state: expected .*{got}"):
        _checks.state(wrong, {"class": "C", "a": 1})
