"""A controller's update: negative means, units, a penalty, equal betas on several processes."""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import fastkl
from fastkl.rl import AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta

MAKERS = {
    "adaptive": lambda **more: AdaptiveBeta(0.1, 0.05, 20, **more),
    "ppo": lambda **more: PPOAdaptiveBeta(0.1, 0.05, **more),
    "pid": lambda **more: PIDBeta(0.1, 0.05, **more),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest):
    """Makes a controller with beta 0.1 and the target 0.05."""
    return request.param


def penalty_of(tokens: int, scale: float = 1.0, beta: object = 0.1) -> fastkl.KLPenalty:
    """A penalty after its call: two sequences of `tokens` tokens altogether."""
    generator = torch.Generator().manual_seed(tokens)
    policy, reference = scale * torch.randn(2, 2, 20, 7, generator=generator)
    penalty = fastkl.KLPenalty(beta)
    mask = torch.arange(20) < torch.tensor([[tokens // 2], [tokens - tokens // 2]])
    penalty(policy, reference, mask)
    return penalty


# ---- negative means


@pytest.mark.parametrize("kl", [-1e-9, -0.001, -5.0, -1e300])
def test_a_negative_mean_is_far_below_the_target(make, kl) -> None:
    """k1 has one in many steps: beta falls as for a KL of 0, it is no error."""
    controller, zero = make(), make()
    assert controller.update(kl) == zero.update(0.0) < 0.1
    assert controller.update(torch.tensor(kl, dtype=torch.float64)) == zero.update(0.0)
    assert FixedBeta(0.1).update(kl) == 0.1


def test_a_negative_mean_by_the_rules() -> None:
    """Ziegler's error clipped at -0.2, PPO's halving, PID's error of -1."""
    assert AdaptiveBeta(0.1, 6.0, 100).update(-0.5, 10) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert AdaptiveBeta(0.1, 1e6, 100).update(-0.5, 10) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert PPOAdaptiveBeta(0.1, 6.0).update(-0.5) == 0.05
    assert PIDBeta(0.1, 6.0, kp=0.3, ki=0.03).update(-0.5) == pytest.approx(0.1 * math.exp(-0.33))


# ---- units


def test_a_target_per_sequence_asks_for_the_unit(make) -> None:
    """A KL per token would move beta the wrong way: without the unit the call is refused."""
    controller = make(unit="sequence")
    penalty = penalty_of(30)
    before = controller.state_dict()
    for kl in (0.8, penalty.last["kl"], torch.tensor(0.8)):
        with pytest.raises(
            ValueError,
            match="^unit: expected 'sequence' beside .*, got None; pass unit='sequence' if",
        ):
            controller.update(kl)
    assert controller.state_dict() == before
    assert controller.update(0.8, unit="sequence") > 0.1
    assert make().update(0.8) == make().update(0.8, unit="token")
    assert FixedBeta(0.1).update(0.8) == 0.1


# ---- the penalty itself


def test_a_penalty_is_read_in_the_unit_of_the_controller(make) -> None:
    """41 nats a sequence are 0.8 a token: each controller takes its own."""
    penalty = penalty_of(30)
    last = penalty.last
    assert last["kl_per_sequence"] == pytest.approx(float(15 * last["kl"]), rel=1e-5)
    per_token, per_sequence = make(), make(unit="sequence")
    assert per_token.update(penalty) == make().update(last["kl"])
    expected = make(unit="sequence").update(last["kl_per_sequence"], unit="sequence")
    assert per_sequence.update(penalty) == expected
    assert make().update(penalty, 3) == make().update(last["kl"], 3)
    assert FixedBeta(0.1).update(penalty) == FixedBeta(0.1).update(penalty, unit="sequence") == 0.1
    above = float(last["kl"]) / 3, float(last["kl_per_sequence"]) / 3
    for unit, target in zip(("token", "sequence"), above, strict=True):
        controller = AdaptiveBeta(0.05, target, 100, unit)
        assert controller.update(penalty, unit=unit) > 0.05
    with pytest.raises(ValueError, match="kl: expected the mean KL per token, got per sequence"):
        per_token.update(penalty, unit="sequence")


def test_a_linear_penalty() -> None:
    """As KLPenalty, and its beta follows."""
    controller = AdaptiveBeta(0.05, 0.01, 1, "sequence")
    penalty = fastkl.LinearKLPenalty(controller)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden = (
        torch.randn(*shape, generator=generator) for shape in ((2, 3, 4), (7, 4), (2, 3, 4))
    )
    penalty(hidden, weight, ref_hidden)
    assert controller.update(penalty) == penalty.beta == pytest.approx(0.06)


def test_a_penalty_that_was_not_called(make) -> None:
    """An error with its remedy, and the controller as it was."""
    controller = make()
    stale = fastkl.KLPenalty(0.1)
    stale.last = {"kl": torch.tensor(1.0)}
    for penalty, got in ((fastkl.KLPenalty(0.1), "an empty one"), (stale, "dict without them")):
        with pytest.raises(
            ValueError,
            match=f"^kl: expected a penalty whose `last` holds 'kl.* got {got}; call the",
        ):
            controller.update(penalty)
    assert controller.beta == 0.1


def test_a_penalty_that_counted_nothing(make) -> None:
    """Its KL of 0 is no measurement."""
    for unit in ("token", "sequence"):
        controller = make(unit=unit)
        before = controller.state_dict()
        assert controller.update(penalty_of(0)) == 0.1 and controller.state_dict() == before


def test_a_penalty_whose_kl_is_not_finite(make) -> None:
    """Refused as the number is."""
    with pytest.raises(ValueError, match="^kl: expected a finite number, got nan; pass the mean"):
        make().update(penalty_of(30, scale=math.nan))


# ---- several processes: this file run as rank 1 beside the test as rank 0

SAMPLES = ((0.02, 1), (0.2, 30)), ((0.06, 4), (math.nan, 0)), ((-0.5, 2), (0.01, 5))
PENALTIES = (4, 31), (0, 10)


def betas() -> dict[str, list[float]]:
    """Betas of this process's controllers in each case; -1 for a ValueError."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    found = {}
    for name, make in MAKERS.items():
        controller = make()
        found[name] = [controller.update(*pair[rank], process_group=group) for pair in SAMPLES]
        for unit in ("token", "sequence"):
            controller = make(unit=unit)
            found[f"{name}, penalty per {unit}"] = [
                controller.update(penalty_of(pair[rank]), process_group=group) for pair in PENALTIES
            ]
        controller = make()
        found[f"{name}, refused"] = []
        for kl, n in ((math.nan if rank else 0.1, 1), (0.1, -1 if rank else 1), (0.1, 0), (0.1, 1)):
            try:
                found[f"{name}, refused"].append(
                    controller.update(torch.tensor(kl, dtype=torch.float64), n, process_group=group)
                )
            except ValueError:
                found[f"{name}, refused"].append(-1.0)
    return found


def pooled(name: str, unit: str) -> list[float]:
    """One process on the samples of both."""
    controller, result = MAKERS[name](unit=unit), []
    for pair in PENALTIES:
        both = [penalty_of(tokens).last for tokens in pair]
        mean, count = ("kl", "tokens") if unit == "token" else ("kl_per_sequence", "sequences")
        total = sum(float(last[mean]) * float(last[count]) for last in both)
        result.append(
            controller.update(total / sum(float(last[count]) for last in both), 2, unit=unit)
        )
    return result


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
def test_betas_stay_equal_on_all_processes(tmp_path) -> None:
    """The same beta on both, to the bit, and that of one process on all samples.

    One rank's NaN is an error on both.
    """
    root = pathlib.Path(fastkl.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    other = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(tmp_path / "store"), 2),
            rank=0,
            world_size=2,
            timeout=datetime.timedelta(seconds=120),
        )
        mine = betas()
        theirs = json.loads(other.communicate(timeout=120)[0])
    finally:
        other.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert mine == theirs
    for name, make in MAKERS.items():
        controller = make()
        means = [(sum(kl * n for kl, n in pair if n), sum(n for _, n in pair)) for pair in SAMPLES]
        assert mine[name] == pytest.approx(
            [controller.update(total / n, n) for total, n in means], rel=1e-12
        )
        for unit in ("token", "sequence"):
            assert mine[f"{name}, penalty per {unit}"] == pytest.approx(
                pooled(name, unit), rel=1e-6
            )
        assert mine[f"{name}, refused"] == [-1.0, -1.0, -1.0, make().update(0.1, 2)]


def test_wrong_process_groups(make) -> None:
    """Whatever is no group of torch.distributed."""
    for wrong in (3, "gloo", True, object()):
        with pytest.raises(
            TypeError,
            match="^process_group: expected a ProcessGroup of torch.distributed or None, got .*; pass torch",
        ):
            make().update(0.1, process_group=wrong)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(pathlib.Path(sys.argv[1]) / "store"), 2),
        rank=1,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    print(json.dumps(betas()))
    torch.distributed.destroy_process_group()
