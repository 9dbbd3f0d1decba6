"""The controllers of beta: rules, bounds, units, a penalty in place of a
number, and equal betas on all processes.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributed

import fastkl
from fastkl.rl import AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta
from fastkl.rl.beta import BOUNDS

TARGET = 0.05
TARGETED = {
    "adaptive": partial(AdaptiveBeta, 0.1, TARGET, 20),
    "ppo": partial(PPOAdaptiveBeta, 0.1, TARGET, tolerance=1.05, factor=1.02),
    "pid": partial(PIDBeta, 0.1, TARGET),
    "pid with kd": partial(PIDBeta, 0.1, TARGET, kp=0.2, ki=0.02, kd=0.2),
}
ALL = {"fixed": partial(FixedBeta, 0.1), **TARGETED}
targeted = pytest.mark.parametrize("make", TARGETED.values(), ids=TARGETED)


# ---- the rules


# A mean of k1 may be negative, and counts as a KL of 0.
ZIEGLER, BAND = partial(AdaptiveBeta, 0.1, 0.05, 1000), {3.99: 1 / 3, 4.01: 1.0, 36.1: 3.0}


@pytest.mark.parametrize(
    "make, kl, n, factor",
    [
        *(
            (ZIEGLER, kl, 64, 1 + error * 0.064)
            for kl, error in {
                -1e300: -0.2,
                -0.5: -0.2,
                0.0: -0.2,
                0.03: -0.2,
                0.045: -0.1,
                0.05: 0.0,
                0.055: 0.1,
                0.06: 0.2,
                5.0: 0.2,
            }.items()
        ),
        (ZIEGLER, 5.0, 1, 1 + 0.2 / 1000),
        (ZIEGLER, 0.0, 4990, 1 - 0.2 * 4.99),
        (partial(AdaptiveBeta, 0.1, 1e6, 1000), -0.5, 64, 1 - 0.2 * 0.064),
        *(
            (partial(PPOAdaptiveBeta, 0.1, 6.0), kl, 1, factor)
            for kl, factor in {
                -0.5: 0.5,
                0.0: 0.5,
                3.99: 0.5,
                4.01: 1.0,
                6.0: 1.0,
                8.99: 1.0,
                9.01: 2.0,
                1e9: 2.0,
            }.items()
        ),
        *(
            (partial(PPOAdaptiveBeta, 0.1, 12.0, tolerance=3.0, factor=3.0), kl, 1, factor)
            for kl, factor in BAND.items()
        ),
        (partial(PIDBeta, 0.1, 6.0), -0.5, 1, math.exp(-0.33)),
        *((partial(FixedBeta, 0.1), kl, 64, 1.0) for kl in (-5.0, 0.0, 1e6)),
    ],
)
def test_rules(make, kl, n, factor) -> None:
    # The published ones, for numbers and tensors of one entry of any type.
    controller = make()
    assert controller.update(kl, n) == controller.beta == pytest.approx(0.1 * factor, rel=1e-13)
    one = torch.tensor([[kl]], dtype=torch.float64, requires_grad=True)
    for measured, samples in ((one, torch.tensor(n)), (np.float64(kl), np.int64(n))):
        assert make().update(measured, samples) == controller.beta
    assert type(controller.beta) is float


def test_pid_is_the_textbooks_rule() -> None:
    # log(beta) = log(initial) + kp·e + ki·Σe + kd·Δe with e = log(kl/target) within ±1.
    controller, errors = PIDBeta(0.1, 2.0, "sequence", kp=0.4, ki=0.05, kd=0.2), [0.0]
    for kl in (2.0, 3.0, 1.5, 0.0, 100.0, 2.2, 2.0, 0.74, 5.43):
        errors.append(max(-1.0, min(1.0, math.log(kl / 2.0) if kl else -math.inf)))
        exact = 0.1 * math.exp(
            0.4 * errors[-1] + 0.05 * sum(errors) + 0.2 * (errors[-1] - errors[-2])
        )
        assert controller.update(kl, unit="sequence") == pytest.approx(exact, rel=1e-12)


# ---- bounds


EXTREME = [
    partial(PIDBeta, 0.1, TARGET, kp=100, ki=100, kd=100),
    partial(PPOAdaptiveBeta, 0.1, TARGET, factor=1e308),
]


@pytest.mark.parametrize("kl, end", [(0.0, 0), (5e-324, 0), (1e308, 1)])
@pytest.mark.parametrize("bounds", [(0.05, 0.2), BOUNDS], ids=str)
@pytest.mark.parametrize("make", [*TARGETED.values(), *EXTREME])
def test_bounds_hold(make, bounds, kl, end) -> None:
    # Beta leaves a bound with the first KL of the other side, as far as from one just reached.
    controller, left = make(bounds=bounds), []
    for updates in (4000, 1000):
        assert [controller.update(kl) for _ in range(updates)][-1] == bounds[end]
        left.append(controller.update(TARGET / 2 if end else 2 * TARGET))
    assert left[0] == pytest.approx(left[1], rel=1e-12) and left[0] != bounds[end]


# ---- units, and a penalty in place of a number


def penalty_of(tokens: int, scale: float = 1.0) -> fastkl.KLPenalty:
    generator, penalty = torch.Generator().manual_seed(tokens), fastkl.KLPenalty(0.1)
    penalty(
        *scale * torch.randn(2, 2, 20, 7, generator=generator),
        torch.arange(20) < torch.tensor([[tokens // 2], [tokens - tokens // 2]]),
    )
    return penalty


@targeted
def test_units(make) -> None:
    # A target per sequence asks for the unit beside a number; a given one must be the controller's.
    controller, per_sequence, fixed = make(), make(unit="sequence"), FixedBeta(0.1)
    for wrong, arguments, name in (
        (controller, {"kl": 6.0, "unit": "sequence"}, "kl"),
        (controller, {"kl": penalty_of(30), "unit": "sequence"}, "kl"),
        (per_sequence, {"kl": 6.0, "unit": "token"}, "kl"),
        (per_sequence, {"kl": 0.8}, "unit"),
        (per_sequence, {"kl": penalty_of(30).last["kl"]}, "unit"),
        (controller, {"kl": 0.8, "unit": "batch"}, "unit"),
        (fixed, {"kl": 0.8, "unit": "batch"}, "unit"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            wrong.update(**arguments)
        assert wrong.beta == 0.1
    expected = per_sequence.update(0.8, unit="sequence")
    assert controller.update(0.8) == make().update(0.8, unit="token") == expected > 0.1


@targeted
def test_a_penalty_is_read_in_the_unit_of_the_controller(make) -> None:
    # One that counted nothing is no measurement; one that was not called is an error, as one whose
    # KL is not finite.
    penalty, none, fixed = penalty_of(30), penalty_of(0), FixedBeta(0.1)
    assert make().update(penalty, 3) == make().update(penalty.last["kl"], 3)
    expected = make(unit="sequence").update(penalty.last["kl_per_sequence"], unit="sequence")
    assert make(unit="sequence").update(penalty) == expected
    assert fixed.update(penalty) == fixed.update(penalty, unit="sequence") == 0.1
    assert make().update(none) == make(unit="sequence").update(none) == 0.1
    controller, stale = make(), fastkl.KLPenalty(0.1)
    stale.last = {"kl": torch.tensor(1.0)}
    for wrong in (fastkl.KLPenalty(0.1), stale, penalty_of(30, scale=math.nan)):
        with pytest.raises(ValueError, match="^kl: expected"):
            controller.update(wrong)
    assert controller.state_dict() == make().state_dict()


# ---- two processes: the other's sums of KL, samples and weights are made here


P = penalty_of(31).last


# This process's KL and samples, the other's sums, the pooled KL and samples: None for an error.
@pytest.mark.parametrize(
    "unit, own, others, pooled",
    [
        ("token", (0.02, 1), (6.0, 30, 30), (6.02 / 31, 31)),
        ("token", (0.06, 4), (0, 0, 0), (0.06, 4)),
        ("token", (math.nan, 0), (0.24, 4, 4), (0.06, 4)),
        ("token", (penalty_of(31), 1), (0.5, 1, 9), ((31 * float(P["kl"]) + 0.5) / 40, 2)),
        (
            "sequence",
            (penalty_of(31), 1),
            (0.5, 1, 2),
            ((2 * float(P["kl_per_sequence"]) + 0.5) / 4, 2),
        ),
        *(("token", own, (0.1, 1, 1), None) for own in ((math.nan, 1), (0.1, -1))),
        ("token", (0.1, 1), (math.nan, 1, 1), None),
        ("token", (0.1, 0), (0, 0, 0), None),
    ],
    ids=str,
)
@targeted
def test_betas_of_several_processes(make, monkeypatch, unit, own, others, pooled) -> None:
    # That of one process on all samples; a wrong value is an error once the others have its sums.
    controller, group, reduced = make(unit=unit), distributed.ProcessGroup(0, 2), []

    def all_reduce(totals, group) -> None:
        reduced.append(totals.add_(torch.tensor(others)))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "get_backend", lambda group: "gloo")
    if pooled is None:
        with pytest.raises(ValueError, match="^(kl|n): expected"):
            controller.update(*own, process_group=group)
        assert reduced and controller.beta == 0.1
    else:
        assert controller.update(*own, process_group=group) == pytest.approx(
            make(unit=unit).update(*pooled, unit=unit), rel=1e-6
        )
