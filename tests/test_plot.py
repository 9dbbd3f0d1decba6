"""`fastkl plot`: the picture shows what the file holds, and every wrong file says what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch

image = pytest.importorskip("matplotlib.image")

# After the skip: the picture needs matplotlib.
from matplotlib import colors  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fastkl.rl import KLMonitor  # noqa: E402
from fastkl.tools import cli, plot  # noqa: E402
from fastkl.tools.files import default_picture  # noqa: E402


def write_run(path, steps: int = 60, jump: int = 40, **figures) -> None:
    """A run as KLMonitor writes it, whose KL jumps once; figures: functions of the step."""
    monitor = KLMonitor(jsonl=path)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        kl = torch.randn(4, 50, generator=generator).sub(4).exp() * (10 if step == jump else 1)
        monitor.update(kl, **{name: figure(step) for name, figure in figures.items()})


def read_figures(path) -> dict[str, list[float]]:
    """The figures of a file, without what is said of its lines."""
    return plot.read_run(path)[0]


@pytest.fixture
def run(tmp_path):
    """The file of a whole run."""
    write_run(tmp_path / "run.jsonl", reward=lambda step: step / 10, beta=lambda step: 0.1 + step / 1e3)
    return tmp_path / "run.jsonl"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is drawn."""
    drawn = []
    monkeypatch.setattr(plot, "Figure", lambda *args, **options: drawn.append(Figure(*args, **options)) or drawn[-1])
    return drawn


def share(picture, colour: str) -> float:
    """How much of a picture is of about that colour."""
    return float((abs(picture[..., :3] - colors.to_rgb(colour)).max(-1) < 0.05).mean())


def fails(capsys, *arguments) -> str:
    """The error line of a command that is to exit with 2."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["plot", *map(str, arguments)])
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err.splitlines()[-1]


# ---- the picture


def test_command(run, capsys) -> None:
    """The command writes a PNG beside the file, or where --out says, and nothing else; it prints where, and the run in a sentence."""
    assert cli.main(["plot", str(run)]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{run.with_suffix('.png')}: 60 steps; KL 0.0") and line.endswith("; 1 spike at 40")
    other = run.parent / "other.PNG"
    assert cli.main(["plot", str(run), "--out", str(other)]) == 0
    assert other.read_bytes() == run.with_suffix(".png").read_bytes()
    assert sorted(path.name for path in run.parent.iterdir()) == ["other.PNG", "run.jsonl", "run.png"]
    picture = image.imread(other, format="png")
    assert picture.shape[1] >= 1000 and picture.shape[0] >= 1000
    for colour in (plot.REWARD, plot.KL, plot.BETA, plot.SPIKE):
        assert share(picture, colour) > 2e-5


def test_curves_are_the_figures(run, figures) -> None:
    """What is drawn is what the file says: reward, mean, band, 99 %, beta and spikes, over its steps."""
    plot.plot_run(run, run.with_suffix(".png"))
    reward, kl, beta = figures[0].axes
    held = [json.loads(line) for line in run.read_text().splitlines()]

    def column(name):
        return [line[name] for line in held]

    for axes, curve, name in ((reward, 0, "reward"), (kl, 0, "kl/mean"), (kl, 1, "kl/p99"), (beta, 0, "beta")):
        assert list(axes.lines[curve].get_xdata()) == column("step") and list(axes.lines[curve].get_ydata()) == column(name)
    assert kl.get_yscale() == "log" and [axes.get_ylabel() for axes in (reward, kl, beta)] == ["reward", "KL (nats per token)", "beta"]
    band = kl.collections[0].get_paths()[0].vertices
    low, _ = kl.get_ylim()
    for values in (column("kl/p50"), column("kl/p95")):
        points = {(round(float(x), 3), round(math.log(y), 6)) for x, y in band}
        assert {(round(step, 3), round(math.log(max(value, low)), 6)) for step, value in zip(column("step"), values, strict=True)} <= points
    spikes = [step for step, spike in zip(column("step"), column("kl/spike"), strict=True) if spike]
    assert spikes == [40] and list(kl.lines[2].get_xdata()) == spikes
    assert all(axes.lines[-1].get_color() == plot.SPIKE and list(axes.lines[-1].get_xdata()) == [40, 40] for axes in (reward, kl, beta))


def test_only_what_the_file_holds(tmp_path, figures, capsys) -> None:
    """A figure that is not in the file has no panel; one without quantiles or spikes has no band and no mark, and the sentence no spikes."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps({"step": step, "kl/mean": 0.1 * (step + 1)}) + "\n" for step in range(3)))
    assert cli.main(["plot", str(path)]) == 0
    axes, = figures[0].axes
    assert len(axes.lines) == 1 and not axes.collections and axes.get_ylabel() == "KL (nats per token)"
    assert capsys.readouterr().out.strip().endswith("run.png: 3 steps; KL 0.3 at the end, 0.3 at most")
    path.write_text('{"step": 0, "kl/mean": 0.1, "beta": null, "reward": 1.0}\n')
    plot.plot_run(path, tmp_path / "run.png")
    assert [axes.get_ylabel() for axes in figures[1].axes] == ["reward", "KL (nats per token)"]


def test_steps_that_come_twice(tmp_path) -> None:
    """Where a run went on from a checkpoint the later line of a step counts, steps are in order, and lines without a step go by their place."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps({"step": step, "kl/mean": kl}) + "\n" for step, kl in ((0, 1), (1, 2), (2, 3), (3, 4), (2, 5), (3, 6))))
    assert read_figures(path) == {"step": [0.0, 1.0, 2.0, 3.0], "kl/mean": [1.0, 2.0, 5.0, 6.0]}
    path.write_text('{"kl/mean": 1}\n{"kl/mean": 2, "note": "x"}\n')
    got = read_figures(path)
    assert got["step"] == [0.0, 1.0] and got["kl/mean"] == [1.0, 2.0]


def test_what_a_resumed_run_gave_up_is_not_shown(tmp_path) -> None:
    """A run of 100 steps that went on from its step 50 and got to 59 has 60 steps, and ends where it ended; twice, and from its first step, too."""
    path = tmp_path / "run.jsonl"

    def written(*parts) -> dict[str, list[float]]:
        path.write_text("".join(json.dumps({"step": step, "kl/mean": 1 + part}) + "\n" for part, steps in enumerate(parts) for step in steps))
        return read_figures(path)

    got = written(range(100), range(50, 60))
    assert got["step"] == list(range(60)) and got["kl/mean"] == [1.0] * 50 + [2.0] * 10
    assert plot.describe(got) == "60 steps; KL 2 at the end, 2 at most"
    assert written(range(100), range(50, 60), range(55, 58))["kl/mean"] == [1.0] * 50 + [2.0] * 5 + [3.0] * 3
    assert written(range(5), [0])["kl/mean"] == [2.0] and written(range(5), [3, 5])["step"] == [0.0, 1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize("lines", [
    [{"step": 7, "kl/mean": 0.1, "kl/p50": 0.0, "kl/p95": 0.2}], [{"step": 0, "kl/mean": 0.0, "kl/p50": 0.0, "kl/p95": 0.0, "kl/spike": 0.0}] * 2,
    [{"step": 0, "kl/mean": -0.1}, {"step": 1, "kl/mean": -0.2}], [{"step": 0, "kl/mean": None, "kl/spike": 1.0}, {"step": 1, "kl/mean": 0.1}],
    [{"step": 0, "kl/mean": 0.1, "reward": 1.0}, {"step": 1, "kl/mean": 1e30, "reward": -1e30}, {"step": 2, "kl/mean": 1e-30}],
    [{"step": 0, "kl/mean": 0.1, "kl/p50": 0.1}, {"step": 1, "kl/p50": 0.1, "kl/p95": 0.3}], [{"step": 0, "kl/mean": 0.1, "kl/spike": 1.0}],
    [{"step": step, "kl/mean": kl, "kl/p50": kl, "kl/p95": kl, "kl/p99": kl, "reward": kl, "beta": kl}
     for step, kl in enumerate((0.1, 1.7e308, -1.7e308, math.inf, 10**400, 5e-324, "text", [1.0], True))], [{"step": 2**53 - 1, "kl/mean": 0.1}],
    [{"step": step, "kl/mean": 1.0, "reward": 1.7e308} for step in range(200)],
], ids=["one-step", "zero", "negative", "null", "huge", "gaps", "spike", "beyond", "far", "no-reward"])
def test_odd_runs(lines, tmp_path, recwarn) -> None:
    """One step, a KL of 0, negative estimates, gaps and extremes give a picture, without a warning."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.plot_run(path, tmp_path / "run.png")
    picture = image.imread(tmp_path / "run.png")
    assert share(picture, plot.KL) > 1e-6 and not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("name", ["a$^$b.jsonl", "a_$\\frac$.jsonl", os.fsdecode(b"\xff.jsonl"), "kl.seed1", "run.png"], ids=ascii)
def test_any_name_of_a_file(name, run, figures) -> None:
    """The title is the file's name as it stands: no mathtext, and no error for bytes that are no text."""
    source = run.rename(run.with_name(name))
    plot.plot_run(source, default_picture(source))
    assert figures[0].get_suptitle() == name.encode(errors="replace").decode()
    assert default_picture(source).stat().st_size > 1000 and default_picture(source) != source


def test_a_band_from_0_reaches_down(tmp_path, figures) -> None:
    """Where the median token has a KL of 0 the band is not lost to the logarithm: it begins at the lower edge."""
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps({"step": step, "kl/mean": 0.1, "kl/p50": 0.0, "kl/p95": 0.3}) + "\n" for step in range(5)))
    plot.plot_run(path, tmp_path / "run.png")
    axes, = figures[0].axes
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(axes.get_ylim()[0]) and heights.max() == 0.3 and axes.get_ylim()[0] > 0


def test_what_a_monitor_saw_go_wrong_is_said(tmp_path) -> None:
    """A KL that is not finite is a gap and a spike, and counted in the sentence."""
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl")
    for value in (0.1, math.nan, 0.2, math.inf):
        monitor.update(torch.tensor([value]))
    said = plot.describe(read_figures(tmp_path / "run.jsonl"))
    assert said == "4 steps; KL 0.2 at the end, 0.2 at most; 2 spikes at 1, 3"
    assert plot.left_out(read_figures(tmp_path / "run.jsonl"))[0] == "KL/p50/p95/p99 of 2 steps (none or not finite)"


def test_what_is_left_out_is_said(tmp_path, figures, capsys) -> None:
    """The command and the picture name gaps of every figure, what a logarithmic axis has no place
    for, replaced and cut-off lines."""
    path = tmp_path / "run.jsonl"
    lines = [{"step": step, "kl/mean": 0.1, "kl/p99": 0.3, "reward": 1.0, "beta": 0.1} for step in range(8)]
    lines[1] |= {"kl/mean": None, "kl/p99": None}
    lines[2]["reward"] = "much"
    lines[3]["beta"] = 1e200
    lines[4] |= {"kl/mean": 0.0, "kl/p99": 0.0}
    lines[5]["kl/mean"] = -0.5
    lines[6]["kl/mean"] = 1e-9
    text = [json.dumps(line) for line in [*lines[:5], *lines[3:]]]
    path.write_text("\n".join([*text, '{"step": 8, "kl/me']))
    assert cli.main(["plot", str(path)]) == 0
    said = capsys.readouterr().out.partition("; left out: ")[2].strip()
    assert said.split(", ") == [
        "reward of 1 step (none or not finite)", "KL/p99 of 1 step (none or not finite)", "KL of 3 steps (below the axis)",
        "p99 of 1 step (below the axis)", "beta of 1 step (none or not finite)", "2 lines (replaced by a later start)", "1 line (cut off)",
    ]
    title = figures[0].axes[0].get_title(loc="left")
    assert " ".join(title.split()).endswith(f"left out: {said}") and max(map(len, title.splitlines())) <= 120
    path.write_text("".join(json.dumps(lines[0] | {"step": step}) + "\n" for step in range(3)))
    assert plot.plot_run(path, tmp_path / "x.png") == "3 steps; KL 0.1 at the end, 0.1 at most"


@pytest.mark.parametrize("source", ["/dev/zero", "/dev/urandom", "/dev/tty"])
def test_a_device_is_refused(source, capsys, tmp_path) -> None:
    """A device has no end, or waits for what nobody types."""
    error = fails(capsys, source, "--out", tmp_path / "x.png")
    assert f"got '{source}' (neither a regular file nor a pipe); name one that exists" in error and not list(tmp_path.iterdir())


def test_a_pipe_is_read_once(run, tmp_path, capsys) -> None:
    """`fastkl plot <(zcat run.jsonl.gz) --out run.png` passes one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(run.read_bytes()))
    writer.start()
    assert cli.main(["plot", str(pipe), "--out", str(tmp_path / "x.png")]) == 0 and "60 steps" in capsys.readouterr().out
    writer.join(10)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 100])
def test_moving_mean(width) -> None:
    """The mean of the finite values within width // 2 on either side."""
    values = [1.0, 4.0, math.nan, 2.0, math.inf, 8.0, 0.0]
    reach, expected = width // 2, []
    for index in range(len(values)):
        near = [value for other, value in enumerate(values) if abs(other - index) <= reach and math.isfinite(value)]
        expected.append(sum(near) / len(near) if near else math.nan)
    assert plot.moving_mean(values, width) == pytest.approx(expected, nan_ok=True)


def test_long_runs(tmp_path, figures) -> None:
    """20 000 steps take seconds; the reward gets a moving mean over its steps, the KL does not."""
    path = tmp_path / "run.jsonl"
    with open(path, "w") as file:
        file.writelines(f'{{"step": {step}, "kl/mean": {0.1 + step % 7}, "reward": {step % 5}}}\n' for step in range(20_000))
    start = time.perf_counter()
    plot.plot_run(path, tmp_path / "run.png")
    assert time.perf_counter() - start < 20
    reward, kl = figures[0].axes
    assert len(kl.lines) == 1 and [line.get_label() for line in reward.lines] == ["each step", "mean of 501 steps"]
    assert set(reward.lines[0].get_ydata()) == {0.0, 1.0, 2.0, 3.0, 4.0} and abs(reward.lines[1].get_ydata()[10_000] - 2) < 0.01


# ---- wrong use


@pytest.mark.parametrize("source, expected", [
    ("a/run.jsonl", "a/run.png"), ("run.JSON", "run.png"), ("kl.seed1", "kl.seed1.png"), ("kl.seed2", "kl.seed2.png"), ("run", "run.png"),
    ("run.png", "run.png.png"), ("a.b/run", "a.b/run.png"), (".", "..png"), ("/", "/.png"),
])
def test_default_picture(source, expected) -> None:
    """Beside the file, another for each and never the file itself; a name for what is no file, of which the reader complains."""
    assert default_picture(Path(source)) == Path(expected) != Path(source)


@pytest.mark.parametrize("text, words", [
    ('{"step": 1e400, "kl/mean": 1}', "with the step inf"), ('{"step": null, "kl/mean": 1}', "with the step nan"),
    ('{"step": "x", "kl/mean": 1}', "with the step x"), ('{"step": 1e300, "kl/mean": 1}', "with the step 1e+300"),
    ('{"step": ' + "1" * 5000 + ', "kl/mean": 1}', "with the step inf"), ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "in line 3"),
    ('{"step": 1, "kl/mean": 1, x}', "in line 3"),
], ids=["infinite", "null", "text", "huge", "digits", "deep", "broken"])
def test_wrong_lines(tmp_path, capsys, text, words) -> None:
    """A step that is no number, or one that no float holds, and a line that is not JSON: exit code 2 and one line."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 0, "kl/mean": 1}\n\n' + text + '\n{"step": 2, "kl/mean": 1}\n')
    assert words in fails(capsys, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_wrong_files(tmp_path, capsys) -> None:
    """A missing file, a folder, an empty file, other text, and JSON without KL: exit code 2, one line that says so, and no picture."""
    path = tmp_path / "run.jsonl"
    start = "fastkl plot: error: argument RUN.jsonl: expected a file that KLMonitor(jsonl=...) wrote, got "
    assert fails(capsys, path) == f"{start}{str(path)!r} (No such file or directory); name one that exists"
    assert fails(capsys, tmp_path).startswith(f"{start}{str(tmp_path)!r} (")
    path.write_text("")
    assert fails(capsys, path) == f"{start}{str(path)!r}, which is empty; the first line comes with the first update"
    path.write_text("step,kl\n1,2\n")
    assert "got 'step,kl' in line 1" in fails(capsys, path)
    path.write_text('{"step": 1, "loss": 0.5}\n')
    assert fails(capsys, path) == f"{start}{str(path)!r} without a finite 'kl/mean' in it, only 'step', 'loss'"
    path.write_text('{"step": 1, "kl/mean": null}\n')
    assert "without a finite 'kl/mean'" in fails(capsys, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_wrong_out(run, capsys) -> None:
    """The picture's name must be that of a PNG file that can be written; the run is never written over."""
    before = run.read_bytes()
    assert "argument --out: expected the name of a PNG file" in fails(capsys, run, "--out", run)
    assert "argument --out: expected the name of a PNG file" in fails(capsys, run, "--out", run.parent / "run.pdf")
    (run.parent / "folder.png").mkdir()
    assert "argument --out: expected the name of a PNG file" in fails(capsys, run, "--out", run.parent / "folder.png")
    assert "argument --out: expected a file that can be written" in fails(capsys, run, "--out", run.parent / "none" / "run.png")
    assert run.read_bytes() == before and sorted(path.name for path in run.parent.iterdir()) == ["folder.png", "run.jsonl"]
    source = run.rename(run.with_suffix(".png"))
    for out in (source, run.parent / "folder.png" / ".." / "run.png"):
        assert fails(capsys, source, "--out", out).endswith(f"that can be written, got {str(out)!r} (it holds the run); choose another")
    assert source.read_bytes() == before and sorted(path.name for path in run.parent.iterdir()) == ["folder.png", "run.png"]


def test_written_whole_or_not_at_all(run, monkeypatch) -> None:
    """A write that fails leaves the picture of before, and no part of a new one."""
    out = run.with_suffix(".png")
    out.write_bytes(b"before")

    def full(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        plot.plot_run(run, out)
    assert out.read_bytes() == b"before" and sorted(path.name for path in run.parent.iterdir()) == ["run.jsonl", "run.png"]


def test_without_matplotlib(run, monkeypatch, capsys) -> None:
    """Without the extra the command says how to get it."""
    monkeypatch.setattr(cli, "missing_modules", lambda names: list(names))
    assert fails(capsys, run) == "fastkl plot: error: not installed: matplotlib; remedy: pip install 'fastkl[plots]'"
