"""KLMonitor's file of JSON lines, and what reads it."""

import io
import json
import math
import os

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
    "\x89PNG\n",
    "17\n",
    "step,kl",
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_other_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    line = 2 if text.startswith('{"step": 1}\n') else 1
    with pytest.raises(ValueError, match=f"^path: expected .* in line {line} of .*, got .*; "):
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
    ('{"step": 0}\n{"a": ' + "[" * 100_000, [ZERO]),
    ('{"step": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"step": 0}\n', [ZERO]),
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
    with pytest.raises(TypeError, match="^spike: expected"):
        KLMonitor(jsonl=tmp_path / "run.jsonl", spike=3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("part", [7, -1], ids=["error", "short write"])
def test_a_full_disk_costs_one_warning(tmp_path, monkeypatch, part) -> None:
    # Figures and state have every step; each line is one write, whole and ended.
    path, writes, full = tmp_path / "run.jsonl", [], [True]

    class Disk(io.FileIO):
        def write(self, data) -> int:
            writes.append(bytes(data))
            written = super().write(data[:part] if full else data)
            if full and part > 0:
                raise OSError(28, "No space left on device")
            return written

    monitor, plain = KLMonitor(jsonl=path), KLMonitor()
    monkeypatch.setattr(
        logs, "open", lambda path, mode, buffering: Disk(path, mode.replace("b", "")), raising=False
    )
    with pytest.warns(RuntimeWarning) as caught:
        returned = [monitor.update(tokens(3, seed=step)) for step in range(2)]
        full.clear()
        returned += [monitor.update(tokens(3, seed=step)) for step in (2, 3)]
    monkeypatch.undo()
    assert returned == [plain.update(tokens(3, seed=step)) for step in range(4)]
    assert monitor.state_dict() == plain.state_dict() and read_jsonl(path)[-2:] == returned[2:]
    assert len(writes) == 4
    assert all(line.endswith(b"}\n") and line.strip(b"\n").count(b"\n") == 0 for line in writes)
    assert [warning.filename for warning in caught] == [__file__]
