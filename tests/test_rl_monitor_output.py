"""What KLMonitor does with its figures: the alarm, the file of JSON lines and what reads it, the loggers."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

from fastkl.rl import logs as module
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
    ("\x89PNG\n", "in line 1"), ("17\n", "got '17'"), ("step,kl", "got 'step,kl'"),
    ('{"step": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "in line 1"), ('{"step": 1, x}\n', "in line 1"),
], ids=["csv", "list", "two", "binary", "number", "no-run", "deep", "broken"])
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


@pytest.mark.parametrize("text, kept", [
    ('\0\0{"step": 0}\n\0\0\0{"st\0ep": 1}\n\0\0', [0, 1]), ('{"step": 0}\n{"step": 1, "a}', [0]),
    ('{"step": 0}\n{"step": 1, "a}\n{"step": 2}\n', [0, 2]),
    ('{"step": 0}\n{"step": 1, "a": {"b": 1}\n{"step": 2}\n', [0, 2]), ('{"step": 0}\n\x1a\x07}', [0]), ('{"step": 0}\n{"a": ' + "[" * 100_000, [0]),
], ids=["nul", "name-last", "name", "inner", "garbage-last", "deep-last"])
def test_what_a_crash_leaves(tmp_path, text, kept) -> None:
    """NUL bytes are no part of a line; a line that was cut off is left out, also where it seems to end, and a last one that is nothing."""
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert [step["step"] for step in read_jsonl(path)] == kept


@pytest.mark.parametrize("digits", [1, 308, 400, 5000])
def test_numbers_of_any_length(tmp_path, digits) -> None:
    """A whole number is a float, +inf where it is too large for one."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"reward": ' + "1" * digits + ', "flag": true}\n')
    step, = read_jsonl(path)
    assert step == {"reward": float("1" * digits), "flag": 1.0} and all(type(value) is float for value in step.values())


@pytest.mark.parametrize("wrong", [1, True, 1.5, None, b"run.jsonl", ["run.jsonl"]], ids=repr)
def test_only_paths(wrong) -> None:
    """The number of a file descriptor is none: reading it would close standard output."""
    with pytest.raises(TypeError, match=r"^path: expected a path, str or os.PathLike, got \w+; pass the file that KLMonitor"):
        read_jsonl(wrong)
    os.fstat(1)
    if wrong is not None:
        with pytest.raises(TypeError, match="^jsonl: expected a path, .*; pass"):
            KLMonitor(jsonl=wrong)


def test_a_file_that_cannot_be_appended_to(tmp_path) -> None:
    """Where the monitor is made it says so, and leaves no file where another argument is wrong."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none" / "run.jsonl", tmp_path / "file" / "run.jsonl", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(ValueError, match="jsonl: expected a file that can be appended to"):
            KLMonitor(jsonl=path)
    with pytest.raises(TypeError, match="loggers"):
        KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[3])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_costs_a_warning(tmp_path, monkeypatch) -> None:
    """A line that cannot be written, or only in part, is told of once; figures, state and loggers have every step, the file the others."""
    path, called, room = tmp_path / "run.jsonl", [], []

    class Disk(io.FileIO):
        def write(self, data) -> int:
            if room:
                return super().write(data)
            super().write(data[:7])
            raise OSError(28, "No space left on device")

    monitor, plain = KLMonitor(jsonl=path, loggers=[called.append]), KLMonitor()
    monkeypatch.setattr(module, "open", lambda path, mode, buffering: Disk(path, mode.replace("b", "")), raising=False)
    with pytest.warns(RuntimeWarning, match=r"jsonl, .*run.jsonl'.* failed at step 0 \(OSError: .*No space left") as caught:
        returned = [monitor.update(tokens(3, seed=step)) for step in range(2)]
        room.append(True)
        returned.append(monitor.update(tokens(3, seed=2)))
    monkeypatch.undo()
    assert len(caught) == 1 and returned == [plain.update(tokens(3, seed=step)) for step in range(3)] == called
    assert monitor.state_dict() == plain.state_dict() and read_jsonl(path) == returned[2:]


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


def test_a_logger_that_fails_costs_a_warning(tmp_path) -> None:
    """A logger that raises is told of once; file, state, figures and the other loggers have every step, that one what it took."""
    called, flaky = [], []

    def fail(metrics):
        if metrics["step"] in (1.0, 2.0):
            raise ZeroDivisionError("no network")
        flaky.append(metrics["step"])

    monitor, plain = KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[fail, called.append]), KLMonitor()
    with pytest.warns(RuntimeWarning) as caught:
        returned = [monitor.update(tokens(3, seed=step)) for step in range(4)]
    assert returned == [plain.update(tokens(3, seed=step)) for step in range(4)] == called == read_jsonl(tmp_path / "run.jsonl")
    warned, = caught
    assert re.search(r"loggers\[0\].* failed at step 1 \(ZeroDivisionError: no network\); the run goes on, .*may be missing", str(warned.message))
    assert flaky == [0.0, 3.0] and monitor.state_dict() == plain.state_dict() and warned.filename == __file__


def test_an_interrupt_goes_through() -> None:
    """What is meant to end the run does."""
    def interrupt(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KLMonitor(loggers=[interrupt]).update(tokens(3))
