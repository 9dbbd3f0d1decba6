"""KLMonitor's one copy from the device, its memory (runs that go on from a copy, damaged states)
and its wrong arguments.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_monitor import CLOSE, mask_of, tokens

from fastkl.rl.logs import read_jsonl
from fastkl.rl.monitor import KLMonitor

# ---- where it runs


def step_of(device: str, packed: bool) -> tuple[tuple, dict]:
    """Arguments of update on a device, with figures of every kind."""
    kl, mask, bounds = (
        tokens(6, 50).to(device),
        mask_of("holes").to(device),
        torch.arange(0, 301, 50).to(device),
    )
    further = {"entropy": tokens(6, 50), "reward": tokens(6), "loss": kl[:, 0], "beta": 0.1}
    if not packed:
        return (kl, mask), further
    return (kl.reshape(-1), mask.reshape(-1)), {
        **further,
        "entropy": tokens(300),
        "cu_seqlens": bounds,
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_copy_and_nothing_else_is_read(packed, monkeypatch) -> None:
    """On the meta device, where looking at a value is an error, a step gets as far as its one copy;
    the run needs none.
    """
    copies = []
    monkeypatch.setattr(
        torch.Tensor,
        "cpu",
        lambda tensor: (
            copies.append(tensor.device.type) or torch.ones(tensor.shape, dtype=tensor.dtype)
        ),
    )
    arguments, further = step_of("meta", packed)
    monitor = KLMonitor(threshold=0.1)
    for _ in range(3):
        assert monitor.update(*arguments, **further)["entropy"] == 1.0
    monitor.summary(), monitor.profile(), monitor.state_dict()
    assert copies == ["meta"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_wait_for_the_gpu(packed) -> None:
    """A step synchronises once, and its figures are those of the CPU."""
    arguments, further = step_of("cuda", packed)
    monitor = KLMonitor(threshold=0.1)
    monitor.update(*arguments, **further)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = monitor.update(*arguments, **further)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1
    arguments, further = step_of("cpu", packed)
    assert KLMonitor(threshold=0.1).update(*arguments, step=1, **further) == pytest.approx(
        got, **CLOSE
    )


# ---- state


def loaded(state: dict) -> KLMonitor:
    """A monitor after load_state_dict of a state kept as JSON."""
    monitor = KLMonitor(threshold=0.1, positions=4)
    monitor.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    return monitor


@pytest.mark.parametrize("made", ["meta", "inference", "loaded"])
def test_state_is_on_the_cpu_and_may_change(made) -> None:
    """Neither a default device nor inference mode, where it is made, loaded or updated, shows in
    the figures.
    """
    batches = [tokens(3, 4 + 40 * step, seed=step) for step in range(4)]
    plain = KLMonitor(threshold=0.1, positions=4)
    expected = [plain.update(batch) for batch in batches]
    with torch.device("meta") if made == "meta" else torch.inference_mode():
        monitor = KLMonitor(threshold=0.1, positions=4)
        got = [monitor.update(batch) for batch in batches[:2]]
        if made != "inference":
            monitor = loaded(monitor.state_dict())
            got.append(monitor.update(batches[2]))
    got += [monitor.update(batch) for batch in batches[len(got) :]]
    assert got == expected and monitor.state_dict() == plain.state_dict()
    assert (monitor.summary(), monitor.profile()) == (plain.summary(), plain.profile())


WRONG_VALUES = {
    TypeError: [
        *({"kl": value} for value in ([0.1], torch.ones(3).long())),
        {"mask": torch.ones(3)},
        {"cu_seqlens": [0, 3]},
        *({"step": value} for value in (1.0, True)),
        {"reward": "1"},
        {"beta": [0.1]},
        {"entropy": torch.ones(3, dtype=torch.complex64)},
        *({"loss": value} for value in (True, torch.ones(3).to_sparse())),
    ],
    ValueError: [
        *({"kl": value} for value in (torch.tensor(0.1), torch.ones(3, device="meta"))),
        {"kl": torch.ones(1, 3), "cu_seqlens": torch.tensor([0, 3])},
        {"mask": torch.ones(2, dtype=torch.bool)},
        {"cu_seqlens": torch.tensor([0, 2])},
        *({"step": value} for value in (-1, 10**400)),
        *({name: 1.0} for name in ("kl/mean", "kl/p95", "kl/per_sequence")),
        *({"loss": value} for value in (torch.ones(3, device="meta"), 10**400)),
    ],
}


@pytest.mark.parametrize(
    "error, arguments", [(error, each) for error, all_of in WRONG_VALUES.items() for each in all_of]
)
def test_wrong_arguments(error, arguments, tmp_path) -> None:
    """Every argument of update is checked before anything changes: neither the run nor the file
    sees the step.
    """
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[lambda metrics: pytest.fail("told")])
    before = monitor.state_dict()
    with pytest.raises(error, match=f"^{next(iter(arguments))}: expected .*, got .*; "):
        monitor.update(**{"kl": tokens(3), **arguments})
    assert monitor.state_dict() == before and read_jsonl(tmp_path / "run.jsonl") == []
