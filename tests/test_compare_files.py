"""`fastkl compare` on the command line: what it reads and writes, what it refuses, and what it leaves when it is ended."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import SIZES, VOCABULARY, WORDS, cli_run, compare, make_files, make_tokenizer, save, silent  # noqa: E402, F401

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare import loading, run, store, text  # noqa: E402
from fastkl.tools.compare.settings import Settings  # noqa: E402

# ---- texts


def test_parts_of_a_character_are_shown_as_bytes(files, tmp_path):
    """Also where the two parts are in different pieces of an excerpt; whole characters are left alone."""
    path = tmp_path / "x.txt"
    path.write_bytes("naïve 日本 → 🙂 ok".encode("utf-8-sig"))
    tokenizer = text.TextTokenizer(files.tokenizer)
    ids, texts, _ = tokenizer.encode("naïve 日本 → 🙂 ok")
    assert b"".join(texts) == "naïve 日本 → 🙂 ok".encode() and all(texts) and files.tokenizer.convert_ids_to_tokens(ids[-1]) == "k"
    split = [at for at, content in enumerate(texts) if "<0x" in store.shown(content)]
    assert len(split) >= 5
    for token, content in zip(ids, texts, strict=True):
        assert tokenizer.label(token) == store.shown(content)
    values, result, read = compare(files, files.a, files.b, tmp_path / "out", text=(path,), top=100)
    assert read == [ids]  # without the byte-order mark
    for entry in result["top"]:
        at = entry["index"]
        parts = [store.shown(b"".join(texts[max(0, at - 24):at])), store.shown(texts[at]), store.shown(b"".join(texts[at + 1:at + 25]))]
        assert [entry["before"], entry["token"], entry["after"]] == parts
    assert not set("".join(str(result))) & set(text.BYTES) - set(map(chr, range(256))), "letters of the byte alphabet"


def test_tokens_that_a_normalizer_changed_keep_the_text(files):
    """Their bytes are not the text's: the first of those that share a character has it."""
    changed = make_tokenizer()
    changed.backend_tokenizer.normalizer = tokenizers.normalizers.NFD()
    content = "naïve café 日本"
    assert b"".join(text.TextTokenizer(changed).encode(content)[1]) == content.encode()


def test_byte_tokens_of_sentencepiece(files):
    """<0xE6> is a byte, in the text and as an expectation."""
    ids = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = tokenizers.decoders.ByteFallback()
    tokenizer = text.TextTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made))
    assert tokenizer.encode("a日a")[1] == [b"a", b"\xe6", b"\x97", b"\xa5", b"a"] and tokenizer.label(0xE6 + 2) == "<0xE6>"


@pytest.mark.parametrize("by", ["document", "line"])
def test_excerpts_begin_with_the_first_token(files, tmp_path, by):
    path = tmp_path / "x.txt"
    path.write_bytes(b"What it costs\r\nline one\r\n")
    _, result, _ = compare(files, files.a, files.b, tmp_path / "out", text=(path,), by=by, top=100)
    assert {"What it costs"} <= {unit["text"][:13] for unit in result["units"]} <= {"What it costs", "line one"}
    assert all("What it costs\r\nline one".startswith(entry["before"][:10]) for entry in result["top"] if entry["index"] < 20)


def test_a_pipe_is_read_as_a_file_is(files, tmp_path):
    pipe, expected = tmp_path / "pipe", compare(files, files.a, files.b, tmp_path / "file", text=files.text[:1])
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(files.text[0].read_bytes()))
    writer.start()
    run.check_files(Settings(files.a, files.b, (pipe,)))
    found = compare(files, files.a, files.b, tmp_path / "pipe-out", text=(pipe,))
    writer.join(10)
    assert found[0].tobytes() == expected[0].tobytes() and found[2] == expected[2]


def test_files_without_text_are_left_out(files, tmp_path, capsys):
    empty, one = tmp_path / "empty.txt", tmp_path / "one.txt"
    empty.touch()
    one.write_text("a")
    code, shown, _ = cli_run(capsys, files.a, files.b, "--text", empty, files.text[0], one, "--json", tmp_path / "x.json")
    numbers, (_, alone, _) = json.loads((tmp_path / "x.json").read_text()), compare(files, files.a, files.b, tmp_path / "out", text=files.text[:1])
    assert code == 0 and f"skipped, with fewer than 2 tokens: {empty}, {one};" in " ".join(shown.split())
    assert numbers["summary"] == alone["summary"] and numbers["text"]["files"] == [str(files.text[0])]
    assert numbers["text"]["skipped"] == [str(empty), str(one)]


# ---- the command line


@pytest.mark.parametrize("sequential", [(), ("--sequential",)])
def test_run_leaves_report_and_files_and_nothing_else(files, tmp_path, monkeypatch, capsys, sequential):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    out = tmp_path / "out"
    out.mkdir()
    code, shown, progress = cli_run(capsys, files.a, files.padded, "--text", *files.text, "--json", out / "x.json", "--html", out / "x.html",
                                    "--context", "64", "--device", "cpu", *sequential)
    assert code == 0 and "\x1b" not in shown and shown.startswith("B differs ")
    assert ("model B" if sequential else "models A and B") in progress and "Traceback" not in progress
    numbers = json.loads((out / "x.json").read_text(encoding="utf-8"))
    assert f"{numbers['summary']['kl_ab']['mean']:.4g}" in shown and numbers["sentence"] in " ".join(shown.split())
    assert numbers["text"]["overlap"] == 16 and numbers["text"]["not_scored"] == 2
    assert "two &amp; &lt;b&gt;.txt" in (out / "x.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == ["x.html", "x.json"] and not list((tmp_path / "temporary").iterdir())


def test_color_is_for_terminals_or_on_demand(files, capsys):
    for option, colored in ((), False), (("--color",), True), (("--no-color",), False):
        code, shown, _ = cli_run(capsys, files.a, files.b, "--text", files.text[1], *option)
        assert code == 0 and ("\x1b[" in shown) == colored


def spoil(files, folder, how):
    """A checkpoint with something wrong."""
    target = shutil.copytree(files.folder / "b", folder / how)
    if how in ("normalizer", "moved"):
        tokenizer = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
        ids = tokenizer["model"]["vocab"]
        if how == "moved":
            ids["!"], ids["%"] = ids["%"], ids["!"]
        tokenizer["normalizer"] = {"type": "NFD"}
        (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    elif how == "tokenless":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (target / name).unlink()
    elif how == "begin":
        make_tokenizer(begin=True).save_pretrained(target)
    elif how == "truncated":
        with open(target / "model.safetensors", "r+b") as file:
            file.truncate(1000)
    elif how == "small":
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        model.resize_token_embeddings(250)
        model.save_pretrained(target)
    elif how == "base":
        transformers.AutoModel.from_pretrained(target).save_pretrained(target)
    elif how == "headless":  # says that it is a causal LM
        config = json.loads((target / "config.json").read_text())
        transformers.AutoModel.from_pretrained(target).save_pretrained(target)
        (target / "config.json").write_text(json.dumps(config))
    elif how == "encoder":
        save(target, files.tokenizer, "Bert", **SIZES)
    elif how == "slow":
        transformers.ByT5Tokenizer().save_pretrained(target)
    elif how == "nan":
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        model.model.norm.weight.data[0] = math.nan
        model.save_pretrained(target)
    return target


@pytest.mark.parametrize("how, expected", {
    "moved": "MODEL_B: expected the tokenizer of MODEL_A, got another; ids that differ: 2; '!' is ",
    "normalizer": "MODEL_B: expected the tokenizer of MODEL_A, got other tokens for the same text: '",
    "begin": "MODEL_B: expected the tokenizer of MODEL_A, got other tokens for the same text: '",
    "tokenless": "MODEL_B: expected a folder with a tokenizer, got ",
    "truncated": "MODEL_B: expected a causal LM that can be loaded, got ",
    "small": "MODEL_B: expected an lm_head of at least 300 rows, for the tokenizer's ids, got 250 in ",
    "base": "MODEL_B: expected a causal LM, got ",
    "headless": "MODEL_B: expected a causal LM with all its weights, got ",
    "encoder": "MODEL_B: expected a causal LM, got ",
    "slow": "MODEL_B: expected a fast tokenizer, which says where in the text its tokens are, got ",
    "nan": "MODEL_B: expected finite logits, got NaN from ",
}.items())
def test_checkpoints_that_cannot_be_compared(files, tmp_path, capsys, how, expected):
    code, shown, said = cli_run(capsys, files.a, spoil(files, tmp_path, how), "--text", *files.text)
    line = [line for line in said.splitlines() if "error:" in line]
    assert code == 2 and shown == "" and len(line) == 1 and said.endswith(line[0] + "\n")
    assert line[0].startswith(f"fastkl compare: error: {expected}") and "; remedy: " in line[0]


def test_arguments_that_cannot_be_used(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *arguments: 1 / 0)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    bare = shutil.copytree(files.b, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    text = ("--text", files.text[0])
    cases = {
        "--text: expected files with text, got fewer than 2 tokens in '": (files.a, files.b, "--text", tmp_path / "empty.txt", tmp_path / "one.txt"),
        "--text: expected files with text, got '/no/*.txt', a pattern that no file matches;": (files.a, files.b, "--text", "/no/*.txt"),
        "--text: expected files with text, got '/no/where', which": (files.a, files.b, "--text", files.text[0], "/no/where"),
        "--text: expected UTF-8 text, got byte 0xe9": (files.a, files.b, "--text", tmp_path / "latin.txt"),
        "MODEL_A: expected a model folder or a hub name, got './none', which": ("./none", files.b, *text),
        "MODEL_A: expected a model folder, got": (tmp_path, files.b, *text),
        "MODEL_B: expected a model folder or a hub name, got": (files.a, files.text[0], *text),
        "MODEL_B: expected a model folder with weights, got": (files.a, bare, *text),
        "--context: expected at most 256 (max_position_embeddings), got 257": (files.a, files.b, *text, "--context", "257"),
        "--overlap: expected fewer tokens than --context (8), got 8": (files.a, files.b, *text, "--context", "8", "--overlap", "8"),
        "--html: expected a file in a folder that can be written to": (files.a, files.b, *text, "--html", tmp_path),
        "--html: expected a file in a folder that can be written to, got '": (files.a, files.b, *text, "--html", tmp_path / ("x" * 300)),
        "--json: expected a file in a folder that can be written to": (files.a, files.b, *text, "--json", tmp_path / "no" / "x.json"),
    }
    for expected, arguments in cases.items():
        code, shown, said = cli_run(capsys, *arguments)
        assert (code, shown) == (2, "") and said.startswith(f"fastkl compare: error: {expected}") and said.count("\n") == 1, said
    for wrong in itertools.product(("--top", "--context", "--by", "--dtype", "--device"), ("-1", "x")):
        assert cli_run(capsys, files.a, files.b, *text, *wrong)[0] == 2


def test_every_file_has_one_use(files, tmp_path, monkeypatch, capsys):
    """Nothing is loaded, and nothing overwritten."""
    monkeypatch.setattr(loading, "load_config", lambda *arguments: 1 / 0)
    content, link, hard, new = tmp_path / "text", tmp_path / "link", tmp_path / "hard", tmp_path / "new"
    content.write_text("some text")
    link.symlink_to(content)
    hard.hardlink_to(content)
    config = Path(files.a) / "config.json"
    text = ("--text", content)
    cases = [(*text, link), (*text, tmp_path / "." / "text"), (*text, "--html", content), (*text, "--json", link), (*text, "--json", hard),
             (*text, "--html", new, "--json", tmp_path / "sub" / ".." / "new"), (*text, "--html", "-", "--json", "/dev/stdout"),
             (*text, "--json", config)]
    (tmp_path / "sub").mkdir()
    before = config.read_bytes()
    for case in cases:
        code, shown, message = cli_run(capsys, files.a, files.b, *case)
        assert (code, shown) == (2, "") and message.count("\n") == 1 and ": expected a file that has no other use, got '" in message, (case, message)
    assert content.read_text() == "some text" and config.read_bytes() == before and not new.exists()


def test_files_that_cannot_be_written_after_all(files, tmp_path, monkeypatch, capsys):
    def fail(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(run, "write_whole", fail)
    code, shown, message = cli_run(capsys, files.a, files.b, "--text", files.text[1], "--html", tmp_path / "x.html")
    line = message.splitlines()[-1]
    assert (code, shown) == (1, "") and "Traceback" not in message
    assert line.startswith(f"fastkl compare: error: Permission denied ({tmp_path / 'x.html'}); remedy: ")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_json_on_stdout(files, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    code, shown, report_ = cli_run(capsys, files.a, files.b, "--text", files.text[1], "--json", name)
    assert code == 0 and json.loads(shown)["sentence"] in " ".join(report_.split()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, where", [(signal.SIGTERM, "model"), (signal.SIGTERM, "page"), (signal.SIGHUP, "page")])
def test_signals_leave_nothing(files, tmp_path, monkeypatch, number, where):
    """Temporary files have no names at all, which even SIGKILL cannot leave; half a page is removed."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    out, seen = tmp_path / "x.html", []

    def before(*arguments):
        raise RuntimeError("what was there before")

    def terminate(*arguments):
        seen.append(sorted(path.name[-5:] for path in tmp_path.rglob("*")))
        os.kill(os.getpid(), number)
        time.sleep(10)

    load = loading.load_model
    if where == "page":
        monkeypatch.setattr(page, "_legend", terminate)
    else:
        monkeypatch.setattr(loading, "load_model", lambda argument, *rest: load(argument, *rest) if argument == "MODEL_A" else terminate())
    own = signal.signal(number, before)
    try:
        with pytest.raises(SystemExit) as exit_:
            run.run_compare(Settings(files.a, files.b, files.text, html=out, sequential=True))
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, own)
    assert exit_.value.code == 128 + number and seen == [["orary"] if where == "model" else [".part", "orary"]]
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_terminals_without_colours(files, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_device", lambda text: "cpu")
    for variables, colored in (({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)):
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            code, shown, _ = cli_run(capsys, files.a, files.b, "--text", files.text[1])
        assert code == 0 and ("\x1b[" in shown) == colored, variables


def test_out_of_memory_names_its_remedy(files, monkeypatch, capsys):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(loading, "load_model", fail)
    code, shown, said = cli_run(capsys, files.a, files.b, "--text", files.text[0])
    assert (code, shown) == (1, "") and said.startswith("fastkl compare: error: out of memory") and "--sequential" in said and said.count("\n") == 1


def test_a_page_that_fails_half_way_leaves_the_old_one(files, tmp_path, monkeypatch):
    target = Path(tmp_path / "x.html")
    target.write_text("before")
    monkeypatch.setattr(page, "_legend", lambda scale: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run_compare(Settings(files.a, files.b, files.text[1:], html=target))
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]
