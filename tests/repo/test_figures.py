# The data behind the figures of docs/mathematics.md are what the page says of them, and a figure
# that does not depend on this machine's rounding is drawn twice to the same bytes.

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
FIGURES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "figures.py"))


def test_errors_grow_as_the_kl_shrinks() -> None:
    data = FIGURES["errors"](rows=2, vocabulary=8192)
    assert (data["fastkl"] < 2e-6).all()
    for name in ("two log-softmaxes", "one pass without a centre"):
        assert (data[name][data["KL"] < 1e-8] > 1).any() and (data[name][-4:] < 1e-4).all(), name


def test_directions_choose_between_modes() -> None:
    _, teacher, forward, reverse = FIGURES["fits"]().values()
    kls = [
        float((p * (p.log() - q.log()))[p > 0].sum())
        for student in (forward, reverse)
        for p, q in ((teacher, student), (student, teacher))
    ]
    assert kls == pytest.approx([0.474, 0.878, 6.93, 0.509], rel=1e-2)
    assert int(forward.argmax()) == 28 and float(reverse[:31].sum()) == pytest.approx(0.999, 1e-3)


def test_deviations_of_estimators() -> None:
    data = FIGURES["estimators"]()
    kl, near = data["KL"], data["KL"] < 1e-2
    torch.testing.assert_close(data["k1"], (2 / kl).sqrt(), rtol=0.15, atol=0.0)
    assert (data["k3"] < 1.2).all() and (data["k2"][near] < 1.2).all()
    assert (data["bias of k3"] < 1e-9).all() and (data["bias of k2"].diff() > 0).all()


def test_divergences_of_two_tokens() -> None:
    # Each is 0 where both gaps are 2; KL(P‖Q) alone is still growing at the ends.
    gap, *curves = FIGURES["two_tokens"]().values()
    slopes = [float((curve[0] - curve[20]) / (gap[20] - gap[0])) for curve in curves]
    assert all(abs(float(curve[200])) < 1e-15 for curve in curves)
    assert slopes[0] == pytest.approx(0.88, abs=0.01) and max(slopes[1:]) < 0.2


def test_a_figure_has_the_same_bytes_twice(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(FIGURES["write"].__globals__, "FOLDER", tmp_path)
    first, second = (FIGURES["write"]("two-tokens").read_bytes() for _ in range(2))
    assert first == second and b"<svg" in first and b"dc:date" not in first
