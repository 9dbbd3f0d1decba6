"""What KLMonitor does with its figures: the alarm, the file of JSON lines and what reads it, the loggers."""

from __future__ import annotations

import copy
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastkl.rl import monitor as module
from fastkl.rl.monitor import KLMonitor, read_jsonl
from fastkl.rl.spikes import SpikeDetector


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """KLs as of a trained policy: most tokens near 0, some of several nats."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).sub(5).exp()


# ---- the alarm


def test_spikes_are_the_detectors() -> None:
    """The alarm is that of a SpikeDetector fed with the means; the summary counts how many steps rang."""
    values = [0.02 + 0.001 * (step % 3) for step in range(80)] + [0.2, 0.2, 0.02]
    for detector in (SpikeDetector(), SpikeDetector(1.5, recent=5, limit=3.0)):
        monitor, alone = KLMonitor(spike=copy.deepcopy(detector)), []
        got = [monitor.update(torch.full((3,), value))["kl/spike"] for value in values]
        alone = [float(detector.update(float(torch.tensor(value)))) for value in values]
        assert got == alone and got[80] == 1.0 and monitor.summary()["kl/spikes"] == sum(got) > 0
    default = KLMonitor()
    assert [default.update(torch.full((3,), value))["kl/spike"] for value in values][80] == 1.0


# ---- the file


def test_jsonl_reads_back(tmp_path) -> None:
    """One line per update, which reads back as the dict that update returned; what is not finite is null there and NaN here."""
    path = tmp_path / "run.jsonl"
    monitor = KLMonitor(threshold=0.1, jsonl=path)
    returned = [monitor.update(tokens(3, 4, seed=step), reward=0.1 * step, step=10 + step) for step in range(5)]
    returned.append(monitor.update(torch.tensor([math.inf, 0.5])))
    lines = path.read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith('{"step": 10, "kl/mean": ')
    assert all(json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines)
    got = read_jsonl(path)
    assert got[:5] == returned[:5] and all(type(value) is float for value in got[0].values())
    assert math.isnan(got[5].pop("kl/mean")) and math.isnan(got[5].pop("kl/max")) and got[5]["kl/spike"] == 1.0


def test_each_line_is_one_write(tmp_path, monkeypatch) -> None:
    """A step's line goes to the file in one unbuffered write that ends it, so that readers and other writers see whole lines."""
    writes = []

    class Recorder(io.FileIO):
        def write(self, data) -> int:
            writes.append(bytes(data))
            return super().write(data)

    def opened(path, mode, buffering):
        assert "a" in mode and buffering == 0
        return Recorder(path, mode.replace("b", ""))

    monkeypatch.setattr(module, "open", opened, raising=False)
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl")
    for step in range(3):
        monitor.update(tokens(3), **{f"name{index}": 1.5 for index in range(3000)})
        assert (tmp_path / "run.jsonl").read_bytes() == b"".join(writes) and len(writes) == step + 1 and writes[-1].endswith(b"}\n")
    assert len(writes[0]) > 2**15


@pytest.mark.parametrize("cut", [1, 2, 10, -2, -1])
def test_a_line_cut_off_costs_only_itself(tmp_path, cut) -> None:
    """The half line of a killed run is left out, at the end of the file and, once the run goes on, in its middle."""
    path = tmp_path / "run.jsonl"
    monitor = KLMonitor(jsonl=path)
    steps = [monitor.update(tokens(3, seed=step)) for step in range(3)]
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[:start] + whole[start:][:cut])
    kept = steps if cut == -1 else steps[:2]  # without its line break alone it is whole
    assert read_jsonl(path) == kept
    more = KLMonitor(jsonl=path).update(tokens(3), step=2)
    assert read_jsonl(path) == [*kept, more] and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("text, words", [
    ("step,kl\n1,0.1\n", "got 'step,kl' in line 1"), ('{"step": 1}\n[1, 2]\n', "got '[1, 2]' in line 2"), ('{"step": 1} {"step": 2}\n', "in line 1"),
    ("\x89PNG\n", "in line 1"), ("17\n", "got '17'"),
], ids=["csv", "list", "two", "binary", "number"])
def test_other_files_are_refused(tmp_path, text, words) -> None:
    """A file of other lines than JSON objects is an error with the line; a missing one is FileNotFoundError."""
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="path: expected one JSON object per line") as raised:
        read_jsonl(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


def test_reads_what_others_write(tmp_path) -> None:
    """Empty lines are skipped, whole numbers become floats, text stays."""
    path = tmp_path / "run.jsonl"
    path.write_text('\n{"step": 3, "kl": null, "note": "warm-up"}\n\n')
    step, = read_jsonl(path)
    assert step["step"] == 3.0 and type(step["step"]) is float and math.isnan(step["kl"]) and step["note"] == "warm-up"


# ---- loggers


def test_loggers() -> None:
    """log(dict), callables and add_scalar(name, value, step) all get the step's figures, each its own copy."""
    logged, called, scalars = [], [], []

    def spoil(metrics):
        called.append(dict(metrics))
        metrics.clear()

    run = SimpleNamespace(log=lambda metrics: logged.append(metrics))
    writer = SimpleNamespace(add_scalar=lambda name, value, step: scalars.append((name, value, step)))
    monitor = KLMonitor(loggers=[spoil, run, writer])
    returned = [monitor.update(tokens(3, seed=step), reward=1.0, step=5 + step) for step in range(2)]
    assert logged == called == returned and all(returned)
    expected = [(name, value, 5 + step) for step, metrics in enumerate(returned) for name, value in metrics.items() if name != "step"]
    assert scalars == expected and all(type(step) is int for _, _, step in scalars)


def test_a_logger_that_fails_loses_no_line(tmp_path) -> None:
    """The file and the state have the step before the loggers are called."""
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[lambda metrics: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        monitor.update(tokens(3))
    assert len(read_jsonl(tmp_path / "run.jsonl")) == 1 and monitor.state_dict()["step"] == 1
