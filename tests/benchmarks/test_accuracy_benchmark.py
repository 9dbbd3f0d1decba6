# The accuracy benchmarks: no error is hidden, a failing provider is a row; the command.

import json
import math
from unittest import mock

import pytest
import torch

from benchmarks import accuracy, linear_accuracy, providers, record, work
from fastkl import testing

CPU = torch.device("cpu")


def exact(p, q):
    return testing.truth(p, q).kl


# Errors of a function of (p_logits, q_logits) on six rows, or on the first `rows` of them.
def errors_of(function, target=1e-2, wrt="p", rows=None):
    pair = accuracy.make_pair("normal 3", "fp32", target, 6, 503, CPU)
    provider = providers.Provider("theirs", {"kl_divergence": lambda i: (function(i.p, i.q),)})
    return accuracy.error_of(provider, accuracy.problem(accuracy.KL, *pair, wrt), rows)


@pytest.mark.parametrize("target", accuracy.TARGETS)
def test_pairs_have_the_kl_asked_for(target):
    first, again = (accuracy.make_pair("peaked", "fp32", target, 5, 503, CPU) for _ in range(2))
    assert all(map(torch.equal, first[:2], again[:2]))
    assert first[2].kl.median().item() == pytest.approx(target, rel=0.1)


def test_errors_are_relative_and_of_the_worst_row():
    for wrt in "pq":
        found = errors_of(exact, wrt=wrt)
        assert found["wrt"] == wrt and found["worst_relative"] < 1e-12 and found["negative"] == 0
        assert 0 < found["gradient_worst"] < 1e-6, "the gradient is float32"
    found = errors_of(lambda p, q: exact(p, q) * torch.tensor([1, 1, 1, 1, 1.25, -1]))
    worst = [found[key] for key in (*accuracy.MEASURES.values(), "negative")]
    assert worst == pytest.approx([2, 2, 1], rel=1e-6) and found["median_relative"] < 1e-9
    assert errors_of(lambda p, q: exact(p, q) * 1.5, rows=2)["rows"] == 2
    assert errors_of(lambda p, q: exact(q, p), target=1.0)["worst_relative"] > 1e-2
    found = errors_of(lambda p, q: exact(p, q) * torch.tensor([1, math.nan, 1, 1, 1, 1]))
    assert math.isnan(found["worst_relative"]) and math.isnan(found["gradient_worst"])


def test_failures_are_reasons():
    refuse = mock.Mock(side_effect=work.NotOfferedError("neither"))
    assert errors_of(refuse) == {"reason": "NotOfferedError: neither"}
    found = errors_of(lambda p, q: exact(p, q).detach())
    assert found["worst_relative"] < 1e-12 and "RuntimeError" in found["gradient_reason"]
    # Without a gradient to P it is asked for that to Q.
    found = errors_of(lambda p, q: refuse() if p.requires_grad else exact(p, q))
    assert found["wrt"] == "q" and found["gradient_worst"] < 1e-6


# Plain formulas in float64 beside the truth, whose formulas are others.
@pytest.mark.parametrize("operation", work.FAMILY)
def test_the_truth_of_the_other_divergences(operation):
    pair = accuracy.make_pair("normal 3", "fp32", 1e-2, 6, 503, CPU)
    asked = accuracy.problem(operation, *pair, "p")
    wide = lambda i: work.PLAIN[operation](i.p.double(), i.q.double(), i.tokens)  # noqa: E731
    found = accuracy.error_of(providers.Provider("theirs", {operation: wide}), asked)
    assert found["wrt"] == "q" and found["worst_relative"] < 1e-9, found
    assert 0 < found["gradient_worst"] < 1e-6, "the gradient is float32"
    assert accuracy.error_of(providers.Provider("theirs", {}), asked) == {}


# Tables, the plot, the command


def row(worst, negative=0, rows=8):
    figures = {"worst_relative": worst, "gradient_worst": float(worst) / 2}
    return {"rows": rows, **figures, "negative": negative}


# A file of results with one kind of rows for each of the errors; the last kind is skipped.
def results(*errors):
    records = [*({"errors": e, "skipped": None} for e in errors), {"errors": {}, "skipped": "no"}]
    head = {"dtype": "fp32", "target": 1e-7, "kl": 1e-7, "distribution": "normal 3"}
    head["operation"] = accuracy.KL
    return {"rows": 8, "vocabulary": 503, "records": [{**head, **record} for record in records]}


FAILED = {"reason": "ImportError: no"}


@pytest.mark.parametrize(
    ("kinds", "measure", "title", "cell"),
    [
        ([row(3e-7), row(1e-7)], "kl", "a", "3e-7"),
        ([row(7.0, 4), row(0.2, 1)], "kl", "a", "7e0 (5 of 16 negative)"),
        ([row(7.0, 4), row(0.2)], "gradient", "a", "4e0"),
        ([row(0.2, rows=2)], "kl", "a, 2 of 8 rows", "2e-1"),
        ([FAILED, row(0.2)], "kl", "a", "–"),
        ([row(0.2), row("nan")], "kl", "a", "inf"),
        ([row("inf"), row(0.2)], "kl", "a", "inf"),
    ],
)
def test_the_table_shows_the_worst_kind(kinds, measure, title, cell):
    data = results(*({"a": kind} for kind in kinds))
    table = accuracy.markdown(data, measure=measure, providers=["a"])
    assert table == f"| KL | {title} |\n| --- | --- |\n| 1e-7 | {cell} |"
    assert len(accuracy.markdown(data, targets=[1e-3]).splitlines()) == 2


def test_the_command(tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "a.json", tmp_path / "b.png"
    monkeypatch.setattr(accuracy.accuracy, "__defaults__", ("p", (1e-8, 1.0)))
    monkeypatch.setattr(accuracy, "DISTRIBUTIONS", ("peaked",))
    words = "--rows 2 --vocabulary 211 --providers fastkl torch".split()
    more = ["fastkl (Triton, interpreted)", "--json", str(file), "--plot", str(picture)]
    assert accuracy.main([*words, *more]) == 0
    data = json.loads(file.read_text())
    assert len(data["records"]) == 2 * 2 + 2 * len(work.FAMILY)
    assert data["command"].endswith(f"--plot {picture}")
    assert (data["rows"], data["vocabulary"], data["wrt"]) == (2, 211, "p")
    printed = capsys.readouterr().out
    assert accuracy.markdown(data, "bf16", "gradient") in printed
    lines = accuracy.family_markdown(data, "kl").splitlines()
    assert len(lines) == 2 + 3 * len(work.FAMILY) and set(lines) < set(printed.splitlines())
    assert "| `js_divergence` | fastkl (Triton, interpreted), 1 of 2 rows | " in printed
    assert picture.read_bytes()[:20].endswith((1600).to_bytes(4, "big"))
    data["records"] += results({"fastkl": row("inf"), "torch": row("nan")})["records"]
    accuracy.draw(data, picture)
    wrong = {"kl_divergence": lambda i: (exact(i.p, i.q) * 1.5,)}
    monkeypatch.setitem(providers.LOADERS, "fastkl", lambda device: wrong)
    assert accuracy.main(words) == 1


def test_from_hidden_states():
    shape = {"tokens": 8, "hidden": 32, "vocabulary": 503}
    (found,) = linear_accuracy.accuracy("cpu", ["bf16"], shape, [0.1])
    wide = found["ways"]["fastkl, logits_dtype=float32"]
    assert found["kl"] > 0 and wide["kl"] < 1e-4 < found["ways"]["torch"]["kl"]
    assert wide["weight"] < 1e-2 and list(wide) == ["kl", "hidden", "weight", "bias"]


def test_committed_results():
    data = json.loads((record.ROOT / "benchmarks/results/cpu/accuracy.json").read_text())
    assert set(providers.LOADERS) <= set(accuracy.names_of(data)), (
        "every provider has figures or a reason"
    )
    assert accuracy.not_worse(data["records"]) == [] and data["vocabulary"] == 128256
    assert len(data["records"]) == 4 * (
        2 * len(accuracy.TARGETS) + len(accuracy.FAMILY_TARGETS) * len(work.FAMILY)
    )
