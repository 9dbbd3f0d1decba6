"""`fastkl plot`: the picture shows the file's figures, and a wrong file says what is wrong."""

from __future__ import annotations

import json
import math
import statistics
from unittest.mock import Mock

import pytest
import torch

image = pytest.importorskip("matplotlib.image")

# After the skip: the picture needs matplotlib.
from matplotlib.figure import Figure  # noqa: E402

from fastkl.rl import AdaptiveBeta, KLMonitor  # noqa: E402
from fastkl.tools import cli, plot  # noqa: E402


def write(path, lines) -> None:
    # Write steps as a monitor does.
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    # The file of a run of 60 steps, whose KL jumps at step 40.
    monitor = KLMonitor(jsonl=tmp_path / "run.jsonl", positions=4)
    generator, beta = torch.Generator().manual_seed(0), AdaptiveBeta(0.1, 0.03, 100)
    for step in range(60):
        kl = torch.randn(4, 50, generator=generator).sub(4).exp() * (10 if step == 40 else 1)
        figures = monitor.update(kl, reward=step / 10, entropy=2 - step / 50, beta=beta)
        beta.update(figures["kl/mean"])
    return tmp_path / "run.jsonl"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    # Every figure that is drawn.
    drawn: list[Figure] = []
    monkeypatch.setattr(plot, "Figure", lambda **how: drawn.append(Figure(**how)) or drawn[-1])
    return drawn


def fails(capsys, *arguments) -> str:
    # Return the error line of a command that exits with 2.
    assert cli.main(["plot", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


def test_curves_are_the_figures(run, figures, capsys) -> None:
    assert cli.main(["plot", str(run)]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{run.with_suffix('.png')}: 60 steps; KL 0.0")
    assert line.endswith("at 40")
    other = run.parent / "other.PNG"
    assert cli.main(["plot", str(run), "--out", str(other)]) == 0
    assert other.read_bytes() == run.with_suffix(".png").read_bytes()
    assert image.imread(other, format="png").std() > 0.05
    assert {path.name for path in run.parent.iterdir()} == {"other.PNG", "run.jsonl", "run.png"}
    held = [json.loads(line) for line in run.read_text().splitlines()]
    reward, kl, entropy, beta, profile = figures[0].axes
    for axes, name in (
        *((reward, "reward"), (kl, "kl/mean"), (kl, "kl/p99"), (kl, "kl/target")),
        *((entropy, "entropy"), (beta, "beta")),
    ):
        assert [[line["step"], line[name]] for line in held] in curves(axes)
    assert all([[40, 0], [40, 1]] in curves(axes) for axes in (kl, beta))
    assert kl.get_yscale() == "log" and len(kl.collections) == 1  # the band of the quantiles
    # The profile: means over the first six and the last six steps.
    for drawn, part in zip(curves(profile), (held[:6], held[-6:]), strict=True):
        means = [statistics.fmean(x[f"kl/position_{i}"] for x in part) for i in (1, 2, 3, 4)]
        expected = zip((12.5, 37.5, 62.5, 87.5), means, strict=True)
        assert drawn == [pytest.approx(each) for each in expected]


def curves(axes) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in axes.lines]


def shown(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_runs_overlaid(run, figures, capsys) -> None:
    # Each of its own colour in every panel, named by what tells the files apart, means alone.
    runs = [run]
    for name in ("a/run.jsonl", "b/run.jsonl", "b/_$x$.jsonl"):
        (run.parent / name).parent.mkdir(exist_ok=True)
        runs.append(run.parent / name)
        lines = [json.loads(line) for line in run.read_text().splitlines()[35:45]]
        write(runs[-1], [{**line, "kl/mean": 0.1 * len(runs)} for line in lines])
    outs = [run.parent / name for name in ("all.svg", "again.svg", "all.PDF")]
    for out in outs:
        assert cli.main(["plot", *map(str, runs), "--out", str(out)]) == 0
    first, again, pdf = (out.read_bytes() for out in outs)
    assert first == again and first.startswith(b"<?xml") and pdf.startswith(b"%PDF")
    head, *said = capsys.readouterr().out.splitlines()[:5]
    names = ["run", "a/run", "b/run", "b/_$x$"]
    assert head == f"{outs[0]}:" and shown(figures[0].legends[0]) == names
    assert [line.partition(":")[0].strip() for line in said] == names
    _, kl, *_, profile = figures[0].axes
    assert shown(kl.get_legend()) == ["spike", "target"] and not kl.collections
    colours = [line.get_color() for line in profile.lines]
    assert len({*colours}) == 4 and colours == [
        line.get_color()
        for line in kl.lines
        if line.get_linestyle() == "-" and line.get_marker() == "."
    ]
    assert colours == [line.get_color() for line in figures[0].legends[0].get_lines()]


def test_lines_at_a_height(run, figures) -> None:
    read = plot.read_run(run)
    plot.picture({"a": read, "b": read}, "two", "of a kind", {"reward": {"best": 0.1}})
    assert shown(figures[0].legends[0]) == ["a", "b"]
    assert shown(figures[0].axes[0].get_legend()) == ["best"]


def test_where_a_run_went_on_from_a_checkpoint(tmp_path) -> None:
    # From where the steps go back, those that follow count; lines without steps go by place.
    path = tmp_path / "run.jsonl"
    parts = range(100), range(50, 60), range(55, 58)
    write(path, [{"step": x, "kl/mean": 1 + y} for y, part in enumerate(parts) for x in part])
    got = plot.read_run(path)
    assert got["step"].tolist() == list(range(58))
    assert got["kl/mean"].tolist() == [1.0] * 50 + [2.0] * 5 + [3.0] * 3
    write(path, [{"kl/mean": 1}, {"kl/mean": 2, "note": "x"}])
    assert plot.read_run(path)["step"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 7, "kl/mean": 0.1, "kl/p50": 0.0, "kl/p95": 0.2}],
        [{"kl/mean": 0.0, "kl/p50": 0.0, "kl/p95": 0.0, "kl/spike": 0.0}] * 2,
        [{"kl/mean": -0.1}, {"kl/mean": -0.2}],
        [{"kl/mean": None, "kl/spike": 1.0}, {"kl/mean": 0.1, "beta": None}],
        [{"kl/mean": 0.1, "reward": 1.0}, {"kl/mean": 1e30, "reward": -1e30}, {"kl/mean": 1e-30}],
        [{"kl/mean": 0.1, "kl/p50": 0.1}, {"kl/p50": 0.1, "kl/p95": 0.3}],
        [
            {"kl/mean": kl, "kl/p50": kl, "kl/p95": kl, "kl/p99": kl, "reward": kl, "other": "text"}
            for kl in (0.1, 1.7e308, -1.7e308, math.inf, 10**400, 5e-324, True)
        ],
        [{"step": 2**53 - 1, "kl/mean": 0.1}],
        [{"kl/mean": 0.1, "kl/position_1": 0.1, "kl/position_2": x} for x in (None, 1e30, -1.0)],
    ],
    ids=["one", "zero", "negative", "null", "huge", "gaps", "beyond", "far", "position"],
)
def test_odd_runs_give_a_picture_without_a_warning(lines, tmp_path, recwarn) -> None:
    write(tmp_path / "run.jsonl", lines)
    plot.plot_runs([tmp_path / "run.jsonl"], tmp_path / "run.png")
    assert image.imread(tmp_path / "run.png").std() > 0.01
    assert not [str(warning.message) for warning in recwarn]


def test_gaps_and_spikes_are_said(tmp_path) -> None:
    figures = (0.1, None, 0.2, None, 1e101)
    write(tmp_path / "run.jsonl", [{"kl/mean": x, "kl/spike": x is None} for x in figures])
    said = plot.describe(plot.read_run(tmp_path / "run.jsonl"))
    assert "5 steps; KL 0.2 at the end, 0.2 at most" in said
    assert "finite KL: 3 steps" in said and "at 1, 3" in said


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no finite 'kl/mean'"),
        ("step,kl\n1,2\n", "got step,kl"),
        ('{"step": 1, "loss": 0.5}\n', "no finite 'kl/mean' but ['step', 'loss']"),
        ('{"step": 1, "kl/mean": null}\n', "no finite 'kl/mean'"),
        ('{"step": 1e400, "kl/mean": 1}', "the step inf"),
        ('{"step": null, "kl/mean": 1}', "the step nan"),
        ('{"step": "x", "kl/mean": 1}', "'x'"),
        ('{"step": 1, "kl/mean": [1]}', "'list'"),
    ],
)
def test_wrong_files(tmp_path, capsys, text, words) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    error = fails(capsys, path)
    assert "RUN.jsonl: expected a file that KLMonitor" in error and words in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_wrong_out(run, monkeypatch, capsys) -> None:
    # The run is never written over, and a write that fails leaves the picture of before.
    before = run.read_bytes()
    for name, words in (
        *(("run.jsonl", "the name of a PNG, SVG"), ("run.jpg", "the name of a PNG, SVG")),
        ("none/run.png", "a file that can"),
    ):
        assert f"--out: expected {words}" in fails(capsys, run, "--out", run.parent / name)
    assert "--out: expected a name for the picture of several" in fails(capsys, run, run)
    for many, words in ((2, "files that differ"), (9, "at most 8 runs")):
        error = fails(capsys, *[run] * many, "--out", run.parent / "all.png")
        assert f"RUN.jsonl: expected {words}" in error
    source = run.rename(run.with_suffix(".png"))
    assert "--out: expected the name of a PNG" in fails(capsys, source, "--out", source)
    assert source.read_bytes() == before and [*run.parent.iterdir()] == [source]
    out = run.parent / "out.png"
    out.write_bytes(b"before")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    # In this process standard output is another file than descriptor 1.
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    assert cli.main(["plot", str(source), "--out", str(out)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"before" and {*run.parent.iterdir()} == {source, out}
