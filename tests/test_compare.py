"""`fastkl compare` with tiny random checkpoints: its values against plain float64, its two modes, its memory."""

import contextlib
import math
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import SIZES, VOCABULARY, WORDS, cli_run, compare, make_files, make_tokenizer, save, silent  # noqa: E402, F401

from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare import inputs, loading, measure, report, run, store, text  # noqa: E402
from fastkl.tools.compare.settings import Settings  # noqa: E402
from memory import allocations  # noqa: E402

COLUMNS = [name for name in store.VALUES.names if name != "scored"]


def double(name):
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()


@torch.no_grad()
def log_probs(name, ids, context, overlap, vocabulary):
    """[n - 1, V] in float64: each token from the inputs of its window, by arithmetic of its own."""
    model, rows = double(name), []
    for target in range(1, len(ids)):
        number = max(0, math.ceil((target - context) / (context - overlap)))
        window = torch.tensor([ids[number * (context - overlap):target]])
        rows.append(model(input_ids=window, use_cache=False).logits[0, -1, :vocabulary].log_softmax(-1))
    return torch.stack(rows)


def truth(a, b, ids, context, overlap, vocabulary=VOCABULARY):
    """The columns of VALUES in plain float64."""
    p, q = (log_probs(name, ids, context, overlap, vocabulary) for name in (a, b))
    tokens = torch.tensor(ids[1:])[:, None]
    mixture = torch.log((p.exp() + q.exp()) / 2)
    kl = [(first.exp() * (first - second)).sum(-1) for first, second in ((p, q), (q, p), (p, mixture), (q, mixture))]
    return {"kl_ab": kl[0], "kl_ba": kl[1], "jsd": (kl[2] + kl[3]) / 2, "entropy_a": -(p.exp() * p).sum(-1), "entropy_b": -(q.exp() * q).sum(-1),
            "logprob_a": p.gather(-1, tokens)[:, 0], "logprob_b": q.gather(-1, tokens)[:, 0], "top_a": p.argmax(-1), "top_b": q.argmax(-1),
            "top_logprob_a": p.amax(-1), "top_logprob_b": q.amax(-1)}


# A logit of up to 20, in float32. Where it is off by this much, so is its log-probability, and by as much again through the sum; an entropy and a KL
# by this times the log-probabilities and log-ratios that weigh it, of 2 and 4 nats in the mean; the JSD's log-ratios stay below ln 2.
LOGIT = 20 * float(np.finfo(np.float32).eps)
TOLERANCE = {"kl_ab": 4 * LOGIT, "kl_ba": 4 * LOGIT, "jsd": LOGIT, "top_a": 0, "top_b": 0}


def assert_true(values, expected):
    for name in COLUMNS:
        np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=TOLERANCE.get(name, 2 * LOGIT), err_msg=name)


# ---- values


@pytest.mark.parametrize("context, overlap", [(256, 0), (16, 4), (9, 8), (40, 0)])
def test_values_are_those_of_plain_float64(files, tmp_path, context, overlap):
    values, result, ids = compare(files, files.a, files.b, tmp_path, context=context, overlap=overlap)
    expected = [truth(files.a, files.b, document, context, overlap) for document in ids]
    scored = values[values["scored"] > 0]
    assert len(scored) == len(values) - 2 == result["summary"]["tokens"]
    whole = {name: torch.cat([document[name] for document in expected]).numpy() for name in COLUMNS}
    assert_true(scored, whole)
    assert whole["kl_ab"].mean() > 0.05 and 0.05 < (whole["top_a"] == whole["top_b"]).mean() < 0.95
    summary = result["summary"]
    assert summary["same_top1"] == (whole["top_a"] == whole["top_b"]).mean()
    for name in ("kl_ab", "kl_ba", "jsd"):
        got = [summary[name][key] for key in ("mean", "p50", "p95", "p99", "max")]
        true = [whole[name].mean(), *np.quantile(whole[name], [0.5, 0.95, 0.99]), whole[name].max()]
        np.testing.assert_allclose(got, true, rtol=0, atol=TOLERANCE[name])
    for name in ("entropy_a", "entropy_b", "logprob_a", "logprob_b"):
        assert summary[name] == pytest.approx(whole[name].mean(), abs=2 * LOGIT)
    worst, label = result["top"][0], text.TextTokenizer(files.tokenizer).label
    assert worst["kl_ab"] == pytest.approx(whole["kl_ab"].max(), abs=TOLERANCE["kl_ab"])
    assert worst["expected_a"]["token"] == label(int(whole["top_a"][whole["kl_ab"].argmax()]))


def test_a_padded_vocabulary_is_cut_to_the_shared_one(files, tmp_path):
    for number, (a, b) in enumerate([(files.a, files.padded), (files.padded, files.a)]):
        values, result, ids = compare(files, a, b, tmp_path / str(number), text=files.text[1:])
        assert_true(values[1:], truth(a, b, ids[0], 256, 0))
        assert result["text"]["vocabulary"] == VOCABULARY
    wide = truth(files.padded, files.padded, ids[0], 256, 0, VOCABULARY + 13)  # where the padding matters, it would be seen
    assert (wide["logprob_a"] - truth(files.padded, files.padded, ids[0], 256, 0)["logprob_a"]).abs().max() > 1e-3


def test_a_vocabulary_padded_in_both_is_cut_to_the_tokenizers(files, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(files.a)
    model.resize_token_embeddings(VOCABULARY + 7)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = -2.0
    model.save_pretrained(tmp_path / "a")
    files.tokenizer.save_pretrained(tmp_path / "a")
    values, result, ids = compare(files, str(tmp_path / "a"), files.padded, tmp_path / "out", text=files.text[1:])
    assert_true(values[1:], truth(files.a, files.padded, ids[0], 256, 0))
    assert result["text"]["vocabulary"] == VOCABULARY and [about["vocabulary"] for about in result["models"]] == [VOCABULARY + 7, VOCABULARY + 13]
    assert f"vocabulary {VOCABULARY} (that of the tokenizer; lm_heads of {VOCABULARY + 7} and {VOCABULARY + 13} rows" in report.text_line(result)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_after_the_other_gives_the_same_bits(files, tmp_path, dtype):
    got = [compare(files, files.a, files.padded, tmp_path / str(way), context=32, overlap=8, dtype=dtype, sequential=way) for way in (False, True)]
    assert got[0][0].tobytes() == got[1][0].tobytes() and got[0][1] == got[1][1]


def test_units_and_totals_do_not_depend_on_by(files, tmp_path):
    for by in ("document", "line"):
        _, result, _ = compare(files, files.a, files.b, tmp_path / by, by=by, top=1000)
        assert sum(unit["tokens"] for unit in result["units"]) == result["summary"]["tokens"]
        total = sum(unit["tokens"] * unit["kl_ab"] for unit in result["units"])
        assert total == pytest.approx(result["summary"]["tokens"] * result["summary"]["kl_ab"]["mean"], rel=1e-9)
        assert {unit["document"] for unit in result["units"]} == {"one.txt", "two & <b>.txt"}
    places = {(entry["document"], entry["line"]) for entry in result["top"]}
    assert places == {(unit["document"], unit["line"]) for unit in result["units"]}


def test_the_same_model_differs_by_exactly_nothing(files, tmp_path):
    values, result, _ = compare(files, files.a, files.a, tmp_path)
    assert not any(values[name].any() for name in ("kl_ab", "kl_ba", "jsd")) and result["sentence"].startswith("A and B are the same")


def test_a_token_in_front_gives_the_first_its_context(files, tmp_path):
    begin = make_tokenizer(begin=True)
    for name in ("a", "b"):
        shutil.copytree(files.folder / name, tmp_path / name)
        begin.save_pretrained(tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    values, result, ids = compare(files, a, b, tmp_path / "out", text=files.text[:1])
    assert ids[0][0] == 0 and result["text"]["not_scored"] == 0 and result["summary"]["tokens"] == len(ids[0]) - 1
    assert_true(values[1:], truth(a, b, ids[0], 256, 0))


# ---- heads

KINDS = {
    "Gemma2": ("ForCausalLM", {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "Granite": ("ForCausalLM", {**SIZES, "logits_scaling": 0.5}, (2.0, None)),
    "Cohere": ("ForCausalLM", {**SIZES, "logit_scale": 0.5}, (0.5, None)),
    "Phi": ("ForCausalLM", SIZES, (1.0, None)),  # a bias
    "GPT2": ("LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}, (1.0, None)),  # tied
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_reproduced(files, tmp_path, kind):
    head, options, constants = KINDS[kind]
    a, b = (save(tmp_path / str(seed), files.tokenizer, kind, seed, head, **options) for seed in (0, 1))
    values, result, ids = compare(files, a, b, tmp_path / "out", text=files.text[1:])
    assert_true(values[1:], truth(a, b, ids[0], 256, 0))
    assert (result["models"][0]["logit_scale"], result["models"][0]["logit_softcap"]) == constants
    mixed = compare(files, files.a, b, tmp_path / "mixed", text=files.text[1:])[0]  # two heads that differ in scale and cap
    assert_true(mixed[1:], truth(files.a, b, ids[0], 256, 0))


# ---- memory


@pytest.fixture
def sized(files, tmp_path, monkeypatch):
    """A function of a number of repetitions: everything from text to page, without loading; the number of tokens."""
    for module, name, value in ((store, "BLOCK", 128), (inputs, "PIECE", 1024)):
        monkeypatch.setattr(module, name, value)
    models = [loading.load_model("MODEL", name, "auto", "cpu") for name in (files.a, files.b)]
    monkeypatch.setattr(loading, "load_model", lambda argument, name, *rest: models[name == files.b])
    monkeypatch.setattr(measure, "progress", lambda *arguments, **options: contextlib.nullcontext(SimpleNamespace(update=lambda count: None)))

    def work(repeats):
        path = tmp_path / f"{repeats}.txt"
        path.write_text(WORDS * repeats, encoding="utf-8")
        made, settings = store.Store(), Settings(files.a, files.b, (path,), by="line", top=3, context=128, sequential=True)
        with contextlib.closing(made):
            tokenizer, result = run.compare(settings, made)
            for _ in page.page(result, made, tokenizer.label):
                pass
        return result["summary"]["tokens"]

    return work


def test_memory_of_python_and_numpy_does_not_grow_with_the_text(sized):
    sized(30)  # fills caches
    got = []
    for repeats in (30, 120):
        tracemalloc.start()
        tokens = sized(repeats)
        got.append((tokens, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    (few, peak), (many, more) = got
    held = (many - few) * (store.VALUES.itemsize + store.TOKEN.itemsize)
    # What transformers leaves to the garbage collector comes and goes: some 50 kB.
    assert held > 250_000 and more - peak < held / 3, (got, held)


def test_memory_of_torch_does_not_grow_with_the_text(sized):
    sized(1)
    peaks = [allocations(lambda repeats=repeats: sized(repeats))["peak"] for repeats in (5, 20)]
    assert peaks[0] == peaks[1]
