"""`fastkl compare` of models whose vocabularies differ by tokens that one of them added."""

import json
import shutil

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import VOCABULARY, cli_run, compare, make_files, silent  # noqa: E402, F401

from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare import loading, report  # noqa: E402


def grown(files, folder, *tokens, rows=VOCABULARY + 4, source="b"):
    """The checkpoint b with these tokens behind its vocabulary, and likely."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files.folder / source)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[VOCABULARY:] = 1.5
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder / source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def divergence(a, b, ids, columns):
    """KL(A‖B) in float64 of the probabilities of these tokens alone."""
    p, q = (
        transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)(
            torch.tensor([ids[:-1]])
        )
        .logits[0][:, columns]
        .log_softmax(-1)
        for name in (a, b)
    )
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("rows", [VOCABULARY + 4, None])
def test_added_tokens_are_left_out_and_named(files, tmp_path, capsys, rows):
    """With and without rows of their own, in B, in A and in both."""
    tuned = grown(files, tmp_path / "tuned", "<pad>", "<call>", rows=rows)
    other = grown(files, tmp_path / "other", "<other>", "<pad>", source="a", rows=rows)
    for a, b, left in (
        (files.a, tuned, {"A": [], "B": ["<pad>", "<call>"]}),
        (tuned, files.a, {"A": ["<pad>", "<call>"], "B": []}),
        (other, tuned, {"A": ["<other>", "<pad>"], "B": ["<pad>", "<call>"]}),
    ):
        values, result, ids = compare(files, a, b, tmp_path / "out", text=files.text[1:])
        np.testing.assert_allclose(
            values["kl_ab"][1:], divergence(a, b, ids[0], range(VOCABULARY)), atol=1e-5
        )
        assert result["text"]["vocabulary"] == VOCABULARY
        assert {
            letter: [entry["token"] for entry in entries]
            for letter, entries in result["text"]["left_out"].items()
        } == left
    code, shown, _ = cli_run(
        capsys,
        files.a,
        tuned,
        "--text",
        files.text[1],
        "--json",
        tmp_path / "x.json",
        "--html",
        tmp_path / "x.html",
    )
    said = "tokens left out: B alone has 2 ('<pad>', '<call>')"
    assert (
        code == 0
        and said in " ".join(shown.split())
        and page.clean(said) in (tmp_path / "x.html").read_text(encoding="utf-8")
    )
    assert json.loads((tmp_path / "x.json").read_text())["text"]["left_out"]["B"] == [
        {"id": 300, "token": "<pad>"},
        {"id": 301, "token": "<call>"},
    ]


def test_a_reserved_token_that_was_renamed_is_left_out_in_the_middle(files, tmp_path):
    """Its id is within the vocabulary of both, and has probability 0 in both."""
    renamed = shutil.copytree(files.b, tmp_path / "renamed")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"][0]["content"] = "<start>"
    tokenizer["model"]["vocab"]["<start>"] = tokenizer["model"]["vocab"].pop("<s>")
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((renamed / "tokenizer_config.json").read_text(encoding="utf-8"))
    (renamed / "tokenizer_config.json").write_text(
        json.dumps({**config, "bos_token": "<start>"}), encoding="utf-8"
    )
    values, result, ids = compare(
        files, files.a, str(renamed), tmp_path / "out", text=files.text[1:]
    )
    assert result["text"]["left_out"] == {
        "A": [{"id": 0, "token": "<s>"}],
        "B": [{"id": 0, "token": "<start>"}],
    }
    np.testing.assert_allclose(
        values["kl_ab"][1:], divergence(files.a, files.b, ids[0], range(1, VOCABULARY)), atol=1e-5
    )
    assert all(np.isfinite(values[name]).all() for name in values.dtype.names)


def test_many_are_counted():
    text = {
        "left_out": {"A": [], "B": [{"id": at, "token": f"<{at}>"} for at in range(1500)]},
        "tokenizer": None,
    }
    assert (
        report._alone(text)
        == "; tokens left out: B alone has 1,500 ('<0>', '<1>', '<2>', '<3>', '<4>', '<5>', '<6>', '<7>', …)"
    )


def test_a_text_that_needs_what_one_model_alone_has_is_refused(
    files, tmp_path, monkeypatch, capsys
):
    """Before a model loads; with the tokenizer that spells it otherwise it is compared."""
    tuned, path = grown(files, tmp_path / "tuned", "<call>"), tmp_path / "x.txt"
    path.write_text("the cat <call> sat")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *arguments: 1 / 0)
        for a, b, options, letter, other in (
            (files.a, tuned, (), "B", "A"),
            (tuned, files.a, (), "A", "B"),
            (files.a, tuned, ("--tokenizer", "B"), "B", "A"),
        ):
            code, shown, said = cli_run(capsys, a, b, "--text", path, *options)
            assert (code, shown) == (2, "") and said == (
                f"fastkl compare: error: --text: expected text in tokens that both models have, got '<call>' in 'x.txt', the token {VOCABULARY} of "
                f"{letter} alone; remedy: leave it out of the text, or read it with --tokenizer {other}\n"
            )
    code, shown, _ = cli_run(capsys, files.a, tuned, "--text", path, "--tokenizer", "A")
    assert code == 0 and "read with A's tokenizer" in " ".join(shown.split())


def test_the_chosen_tokenizer_reads_for_both(files, tmp_path):
    """The other model needs none; it may have fewer rows, where the text does not need the rest."""
    bare = shutil.copytree(files.b, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    expected = compare(files, files.a, files.b, tmp_path / "out")
    values, result, _ = compare(files, files.a, str(bare), tmp_path / "out", tokenizer="A")
    assert values.tobytes() == expected[0].tobytes() and result["text"]["tokenizer"] == "A"
    tuned = grown(files, tmp_path / "tuned", "<call>")
    values, result, ids = compare(
        files, files.a, tuned, tmp_path / "out", tokenizer="B", text=files.text[1:]
    )
    assert (
        result["text"]["left_out"] == {"A": [], "B": [{"id": VOCABULARY, "token": "<call>"}]}
        and result["text"]["vocabulary"] == VOCABULARY
    )
    np.testing.assert_allclose(
        values["kl_ab"][1:], divergence(files.a, tuned, ids[0], range(VOCABULARY)), atol=1e-5
    )


def test_rows_that_lack_are_said_before_a_model_loads(files, tmp_path, monkeypatch, capsys):
    small = shutil.copytree(files.b, tmp_path / "small")
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(250)
    model.save_pretrained(small)
    monkeypatch.setattr(loading, "load_model", lambda *arguments: 1 / 0)
    for arguments, letter in (
        ((files.a, small), "B"),
        ((small, files.a), "A"),
        ((files.a, small, "--tokenizer", "B"), "B"),
    ):
        code, shown, said = cli_run(capsys, *arguments, "--text", files.text[1])
        assert (code, shown) == (2, "")
        assert (
            f"error: MODEL_{letter}: expected an lm_head of at least {VOCABULARY} rows, for the tokenizer's ids, got 250 in '{small}'; "
            in said
        )
