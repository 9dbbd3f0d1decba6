"""Updates of controllers: units, a penalty instead of a number, equal betas on all processes."""

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
from test_beta import TARGETED, targeted
from torch import distributed

import fastkl
from fastkl.rl import FixedBeta


def penalty_of(tokens: int, scale: float = 1.0) -> fastkl.KLPenalty:
    """Returns a penalty after its call: two sequences of `tokens` tokens altogether."""
    generator = torch.Generator().manual_seed(tokens)
    policy, reference = scale * torch.randn(2, 2, 20, 7, generator=generator)
    penalty = fastkl.KLPenalty(0.1)
    penalty(
        policy, reference, torch.arange(20) < torch.tensor([[tokens // 2], [tokens - tokens // 2]])
    )
    return penalty


@targeted
def test_units(make) -> None:
    """A target per sequence asks for the unit beside a number; a unit that is given must be the
    controller's.
    """
    controller, per_sequence = make(), make(unit="sequence")
    assert (controller.unit, per_sequence.unit) == ("token", "sequence")
    for wrong, arguments, name in (
        (controller, {"kl": 6.0, "unit": "sequence"}, "kl"),
        (controller, {"kl": penalty_of(30), "unit": "sequence"}, "kl"),
        (per_sequence, {"kl": 6.0, "unit": "token"}, "kl"),
        (per_sequence, {"kl": 0.8}, "unit"),
        (per_sequence, {"kl": penalty_of(30).last["kl"]}, "unit"),
        (controller, {"kl": 0.8, "unit": "batch"}, "unit"),
        (FixedBeta(0.1), {"kl": 0.8, "unit": "batch"}, "unit"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            wrong.update(**arguments)
        assert wrong.beta == 0.1
    assert (
        per_sequence.update(0.8, unit="sequence")
        == controller.update(0.8)
        == make().update(0.8, unit="token")
        > 0.1
    )


@targeted
def test_a_penalty_is_read_in_the_unit_of_the_controller(make) -> None:
    """One that counted nothing is no measurement; one that was not called is an error, as one whose
    KL is not finite.
    """
    penalty, none, fixed = penalty_of(30), penalty_of(0), FixedBeta(0.1)
    per_token, per_sequence = penalty.last["kl"], penalty.last["kl_per_sequence"]
    assert per_sequence == pytest.approx(float(15 * per_token), rel=1e-5)
    assert make().update(penalty, 3) == make().update(per_token, 3)
    expected = make(unit="sequence").update(per_sequence, unit="sequence")
    assert make(unit="sequence").update(penalty) == expected
    assert fixed.update(penalty) == fixed.update(penalty, unit="sequence") == 0.1
    assert make().update(none) == make(unit="sequence").update(none) == 0.1
    controller, stale = make(), fastkl.KLPenalty(0.1)
    stale.last = {"kl": torch.tensor(1.0)}
    for wrong in (fastkl.KLPenalty(0.1), stale, penalty_of(30, scale=math.nan)):
        with pytest.raises(ValueError, match="^kl: expected"):
            controller.update(wrong)
    assert controller.state_dict() == make().state_dict()
    with pytest.raises(AttributeError):
        controller.beta = 1.0


# ---- several processes: this file run as rank 1 beside the test as rank 0

SAMPLES = ((0.02, 1), (0.2, 30)), ((0.06, 4), (math.nan, 0)), ((-0.5, 2), (0.01, 5))
PENALTIES = (4, 31), (0, 10)
KEPT = {"token": ("kl", "tokens"), "sequence": ("kl_per_sequence", "sequences")}
REFUSED = ((0.1, 1), (math.nan, 1)), ((0.1, 1), (0.1, -1)), ((0.1, 0), (0.1, 0))


def join(rank: int, folder: str | pathlib.Path) -> None:
    store = distributed.FileStore(str(pathlib.Path(folder) / "store"), 2)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )


def betas(make) -> list[float]:
    """Return this process's betas: samples, penalties per token and per sequence, refused ones.

    A ValueError stands as -1.
    """
    rank, group = distributed.get_rank(), distributed.group.WORLD
    runs = [(make(), [pair[rank] for pair in SAMPLES])]
    for unit in ("token", "sequence"):
        runs.append((make(unit=unit), [(penalty_of(pair[rank]),) for pair in PENALTIES]))
    last = torch.tensor(0.1, dtype=torch.float64), 1
    runs.append((make(), [*(pair[rank] for pair in REFUSED), last]))
    found = []
    for controller, calls in runs:
        for call in calls:
            try:
                found.append(controller.update(*call, process_group=group))
            except ValueError:
                found.append(-1.0)
    return found


def pooled(make) -> list[float]:
    """Return the betas of one process on the samples of both."""
    controller, found = make(), []
    for pair in SAMPLES:
        count = sum(n for _, n in pair)
        found.append(controller.update(sum(kl * n for kl, n in pair if n) / count, count))
    for unit, (mean, count) in KEPT.items():
        controller = make(unit=unit)
        for pair in PENALTIES:
            both = [penalty_of(tokens).last for tokens in pair]
            total = sum(float(last[mean] * last[count]) for last in both)
            kl = total / sum(float(last[count]) for last in both)
            found.append(controller.update(kl, 2, unit=unit))
    return [*found, -1.0, -1.0, -1.0, make().update(0.1, 2)]


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
def test_betas_stay_equal_on_all_processes(tmp_path) -> None:
    """The same beta on both, to the bit, and that of one process on all samples; one rank's NaN is
    an error on both.
    """
    path = os.pathsep.join(
        [str(pathlib.Path(fastkl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(tmp_path)]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        join(0, tmp_path)
        mine = [betas(make) for make in TARGETED.values()]
        theirs = json.loads(other.communicate(timeout=120)[0])
    finally:
        other.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    assert mine == theirs
    for found, make in zip(mine, TARGETED.values(), strict=True):
        assert found == pytest.approx(pooled(make), rel=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join(1, sys.argv[1])
    print(json.dumps([betas(make) for make in TARGETED.values()]))
    distributed.destroy_process_group()
