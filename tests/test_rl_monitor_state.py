"""KLMonitor's memory and arguments: a run that goes on from a copy, damaged states, wrong settings and arguments."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle

import pytest
import torch

from fastkl.rl.monitor import KLMonitor, read_jsonl
from fastkl.rl.spikes import SpikeDetector


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """KLs as of a trained policy: most tokens near 0, some of several nats."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).sub(5).exp()


# ---- state


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor)),
    lambda monitor: loaded(KLMonitor(threshold=0.1, positions=4), json.loads(json.dumps(monitor.state_dict(), allow_nan=False))),
], ids=["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("at", [0, 1, 45])
def test_goes_on_from_a_copy(at, copied) -> None:
    """A copy made in the middle of a run, also before its first step, gives the same figures from there on."""
    batches = [tokens(3, 4 + step // 4, seed=step) * (1000 if step == 50 else 1) for step in range(60)]
    monitor = KLMonitor(threshold=0.1, positions=4)
    for batch in batches[:at]:
        monitor.update(batch)
    other, saved = copied(monitor), monitor.state_dict()
    kept = json.dumps(saved)
    loaded(KLMonitor(threshold=0.1, positions=4), saved).update(batches[0])
    original = [monitor.update(batch) for batch in batches[at:]]
    assert [other.update(batch) for batch in batches[at:]] == original and original[-1]["step"] == 59.0
    assert other.summary() == monitor.summary() and other.profile() == monitor.profile() and other.state_dict() == monitor.state_dict()
    assert monitor.summary()["kl/spikes"] >= 1.0 and json.dumps(saved) == kept


def loaded(monitor: KLMonitor, state: dict) -> KLMonitor:
    """The monitor after load_state_dict."""
    monitor.load_state_dict(state)
    return monitor


@pytest.mark.parametrize("made", ["meta", "inference", "loaded"])
def test_state_is_on_the_cpu_and_may_change(made) -> None:
    """Neither a default device nor inference mode, where it is made, loaded or updated, shows in the figures."""
    batches = [tokens(3, 4 + 40 * step, seed=step) for step in range(4)]
    plain = KLMonitor(threshold=0.1, positions=4)
    expected = [plain.update(batch) for batch in batches]
    with torch.device("meta") if made == "meta" else torch.inference_mode():
        monitor = KLMonitor(threshold=0.1, positions=4)
        got = [monitor.update(batch) for batch in batches[:2]]
        if made != "inference":
            monitor = loaded(KLMonitor(threshold=0.1, positions=4), monitor.state_dict())
            got.append(monitor.update(batches[2]))
    got += [monitor.update(batch) for batch in batches[len(got):]]
    assert got == expected and monitor.state_dict() == plain.state_dict()
    assert monitor.summary() == plain.summary() and monitor.profile() == plain.profile()


@pytest.mark.parametrize("change, words", [
    (lambda state: [], "got list"), (lambda state: {**state, "class": "SpikeDetector"}, "'KLMonitor', got 'SpikeDetector'"),
    (lambda state: {name: value for name, value in state.items() if name != "width"}, "with the entries"),
    (lambda state: KLMonitor(threshold=0.1).state_dict(), "threshold None, got 0.1"),
    (lambda state: KLMonitor(positions=3).state_dict(), "positions 64, got 3"),
    (lambda state: KLMonitor(spike=False).state_dict(), "with a spike detector, got one without"),
    (lambda state: {**state, "histogram": [0.0]}, "histogram as this version"), (lambda state: {**state, "run": {}}, "run as this version"),
    (lambda state: {**state, "spike": {"class": "SpikeDetector"}}, "evidence"), (lambda state: {**state, "spike": 3}, "got int"),
    (lambda state: {**state, "spike": SpikeDetector(recent=4).state_dict()}, "recent 15, got 4"), (lambda state: {**state, "width": 0}, "width as"),
    (lambda state: {**state, "width": None}, "width as"), (lambda state: {**state, "width": 2**40}, "width as"),
    (lambda state: {**state, "step": None}, "step as"), (lambda state: {**state, "step": 1.0}, "step as"),
    (lambda state: {**state, "run": None}, "run as"), (lambda state: {**state, "run": {**state["run"], "max": None}}, "run as"),
    (lambda state: {**state, "histogram": None}, "histogram as"), (lambda state: {**state, "step": -1}, "step as"),
    *((lambda state, name=name, value=value: {**state, "run": {**state["run"], name: value}}, "run as")
      for name, value in (("sum", math.nan), ("max", math.inf), ("steps", -1.0), ("tokens", -3.0), ("spikes", math.nan), ("above", -1.0),
                          ("finite", 5.0), ("sequences", 1.0))),
    *((lambda state, value=value: {**state, "histogram": [value, *state["histogram"][1:]]}, "histogram as") for value in (math.nan, -1.0)),
    (lambda state: {**state, "profile": [[math.inf] * 64, [0.0] * 64]}, "profile as"),
    (lambda state: {**state, "profile": [[0.0] * 64, [-1.0] * 64]}, "profile as"),
    (lambda state: {**state, "threshold": torch.ones(2)}, "threshold None, got tensor"),
    (lambda state: {**state, "spike": {**state["spike"], "evidence": -1.0}}, "evidence as"),
    (lambda state: {**state, "spike": {**state["spike"], "levels": [math.nan]}}, "levels as"),
    (lambda state: {**state, "histogram": ["x"] * len(state["histogram"])}, "histogram as"),
    (lambda state: {**state, "profile": [[0.0] * 64, [0.0] * 63]}, "profile as"), (lambda state: {**state, "profile": [None] * 64}, "profile as"),
], ids=["no-dict", "class", "missing", "threshold", "positions", "spike", "histogram", "run", "detector", "spike-int", "detector-set", "width-0",
        "width-none", "width-huge", "step-none", "step-float", "run-none", "run-max", "histogram-none", "step-negative", "sum-nan", "max-inf",
        "steps-negative", "tokens-negative", "spikes-nan", "above-negative", "finite-more", "sequences-more", "bin-nan", "bin-negative",
        "profile-inf", "profile-negative", "threshold-tensor", "evidence-negative", "levels-nan", "histogram-text", "ragged", "profile-none"])
def test_wrong_state(change, words) -> None:
    """Another class's, an incomplete, a damaged or a differently set monitor's state is an error that names the entry, and changes nothing."""
    monitor = KLMonitor()
    monitor.update(tokens(3, 4))
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="state: expected") as raised:
        monitor.load_state_dict(change(KLMonitor().state_dict()))
    assert words in str(raised.value) and monitor.state_dict() == before


# ---- errors


@pytest.mark.parametrize("settings, error", [
    ({"threshold": -0.1}, ValueError), ({"threshold": math.nan}, ValueError), ({"threshold": torch.tensor(0.1)}, TypeError),
    ({"spike": 3.0}, TypeError), ({"spike": None}, TypeError), ({"positions": 0}, ValueError), ({"positions": 2.0}, TypeError),
    ({"jsonl": 3}, TypeError), ({"jsonl": "/nowhere/to/be/found.jsonl"}, ValueError), ({"jsonl": "/"}, ValueError),
    ({"loggers": print}, TypeError), ({"loggers": [3]}, TypeError), ({"loggers": [logging.getLogger()]}, TypeError),
], ids=str)
def test_wrong_settings(settings, error) -> None:
    """Every setting is checked where the monitor is made."""
    (name, value), = settings.items()
    with pytest.raises(error, match=f"{name}: expected"):
        KLMonitor(**settings)


@pytest.mark.parametrize("name, arguments, error, words", [
    ("kl", {"kl": [0.1]}, TypeError, "got list"), ("kl", {"kl": torch.ones(3).long()}, TypeError, "int64"),
    ("kl", {"kl": torch.tensor(0.1)}, ValueError, "before its mean"), ("mask", {"mask": torch.ones(3)}, TypeError, "float32"),
    ("mask", {"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"\(3,\), .*got \(2,\)"),
    ("cu_seqlens", {"cu_seqlens": [0, 3]}, TypeError, "got list"), ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "from 0 to 3"),
    ("kl", {"kl": torch.ones(1, 3), "cu_seqlens": torch.tensor([0, 3])}, ValueError, r"\[total\]"),
    ("step", {"step": 1.0}, TypeError, "float"), ("step", {"step": True}, TypeError, "bool"), ("reward", {"reward": "1"}, TypeError, "got str"),
    ("beta", {"beta": [0.1]}, TypeError, "got list"), ("entropy", {"entropy": torch.ones(3, dtype=torch.complex64)}, TypeError, "complex64"),
    ("kl/mean", {"kl/mean": 1.0}, ValueError, "choose another"), ("kl/p95", {"kl/p95": 1.0}, ValueError, "choose another"),
    ("loss", {"loss": torch.ones(3, device="meta")}, ValueError, "got meta"),
    ("kl/per_sequence", {"kl/per_sequence": 1.0}, ValueError, "choose another"), ("kl", {"kl": torch.ones(3, device="meta")}, ValueError, "meta"),
    ("step", {"step": -1}, ValueError, r"from 0 to 2\^53, got -1"), ("step", {"step": 10**400}, ValueError, "of 1329 bits; count"),
    ("loss", {"loss": True}, TypeError, "got bool"), ("loss", {"loss": 10**400}, ValueError, "of 1329 bits"),
    ("loss", {"loss": torch.ones(3).to_sparse()}, TypeError, "to_dense"),
], ids=str)
def test_wrong_arguments(name, arguments, error, words, tmp_path) -> None:
    """Every argument of update is checked before anything changes: neither the run nor the file sees the step."""
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[lambda metrics: pytest.fail("told")])
    before = monitor.state_dict()
    arguments = {"kl": tokens(3), **arguments}
    with pytest.raises(error, match=f"{name}: expected") as raised:
        monitor.update(**arguments)
    raised.match(words)
    assert "; " in str(raised.value)
    assert monitor.state_dict() == before and read_jsonl(tmp_path / "run.jsonl") == []


def test_repr(tmp_path) -> None:
    """Every setting shows."""
    assert repr(KLMonitor(threshold=0.5, spike=False)) == "KLMonitor(threshold=0.5, spike=False, positions=64, jsonl=None, loggers=[])"
    got = repr(KLMonitor(spike=SpikeDetector(recent=4), positions=2, jsonl=tmp_path / "a", loggers=[print]))
    assert got == (f"KLMonitor(threshold=None, spike={SpikeDetector(recent=4)!r}, positions=2, jsonl={str(tmp_path / 'a')!r}, "
                   f"loggers=[<built-in function print>])")
