"""States of controllers, detector and monitor: runs continue from a copy, a wrong state changes
nothing, and every setting shows. The monitor's one copy from the device.
"""

import copy
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from cases import waits
from test_beta import ALL, TARGET
from test_monitor import mask_of, tokens

from fastkl.rl import (
    AdaptiveBeta,
    FixedBeta,
    KLMonitor,
    PIDBeta,
    PPOAdaptiveBeta,
    SpikeDetector,
    TrustRegion,
)
from fastkl.rl.beta import BOUNDS
from fastkl.rl.figures import BINS

STEPS = 100
RANDOM = random.Random(1)
KLS = [TARGET * math.exp(RANDOM.gauss(0.5, 1)) for _ in range(STEPS)]
# 1.77 is a little more than the root of 3: one step of it is evidence, but not enough.
RISING = [
    0.02 * (1.77 if step >= 90 else 1) * math.exp(RANDOM.gauss(0, 0.002)) for step in range(STEPS)
]
# How an object is made, and its update with the figures of a step.
RUNS = {name: (make, lambda made, step: made.update(KLS[step], 3)) for name, make in ALL.items()}
RUNS |= {
    "spikes": (SpikeDetector, lambda made, step: made.update(RISING[step])),
    "monitor": (
        lambda: KLMonitor(threshold=0.1),
        lambda made, step: made.update(
            tokens(3, 4 + step // 4, seed=step) * (1000 if step == 50 else 1)
        ),
    ),
}


@pytest.mark.parametrize("at", [0, 1, 45, 91])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_continues_from_a_copy(name, at) -> None:
    # A copy, a pickle and a state kept as JSON give the results of the run, to the bit.
    make, update = RUNS[name]
    whole, loaded = make(), make()
    update(loaded, 0)  # a state of its own, which must go
    for step in range(at):
        update(whole, step)
    saved, kept = whole.state_dict(), json.dumps(whole.state_dict(), allow_nan=False)
    loaded.load_state_dict(json.loads(kept))
    others = [loaded, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    assert all(other.state_dict() == saved for other in others)
    original = [update(whole, step) for step in range(at, STEPS)]
    for other in others:
        assert [update(other, step) for step in range(at, STEPS)] == original
        assert other.state_dict() == whole.state_dict()
    assert json.dumps(saved) == kept
    if name == "spikes":
        assert (original.index(True) + at, at < 91 or saved["evidence"] > 6) == (91, True)
    if name == "monitor":
        KLMonitor(threshold=0.1, positions=8).load_state_dict(saved)  # they have no state
        assert whole.summary()["kl/spikes"] >= 1.0


RUN = {"sum": math.nan, "max": None, "steps": "1", "tokens": math.inf}
SPIKE = {"evidence": -1.0, "levels": [math.nan], "recent": 4}
# Wrong values of an entry; for an entry within an entry ("run", "spike") what changes there.
NUMBERS = [math.nan, math.inf, -0.1, None, "0.1", True]
BETAS = {
    "unit": ["sequence", 3, np.array(["token", "token"])],
    "beta": [*NUMBERS, 2 * BOUNDS[1]],
    "settled": [1e9],
    "previous": [math.nan, math.inf, 1e9, -2.0],
}
WRONG = {
    **dict.fromkeys(ALL, BETAS),
    "fixed": {"unit": BETAS["unit"], "beta": NUMBERS},
    "spikes": {
        "recent": [4, torch.ones(2)],
        "window": [16],
        "floor": [0.5, None],
        "levels": [None, [0.0] * 16, [None]],
        "residuals": [["0.1"], [None, math.nan]],
        "evidence": [None, math.inf, -0.5],
    },
    "monitor": {
        "threshold": [0.2, torch.ones(2)],
        "spike": [None, 3, {"class": "SpikeDetector"}, *({name: SPIKE[name]} for name in SPIKE)],
        "step": [None, 1.0],
        "run": [None, {}, *({name: RUN[name]} for name in RUN)],
        "histogram": [
            None,
            [0.0],
            *([wrong] + [0.0] * (BINS - 1) for wrong in ("x", math.nan)),
        ],
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_wrong_states(name) -> None:
    # Another class's, an incomplete, a damaged or a differently set object's state is an
    # error.
    make, update = RUNS[name]
    made = make()
    update(made, 0)
    good = made.state_dict()
    wrong = [None, [], {}, {**good, "more": 1.0}, {**good, "class": "Other"}]
    wrong += [{key: value for key, value in good.items() if key != missing} for missing in good]
    wrong += [other().state_dict() for other, _ in RUNS.values() if type(other()) is not type(made)]
    for entry in good.keys() & WRONG[name].keys():
        for value in WRONG[name][entry]:
            within = isinstance(value, dict) and value and "class" not in value
            wrong.append({**good, entry: {**good[entry], **value} if within else value})
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match="^state"):
            made.load_state_dict(state)
        assert made.state_dict() == good


# ---- where it runs


def step_of(device: str, packed: bool) -> dict:
    kl, mask = tokens(6, 50).to(device), mask_of().to(device)
    further = {"entropy": tokens(6, 50), "reward": tokens(6), "loss": kl[:, 0], "beta": 0.1}
    if not packed:
        return {"kl": kl, "mask": mask, **further}
    ends, entropy = torch.arange(0, 301, 50).to(device), tokens(300)
    further |= {"cu_seqlens": ends, "entropy": entropy}
    return {"kl": kl.flatten(), "mask": mask.flatten(), **further}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_copy_and_nothing_else_is_read(packed, monkeypatch) -> None:
    # On the meta device, where looking at a value is an error, a step gets as far as its one
    # copy; the run needs none.
    copies, monitor = [], KLMonitor(threshold=0.1, positions=4)

    def copied(tensor):
        copies.append(tensor.device.type)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", copied)
    for _ in range(3):
        assert monitor.update(**step_of("meta", packed))["entropy"] == 1.0
    monitor.summary(), monitor.state_dict()
    assert copies == ["meta"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_wait_for_the_gpu(packed) -> None:
    arguments, monitor = step_of("cuda", packed), KLMonitor(threshold=0.1, positions=4)
    assert waits(lambda: monitor.update(**arguments)) == 1


# ---- the monitor: devices and inference mode


@pytest.mark.parametrize("where", [lambda: torch.device("meta"), torch.inference_mode])
def test_state_is_on_the_cpu_and_may_change(where) -> None:
    # Neither a default device nor inference mode, where it is made, loaded or updated, shows
    # in the figures.
    batches = [tokens(3, 4 + 40 * step, seed=step) for step in range(4)]
    plain = KLMonitor(threshold=0.1)
    expected = [plain.update(batch) for batch in batches]
    with where():
        monitor, loaded = (KLMonitor(threshold=0.1) for _ in range(2))
        got = [monitor.update(batches[0])]
        loaded.load_state_dict(monitor.state_dict())
        got.append(loaded.update(batches[1]))
    got += [loaded.update(batch) for batch in batches[2:]]
    assert got == expected and loaded.state_dict() == plain.state_dict()


# ---- what is shown


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
        (KLMonitor(threshold=0.5), "threshold=0.5 spike=SpikeDetector( positions=0 jsonl="),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_setting_shows(made, fields) -> None:
    assert all(field in repr(made) for field in [type(made).__name__, *fields.split()])
