"""The accuracy benchmark: its truth is true, no error is hidden, a failing provider is a row."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy, interpreted, pairs
from benchmarks.work import NotOfferedError
from benchmarks.providers import LOADERS, Provider, load_providers, plain_kl_divergence

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def made_of(function, **options):
    return Provider("theirs", {"kl_divergence": lambda i: (function(i.p, i.q),)}, **options)


def exact(p, q):
    return plain_kl_divergence(p.double(), q.double())[0]


def long_double(p, q, wrt):
    """(KL, gradient) by the definition, with the 64 bits of an x86 long double."""
    x, y = (t.double().numpy().astype(np.longdouble) for t in (p, q))
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    to_p = np.exp(log_p) * (log_p - log_q - kl[:, None])
    gradient = to_p if wrt == "p" else np.exp(log_q) - np.exp(log_p)
    return [torch.from_numpy(value.astype(np.float64)) for value in (kl, gradient)]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is a double here")
@pytest.mark.parametrize("distribution", pairs.DISTRIBUTIONS)
@pytest.mark.parametrize("target", [1e-8, 1e-4, 1e1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_truth_is_true(distribution, target, dtype):
    p, q, truth = pairs.make_pair(distribution, dtype, target, 3, 1009, CPU)
    for wrt in "pq":
        kl, gradient = long_double(p, q, wrt)
        torch.testing.assert_close(truth, kl, rtol=1e-9, atol=1e-17)
        off = (pairs.exact_gradient(p, q, wrt) - gradient).norm(dim=-1)
        assert (off <= 1e-8 * gradient.norm(dim=-1)).all(), off


def test_pairs_are_those_asked_for():
    first, again = (pairs.make_pair("normal 3", "fp32", 1e-5, 5, 503, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for target in accuracy.TARGETS:
        truth = pairs.make_pair("peaked", "fp32", target, 5, 503, CPU)[2]
        assert truth.median().item() == pytest.approx(target, rel=0.1)


def errors_of(function, target=1e-2, wrt="p", **options):
    pair = pairs.make_pair("normal 3", "fp32", target, 6, 503, CPU)
    return accuracy.error_of(made_of(function, **options), *pair, wrt)


def test_errors_are_relative_and_of_the_worst_row():
    for wrt in "pq":
        found = errors_of(exact, wrt=wrt)
        assert found["wrt"] == wrt and found["worst_relative"] < 1e-12 and found["negative"] == 0
        assert 0 < found["gradient_worst"] < 1e-6, "the gradient is float32"
    factor = torch.tensor([1, 1, 1, 1, 1.25, -1])
    found = errors_of(lambda p, q: exact(p, q) * factor)
    worst = [found["worst_relative"], found["gradient_worst"]]
    assert worst == pytest.approx([2, 2], rel=1e-6)
    assert found["negative"] == 1 and found["median_relative"] < 1e-9
    assert errors_of(lambda p, q: exact(p, q) * 1.5, rows=2)["rows"] == 2
    assert errors_of(lambda p, q: exact(q, p), target=1.0)["worst_relative"] > 1e-2
    found = errors_of(lambda p, q: exact(p, q) * torch.tensor([1, math.nan, 1, 1, 1, 1]))
    assert math.isnan(found["worst_relative"]) and math.isnan(found["gradient_worst"])


def refuse(*_):
    raise NotOfferedError("neither")


def test_failures_are_reasons():
    assert errors_of(refuse) == {"reason": "NotOfferedError: neither"}
    found = errors_of(lambda p, q: exact(p, q).detach())
    assert found["worst_relative"] < 1e-12 and "RuntimeError" in found["gradient_reason"]
    # Without a gradient to P it is asked for that to Q.
    found = errors_of(lambda p, q: refuse() if p.requires_grad else exact(p, q))
    assert found["wrt"] == "q" and found["gradient_worst"] < 1e-6


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "torch.compile"])
def test_every_provider_computes_the_kl_or_says_why_not(name):
    (provider,) = load_providers(CPU, [name])
    if provider.missing:
        pytest.skip(provider.missing)
    for wrt in "pq":
        for dtype, limit in (("fp32", 1e-4), ("bf16", 1e-2)):
            pair = pairs.make_pair("normal 3", dtype, 1.0, 3, 503, CPU)
            found = accuracy.error_of(provider, *pair, wrt)
            assert found["wrt"] == wrt and found["worst_relative"] < 1e-5, found
            assert found["gradient_worst"] < limit, found


def test_interpreted_kernels_are_as_exact_as_ours():
    pytest.importorskip("triton")
    (provider,) = interpreted.interpreted_providers(["fastkl (Triton, interpreted)"])
    pair = pairs.make_pair("normal 3", "fp32", 1e-6, 3, 503, CPU)
    for wrt in "pq":
        found = accuracy.error_of(provider, *pair, wrt)
        assert found["rows"] == 2 and found["wrt"] == wrt
        assert found["worst_relative"] < 1e-4 and found["gradient_worst"] < 1e-4, found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_process_stays_behind():
    """A killed benchmark takes its child with it."""
    code = (
        "import os; from benchmarks.interpreted import _child;"
        "print(_child().submit(os.getpid).result(), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.1)


# Tables, the plot, the command


def row(worst, negative=0, rows=8):
    figures = {"worst_relative": worst, "gradient_worst": float(worst) / 2}
    return {"rows": rows, **figures, "negative": negative}


def results(*errors, target=1e-7):
    """A file of results with one kind of rows for each of the errors."""
    head = {"dtype": "fp32", "target": target, "kl": target, "skipped": None}
    records = [{**head, "distribution": str(i), "errors": e} for i, e in enumerate(errors)]
    return {"rows": 8, "vocabulary": 503, "wrt": "p", "records": records}


def test_the_table_shows_the_worst_kind():
    data = results(
        {"fastkl": row(3e-7), "torch": row(7.0, 4)}, {"fastkl": row(1e-7), "torch": row(0.2, 1)}
    )
    text = "| KL | fastkl | torch |\n|---|---|---|\n| 1e-7 | 3e-7 | 7e0 (5 of 16 negative) |"
    assert accuracy.markdown(data) == text
    table = accuracy.markdown(data, measure="gradient", providers=["torch"])
    assert table.splitlines()[-1] == "| 1e-7 | 4e0 |"
    assert len(accuracy.markdown(data, targets=[1e-3]).splitlines()) == 2


@pytest.mark.parametrize(
    ("other", "shown"),
    [({"reason": "no"}, "–"), (row("nan"), "nan"), (row("inf"), "inf"), (row(0.1), "2e-1")],
)
def test_a_failure_in_one_kind_is_not_outshone_by_the_others(other, shown):
    for errors in ((other, row(0.2)), (row(0.2), other)):
        data = results(*({"torch": error} for error in errors))
        text = accuracy.markdown(data, providers=["torch"])
        assert text.splitlines()[-1] == f"| 1e-7 | {shown} |"


def test_sizes_that_rounding_hides_fewer_rows_and_missing_providers():
    gone = {"reason": "ImportError: no module\nat all"}
    data = results({"torch": row(0.2), "few": row(0.1, rows=2), "gone": gone}, {})
    data["records"][1]["skipped"] = "rounding to bf16 gives a KL of 1e-3"
    lines = accuracy.markdown(data).splitlines()
    assert lines[0] == "| KL | torch | few, 2 of 8 rows |" and lines[-1] == "| 1e-7 | 2e-1 | 1e-1 |"
    assert accuracy.reasons(data) == {"gone": "ImportError: no module"}


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    data = results(
        {"fastkl": row(3e-7), "infinite": row("inf"), "zero": row(0.0), "nan": row("nan")}
    )
    accuracy.draw(data, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:4] == b"\x89PNG" and int.from_bytes(content[16:20], "big") == 1600


def test_the_command(tmp_path, capsys):
    file = tmp_path / "a.json"
    words = ["--rows", "2", "--vocabulary", "211", "--providers", "fastkl", "torch"]
    assert accuracy.main([*words, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert len(data["records"]) == 2 * 4 * len(accuracy.SHOWN)
    assert (data["rows"], data["vocabulary"], data["wrt"]) == (2, 211, "p")
    printed = capsys.readouterr().out
    assert accuracy.markdown(data, "bf16", "gradient") in printed
    pytest.importorskip("matplotlib")
    assert accuracy.main(["--from", str(file), "--plot", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").exists() and capsys.readouterr().out.strip() in printed


def test_from_hidden_states():
    shape = {"tokens": 8, "hidden": 32, "vocabulary": 503}
    (record,) = accuracy.linear_accuracy(CPU, ["bf16"], shape, [0.1])
    wide = record["ways"]["fastkl, logits_dtype=float32"]
    assert record["kl"] > 0 and wide["kl"] < 1e-4 < record["ways"]["torch"]["kl"]
    assert wide["weight"] < 1e-2 and list(wide) == ["kl", "hidden", "weight", "bias"]


def test_exit_code_tells_when_ours_is_worse(monkeypatch):
    wrong = made_of(lambda p, q: exact(p, q) * 1.5).operations
    monkeypatch.setitem(LOADERS, "fastkl", lambda device: wrong)
    monkeypatch.setattr(accuracy, "SHOWN", (1.0,))
    words = ["--rows", "2", "--vocabulary", "97", "--providers", "fastkl", "torch"]
    assert accuracy.main(words) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--rows", "0"], ["--vocabulary", "1"], ["--providers", "nobody"], ["--wrt", "r"]),
        *(["--plot", "a.pdf"], ["--plot", "/proc/x.png"], ["--from", "/nowhere.json"]),
        ["--from", str(ROOT / "setup.py")],
    ],
)
def test_wrong_use(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        accuracy.main(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_committed_results():
    data = json.loads((RESULTS / "accuracy.json").read_text())
    assert set(LOADERS) <= set(accuracy.names_of(data)), "every provider has figures or a reason"
    assert accuracy.not_worse(data["records"]) == [] and data["vocabulary"] == 128256
    assert len(data["records"]) == 2 * 4 * len(accuracy.SHOWN)
