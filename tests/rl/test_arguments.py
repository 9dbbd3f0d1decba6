"""Wrong arguments of fastkl.rl, alone and beside each other: an error that names the argument and
says what to do.
"""

import math
import operator
import os
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastkl.rl import (
    AdaptiveBeta,
    FixedBeta,
    KLMonitor,
    PIDBeta,
    PPOAdaptiveBeta,
    SpikeDetector,
    TrustRegion,
    dpo_loss,
    grpo_loss,
    ppo_loss,
    read_jsonl,
    shape_rewards,
)

S, KL, M, CU = (
    torch.zeros(3),
    torch.zeros(3, 5),
    torch.ones(3, 5, dtype=torch.bool),
    torch.tensor([0, 5, 10, 15]),
)
L, ZEROS, FLAT, PAIRS = (
    torch.zeros(2, 3, requires_grad=True),
    torch.zeros(2, 3),
    torch.zeros(6),
    torch.zeros(2),
)
PPO = {"logprob": L, "old_logprob": ZEROS, "advantages": PAIRS}
DPO = dict.fromkeys(("chosen", "rejected", "ref_chosen", "ref_rejected"), PAIRS)
step = TrustRegion(0.1).step
spike, update = SpikeDetector().update, AdaptiveBeta(0.1, 6, 100).update
record = KLMonitor().update
TARGETED = {"initial": 0.1, "target": 6}
RIGHT = {
    shape_rewards: {"scores": S, "kl": KL, "beta": 0.1},
    ppo_loss: PPO,
    grpo_loss: PPO,
    dpo_loss: DPO,
    FixedBeta: {"beta": 0.1},
    AdaptiveBeta: {**TARGETED, "horizon": 100},
    PPOAdaptiveBeta: TARGETED,
    PIDBeta: TARGETED,
    update: {"kl": 0.1},
    SpikeDetector: {},
    spike: {"kl": 0.1},
    KLMonitor: {},
    read_jsonl: {"path": os.devnull},
    record: {"kl": S},
    TrustRegion: {"max_kl": 0.1},
    step: {"optimizer": torch.optim.SGD([torch.zeros(3)]), "mean_kl": float},
}
REWARDS, BOTH, ONLY_PPO, GRPO, ONLY_DPO = (
    (shape_rewards,),
    (ppo_loss, grpo_loss),
    (ppo_loss,),
    (grpo_loss,),
    (dpo_loss,),
)
# A pack of two sequences; PPO then gets a reduction that asks for them, as GRPO's default does.
PACKED = {
    "logprob": FLAT,
    "old_logprob": FLAT,
    "advantages": PAIRS,
    "cu_seqlens": torch.tensor([0, 2, 6]),
}
LINE = {"kl": KL.flatten(), "cu_seqlens": CU}
SAMPLED = {"beta": 0.1, "ref_logprob": ZEROS}


meta = operator.methodcaller("to", "meta")


NO_PATHS = [1, True, 1.5, b"run.jsonl", ["run.jsonl"]]
# Who may get it, the error, the argument that it names, its wrong values; or what is changed of the
# right arguments.
ALONE = [
    (REWARDS, TypeError, "scores", [[0.0] * 3, S.long()]),
    (REWARDS, ValueError, "scores", [torch.zeros(4), torch.zeros(3, 1), meta(S)]),
    (REWARDS, TypeError, "kl", [[[0.0]], KL.long(), M]),
    (REWARDS, ValueError, "kl", [torch.zeros(())]),
    (REWARDS, TypeError, "mask", [M.float()]),
    (REWARDS, ValueError, "mask", [M[:, :4], meta(M)]),
    (REWARDS, TypeError, "beta", [None, True, "0.1", torch.tensor(1), SimpleNamespace(weight=1.0)]),
    (
        REWARDS,
        ValueError,
        "beta",
        [-0.1, math.inf, math.nan, KL, meta(torch.zeros(())), SimpleNamespace(beta=-1.0)],
    ),
    *((BOTH, TypeError, name, [[0.0], ZEROS.long()]) for name in PPO),
    (BOTH, ValueError, "logprob", [torch.zeros(())]),
    (BOTH, ValueError, "old_logprob", [FLAT, L, meta(ZEROS)]),
    (BOTH, TypeError, "old_logprob", [ZEROS.double()]),
    (BOTH, ValueError, "advantages", [torch.zeros(3), torch.zeros(2, 1), meta(PAIRS)]),
    (BOTH, TypeError, "mask", [torch.ones(2, 3)]),
    (BOTH, ValueError, "mask", [torch.ones(2, dtype=torch.bool)]),
    (BOTH, TypeError, "clip", ["0.2", True, (0.1, 0.2, 0.3), torch.tensor(0.2)]),
    (BOTH, ValueError, "clip", [-0.1, 1.2, (0.2, -0.1), (0.2, math.nan)]),
    ((*BOTH, dpo_loss), TypeError, "normalizer", [True, "3", torch.tensor(True)]),
    (
        (*BOTH, dpo_loss),
        ValueError,
        "normalizer",
        [0, -1.0, math.inf, torch.ones(2), meta(torch.ones(()))],
    ),
    (ONLY_PPO, ValueError, "reduction", ["grpo"]),
    (ONLY_PPO, ValueError, "dual_clip", [1.0, 0.5, math.inf, math.nan]),
    (ONLY_PPO, TypeError, "dual_clip", ["3"]),
    (GRPO, ValueError, "level", ["word"]),
    (GRPO, ValueError, "reduction", ["mean", "sequence_mean", "token_mean"]),
    (GRPO, TypeError, "correct_kl", ["no", 0, None, np.True_]),
    (GRPO, ValueError, "max_length", [9]),
    (GRPO, ValueError, "kl_clamp", [0.0, 51]),
    (GRPO, TypeError, "kl_clamp", ["5"]),
    *((ONLY_DPO, TypeError, name, [[0.0], PAIRS.long()]) for name in DPO),
    *((ONLY_DPO, ValueError, name, [torch.zeros(3), meta(PAIRS)]) for name in list(DPO)[1:]),
    *((ONLY_DPO, TypeError, name, [PAIRS.double()]) for name in list(DPO)[1:]),
    (ONLY_DPO, ValueError, "beta", [0, -0.1, math.inf, math.nan]),
    (ONLY_DPO, TypeError, "beta", [SimpleNamespace(beta=0.1)]),
    (ONLY_DPO, ValueError, "label_smoothing", [-0.1, 0.5, math.nan]),
    (ONLY_DPO, TypeError, "label_smoothing", [None]),
    ((TrustRegion,), ValueError, "max_kl", [0.0, -1, math.inf, math.nan]),
    ((TrustRegion,), TypeError, "max_kl", ["0.1", torch.tensor(0.1), True]),
    ((TrustRegion,), ValueError, "shrink", [1.0, 0]),
    ((TrustRegion,), ValueError, "tries", [-1, 2.5]),
    ((TrustRegion,), TypeError, "tries", [None]),
    ((step,), TypeError, "optimizer", [[torch.ones(3)]]),
    ((step,), TypeError, "mean_kl", [0.1]),
    ((step,), TypeError, "closure", [1]),
    (
        (FixedBeta,),
        ValueError,
        "beta",
        [-0.1, math.nan, Fraction(10**400), -Fraction(10**400), 10**400],
    ),
    ((FixedBeta,), TypeError, "beta", ["0.1"]),
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), ValueError, "initial", [0.0]),
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), ValueError, "target", [0.0, -1.0, math.inf]),
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), ValueError, "unit", ["batch"]),
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), ValueError, "bounds", [(1.0, 0.01), (0.0, 1.0)]),
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), TypeError, "bounds", [0.5]),
    ((AdaptiveBeta,), ValueError, "horizon", [0, -5]),
    ((AdaptiveBeta,), TypeError, "horizon", [None]),
    ((PPOAdaptiveBeta,), ValueError, "tolerance", [0.9]),
    ((PPOAdaptiveBeta,), ValueError, "factor", [1.0]),
    ((PIDBeta,), ValueError, "kp", [-0.1]),
    ((PIDBeta,), ValueError, "ki", [0.0]),
    ((PIDBeta,), ValueError, "kd", [1e3]),
    (
        (update,),
        ValueError,
        "kl",
        [math.nan, -math.inf, math.inf, torch.tensor(math.nan), torch.ones(3)],
    ),
    ((update,), TypeError, "kl", ["0.1", None, True, torch.ones(1, dtype=torch.complex64)]),
    ((update,), ValueError, "n", [500, 0, -1, math.nan]),
    ((update,), TypeError, "n", ["1"]),
    ((update,), TypeError, "process_group", ["gloo", 3]),
    ((SpikeDetector,), ValueError, "ratio", [1.0, math.inf]),
    ((SpikeDetector,), TypeError, "ratio", ["3"]),
    ((SpikeDetector,), ValueError, "limit", [0.0]),
    ((SpikeDetector,), TypeError, "limit", [None]),
    ((SpikeDetector,), ValueError, "recent", [0]),
    ((SpikeDetector,), TypeError, "recent", [1.5]),
    ((SpikeDetector,), ValueError, "window", [15]),
    ((SpikeDetector,), TypeError, "window", [True]),
    ((SpikeDetector,), ValueError, "floor", [0.0, math.nan]),
    ((spike,), TypeError, "kl", [None, "0.1", True, torch.tensor(0.1)]),
    ((record,), TypeError, "kl", [[0.1], S.long()]),
    ((record,), ValueError, "kl", [torch.tensor(0.1), meta(S)]),
    ((record,), TypeError, "mask", [S]),
    ((record,), ValueError, "mask", [torch.ones(2, dtype=torch.bool)]),
    ((record,), TypeError, "cu_seqlens", [[0, 3]]),
    ((record,), ValueError, "cu_seqlens", [torch.tensor([0, 2])]),
    ((record,), TypeError, "step", [1.0, True]),
    ((record,), ValueError, "step", [-1, 10**400]),
    ((record,), TypeError, "reward", ["1"]),
    ((record,), TypeError, "beta", [[0.1]]),
    ((record,), TypeError, "entropy", [torch.ones(3, dtype=torch.complex64)]),
    ((record,), TypeError, "loss", [True, torch.ones(3).to_sparse()]),
    ((record,), ValueError, "loss", [meta(S), 10**400]),
    *(((record,), ValueError, name, [1.0]) for name in ("kl/mean", "kl/p95", "kl/per_sequence")),
    ((KLMonitor,), ValueError, "threshold", [-0.1, math.nan]),
    ((KLMonitor,), TypeError, "threshold", [torch.tensor(0.1)]),
    ((KLMonitor,), TypeError, "spike", [3.0, None]),
    ((KLMonitor,), ValueError, "jsonl", ["/nowhere/to/be/found.jsonl", "/"]),
    ((KLMonitor,), TypeError, "jsonl", NO_PATHS),
    ((read_jsonl,), TypeError, "path", NO_PATHS),
]
BESIDE = [
    ((AdaptiveBeta, PPOAdaptiveBeta, PIDBeta), ValueError, "initial", {"bounds": (0.2, 1.0)}),
    (REWARDS, ValueError, "scores", {"kl": torch.zeros(15)}),
    *(
        (REWARDS, TypeError, "cu_seqlens", {**LINE, "cu_seqlens": value})
        for value in ([0, 15], CU.float())
    ),
    *(
        (REWARDS, ValueError, "cu_seqlens", {**LINE, "cu_seqlens": value})
        for value in (CU[:0], CU[None], meta(CU))
    ),
    (REWARDS, ValueError, "kl", {"cu_seqlens": CU}),
    *(
        (REWARDS, ValueError, "scores", {**LINE, "scores": value})
        for value in (torch.zeros(4), meta(S))
    ),
    (BOTH, ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": None}),
    (BOTH, TypeError, "cu_seqlens", {**PACKED, "cu_seqlens": [0, 6]}),
    *(
        (BOTH, ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor(ends)})
        for ends in ([0, 2, 7], [6])
    ),
    (BOTH, ValueError, "advantages", {**PACKED, "advantages": torch.zeros(3)}),
    (BOTH, ValueError, "logprob", {"cu_seqlens": PACKED["cu_seqlens"]}),
    (BOTH, ValueError, "normalizer", {"reduction": "sum", "normalizer": 3}),
    *(
        (GRPO, TypeError, "max_length", {"reduction": "dr_grpo", "max_length": value})
        for value in (None, 2.5, True)
    ),
    *(
        (GRPO, ValueError, "max_length", {"reduction": "dr_grpo", "max_length": value})
        for value in (0, 2, 2**31)
    ),
    (GRPO, ValueError, "max_length", {**PACKED, "reduction": "dr_grpo", "max_length": 3}),
    *(
        (GRPO, ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": None, **more})
        for more in (
            {"reduction": "dr_grpo", "max_length": 3},
            {"level": "sequence", "reduction": "sum"},
            {"level": "sequence", "reduction": "bnpo"},
        )
    ),
    *((GRPO, ValueError, "kl", {"beta": value}) for value in (0.1, torch.tensor(0.1))),
    (GRPO, ValueError, "beta", {**SAMPLED, "beta": -0.1}),
    (GRPO, TypeError, "beta", {**SAMPLED, "beta": "0.1"}),
    (GRPO, ValueError, "kl", {**SAMPLED, "kl": L}),
    (GRPO, ValueError, "ref_logprob", {**SAMPLED, "ref_logprob": FLAT}),
    *(
        (GRPO, TypeError, "ref_logprob", {**SAMPLED, "ref_logprob": value})
        for value in (ZEROS.double(), ZEROS.long())
    ),
    *((GRPO, TypeError, "kl", {"beta": 0.1, "kl": value}) for value in (L.double(), 0.5)),
    *((GRPO, ValueError, "kl", {"beta": 0.1, "kl": value}) for value in (FLAT, ZEROS)),
    (GRPO, ValueError, "kl_clamp", {"beta": 0.1, "kl": L, "kl_clamp": 5.0}),
    (GRPO, ValueError, "correct_kl", {"beta": 0.1, "kl": L, "correct_kl": True}),
    *(
        (ONLY_DPO, ValueError, "chosen", dict.fromkeys(DPO, value))
        for value in (ZEROS, torch.zeros(()))
    ),
]
BESIDE += [
    (calls, error, name, {name: value}) for calls, error, name, values in ALONE for value in values
]


@pytest.mark.parametrize(
    "call, error, name, change",
    [(call, *wrong) for calls, *wrong in BESIDE for call in calls],
)
def test_wrong_arguments(call, error, name, change) -> None:
    right = dict(RIGHT[call])
    if call is ppo_loss and change.keys() >= PACKED.keys():
        right["reduction"] = "sequence_mean"
    call(**right)
    with pytest.raises(error, match=f"^{re.escape(name)}: expected (?s:.*), got (?s:.*)[;,:] "):
        call(**{**right, **change})


@pytest.mark.parametrize(
    "made, fields",
    [
        (FixedBeta(0.1), "beta=0.1"),
        (
            AdaptiveBeta(0.1, 6, 100, "sequence"),
            "beta=0.1 target=6.0 horizon=100.0 unit='sequence'",
        ),
        (
            PPOAdaptiveBeta(0.1, 6, bounds=(0.1, 1)),
            "bounds=(0.1, tolerance=1.5 factor=2.0 unit='token'",
        ),
        (PIDBeta(0.1, 6, ki=0.5), "beta=0.1 target=6.0 kp=0.3 ki=0.5 kd=0.0"),
        (TrustRegion(1), "max_kl=1 shrink=0.5 tries=10"),
        (SpikeDetector(2.0), "ratio=2 limit=12 recent=15 window=64 floor=0.0001"),
        (KLMonitor(threshold=0.5), "threshold=0.5 spike=SpikeDetector( jsonl="),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_setting_shows(made, fields) -> None:
    assert all(field in repr(made) for field in [type(made).__name__, *fields.split()])
