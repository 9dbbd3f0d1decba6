"""KLMonitor: figures of every step and of the run against their definition in plain torch."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.rl import AdaptiveBeta, FixedBeta, logs
from fastkl.rl.monitor import KLMonitor, read_jsonl
from fastkl.rl.spikes import SpikeDetector

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# Float64 sums of the same float32 values, which both compute, may differ in the order of adding up
# to 2^17 of them.
CLOSE = {"rel": 1e-10, "abs": 0.0, "nan_ok": True}
PARTS = 3
QUANTILES = {"kl/p50": 0.5, "kl/p95": 0.95, "kl/p99": 0.99}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """KLs as of a trained policy: most tokens near 0, some of several nats."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).sub(5).exp()


def mask_of(rows: int = 6, length: int = 50) -> torch.Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.6


# ---- the definition, from the tokens that count of each sequence


def quantile(ordered: torch.Tensor, q: float) -> float:
    """torch.quantile's, and through an infinite value, where torch gives NaN."""
    rank = q * (len(ordered) - 1)
    low, high = (float(ordered[index]) for index in (math.floor(rank), math.ceil(rank)))
    return low if rank % 1 == 0 else (1 - rank % 1) * low + rank % 1 * high


def of_step(sequences: list[torch.Tensor]) -> dict[str, float]:
    x = torch.cat(sequences).double()
    parts = [
        [s.double()[PARTS * torch.arange(len(s)) // max(len(s), 1) == part] for s in sequences]
        for part in range(PARTS)
    ]
    ordered = x[~x.isnan()].sort().values
    ordered = ordered if len(ordered) else torch.tensor([math.nan])
    figures = {
        "kl/mean": x.mean(),
        "kl/per_sequence": x.sum() / sum(map(bool, map(len, sequences))),
        "kl/max": x.max() if len(x) else math.nan,
        **{name: quantile(ordered, q) for name, q in QUANTILES.items()},
        "kl/tokens": len(x),
        "kl/not_finite": (~x.isfinite()).sum(),
        "kl/above_threshold": (x > 0.1).double().mean(),
        **{f"kl/position_{part + 1}": torch.cat(each).mean() for part, each in enumerate(parts)},
        "kl/spike": len(x) > 0 and not x.mean().isfinite(),
    }
    return {name: float(value) for name, value in figures.items()}


def of_run(sequences: list[torch.Tensor]) -> dict[str, object]:
    """Figures of the finite tokens, with quantiles right to 1 % between 1e-8 and 1e3 nats, 0 below,
    about 1e3 above; shares and counts of all.
    """
    every, kept = of_step(sequences), [each[each.isfinite()] for each in sequences]
    figures, ordered = of_step(kept), torch.cat(kept).double().sort().values
    nonempty = sum(map(bool, map(len, sequences)))
    figures["kl/per_sequence"] = float(ordered.sum()) / nonempty if len(ordered) else math.nan
    for name, q in QUANTILES.items() if len(ordered) else ():
        value = float(ordered.quantile(q, interpolation="lower"))
        # The bin's 1 %, and the rounding of the logarithm.
        allowed = 0.0101 if value < 1e3 else 0.05
        figures[name] = 0.0 if value < 1e-8 else pytest.approx(min(value, 1e3), rel=allowed)
    figures = {name: x for name, x in figures.items() if not name.startswith(("kl/s", "kl/po"))}
    same = ("kl/tokens", "kl/not_finite", "kl/above_threshold")
    return {**figures, **{name: every[name] for name in same}}


def laid_out(sequences: list[torch.Tensor], layout: str, garbage: float) -> dict:
    if layout == "packed":
        return {
            "kl": torch.cat(sequences),
            "cu_seqlens": torch.tensor([0, *map(len, sequences)]).cumsum(0).int(),
        }
    counts, width = torch.tensor([*map(len, sequences)])[:, None], 2 * max(map(len, sequences)) + 2
    at = torch.arange(width)
    masks = {
        "behind": at < counts,
        "before": at >= width - counts,
        "holes": (at % 2 == 0) & (at < 2 * counts),
    }
    mask, values = masks[layout][None], torch.cat(sequences)
    return {
        "kl": torch.full(mask.shape, garbage, dtype=values.dtype).masked_scatter(mask, values),
        "mask": mask,
    }


def sized(*lengths: int) -> list[list[torch.Tensor]]:
    """Steps of five sequences, the longest of these lengths."""
    return [
        [
            tokens(size, seed=10 * step + row)
            for row, size in enumerate([longest, 0, 1, longest // 3, longest // 2])
        ]
        for step, longest in enumerate(lengths)
    ]


INF, NAN = math.inf, math.nan
RUNS = {
    **{
        str(sizes): sized(*sizes)
        for sizes in ((5, 8), (8, 9), (3, 40, 7), (100, 3), (16, 17, 33, 64, 65), (1, 1))
    },
    "large": [[tokens(512, seed=row) for row in range(257)]],
    "few": [[tokens(count, seed=count)] for count in range(1, 12)],
    "few, one infinite": [
        [torch.cat([tokens(count, seed=count), torch.tensor([INF])])] for count in range(1, 12)
    ],
    "not finite": [[tokens(30), torch.tensor([bad, 0.5, 0.01])] for bad in (NAN, INF, -INF)],
    "nothing finite": [[torch.tensor([0.5, INF, 0.25, NAN, INF])]],
    "none, then some": [[torch.zeros(0)] * 2, *sized(4), [torch.zeros(0)]],
    "negative": [[torch.tensor([value])] for value in (-0.5, NAN, -0.25, -1.0)],
    **{
        f"bin of {value}": [[torch.tensor([value] * 99 + [999.0])]]
        for value in (1.01e-8, 3e-6, 1e-3, 0.11, 1.0, 31.0, 9.9e2)
    },
    "below all bins": [[torch.tensor([0.0, -0.5, 9e-9, 1e-30])]],
    "above all bins": [[torch.tensor([1e10])]],
}
WAYS = [
    *((layout, NAN, torch.float32) for layout in ("packed", "behind", "before")),
    *(("holes", garbage, torch.float32) for garbage in (NAN, INF, -INF, 1e30)),
    *(("behind", NAN, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]


@on_devices
@pytest.mark.parametrize("layout, garbage, dtype", WAYS, ids=str)
@pytest.mark.parametrize("steps", RUNS.values(), ids=RUNS)
def test_figures(steps, layout, garbage, dtype, device) -> None:
    monitor, seen, spikes = KLMonitor(threshold=0.1, positions=PARTS), [], 0.0
    for step, sequences in enumerate(steps):
        sequences = [values.to(dtype) for values in sequences]
        seen += sequences
        given = laid_out(sequences, layout, garbage)
        before = given["kl"].clone()
        moved = {name: value.to(device) for name, value in given.items()}
        got = monitor.update(**{**moved, "kl": moved["kl"].requires_grad_()})
        assert {type(value) for value in got.values()} == {float}
        assert got == pytest.approx({"step": step, **of_step(sequences)}, **CLOSE)
        testing.assert_same_bits(given["kl"], before, "kl")
        spikes += got["kl/spike"]
        run, figures = monitor.summary(), of_run(seen)
        for name in figures.keys() & QUANTILES.keys():
            value = run.pop(name)
            assert math.isnan(value) or value <= max(0.0, run["kl/max"])
            assert value == pytest.approx(figures.pop(name), nan_ok=True)
        assert run == pytest.approx({**figures, "steps": step + 1, "kl/spikes": spikes}, **CLOSE)


@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0), (0, 3)], ids=str)
def test_no_token_that_counts(shape) -> None:
    # The figures are NaN and no alarm rings.
    none, nan = torch.zeros(shape, dtype=torch.bool), torch.full(shape, NAN)
    got = KLMonitor(threshold=0.1).update(nan, none, entropy=torch.zeros(shape))
    zero = {name for name, value in got.items() if value == 0}
    assert zero == {"step", "kl/tokens", "kl/not_finite", "kl/spike"}
    assert all(math.isnan(value) for name, value in got.items() if name not in zero)


@on_devices
def test_further_figures(device) -> None:
    # Tensors shaped as kl, of its device or the CPU, are averaged over the tokens that count,
    # others over all their entries.
    kl, mask, entropy = tokens(6, 50), mask_of(), tokens(6, 50, seed=1)
    more = {
        "reward": tokens(6, seed=2),
        "beta": SimpleNamespace(beta=0.25),
        "rate": 1e-5,
        "absent": None,
        "loss": torch.tensor(-1.5, device=device, requires_grad=True),
        "length": mask.sum(-1).to(device),
        "clipped": mask.to(device),
    }
    expected = {
        "entropy": float(entropy[mask].double().mean()),
        "reward": float(more["reward"].double().mean()),
        "beta": 0.25,
        "rate": 1e-5,
        "loss": -1.5,
        "length": float(mask.sum() / 6),
        "clipped": 1.0,
    }
    for given in (entropy.masked_fill(~mask, NAN), entropy.to(device)):
        figures = KLMonitor(spike=False).update(
            kl.to(device), mask.to(device), entropy=given, **more
        )
        got = dict(list(figures.items())[9:])
        assert list(got) == list(expected) and {type(value) for value in got.values()} == {float}
        assert got == pytest.approx(expected, **{**CLOSE, "rel": 1e-7})


@on_devices
@pytest.mark.parametrize(
    "bounds, expected",
    [([0, 1, 2, 3], 4.0), ([0, 2, 2, 3], 4.0), ([0, 2, 3], 1.0), (None, 1.0)],
)
def test_a_reward_of_each_packed_sequence(bounds, expected, device) -> None:
    # With as many packed sequences as tokens a reward is one per sequence; other figures are per
    # token all the same.
    kl, mask = torch.ones(3, device=device), torch.tensor([True, False, True], device=device)
    ends = None if bounds is None else torch.tensor(bounds, device=device)
    for values in (torch.tensor([1.0, 10.0, 1.0]), torch.tensor([1.0, 10.0, 1.0], device=device)):
        figures = dict.fromkeys(("reward", "entropy", "score"), values)
        got = KLMonitor(spike=False).update(kl, mask, cu_seqlens=ends, **figures)
        assert [got[name] for name in figures] == [expected, 1.0, 1.0]


@pytest.mark.parametrize(
    "unit, name", [("token", "kl/target"), ("sequence", "kl/target_per_sequence")]
)
def test_the_target_of_a_controller(unit, name) -> None:
    # Under a name of its unit, unless one is passed; none without a target.
    controller, monitor = AdaptiveBeta(0.25, 6.0, 100, unit), KLMonitor(spike=False)
    got = monitor.update(tokens(3), beta=controller)
    assert list(got.items())[9:] == [("beta", 0.25), (name, 6.0)]
    assert monitor.update(tokens(3), beta=controller, **{name: 0.5})[name] == 0.5
    assert list(monitor.update(tokens(3), beta=FixedBeta(0.1)))[9:] == ["beta"]


def test_which_figures_and_steps() -> None:
    # Threshold and detector add their own; the step is one more than the last, from 0, unless it
    # is given.
    names, monitor = ["kl/mean", "kl/per_sequence", "kl/max", *QUANTILES], KLMonitor(spike=False)
    assert list(monitor.update(tokens(3))) == ["step", *names, "kl/tokens", "kl/not_finite"]
    assert list(monitor.summary()) == ["steps", "kl/tokens", *names, "kl/not_finite"]
    assert [monitor.update(tokens(3), step=step)["step"] for step in (None, 10, None, 5, None)] == [
        1.0,
        10.0,
        11.0,
        5.0,
        6.0,
    ]


@pytest.mark.parametrize("own", [{}, {"ratio": 1.5, "recent": 5, "limit": 3.0}], ids=str)
def test_spikes_are_the_detectors(own) -> None:
    # The alarm is that of a SpikeDetector fed with the means.
    values = [torch.tensor(0.02 + 0.001 * (step % 3)) for step in range(80)]
    values += [torch.tensor(0.2), torch.tensor(0.2), torch.tensor(0.02)]
    alone, monitor = SpikeDetector(**own), KLMonitor(spike=SpikeDetector(**own) if own else True)
    got = [monitor.update(value.expand(3))["kl/spike"] for value in values]
    assert got == [float(alone.update(float(value))) for value in values] and got[80] == 1.0


# ---- the file of JSON lines, and what reads it


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
    steps = [KLMonitor(jsonl=path).update(tokens(3, seed=step)) for step in range(3)]
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:cut])
    kept = steps if cut == -1 else steps[:2]  # without its line break alone it is whole
    assert read_jsonl(path) == kept
    more = KLMonitor(jsonl=path).update(tokens(3), step=2)
    assert read_jsonl(path) == [*kept, more] and path.read_bytes().endswith(b"}\n")


READ = [
    # Others' files: empty lines, whole numbers of any length, text.
    (
        '\n{"step": 0, "note": "warm-up", "flag": true}\n\n',
        [{"step": 0.0, "note": "warm-up", "flag": 1.0}],
    ),
    *(
        ('{"step": ' + "1" * digits + "}\n", [{"step": float("1" * digits)}])
        for digits in (1, 308, 400, 5000)
    ),
    # A crash leaves NUL bytes, lines cut off that seem to end, and a last one that is nothing.
    ('\0\0{"step": 0}\n\0\0\0{"st\0ep": 1}\n\0\0', [{"step": 0.0}, {"step": 1.0}]),
    ('{"step": 0}\n{"step": 1, "a}', [{"step": 0.0}]),
    ('{"step": 0}\n{"step": 1, "a}\n{"step": 2}\n', [{"step": 0.0}, {"step": 2.0}]),
    ('{"step": 0}\n{"step": 1, "a": {"b": 1}\n{"step": 2}\n', [{"step": 0.0}, {"step": 2.0}]),
    ('{"step": 0}\n{"a": ' + "[" * 100_000, [{"step": 0.0}]),
    ('{"step": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"step": 0}\n', [{"step": 0.0}]),
]


# Other files, and the line that is refused.
READ += [
    ('{"step": 1}\n[1, 2]\n', 2),
    *((text, 1) for text in ("step,kl\n1,0.1\n", "\x89PNG\n", "17\n", "step,kl")),
]


@pytest.mark.parametrize("text, expected", READ, ids=range(len(READ)))
def test_other_files(tmp_path, text, expected) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    if isinstance(expected, int):
        with pytest.raises(ValueError, match=f"^path: expected .* in line {expected} of .*, got "):
            read_jsonl(tmp_path / "run.jsonl")
    else:
        got = read_jsonl(tmp_path / "run.jsonl")
        assert got == expected and all(type(step["step"]) is float for step in got)


@pytest.mark.parametrize("name", ["", "none/run.jsonl", "file/run.jsonl", "n" * 300, "a\0b"])
def test_files_that_cannot_be_appended_to(tmp_path, name) -> None:
    # The monitor says so where it is made, and leaves no file where another argument is wrong.
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^jsonl: expected .*, got .*; "):
        KLMonitor(jsonl=tmp_path / name)
    with pytest.raises(TypeError, match="^spike: expected"):
        KLMonitor(jsonl=tmp_path / "run.jsonl", spike=3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"mask": tokens(3)}, {"step": -1}, {"reward": "1"}),
        *({"kl/mean": 1.0}, {"kl/position_1": 1.0}),
    ],
    ids=str,
)
def test_an_error_changes_neither_state_nor_file(tmp_path, wrong) -> None:
    path = tmp_path / "run.jsonl"
    monitor = KLMonitor(threshold=0.1, jsonl=path)
    monitor.update(tokens(3))
    before = monitor.state_dict(), path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        monitor.update(tokens(3, seed=1), **wrong)
    assert (monitor.state_dict(), path.read_bytes()) == before


def test_a_full_disk_costs_one_warning(tmp_path, monkeypatch) -> None:
    # Figures and state have every step; each line is one write, whole and ended.
    path, writes, plain = tmp_path / "run.jsonl", [], KLMonitor()

    class Disk(io.FileIO):
        def write(self, data) -> int:
            writes.append(bytes(data))
            return super().write(data[:7] if len(writes) < 3 else data)

    monitor = KLMonitor(jsonl=path)
    monkeypatch.setattr(logs, "open", lambda path, *_, **__: Disk(path, "a+"), raising=False)
    with pytest.warns(RuntimeWarning) as caught:
        returned = [monitor.update(tokens(3, seed=step)) for step in range(4)]
    monkeypatch.undo()
    assert returned == [plain.update(tokens(3, seed=step)) for step in range(4)]
    assert monitor.state_dict() == plain.state_dict() and read_jsonl(path)[-2:] == returned[2:]
    assert all(line.endswith(b"}\n") and line.strip(b"\n").count(b"\n") == 0 for line in writes)
    assert len(writes) == 4 and [warning.filename for warning in caught] == [__file__]
