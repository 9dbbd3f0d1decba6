"""`fastkl compare`: checkpoints and arguments that it refuses, as early as can be seen."""

import json
import os
import shutil

import pytest
import torch
from compare_cases import (
    SIZES,
    cli_run,
    make_files,  # noqa: F401
    make_loads,  # noqa: F401
    make_tokenizer,
    refused,
    save,
    transformers,
)

from fastkl.tools.compare import CompareError, loading

CHAT = b'{"messages": [{"role": "user", "content": "x"}]}'


def rewritten(path, change):
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def resaved(folder, change, auto=transformers.AutoModelForCausalLM):
    """Change a model in place."""
    model = auto.from_pretrained(folder)
    change(model)
    model.save_pretrained(folder)


def encoder(to, kind):
    config = getattr(transformers, f"{kind}Config")
    config(architectures=[f"{kind}ForConditionalGeneration"]).save_pretrained(to)


def headless(to):
    """It says that it is a causal LM."""
    config = (to / "config.json").read_text()
    resaved(to, id, transformers.AutoModel)
    (to / "config.json").write_text(config)


def called(to):
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [" sat"]})
    made.save_pretrained(to)


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
    "call": called,
    "tokenless": lambda to: [path.unlink() for path in to.glob("tokenizer*")],
    "slow": lambda to: transformers.ByT5Tokenizer().save_pretrained(to),
    "small": lambda to: resaved(to, lambda model: model.resize_token_embeddings(250)),
    "base": lambda to: resaved(to, id, transformers.AutoModel),
    "T5": lambda to: encoder(to, "T5"),
    "Bart": lambda to: encoder(to, "Bart"),
    "truncated": lambda to: os.truncate(to / "model.safetensors", 1000),
    "bare": lambda to: (to / "model.safetensors").unlink(),
    "pickle": pickled,
    "headless": headless,
    "encoder": lambda to: save(to, "BertLMHeadModel", **SIZES),
    "nan": lambda to: resaved(to, lambda model: model.model.norm.weight.data.fill_(torch.nan)),
}
OTHER = "MODEL_B: expected the tokenizer of MODEL_A, got "


@pytest.mark.parametrize(
    "how, expected, count",
    [
        ("moved", OTHER + "another; ids that differ: 2; '!' is ", 0),
        ("normalizer", OTHER + "other tokens for the same text: '", 0),
        ("begin", OTHER + "other tokens for the same text: '", 0),
        ("call", "--text: .* got ' sat' in 'one.txt', the token 300 of B alone;.*--tokenizer A", 0),
        ("tokenless", "MODEL_B: expected a fast tokenizer that can be loaded, got ", 0),
        ("slow", "MODEL_B: expected a fast tokenizer that can be loaded, got ", 0),
        ("small", "MODEL_B: expected an lm_head of at least 300 rows.*, got 250 in ", 0),
        ("base", "MODEL_B: expected a causal LM, got ", 0),
        ("T5", "MODEL_B: expected a causal LM, got ", 0),
        ("Bart", "MODEL_B: expected a causal LM, got ", 0),
        ("truncated", "MODEL_B: expected a causal LM that can be loaded, got ", 2),
        ("bare", "MODEL_B: expected a causal LM that can be loaded, got ", 2),
        ("pickle", "MODEL_B: expected a causal LM that can be loaded, got .*[Ww]eights", 2),
        ("headless", "MODEL_B: expected a causal LM with all its weights, got ", 2),
        ("encoder", "MODEL_B: expected a model whose lm_head makes its logits, got ", 2),
        ("nan", "MODEL_B: expected .*, got .*NaN|MODEL_B: expected a model whose lm_head", 2),
    ],
)
def test_checkpoints_that_cannot_be_compared(files, tmp_path, capsys, loads, how, expected, count):
    """As early as can be seen; count: how many models were loaded before."""
    spoilt = shutil.copytree(files.b, tmp_path / how)
    SPOIL[how](spoilt)
    capsys.readouterr()
    refused(capsys, expected, files.a, spoilt, "--text", *files.text)
    assert len(loads) == count
    if how == "call":
        arguments = ("--text", *files.text, "--tokenizer", "A")
        assert cli_run(capsys, files.a, spoilt, *arguments)[0] == 0


def test_a_model_that_looks_ahead(files, monkeypatch):
    model = loading.Checkpoint("MODEL_A", files.a).load("auto", "cpu")
    model.check(torch.arange(20))
    own = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: own(ids) + 9 * own(ids).mean(0))
    with pytest.raises(CompareError, match="^MODEL_A: expected a causal LM, .* that follow"):
        model.check(torch.arange(20))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("A", "B", "--text", "{}/empty", "{}/one"), "--text: .*fewer than 2 tokens in '"),
        (("A", "B", "--text", "/no/*.txt"), r"--text: expected files with text, got '/no/\*.txt'"),
        (("A", "B", "--text", "{}/empty", "/no/where"), "--text: .* got '/no/where'"),
        (("A", "B", "--text", "{}/none"), "--text: expected files with text, got '.*/none'"),
        (("A", "B", "--text", "{}/latin"), "--text: expected UTF-8 .*0xe9"),
        (("./none", "B"), "MODEL_A: expected a model folder or a hub name, got './none'"),
        (("{}", "B"), "MODEL_A: expected a model folder or a hub name, got"),
        (("A", "{}/one"), "MODEL_B: expected a model folder or a hub name, got"),
        (("A", "B", "--context", "257"), r"--context: expected at most 256 \(max_position"),
        (("A", "B", "--context", "8", "--overlap", "8"), "--overlap: expected fewer tokens than"),
        (("A", "B", "--html", "{}"), "--html: expected a file in a folder that can be written to"),
        (("A", "B", "--html", "{}/" + "x" * 300), "--html: expected a file in a folder"),
        (("A", "B", "--json", "{}/no/x.json"), "--json: expected a file in a folder"),
        (("A", "B", "--text", "{}/x.jsonl"), "--text: .*template of MODEL_A"),
    ],
)
def test_arguments_that_cannot_be_used(files, tmp_path, capsys, loads, arguments, expected):
    (tmp_path / "none").mkdir()
    for name, content in (("empty", b""), ("one", b"a"), ("latin", b"caf\xe9"), ("x.jsonl", CHAT)):
        (tmp_path / name).write_bytes(content)
    given = [{"A": files.a, "B": files.b}.get(each, each.format(tmp_path)) for each in arguments]
    text = () if "--text" in arguments else ("--text", files.text[0])
    refused(capsys, expected, *given, *text)
    assert not loads
