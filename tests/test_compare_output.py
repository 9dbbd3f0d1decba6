"""`fastkl compare`: what becomes of its output where there is no room for it, and how it says what other libraries refuse."""

import os
import pickle
import re
import shutil
import signal
import sys

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import cli_run, make_files, silent  # noqa: E402, F401

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import errors, report, run  # noqa: E402
from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare.settings import CompareError  # noqa: E402

# ---- standard output


@pytest.mark.parametrize("option", [(), ("--json", "-")])
@pytest.mark.parametrize("kind, code", [("full", 1), ("closed", 141)])
def test_standard_output_that_takes_no_more(files, monkeypatch, capsys, kind, code, option):
    """A full one is one message; where its reader has seen enough, the command ends in silence. Closing it, as Python does at exit, is in peace."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    with open(descriptor, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert (
            cli.main(["compare", files.a, files.b, "--text", str(files.text[1]), *option]) == code
        )
    said = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert (
        said.startswith(
            "fastkl compare: error: No space left on device; remedy: room for the output, "
        )
        if code == 1
        else "rror" not in said
    )


def test_nohup_stays_in_force():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run._signals_are_exits():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(
                signal.SIGTERM
            ) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, own)


# ---- words of other libraries


@pytest.mark.parametrize("protocol", [None, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_refused_pickle_is_a_whole_sentence(files, tmp_path, capsys, protocol):
    folder = shutil.copytree(files.b, tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    if protocol:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": print}, protocol))
    else:
        torch.save({"x": print}, folder / "pytorch_model.bin")
    code, shown, said = cli_run(capsys, files.a, folder, "--text", files.text[1])
    line = said.splitlines()[-1]
    assert (code, shown) == (2, "") and "Traceback" not in said
    got = f"got '{folder}' with a pickle that torch refuses to load, because it may hold code and not tensors alone ("
    assert line.startswith(
        f"fastkl compare: error: MODEL_B: expected a causal LM that can be loaded, {got}"
    )
    assert line.endswith(
        "); remedy: load it where its source is trusted, and save it as safetensors with save_pretrained"
    )


@pytest.mark.parametrize(
    "message, shown",
    [
        ("One line. And  a\\nsecond.", "One line. And a second"),
        ("First. " + "long " * 60 + "end.", "First"),
        ("a" * 300 + ". More.", "a" * 300),
        ("word " * 200, "word " * 94 + "word …"),
        ("", ""),
    ],
)
def test_messages_end_with_a_sentence(message, shown):
    assert errors.sentences(message.replace("\\n", "\n")) == shown
    with (
        pytest.raises(
            CompareError,
            match=f"^MODEL: expected x, got 'name': {re.escape(shown or 'ValueError')}; remedy: y$",
        ),
        errors.told("MODEL", "x", "name", "y"),
    ):
        raise ValueError(message.replace("\\n", "\n"))


# ---- figures and the page


@pytest.mark.parametrize(
    "share, digits, shown",
    [
        (0.0, 0, "0%"),
        (0.004, 0, "0.4%"),
        (0.00123, 0, "0.12%"),
        (4e-6, 0, "0.0004%"),
        (0.005, 0, "0.5%"),
        (0.006, 0, "1%"),
        (0.25, 0, "25%"),
        (1.0, 0, "100%"),
        (0.0004, 1, "0.04%"),
        (0.0, 1, "0.0%"),
        (1e-7, 2, "1e-05%"),
        (0.999, 1, "99.9%"),
    ],
)
def test_no_share_above_nothing_reads_nothing(share, digits, shown):
    assert report.percent(share, digits) == shown


def test_unlikely_tokens_are_shown_in_report_and_page(files, tmp_path, capsys):
    """Heads that expect every token alike: a probability of 1/300."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files.a)
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=1e-3)
        model.save_pretrained(tmp_path / name)
        files.tokenizer.save_pretrained(tmp_path / name)
    code, shown, _ = cli_run(
        capsys,
        tmp_path / "a",
        tmp_path / "b",
        "--text",
        files.text[1],
        "--html",
        tmp_path / "x.html",
    )
    written = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert code == 0 and not re.search(
        r"(?<![\d.])0%", shown + re.sub("<style>.*?</style>", "", written, flags=re.DOTALL)
    )
    assert re.search(r"B '.*?' 0\.34%", shown) and page.clean("'") + " 0.34%" in written


def test_wide_tables_scroll(files, tmp_path, capsys):
    assert (
        cli_run(capsys, files.a, files.b, "--text", files.text[1], "--html", tmp_path / "x.html")[0]
        == 0
    )
    written = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert ".wide{overflow-x:auto}" in written
    assert (
        written.count("<table>")
        == written.count('<div class="wide"><table>')
        == written.count("</table></div>")
        == 3
    )
