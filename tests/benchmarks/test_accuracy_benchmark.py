"""The accuracy benchmark's promises: its truth is true, no error is hidden, a failing provider is a
row, table and picture say what was measured.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy, interpreted
from benchmarks.plain import plain_kl_divergence
from benchmarks.providers import LOADERS, Provider, load_providers
from benchmarks.work import NotOfferedError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "accuracy.json"


def made_of(function, name="theirs"):
    return Provider(name, {"kl_divergence": lambda i: (function(i.p, i.q),)})


def exact(p, q):
    return plain_kl_divergence(p.double(), q.double())[0]


# The truth
# ----


def long_double(p, q, wrt):
    """(KL, gradient) by the definition, with the 64 bits of an x86 long double."""
    x, y = (t.double().numpy().astype(np.longdouble) for t in (p, q))
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    gradient = (
        np.exp(log_p) * (log_p - log_q - kl[:, None])
        if wrt == "p"
        else np.exp(log_q) - np.exp(log_p)
    )
    return torch.from_numpy(kl.astype(np.float64)), torch.from_numpy(gradient.astype(np.float64))


@pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63,
    reason="this machine's long double is no longer than a double",
)
@pytest.mark.parametrize("distribution", accuracy.DISTRIBUTIONS)
@pytest.mark.parametrize("target", [1e-8, 1e-4, 1e1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_truth_is_true(distribution, target, dtype):
    p, q, truth = accuracy.make_pair(distribution, dtype, target, 3, 1009, CPU)
    for wrt in "pq":
        kl, gradient = long_double(p, q, wrt)
        torch.testing.assert_close(truth, kl, rtol=1e-9, atol=1e-17)
        off = (accuracy.exact_gradient(p, q, wrt) - gradient).norm(dim=-1)
        assert (off <= 1e-8 * gradient.norm(dim=-1)).all(), off


def test_pairs_are_those_asked_for():
    first, again = (accuracy.make_pair("normal 3", "fp32", 1e-5, 5, 503, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for target in accuracy.TARGETS:
        assert accuracy.make_pair("peaked", "fp32", target, 5, 503, CPU)[
            2
        ].median().item() == pytest.approx(target, rel=0.1)


# Errors
# ----


def errors_of(function, target=1e-2, wrt="p", **changes):
    p, q, truth = accuracy.make_pair("normal 3", "fp32", target, 6, 503, CPU)
    provider = made_of(function)
    return accuracy.error_of(
        Provider(provider.name, provider.operations, **changes), p, q, truth, wrt
    )


def test_the_exact_provider_has_no_error():
    for wrt in "pq":
        found = errors_of(exact, wrt=wrt)
        assert found["wrt"] == wrt and found["worst_relative"] < 1e-12 and found["negative"] == 0
        assert 0 < found["gradient_worst"] < 1e-6, "the gradient is float32"


def test_errors_are_relative_and_of_the_worst_row():
    factor = torch.tensor([1, 1, 1, 1, 1.25, -1])
    found = errors_of(lambda p, q: exact(p, q) * factor)
    assert (
        found["worst_relative"] == pytest.approx(2)
        and found["gradient_worst"] == pytest.approx(2)
        and found["negative"] == 1
    )
    assert found["median_relative"] < 1e-9 and found["gradient_median"] < 1e-6
    assert errors_of(lambda p, q: exact(p, q) * 1.5)["gradient_median"] == pytest.approx(
        0.5, rel=1e-5
    )


def test_the_other_direction_is_wrong():
    found = errors_of(lambda p, q: exact(q, p), target=1.0)
    assert found["worst_relative"] > 1e-2 and found["gradient_worst"] > 1e-1


def test_nan_is_not_hidden():
    found = errors_of(lambda p, q: exact(p, q) * torch.tensor([1, math.nan, 1, 1, 1, 1]))
    assert math.isnan(found["worst_relative"]) and math.isnan(found["gradient_worst"])


def test_fewer_rows_are_the_first_ones():
    factor = torch.tensor([1, 1.5])
    assert errors_of(lambda p, q: exact(p, q) * factor, rows=2)["worst_relative"] == pytest.approx(
        0.5
    )
    assert errors_of(exact, rows=2)["rows"] == 2


def refuse(error):
    def raises(*_):
        raise error

    return raises


def test_failures_are_reasons():
    assert errors_of(refuse(RuntimeError("no kernel"))) == {"reason": "RuntimeError: no kernel"}
    assert errors_of(refuse(NotOfferedError("neither"))) == {"reason": "NotOfferedError: neither"}
    found = errors_of(lambda p, q: exact(p, q).detach())
    assert (
        found["worst_relative"] < 1e-12
        and "RuntimeError" in found["gradient_reason"]
        and "gradient_worst" not in found
    )


def test_a_provider_without_that_gradient_is_asked_for_the_other():
    def only_q(p, q):
        if p.requires_grad:
            raise NotOfferedError("no gradient to p")
        return exact(p, q)

    found = errors_of(only_q)
    assert (
        found["wrt"] == "q" and found["worst_relative"] < 1e-12 and found["gradient_worst"] < 1e-6
    )


# Providers that run here
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "torch.compile"])
def test_every_provider_computes_the_kl_or_says_why_not(name):
    (provider,) = load_providers(CPU, [name])
    if provider.missing:
        assert ": " in provider.missing and "Liger" in name or "No module" in provider.missing
        pytest.skip(provider.missing)
    for wrt in "pq":
        for dtype, gradient_limit in (("fp32", 1e-4), ("bf16", 1e-2)):
            p, q, truth = accuracy.make_pair("normal 3", dtype, 1.0, 3, 503, CPU)
            found = accuracy.error_of(provider, p, q, truth, wrt)
            assert (
                found["wrt"] == wrt
                and found["worst_relative"] < 1e-5
                and found["gradient_worst"] < gradient_limit
            ), (dtype, found)


def test_interpreted_kernels_are_as_exact_as_ours():
    pytest.importorskip("triton")
    (provider,) = interpreted.interpreted_providers(["fastkl (Triton, interpreted)"])
    p, q, truth = accuracy.make_pair("normal 3", "fp32", 1e-6, 3, 503, CPU)
    found = accuracy.error_of(provider, p, q, truth)
    assert (
        found["rows"] == 2 and found["worst_relative"] < 1e-4 and found["gradient_worst"] < 1e-4
    ), found
    (broken,) = (
        Provider(
            "broken", {"kl_divergence": lambda i: interpreted._kl_divergence("no such provider", i)}
        ),
    )
    assert "ValueError" in accuracy.error_of(broken, p, q, truth)["reason"], (
        "what goes wrong in the child is a reason too"
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_no_process_stays_behind():
    """A killed benchmark takes its child with it."""
    code = "import os; from benchmarks.interpreted import _child; print(_child().submit(os.getpid).result(60), flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    child = Path(f"/proc/{int(done.stdout)}")
    for _ in range(100):
        if (
            not child.exists()
            or child.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
        ):
            return
        time.sleep(0.1)
    os.kill(int(done.stdout), 9)
    pytest.fail("the child outlived its parent")


# The table
# ----


def row(worst, negative=0, rows=8):
    gradient = {"gradient_worst": float(worst) / 2, "gradient_median": 0}
    return {
        "rows": rows,
        "worst_relative": worst,
        "median_relative": worst,
        "negative": negative,
        **gradient,
    }


def results(*errors, target=1e-7):
    """A file of results with one kind of rows for each of the errors."""
    kinds = [
        {
            "dtype": "fp32",
            "distribution": str(i),
            "target": target,
            "kl": target,
            "errors": e,
            "skipped": None,
        }
        for i, e in enumerate(errors)
    ]
    return {"rows": 8, "vocabulary": 503, "wrt": "p", "records": kinds}


def test_the_table_shows_the_worst_kind():
    data = results(
        {"fastkl": row(3e-7), "torch": row(7.0, 4)}, {"fastkl": row(1e-7), "torch": row(0.2, 1)}
    )
    assert (
        accuracy.markdown(data)
        == "| KL | fastkl | torch |\n|---|---|---|\n| 1e-7 | 3e-7 | 7e0 (5 of 16 negative) |"
    )
    assert (
        accuracy.markdown(data, measure="gradient", providers=["torch"]).splitlines()[-1]
        == "| 1e-7 | 4e0 |"
    )
    assert len(accuracy.markdown(data, targets=[1e-3]).splitlines()) == 2


@pytest.mark.parametrize(
    "other, shown",
    [
        ({"reason": "RuntimeError: no"}, "–"),
        (row("nan"), "nan"),
        (row("inf"), "inf"),
        (row(0.1), "2e-1"),
    ],
)
def test_what_failed_in_one_kind_is_not_outshone_by_the_others(other, shown):
    for errors in ((other, row(0.2)), (row(0.2), other)):
        text = accuracy.markdown(
            results(*({"torch": error} for error in errors)), providers=["torch"]
        )
        assert text.splitlines()[-1] == f"| 1e-7 | {shown} |"


def test_sizes_that_rounding_hides_are_not_counted():
    data = results({"torch": row(0.2)}, {})
    data["records"][1]["skipped"] = "rounding to bf16 gives a KL of 1e-3"
    assert accuracy.markdown(data).splitlines()[-1] == "| 1e-7 | 2e-1 |"


def test_fewer_rows_and_missing_providers_are_told():
    data = results(
        {
            "torch": row(0.2),
            "few": row(0.1, rows=2),
            "gone": {"reason": "ImportError: no module\nat all"},
        }
    )
    assert accuracy.markdown(data).splitlines()[0] == "| KL | torch | few, 2 of 8 rows |"
    assert accuracy.reasons(data) == {"gone": "ImportError: no module"}
    assert "gone: no figures: ImportError: no module" in accuracy.report(data)


# The picture
# ----


def test_the_picture(tmp_path):
    plot = pytest.importorskip("benchmarks.accuracy_plot", exc_type=ImportError)
    data = results(
        {
            "fastkl": row(3e-7),
            "torch": row(7.0, 4),
            "infinite": row("inf"),
            "zero": row(0.0),
            "gone": {"reason": "RuntimeError: no"},
        }
    )
    data["records"] += [{**record, "target": 1e-3} for record in data["records"]]
    assert list(plot.curves(data, "fp32", "kl")) == ["torch", "infinite", "zero", "fastkl"], (
        "ours on top, none without figures"
    )
    plot.draw(data, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(content[16:20], "big") == 1600
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_labels_do_not_overlap():
    plot = pytest.importorskip("benchmarks.accuracy_plot", exc_type=ImportError)
    heights = [2.5, 2.0, 2.0, 2.0, 1.6, -6.0, -6.3]
    moved = plot._apart(heights)
    assert all(a - b >= plot.LABEL - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    assert plot._apart([3.0, -3.0]) == [3.0, -3.0], "what does not touch stays where it is"
    assert sum(moved) == pytest.approx(sum(heights))


# The command
# ----


def test_the_command(tmp_path, capsys):
    file, again = tmp_path / "a.json", tmp_path / "b.png"
    assert (
        accuracy.main(
            [
                "--rows",
                "2",
                "--vocabulary",
                "211",
                "--providers",
                "fastkl,torch",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    data = json.loads(file.read_text())
    assert len(data["records"]) == 2 * 4 * len(accuracy.SHOWN) and data["command"].endswith(
        f"--json {file}"
    )
    assert accuracy.names_of(data) == ["fastkl", "torch"] and (
        data["rows"],
        data["vocabulary"],
        data["wrt"],
    ) == (2, 211, "p")
    printed = capsys.readouterr().out
    assert (
        accuracy.markdown(data, "bf16", "gradient") in printed
        and accuracy.markdown(data) in printed
    )
    pytest.importorskip("matplotlib")
    assert (
        accuracy.main(["--from", str(file), "--plot", str(again)]) == 0
        and again.stat().st_size > 10_000
    )
    assert capsys.readouterr().out.strip() in printed, "the same tables from the file"


def test_exit_code_tells_when_ours_is_worse(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        LOADERS, "fastkl", lambda device: made_of(lambda p, q: exact(p, q) * 1.5).operations
    )
    monkeypatch.setattr(accuracy, "SHOWN", (1.0,))
    assert accuracy.main(["--rows", "2", "--vocabulary", "97", "--providers", "fastkl,torch"]) == 1
    assert "worse than plain torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "0"], "expected a whole number of 1 or more, got '0'"),
        (["--vocabulary", "x"], "expected a whole number"),
        (["--providers", "fastkl,nobody"], "got nobody"),
        (["--wrt", "r"], "invalid choice"),
        *(
            (
                ["--plot", name],
                f"--plot: expected the name of a PNG file, got '{name}'; end it in .png",
            )
            for name in ("a.xyz", "a.pdf", "picture", "png")
        ),
        (
            ["--plot", "/proc/x.png"],
            "--plot: expected a file that can be written, got '/proc/x.png'",
        ),
        (["--from", "/nowhere.json"], "expected a file that --json wrote"),
        (["--from", str(ROOT / "setup.py")], "expected a file that --json wrote"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        accuracy.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


# What is committed
# ----


def test_committed_results():
    data = json.loads(RESULTS.read_text())
    assert (
        RESULTS.with_suffix(".png").exists()
        and data["versions"]["torch"]
        and data["commit"] != "unknown"
    )
    assert (data["rows"], data["vocabulary"]) == (8, 128256) and len(
        data["records"]
    ) == 2 * 4 * len(accuracy.SHOWN)
    assert set(LOADERS) <= set(accuracy.names_of(data)), "every provider has figures or a reason"
    assert accuracy.not_worse(data["records"]) == []
