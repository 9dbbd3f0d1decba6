"""`fastkl compare` on the command line: what it reads and writes, and what it refuses, as early as
can be seen."""

import io
import json
import os
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
from compare_cases import (  # noqa: E402
    COLUMNS,
    SIZES,
    assert_true,
    cli_run,
    compare,
    make_files,  # noqa: F401
    make_loads,  # noqa: F401
    make_tokenizer,
    refused,
    save,
    truth,
)

from fastkl.tools.compare import inputs, loading, page  # noqa: E402
from fastkl.tools.errors import UseError  # noqa: E402
from fastkl.tools.files import find_texts  # noqa: E402

TEMPLATE = "{% for each in messages %}<s>{{ each['role'] + ': ' + each['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat"}]
RENDERED = "<s>user: the cat sat\n<s>assistant: on a mat\n"


# ---- texts


@pytest.fixture(name="chats")
def make_chats(files, tmp_path):
    # Checkpoints a and b with chat templates that differ, and a special token in front.
    for name, template in (("a", TEMPLATE), ("b", "{{ messages }}")):
        shutil.copytree(files.folder / name, tmp_path / name)
        make_tokenizer(begin=True, chat_template=template).save_pretrained(tmp_path / name)
    return str(tmp_path / "a"), str(tmp_path / "b")


def lines(path, *entries):
    texts = (each if isinstance(each, str) else json.dumps(each) + "\n" for each in entries)
    path.write_text("".join(texts), encoding="utf-8")
    return path


def test_a_line_of_jsonl_is_a_document_of_its_own(files, chats, tmp_path):
    # A special token of the template is the context that one in front would be.
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
    parts = [truth(files.a, files.b, document) for document in ids]
    assert_true(tokens, {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS})
    numbers = {int(unit["document"].removeprefix("x.JSONL#")) for unit in result["units"]}
    assert len(numbers) == result["text"]["documents"] == 6
    assert len(tokens) - result["summary"]["tokens"] == 6  # the special token in front
    alone = lines(tmp_path / "y.jsonl", list(texts)[-1])
    own = compare(files, *chats, text=(alone,))[0]["kl_ab"].to_numpy()
    np.testing.assert_array_equal(own, tokens["kl_ab"][-len(ids[-1]) :])


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"conversations": [{"value": "x"}]}, "conversations is of type list"),
        ({"prompt": "x"}, "prompt is of type str"),
        ({"prompt": CHAT, "completion": "x"}, "concatenate"),
        ({"messages": "x"}, "messages is of type str"),
        ({"messages": []}, "messages is of type list; .* not empty"),
        ({"messages": [{"content": "x"}]}, "'role'"),
        (
            {"messages": CHAT, "text": "x"},
            "messages is of type list, text is of type str; expected one",
        ),
        ({"text": 7}, r"text is of type int; expected one of text \(a str\)"),
        ([1], "list"),
        ("{\n", "property name"),
        ('{"text": "\\ud800"}\n', "surrogate"),
        ({"messages": [{"role": "user"}]}, ""),
    ],
)
def test_lines_that_cannot_be_read(chats, tmp_path, capsys, loads, entry, expected):
    path = lines(tmp_path / "x.jsonl", {"text": "a mat"}, entry)
    expected = f"--text: expected lines of the form .* got line 2 of .*{expected}"
    refused(capsys, expected, chats[0], chats[0], "--text", path)
    assert not loads


def test_bytes_of_a_character(files, tmp_path):
    # A byte-order mark goes; the first of the tokens that share a character has it.
    content, path = "naïve 日本 → 🙂 ok", tmp_path / "x.txt"
    path.write_bytes(content.encode("utf-8-sig"))
    tokenizer = inputs.TextTokenizer(make_tokenizer())
    _, result, ids = compare(files, files.a, files.b, text=(path,), top=100)
    assert ids == [make_tokenizer()(content)["input_ids"]]
    assert "".join(tokenizer.encode(content)[1]) == content
    assert all(entry["token"] for entry in result["top"])


def test_folders_patterns_and_standard_input(files, tmp_path, monkeypatch, capsys):
    for name in ("b.txt", "a.txt", ".hidden", "deep/c.txt", "deep/er/d.md", "[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.text[0], tmp_path / name)
    for given, expected in (
        ("deep", "deep/c.txt"),
        ("**/*.txt", "[1].txt a.txt b.txt deep/c.txt"),
        ("[1].txt", "[1].txt"),
    ):
        found = find_texts([tmp_path / given])
        assert found == tuple(tmp_path / name for name in expected.split())
    expected = compare(files, files.a, files.b, text=files.text[:1])[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(files.text[0].read_bytes())))
    (tmp_path / "empty").touch()
    arguments = ("--device", "cpu", "--text", "-", tmp_path / "e*y", "--json", "-")
    code, shown, _ = cli_run(capsys, files.a, files.b, *arguments)
    numbers = json.loads(shown)
    assert code == 0 and numbers["summary"] == expected["summary"]
    assert numbers["text"]["skipped"] == [str(tmp_path / "empty")]


# ---- outputs


def test_a_run_leaves_its_files_and_nothing_else(files, tmp_path, capsys):
    # Also where names are no UTF-8.
    out = tmp_path / os.fsdecode(b"caf\xe9")
    out.mkdir()
    text = shutil.copy(files.text[1], out / "two & <b>.txt")
    outputs = ("--json", out / "x.json", "--html", out / "x.html")
    code, shown, _ = cli_run(capsys, files.a, files.b, "--text", text, files.text[0], *outputs)
    numbers = json.loads((out / "x.json").read_text(encoding="utf-8"))
    assert code == 0 and f"{numbers['summary']['kl_ab']['mean']:.4g}" in shown
    assert numbers["sentence"] in " ".join(shown.split())
    assert f"wrote {tmp_path}/caf\\xe9/x.json and " in shown
    assert "two &amp; &lt;b&gt;.txt" in (out / "x.html").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"two & <b>.txt", "x.html", "x.json"}


def test_a_page_that_fails_half_way_leaves_the_old_one(files, tmp_path, monkeypatch, capsys):
    target = tmp_path / "x.html"
    target.write_text("before")
    monkeypatch.setattr(page, "token_html", Mock(side_effect=SystemExit(143)))
    code, shown, said = cli_run(
        capsys, files.a, files.b, "--text", *files.text, "--html", target, "--device", "cpu"
    )
    assert (code, shown) == (143, "") and "Traceback" not in said
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_every_file_has_one_use(files, tmp_path, capsys, loads):
    content, link, new = tmp_path / "text", tmp_path / "link", tmp_path / "new"
    content.write_text("some text")
    link.symlink_to(content)
    (tmp_path / "sub").mkdir()
    for case in (
        (link,),
        (tmp_path / "." / "text",),
        ("-", "-"),
        ("--html", content),
        ("--json", link),
        ("--html", new, "--json", tmp_path / "sub" / ".." / "new"),
        ("--html", "-", "--json", "-"),
    ):
        expected = "--(text|html|json): expected a file that has no other use, got '"
        refused(capsys, expected, files.a, files.b, "--text", content, *case)
    assert content.read_text() == "some text" and not new.exists() and not loads


# ---- checkpoints and arguments that cannot be used


def rewritten(path, change):
    # Change a JSON file in place.
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def resaved(folder, change, auto=transformers.AutoModelForCausalLM):
    # Change a model in place.
    model = auto.from_pretrained(folder)
    change(model)
    model.save_pretrained(folder)


def encoder(to, kind):
    config = getattr(transformers, f"{kind}Config")
    config(architectures=[f"{kind}ForConditionalGeneration"]).save_pretrained(to)


def swapped(tokenizer):
    ids = tokenizer["model"]["vocab"]
    ids["!"], ids["%"] = ids["%"], ids["!"]


def pickled(to):
    (to / "model.safetensors").unlink()
    torch.save({"x": print}, to / "pytorch_model.bin")


NFD = {"normalizer": {"type": "NFD"}}
SPOIL = {
    "moved": lambda to: rewritten(to / "tokenizer.json", swapped),
    "normalizer": lambda to: rewritten(to / "tokenizer.json", lambda own: own.update(NFD)),
    "begin": lambda to: make_tokenizer(begin=True).save_pretrained(to),
    "call": lambda to: make_tokenizer(" sat").save_pretrained(to),
    "tokenless": lambda to: [path.unlink() for path in to.glob("tokenizer*")],
    "slow": lambda to: transformers.ByT5Tokenizer().save_pretrained(to),
    "small": lambda to: resaved(to, lambda model: model.resize_token_embeddings(250)),
    "base": lambda to: resaved(to, id, transformers.AutoModel),
    "T5": lambda to: encoder(to, "T5"),
    "Bart": lambda to: encoder(to, "Bart"),
    "truncated": lambda to: os.truncate(to / "model.safetensors", 1000),
    "bare": lambda to: (to / "model.safetensors").unlink(),
    "pickle": pickled,
    "headless": lambda to: resaved(to, lambda model: delattr(model.lm_head, "weight")),
    "encoder": lambda to: save(to, "BertLMHeadModel", **SIZES),
    "nan": lambda to: resaved(to, lambda model: model.model.norm.weight.data.fill_(torch.nan)),
}
LM = "MODEL_B: expected a causal LM, got "
OTHER = "MODEL_B: expected the tokenizer of MODEL_A, got "


@pytest.mark.parametrize(
    "how, expected, count",
    [
        ("moved", OTHER + r"another; tokens with other ids: \['!', '%'\]", 0),
        ("normalizer", OTHER + "other tokens for the same text: '", 0),
        ("begin", OTHER + "other tokens for the same text: '", 0),
        ("call", "--text: .* got ' sat' in 'one.txt', the token 300 of B alone;.*--tokenizer A", 0),
        ("tokenless", "MODEL_B: expected a fast tokenizer that can be loaded, got ", 0),
        ("slow", "MODEL_B: expected a fast tokenizer that can be loaded, got ", 0),
        ("small", "MODEL_B: expected an lm_head of at least 300 rows.*, got 250 in ", 0),
        *((how, LM, 2) for how in ("base", "T5", "Bart", "truncated", "bare", "headless")),
        ("pickle", LM + ".*[Ww]eights", 2),
        ("encoder", "MODEL_B: expected a model whose lm_head makes its logits, got ", 2),
        ("nan", "MODEL_B: expected .*, got .*NaN|MODEL_B: expected a model whose lm_head", 2),
    ],
)
def test_checkpoints_that_cannot_be_compared(files, tmp_path, capsys, loads, how, expected, count):
    # As early as can be seen; count: how many models were loaded before.
    spoilt = shutil.copytree(files.b, tmp_path / how)
    SPOIL[how](spoilt)
    capsys.readouterr()
    refused(capsys, expected, files.a, spoilt, "--text", *files.text)
    assert len(loads) == count
    if how == "call":
        arguments = ("--text", *files.text, "--tokenizer", "A")
        assert cli_run(capsys, files.a, spoilt, *arguments)[0] == 0


def test_a_model_that_looks_ahead(files, monkeypatch):
    model = loading.Checkpoint("A", files.a).load("auto", "cpu")
    model.check(torch.arange(20))
    own = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: own(ids) + 9 * own(ids).mean(0))
    with pytest.raises(UseError, match="^MODEL_A: expected a causal LM, .* that follow"):
        model.check(torch.arange(20))


NAME = "MODEL_A: expected a folder that save_pretrained wrote, or a hub name, got "


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("A", "B", "--text", "{}/empty", "{}/one"), "--text: .*fewer than 2 tokens in '"),
        (("A", "B", "--text", "{}/empty", "/no/where"), "--text: .* got '/no/where'"),
        (("A", "B", "--text", "{}/none"), "--text: expected files with text, got '.*/none'"),
        (("A", "B", "--text", "{}/latin"), "--text: expected UTF-8 .*0xe9"),
        (("A", "B", "--text", "{}/x.jsonl"), "--text: .*line 1 of .*template"),
        (("./none", "B"), NAME + "'./none'"),
        (("{}", "B"), NAME),
        (("{}/one", "B"), NAME),
        (("A", "B", "--device", "cuda:99"), r"--device: expected one that this machine has \("),
        (("A", "B", "--window", "257"), r"--window: expected at most 256 \(max_position"),
        (("A", "B", "--window", "8", "--stride", "9"), "--stride: expected 1 tokens or more, at"),
        (("A", "B", "--html", "{}"), "--html: expected a file in a folder that can be written to"),
        (("A", "B", "--html", "{}/" + "x" * 300), "--html: expected a file in a folder"),
        (("A", "B", "--json", "{}/no/x.json"), "--json: expected a file in a folder"),
    ],
)
def test_arguments_that_cannot_be_used(files, tmp_path, capsys, loads, arguments, expected):
    (tmp_path / "none").mkdir()
    for name, content in (("empty", b""), ("one", b"a"), ("latin", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
    lines(tmp_path / "x.jsonl", {"messages": CHAT})
    given = [{"A": files.a, "B": files.b}.get(each, each.format(tmp_path)) for each in arguments]
    text = () if "--text" in arguments else ("--text", files.text[0])
    refused(capsys, expected, *given, *text)
    assert not loads
