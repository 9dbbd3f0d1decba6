"""KLMonitor's file of JSON lines and what reads it, and its loggers."""

import io
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_monitor import tokens

from fastkl.rl import logs
from fastkl.rl.monitor import KLMonitor, read_jsonl


def test_jsonl_reads_back(tmp_path) -> None:
    # One line per update, which reads back as the dict that update returned; what is not
    # finite is null there and NaN here.
    path = tmp_path / "run.jsonl"
    monitor = KLMonitor(threshold=0.1, jsonl=path)
    returned = [
        monitor.update(tokens(3, 4, seed=step), reward=0.1 * step, step=10 + step)
        for step in range(5)
    ]
    monitor.update(torch.tensor([math.inf, 0.5]))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["step"] == 10 and lines[5]["kl/mean"] is None
    *got, last = read_jsonl(path)
    assert got == returned and {type(value) for value in got[0].values()} == {float}
    assert math.isnan(last["kl/mean"]) and math.isnan(last["kl/max"]) and last["kl/spike"] == 1.0


@pytest.mark.parametrize("cut", [1, 2, 10, -2, -1])
def test_a_line_cut_off_costs_only_itself(tmp_path, cut) -> None:
    # The half line of a killed run is left out, at the end of the file and, once the run goes
    # on, in its middle.
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


REFUSED = [
    "step,kl\n1,0.1\n",
    '{"step": 1}\n[1, 2]\n',
    '{"step": 1} {"step": 2}\n',
    "\x89PNG\n",
    "17\n",
    "step,kl",
    '{"step": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
    '{"step": 1, x}\n',
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_other_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    line = 2 if text.startswith('{"step": 1}\n') else 1
    with pytest.raises(ValueError, match=f"^path: expected .*, got .* in line {line} of .*; "):
        read_jsonl(tmp_path / "run.jsonl")


ZERO = {"step": 0.0}
READ = [
    # Others' files: empty lines, whole numbers of any length, text.
    (
        '\n{"step": 0, "note": "warm-up", "flag": true}\n\n',
        [{**ZERO, "note": "warm-up", "flag": 1.0}],
    ),
    *(
        ('{"step": ' + "1" * digits + "}\n", [{"step": float("1" * digits)}])
        for digits in (1, 308, 400, 5000)
    ),
    # A crash leaves NUL bytes, lines cut off that seem to end, and a last one that is nothing.
    ('\0\0{"step": 0}\n\0\0\0{"st\0ep": 1}\n\0\0', [ZERO, {"step": 1.0}]),
    ('{"step": 0}\n{"step": 1, "a}', [ZERO]),
    ('{"step": 0}\n{"step": 1, "a}\n{"step": 2}\n', [ZERO, {"step": 2.0}]),
    ('{"step": 0}\n{"step": 1, "a": {"b": 1}\n{"step": 2}\n', [ZERO, {"step": 2.0}]),
    ('{"step": 0}\n\x1a\x07}', [ZERO]),
    ('{"step": 0}\n{"a": ' + "[" * 100_000, [ZERO]),
]


@pytest.mark.parametrize("text, steps", READ, ids=range(len(READ)))
def test_files_that_are_read(tmp_path, text, steps) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    got = read_jsonl(tmp_path / "run.jsonl")
    assert got == steps and all(type(step["step"]) is float for step in got)


NO_PATHS = [1, True, 1.5, b"run.jsonl", ["run.jsonl"]]


@pytest.mark.parametrize("wrong", NO_PATHS)
def test_no_paths(wrong) -> None:
    for call, name in ((read_jsonl, "path"), (lambda path: KLMonitor(jsonl=path), "jsonl")):
        with pytest.raises(TypeError, match=f"^{name}: expected a path, .*, got .*; "):
            call(wrong)
    os.fstat(1)  # the number of a file descriptor is no path: reading it would close the file


@pytest.mark.parametrize("name", ["", "none/run.jsonl", "file/run.jsonl", "n" * 300, "a\0b"])
def test_files_that_cannot_be_appended_to(tmp_path, name) -> None:
    # The monitor says so where it is made, and leaves no file where another argument is wrong.
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^jsonl: expected .*, got .*; "):
        KLMonitor(jsonl=tmp_path / name)
    with pytest.raises(TypeError, match="^loggers: expected"):
        KLMonitor(jsonl=tmp_path / "run.jsonl", loggers=[3])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_loggers() -> None:
    # log(dict), callables and add_scalar(name, value, step) all get the step's figures, each its
    # own copy.
    logged, called = [], []

    def spoil(metrics):
        called.append(dict(metrics))
        metrics.clear()

    writer = mock.Mock(spec=["add_scalar"])
    monitor = KLMonitor(loggers=[spoil, SimpleNamespace(log=logged.append), writer])
    returned = [
        monitor.update(tokens(3, seed=step), reward=1.0, step=5 + step) for step in range(2)
    ]
    assert logged == called == returned and all(returned)
    assert writer.add_scalar.call_args_list == [
        mock.call(name, value, int(metrics["step"]))
        for metrics in returned
        for name, value in metrics.items()
        if name != "step"
    ]
    assert {type(call.args[2]) for call in writer.add_scalar.call_args_list} == {int}
    with pytest.raises(KeyboardInterrupt):
        KLMonitor(loggers=[mock.Mock(spec=(), side_effect=KeyboardInterrupt)]).update(tokens(3))


@pytest.mark.parametrize("part", [7, -1], ids=["error", "short write"])
def test_what_fails_costs_a_warning(tmp_path, monkeypatch, part) -> None:
    # A full disk and a logger that raises are told of once; figures, state and the other
    # loggers have every step.
    path, called, writes, full = tmp_path / "run.jsonl", [], [], [True]

    class Disk(io.FileIO):
        def write(self, data) -> int:
            writes.append(bytes(data))
            written = super().write(data[:part] if full else data)
            if full and part > 0:
                raise OSError(28, "No space left on device")
            return written

    flaky = mock.Mock(spec=(), side_effect=[None, ZeroDivisionError, ZeroDivisionError, None])
    monitor, plain = KLMonitor(jsonl=path, loggers=[flaky, called.append]), KLMonitor()
    monkeypatch.setattr(
        logs, "open", lambda path, mode, buffering: Disk(path, mode.replace("b", "")), raising=False
    )
    with pytest.warns(RuntimeWarning) as caught:
        returned = [monitor.update(tokens(3, seed=step)) for step in range(2)]
        full.clear()
        returned += [monitor.update(tokens(3, seed=step)) for step in (2, 3)]
    monkeypatch.undo()
    assert returned == [plain.update(tokens(3, seed=step)) for step in range(4)] == called
    assert monitor.state_dict() == plain.state_dict() and flaky.call_count == 4
    assert read_jsonl(path)[-2:] == returned[2:]
    # Each line is one write, whole and ended, for other readers and writers.
    assert len(writes) == 4 and all(line.strip(b"\n").count(b"\n") == 0 for line in writes)
    assert all(line.endswith(b"}\n") for line in writes)
    told = [str(warning.message) for warning in caught]
    assert ["jsonl" in told[0], "loggers[0]" in told[1], len(told)] == [True, True, 2]
    assert {warning.filename for warning in caught} == {__file__}
