"""States of controllers, detector and monitor: runs continue from a copy, and a wrong state changes
nothing.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from test_beta import ALL, TARGET
from test_monitor import tokens

from fastkl.rl import KLMonitor, SpikeDetector
from fastkl.rl.beta import BOUNDS

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
        lambda: KLMonitor(threshold=0.1, positions=4),
        lambda made, step: made.update(
            tokens(3, 4 + step // 4, seed=step) * (1000 if step == 50 else 1)
        ),
    ),
}


@pytest.mark.parametrize("at", [0, 1, 45, 91])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_continues_from_a_copy(name, at) -> None:
    """A copy, a pickle and a state kept as JSON give the results of the run, to the bit."""
    make, update = RUNS[name]
    whole, loaded = make(), make()
    for step in range(at):
        update(whole, step)
    update(loaded, 0)  # a state of its own, which must go
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
        assert whole.summary()["kl/spikes"] >= 1.0


RUN = {"sum": math.nan, "max": None, "steps": -1.0, "tokens": -3.0, "spikes": math.nan}
RUN |= {"above": -1.0, "finite": 100.0, "sequences": 100.0}
SPIKE = {"evidence": -1.0, "levels": [math.nan], "recent": 4}
# Wrong values of an entry; for an entry within an entry ("run", "spike") what changes there.
WRONG = {
    **dict.fromkeys(ALL, {"beta": [math.nan, math.inf, -0.1, None, "0.1", True]}),
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
        "positions": [3],
        "spike": [None, 3, {"class": "SpikeDetector"}, *({name: SPIKE[name]} for name in SPIKE)],
        "width": [0, None, 2**40],
        "step": [None, 1.0, -1],
        "run": [None, {}, *({name: RUN[name]} for name in RUN)],
        "histogram": [None, [0.0], ["x"], [math.nan], [-1.0]],
        "profile": [
            *(None, [None] * 4, [[0.0] * 4, [0.0] * 3]),
            *([[math.inf] * 4, [0.0] * 4], [[0.0] * 4, [-1.0] * 4]),
        ],
    },
}
for kind in ALL:
    more = {"unit": ["sequence", 3, np.array(["token", "token"])]}
    WRONG[kind] = {"beta": [*WRONG[kind]["beta"]], **more}
    if kind != "fixed":
        WRONG[kind]["beta"].append(2 * BOUNDS[1])
    if "pid" in kind:
        WRONG[kind] |= {"settled": [1e9], "previous": [math.nan, math.inf, 1e9, -2.0]}


@pytest.mark.parametrize("name", RUNS)
def test_wrong_states(name) -> None:
    """Another class's, an incomplete, a damaged or a differently set object's state is an error."""
    make, update = RUNS[name]
    made = make()
    update(made, 0)
    good = made.state_dict()
    wrong = [None, [], {}, {**good, "more": 1.0}, {**good, "class": "Other"}]
    wrong += [{key: value for key, value in good.items() if key != missing} for missing in good]
    wrong += [other().state_dict() for other, _ in RUNS.values() if type(other()) is not type(made)]
    for entry, values in WRONG[name].items():
        for value in values:
            if isinstance(value, dict) and value and "class" not in value:
                value = {**good[entry], **value}
            elif entry == "histogram" and value in (["x"], [math.nan], [-1.0]):
                value = [*value, *good[entry][1:]]
            wrong.append({**good, entry: value})
    for state in wrong:
        with pytest.raises((ValueError, TypeError), match="^state"):
            made.load_state_dict(state)
        assert made.state_dict() == good
