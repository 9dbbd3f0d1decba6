"""`fastkl compare` on the command line: what it reads, writes and refuses."""

import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
from compare_cases import (  # noqa: E402
    cli_run,
    compare,
    make_files,  # noqa: F401
    make_loads,  # noqa: F401
    make_tokenizer,
    refused,
)

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import inputs, report  # noqa: E402

TEMPLATE = "{% for each in messages %}<s>{{ each['role'] + ': ' + each['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat"}]
RENDERED = "<s>user: the cat sat\n<s>assistant: on a mat\n"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """The folder of temporary files, which have no names there."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


# ---- texts


@pytest.fixture(name="chats")
def make_chats(files, tmp_path):
    """Checkpoints a and b with chat templates that differ, and a special token in front."""
    for name, template in (("a", TEMPLATE), ("b", "{{ messages }}")):
        shutil.copytree(files.folder / name, tmp_path / name)
        made = make_tokenizer(begin=True, chat_template=template)
        made.save_pretrained(tmp_path / name)
    return str(tmp_path / "a"), str(tmp_path / "b")


def lines(path, *entries):
    texts = (each if isinstance(each, str) else json.dumps(each) + "\n" for each in entries)
    path.write_text("".join(texts), encoding="utf-8")
    return path


def test_a_line_of_jsonl_is_a_document_of_its_own(files, chats, tmp_path):
    """A special token of the template is the context that one in front would be."""
    texts = {
        json.dumps({"messages": CHAT}): RENDERED,
        json.dumps({"messages": CHAT, "prompt": "the cat", "prompt_id": 7}): RENDERED,
        "\n": None,
        json.dumps({"prompt": CHAT[:1], "completion": CHAT[1:]}): RENDERED,
        json.dumps({"prompt": "the cat", "completion": " on a mat"}): "<s>the cat on a mat",
        json.dumps({"text": "a mat 日本", "source": "x"}): "<s>a mat 日本",
        json.dumps({"text": "a mat", "messages": []}): "<s>a mat",
    }
    path = lines(tmp_path / "x.JSONL", *(f"{line}\n" for line in texts))
    tokens, result, ids = compare(files, *chats, text=(path,))
    tokenizer, known = make_tokenizer(), list(filter(None, texts.values()))
    assert ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in known]
    numbers = {int(unit["document"].removeprefix("x.JSONL#")) for unit in result["units"]}
    assert len(numbers) == result["text"]["documents"] == 6 and result["text"]["not_scored"] == 0
    alone = lines(tmp_path / "y.jsonl", list(texts)[-1])
    own = compare(files, *chats, text=(alone,))[0]
    assert own["kl_ab"].tobytes() == tokens["kl_ab"][-len(ids[-1]) :].tobytes()


SHAPES = "--text: expected lines of the form "


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"conversations": [{"value": "x"}]}, SHAPES + ".*'conversations'.* in line 2 of '"),
        ({"prompt": "x"}, SHAPES),
        ({"prompt": CHAT, "completion": "x"}, SHAPES),
        ({"messages": "x"}, SHAPES),
        ({"messages": []}, SHAPES),
        ({"messages": [{"content": "x"}]}, SHAPES),
        ({"messages": CHAT, "text": "x"}, SHAPES),
        ({"text": 7}, SHAPES),
        ([1], SHAPES),
        ("{\n", "--text: expected a JSON object a line in a .jsonl file, got line 2 of '"),
        ('{"text": "\\ud800"}\n', "--text: .*line 2 of '.*surrogate"),
        ({"messages": [{"role": "user"}]}, "--text: expected messages .* template of MODEL_A"),
    ],
)
def test_lines_that_cannot_be_read(chats, tmp_path, capsys, loads, entry, expected):
    path = lines(tmp_path / "x.jsonl", {"text": "a mat"}, entry)
    refused(capsys, expected, chats[0], chats[0], "--text", path)
    assert not loads


def test_bytes_of_a_character(files, tmp_path):
    """A byte-order mark goes; the first of the tokens that share a character has it."""
    content, path = "naïve 日本 → 🙂 ok", tmp_path / "x.txt"
    path.write_bytes(content.encode("utf-8-sig"))
    tokenizer = inputs.TextTokenizer(make_tokenizer())
    _, result, ids = compare(files, files.a, files.b, text=(path,), top=100)
    assert ids == [make_tokenizer()(content)["input_ids"]]
    assert "".join(tokenizer.encode(content)[1]) == content
    for entry in result["top"]:
        assert entry["token"] in content or re.fullmatch("(<0x[0-9A-F]{2}>)+", entry["token"])


def test_folders_patterns_and_standard_input(files, tmp_path, monkeypatch, capsys):
    for name in ("b.txt", "a.txt", ".hidden", "deep/c.txt", "deep/er/d.md", "[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.text[0], tmp_path / name)
    for given, expected in (
        ("deep", "deep/c.txt"),
        ("**/*.txt", "[1].txt a.txt b.txt deep/c.txt"),
        ("[1].txt", "[1].txt"),
    ):
        found = inputs.files([tmp_path / given])
        assert found == tuple(tmp_path / name for name in expected.split())
    expected = compare(files, files.a, files.b, text=files.text[:1])[1]
    content = files.text[0].read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (tmp_path / "empty").touch()
    arguments = ("--device", "cpu", "--text", "-", tmp_path / "empty", "--json", "-")
    code, shown, _ = cli_run(capsys, files.a, files.b, *arguments)
    numbers = json.loads(shown)
    assert code == 0 and numbers["summary"] == expected["summary"]
    assert numbers["text"]["skipped"] == [str(tmp_path / "empty")]


# ---- outputs


@pytest.mark.parametrize("options", [(), ("--sequential", "--color")])
def test_a_run_leaves_its_files_and_nothing_else(files, tmp_path, monkeypatch, capsys, options):
    """Also where names are no UTF-8."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    out.mkdir()
    text = shutil.copy(files.text[1], out / "two & <b>.txt")
    outputs = ("--json", out / "x.json", "--html", out / "x.html")
    code, shown, _ = cli_run(
        capsys, files.a, files.b, "--text", text, files.text[0], *outputs, *options
    )
    numbers = json.loads((out / "x.json").read_text(encoding="utf-8"))
    assert code == 0 and ("\x1b[" in shown) == ("--color" in options)
    assert f"{numbers['summary']['kl_ab']['mean']:.4g}" in shown
    assert numbers["sentence"] in " ".join(shown.split()) and numbers["text"]["not_scored"] == 2
    assert f"wrote {tmp_path}/caf<0xE9>/x.html and " in shown
    assert "two &amp; &lt;b&gt;.txt" in (out / "x.html").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"two & <b>.txt", "x.html", "x.json"}


@pytest.mark.parametrize("device, code", [("/dev/full", 1), (None, 141)])
def test_standard_output_that_takes_no_more(files, monkeypatch, capsys, device, code):
    """A full one is one message; where its reader has seen enough, the command ends in silence."""
    reading, descriptor = os.pipe()
    os.close(reading)
    with open(device or descriptor, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        arguments = [files.a, files.b, "--text", str(files.text[1]), "--device", "cpu"]
        assert cli.main(["compare", *arguments]) == code
    said = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert ("No space left on device; remedy: " in said) if code == 1 else "rror" not in said


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (PermissionError(13, "Permission denied", "x.html"), 1, r"Permission denied \(x.html\)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "out of memory "),
        (SystemExit(143), 143, ""),
    ],
)
def test_a_page_that_fails_half_way_leaves_the_old_one(
    files, tmp_path, monkeypatch, capsys, error, code, expected
):
    target = tmp_path / "x.html"
    target.write_text("before")
    monkeypatch.setattr(report, "_tokens", Mock(side_effect=error))
    done, shown, said = cli_run(capsys, files.a, files.b, "--text", *files.text, "--html", target)
    assert (done, shown) == (code, "") and "Traceback" not in said
    assert re.search(f"error: {expected}.*; remedy: " if expected else "", said)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_every_file_has_one_use(files, tmp_path, capsys, loads):
    content, link, new = tmp_path / "text", tmp_path / "link", tmp_path / "new"
    content.write_text("some text")
    link.symlink_to(content)
    config = Path(files.a) / "config.json"
    before = config.read_bytes()
    (tmp_path / "sub").mkdir()
    for case in (
        (link,),
        (tmp_path / "." / "text",),
        ("-", "-"),
        ("--html", content),
        ("--json", link),
        ("--html", new, "--json", tmp_path / "sub" / ".." / "new"),
        ("--html", "-", "--json", "/dev/stdout"),
        ("--json", config),
    ):
        expected = "--(text|html|json): expected a file that has no other use, got '"
        refused(capsys, expected, files.a, files.b, "--text", content, *case)
    assert content.read_text() == "some text" and config.read_bytes() == before and not new.exists()
    assert not loads
