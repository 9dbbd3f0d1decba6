"""`fastkl compare --text`: standard input, folders, patterns, and the documents of a .jsonl file."""

import io
import json
import os
import shutil
import sys

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import cli_run, compare, make_files, make_tokenizer, silent  # noqa: E402, F401

from fastkl.tools.compare import inputs, loading, report  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat"}]
RENDERED = "<s>user: the cat sat\n<s>assistant: on a mat\n"


@pytest.fixture(scope="module", name="chats")
def make_chats(files, tmp_path_factory):
    """Checkpoints a and b with chat templates that differ."""
    folder = tmp_path_factory.mktemp("chats")
    for name, template in (("a", TEMPLATE), ("b", "{{ messages }}")):
        shutil.copytree(files.folder / name, folder / name)
        make_tokenizer(chat_template=template).save_pretrained(folder / name)
    return str(folder / "a"), str(folder / "b")


def lines(path, *entries):
    path.write_text(
        "".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries),
        encoding="utf-8",
    )
    return path


# ---- .jsonl


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"messages": CHAT}, RENDERED),
        ({"messages": CHAT, "prompt": "the cat", "prompt_id": 7}, RENDERED),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, RENDERED),
        ({"prompt": "the cat sat", "completion": " on a mat"}, "the cat sat on a mat"),
        ({"text": "a mat 日本", "source": "x"}, "a mat 日本"),
        ({"text": "a mat", "messages": []}, "a mat"),
    ],
)
def test_a_line_is_a_document_and_not_json(files, chats, tmp_path, entry, expected):
    path = lines(tmp_path / "x.JSONL", {"text": "the first"}, "\n", entry)
    _, result, ids = compare(files, *chats, tmp_path / "out", text=(path,))
    tokenizer = transformers.AutoTokenizer.from_pretrained(chats[0])
    assert ids == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the first", expected)
    ]
    assert {unit["document"] for unit in result["units"]} == {"x.JSONL#1", "x.JSONL#3"}
    assert (
        result["text"]["documents"] == 2
        and result["text"]["not_scored"] == 2
        and "x.JSONL, 2 documents, " in report.text_line(result)
    )


def test_the_special_token_that_a_template_writes_is_context_as_that_in_front(files, tmp_path):
    """And it is not put in front a second time."""
    for name in ("a", "b"):
        shutil.copytree(files.folder / name, tmp_path / name)
        make_tokenizer(begin=True, chat_template=TEMPLATE).save_pretrained(tmp_path / name)
    path = lines(tmp_path / "x.jsonl", {"messages": CHAT}, {"text": "a mat"})
    _, result, ids = compare(
        files, str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "out", text=(path,)
    )
    assert (
        [document[:2].count(0) for document in ids] == [1, 1]
        and ids[0].count(0) == 2
        and result["text"]["not_scored"] == 0
    )
    assert result["summary"]["tokens"] == sum(map(len, ids)) - 2


def test_the_template_is_that_of_the_chosen_tokenizer(files, chats, tmp_path):
    path = lines(tmp_path / "x.jsonl", {"messages": CHAT})
    for letter, expected in (("A", RENDERED), ("B", str(CHAT))):
        ids = compare(files, *chats, tmp_path / "out", text=(path,), tokenizer=letter)[2]
        assert ids == [files.tokenizer(expected, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    "entry, expected",
    [
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            '--text: expected lines of the form {"messages": [...]}, {"prompt": ..., "completion": '
            "...} or {\"text\": ...}, with text or messages, got the fields 'conversations' in line 2 of '",
        ),
        ({"prompt": "x"}, "--text: expected lines of the form "),
        ({"prompt": CHAT, "completion": "x"}, "--text: expected lines of the form "),
        ({"messages": "x"}, "--text: expected lines of the form "),
        ({"messages": []}, "--text: expected lines of the form "),
        ({"messages": [{"content": "x"}]}, "--text: expected lines of the form "),
        ({"messages": CHAT, "text": "x"}, "--text: expected lines of the form "),
        ({"text": 7}, "--text: expected lines of the form "),
        (
            [1],
            '--text: expected lines of the form {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, with text or messages, '
            "got no such object in line 2 of '",
        ),
        (
            "{\n",
            "--text: expected a JSON object a line in a .jsonl file, got Expecting property name ",
        ),
        (
            '{"text": "\\ud800"}\n',
            "--text: expected characters in UTF-8, got a lone '\\ud800' in line 2 of '",
        ),
        (
            {"messages": [{"role": "user"}]},
            "--text: expected messages that the chat template of MODEL_A takes, got ",
        ),
    ],
)
def test_lines_that_cannot_be_read_are_refused_before_a_model_loads(
    files, tmp_path, monkeypatch, capsys, entry, expected
):
    strict = shutil.copytree(files.folder / "a", tmp_path / "a")
    make_tokenizer(
        chat_template=TEMPLATE.replace("message['content']", "message['content'] + ''")
    ).save_pretrained(strict)
    monkeypatch.setattr(loading, "load_model", lambda *arguments: 1 / 0)
    code, shown, said = cli_run(
        capsys, strict, strict, "--text", lines(tmp_path / "x.jsonl", {"text": "a mat"}, entry)
    )
    assert (
        (code, shown, said.count("\n")) == (2, "", 1)
        and said.startswith(f"fastkl compare: error: {expected}")
        and "; remedy: " in said
    ), said


def test_a_missing_template_is_said_before_a_model_loads(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *arguments: 1 / 0)
    code, shown, said = cli_run(
        capsys, files.a, files.b, "--text", lines(tmp_path / "x.jsonl", {"messages": CHAT})
    )
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert said.startswith(
        "fastkl compare: error: MODEL_A: expected a tokenizer with a chat template, for the messages in line 1 of '"
    )


def test_many_documents_are_found_again(files, tmp_path):
    """Excerpts and places stay in their document."""
    path = lines(tmp_path / "x.jsonl", *({"text": f"number {at} of the cats"} for at in range(60)))
    _, result, ids = compare(files, files.a, files.b, tmp_path / "out", text=(path,), top=40)
    assert len(ids) == len(result["units"]) == 60
    for unit in result["units"]:
        assert unit["text"] == f"number {int(unit['document'].split('#')[1]) - 1} of the cats"
    for entry in result["top"]:
        assert (
            f"number {int(entry['document'].split('#')[1]) - 1} of the cats"
            == entry["before"] + entry["token"] + entry["after"]
        )


# ---- standard input, folders, patterns


def test_standard_input_is_a_document(files, tmp_path, monkeypatch, capsys):
    """Beside a file and with a result on standard output, which has the same name."""
    expected = compare(files, files.a, files.b, tmp_path / "out", text=files.text[:1])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(files.text[0].read_bytes())))
    code, shown, _ = cli_run(capsys, files.a, files.b, "--text", "-", "--json", "-")
    numbers = json.loads(shown)
    assert (
        code == 0
        and numbers["summary"] == expected[1]["summary"]
        and numbers["text"]["files"] == ["standard input"]
    )
    assert {entry["document"] for entry in numbers["top"]} == {
        "standard input"
    } and sys.stdin.buffer.read() == b""


@pytest.mark.parametrize("arguments, got", [(("-", "-"), "- twice"), (("-",), "a closed one")])
def test_standard_input_is_read_once(files, monkeypatch, capsys, arguments, got):
    if len(arguments) == 1:
        monkeypatch.setattr(sys, "stdin", None)
    code, shown, said = cli_run(capsys, files.a, files.b, "--text", *arguments)
    assert (code, shown) == (2, "") and said.startswith(
        f"fastkl compare: error: --text: expected standard input to be open, and read once, got {got};"
    )


def test_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", ".hidden", "deep/c.txt", "deep/er/d.md", "[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a mat")

    def found(*names):
        return [str(path) for path in inputs.files([inputs.Path(name) for name in names])]

    assert found(".") == ["[1].txt", "a.txt", "b.txt"] and found("deep") == ["deep/c.txt"]
    assert found("*.txt") == ["[1].txt", "a.txt", "b.txt"] and found("**/*.txt") == [
        "[1].txt",
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    assert found("[1].txt") == ["[1].txt"] and found("b.txt", "deep/*", "-") == [
        "b.txt",
        "deep/c.txt",
        "-",
    ]


def test_a_folder_is_its_files(files, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for path in files.text:
        shutil.copy(path, tmp_path / "texts")
    (tmp_path / "none").mkdir()
    code, _, _ = cli_run(
        capsys, files.a, files.b, "--text", tmp_path / "texts", "--json", tmp_path / "x.json"
    )
    expected, numbers = (
        compare(files, files.a, files.b, tmp_path / "out")[1],
        json.loads((tmp_path / "x.json").read_text(encoding="utf-8")),
    )
    assert (
        code == 0
        and numbers["summary"] == expected["summary"]
        and numbers["units"] == expected["units"]
    )
    assert numbers["text"]["files"] == [str(tmp_path / "texts" / path.name) for path in files.text]
    code, shown, said = cli_run(capsys, files.a, files.b, "--text", tmp_path / "none")
    assert (
        (code, shown) == (2, "")
        and f"--text: expected files with text, got '{tmp_path / 'none'}', a folder without files in it; remedy: "
        in said
    )


# ---- names


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_utf8_lose_nothing(files, tmp_path, capsys):
    """Neither in the text's, nor in a model's, nor in an output's name."""
    strange = os.fsdecode(b"caf\xe9")
    content, out = tmp_path / f"{strange}.txt", tmp_path / strange
    out.mkdir()
    shutil.copy(files.text[1], content)
    code, shown, said = cli_run(
        capsys,
        files.a,
        files.b,
        "--text",
        content,
        files.text[0],
        "--json",
        out / "x.json",
        "--html",
        out / "x.html",
    )
    assert (
        code == 0
        and "Traceback" not in said
        and "caf<0xE9>.txt" in shown
        and f"wrote {tmp_path}/caf<0xE9>/x.html and " in shown
    )
    numbers = json.loads((out / "x.json").read_text(encoding="utf-8"))
    assert "caf<0xE9>.txt" in numbers["text"]["files"][0] and "caf&lt;0xE9&gt;.txt" in (
        out / "x.html"
    ).read_text(encoding="utf-8")
    shutil.copy(files.text[1], tmp_path / f"{strange}.jsonl")
    code, _, said = cli_run(capsys, files.a, files.b, "--text", tmp_path / f"{strange}.jsonl")
    assert code == 2 and "in a .jsonl file, got " in said


def test_a_line_is_compared_alone(files, tmp_path):
    """A line's values are those of the line alone, whatever stands in the file before it."""
    alone = compare(
        files,
        files.a,
        files.b,
        tmp_path / "out",
        text=(lines(tmp_path / "x.jsonl", {"text": "a mat"}),),
    )[0]
    both = compare(
        files,
        files.a,
        files.b,
        tmp_path / "out",
        text=(lines(tmp_path / "y.jsonl", {"text": "the cat"}, {"text": "a mat"}),),
    )[0]
    assert torch.equal(
        torch.from_numpy(alone["kl_ab"].copy()),
        torch.from_numpy(both["kl_ab"][-len(alone) :].copy()),
    )
