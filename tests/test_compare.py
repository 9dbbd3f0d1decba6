"""`fastkl compare` with tiny random checkpoints: its values against plain float64, its two modes, its errors, its memory."""

import contextlib
import itertools
import json
import math
import shutil
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare import loading, run, store, text  # noqa: E402
from fastkl.tools.compare.settings import Settings  # noqa: E402
from fastkl.tools.demo.memory import allocations  # noqa: E402

WORDS = "the cat sat on a mat while naïve café 日本 readers of <b>bold</b> & 'quoted' text looked on.\n"
VOCABULARY = 300
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256}
COLUMNS = [name for name in store.VALUES.names if name != "scored"]


def make_tokenizer(**options):
    """Byte-level BPE; options: of PreTrainedTokenizerFast."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS * 3], trainer)
    if options.pop("begin", False):
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **options)


def save(folder, tokenizer, kind="Llama", seed=0, head="LMHeadModel", **options):
    """A random checkpoint whose logits are a few nats wide."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}{head}")(config)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.35)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def silent():
    loading.quiet()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints a, b (b near a, padded), texts one, two."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= VOCABULARY
    a = save(folder / "a", tokenizer, head="ForCausalLM", **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(a)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    model.save_pretrained(folder / "b")
    tokenizer.save_pretrained(folder / "b")
    model.resize_token_embeddings(VOCABULARY + 13)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 3.0
    model.save_pretrained(folder / "padded")
    tokenizer.save_pretrained(folder / "padded")
    one, two = folder / "one.txt", folder / "two & <b>.txt"
    one.write_text(WORDS * 3, encoding="utf-8")
    two.write_text("a mat of text\n\non the readers\r\n  sat" + WORDS[::-1], encoding="utf-8", newline="")
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, a=a, b=str(folder / "b"), padded=str(folder / "padded"), text=(one, two))


def compare(files, a, b, folder, **options):
    """(values of all tokens, the report, the tokens' ids per document)."""
    folder.mkdir(exist_ok=True)
    made = store.Store(folder)
    try:
        _, result = run.compare(Settings(a, b, **{"text": files.text, **options}), made)
        ids = [made.tokens(document.start, document.end)["id"].tolist() for document in made.documents]
        return made.values(0, made.count), result, ids
    finally:
        made.close()


def double(name):
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()


@torch.no_grad()
def log_probs(name, ids, context, stride, vocabulary):
    """[n - 1, V] in float64: each token from the inputs of its window, by arithmetic of its own."""
    model, rows = double(name), []
    for target in range(1, len(ids)):
        number = max(0, math.ceil((target - context) / (context - stride)))
        window = torch.tensor([ids[number * (context - stride):target]])
        rows.append(model(input_ids=window, use_cache=False).logits[0, -1, :vocabulary].log_softmax(-1))
    return torch.stack(rows)


def truth(a, b, ids, context, stride, vocabulary=VOCABULARY):
    """The columns of VALUES in plain float64."""
    p, q = (log_probs(name, ids, context, stride, vocabulary) for name in (a, b))
    tokens = torch.tensor(ids[1:])[:, None]
    mixture = torch.log((p.exp() + q.exp()) / 2)
    kl = [(first.exp() * (first - second)).sum(-1) for first, second in ((p, q), (q, p), (p, mixture), (q, mixture))]
    return {"kl_ab": kl[0], "kl_ba": kl[1], "jsd": (kl[2] + kl[3]) / 2, "entropy_a": -(p.exp() * p).sum(-1), "entropy_b": -(q.exp() * q).sum(-1),
            "logprob_a": p.gather(-1, tokens)[:, 0], "logprob_b": q.gather(-1, tokens)[:, 0], "top_a": p.argmax(-1), "top_b": q.argmax(-1),
            "top_logprob_a": p.amax(-1), "top_logprob_b": q.amax(-1)}


def assert_true(values, expected):
    for name in COLUMNS:
        np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


# ---- values


@pytest.mark.parametrize("context, stride", [(256, 0), (16, 4), (9, 8), (40, 0)])
def test_values_are_those_of_plain_float64(files, tmp_path, context, stride):
    values, result, ids = compare(files, files.a, files.b, tmp_path, context=context, stride=stride)
    expected = [truth(files.a, files.b, document, context, stride) for document in ids]
    scored = values[values["scored"] > 0]
    assert len(scored) == len(values) - 2 == result["summary"]["tokens"]
    whole = {name: torch.cat([document[name] for document in expected]).numpy() for name in COLUMNS}
    assert_true(scored, whole)
    assert whole["kl_ab"].mean() > 0.05 and 0.05 < (whole["top_a"] == whole["top_b"]).mean() < 0.95
    summary = result["summary"]
    assert summary["same_top1"] == (whole["top_a"] == whole["top_b"]).mean()
    for name in ("kl_ab", "kl_ba", "jsd"):
        got = [summary[name][key] for key in ("mean", "p50", "p95", "p99", "max")]
        true = [whole[name].mean(), *np.quantile(whole[name], [0.5, 0.95, 0.99], method="inverted_cdf"), whole[name].max()]
        np.testing.assert_allclose(got, true, rtol=0, atol=1e-5)
    for name in ("entropy_a", "entropy_b", "logprob_a", "logprob_b"):
        assert summary[name] == pytest.approx(whole[name].mean(), abs=1e-5)
    worst, label = result["top"][0], text.TextTokenizer(files.tokenizer).label
    assert worst["kl_ab"] == pytest.approx(whole["kl_ab"].max(), abs=1e-5)
    assert worst["expected_a"]["token"] == label(int(whole["top_a"][whole["kl_ab"].argmax()]))


def test_a_padded_vocabulary_is_cut_to_the_shared_one(files, tmp_path):
    for number, (a, b) in enumerate([(files.a, files.padded), (files.padded, files.a)]):
        values, result, ids = compare(files, a, b, tmp_path / str(number), text=files.text[1:])
        assert_true(values[1:], truth(a, b, ids[0], 256, 0))
        assert result["text"]["vocabulary"] == VOCABULARY
    wide = truth(files.padded, files.padded, ids[0], 256, 0, VOCABULARY + 13)  # where the padding matters, it would be seen
    assert (wide["logprob_a"] - truth(files.padded, files.padded, ids[0], 256, 0)["logprob_a"]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_after_the_other_gives_the_same_bits(files, tmp_path, dtype):
    got = [compare(files, files.a, files.padded, tmp_path / str(way), context=32, stride=8, dtype=dtype, sequential=way) for way in (False, True)]
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
    for module, name, value in ((store, "BLOCK", 128), (text, "PIECE", 1024)):
        monkeypatch.setattr(module, name, value)
    models = [loading.load_model("MODEL", name, "auto", "cpu") for name in (files.a, files.b)]
    monkeypatch.setattr(loading, "load_model", lambda argument, name, *rest: models[name == files.b])
    monkeypatch.setattr(run, "progress", lambda *arguments: contextlib.nullcontext(SimpleNamespace(update=lambda count: None)))

    def work(repeats):
        path = tmp_path / f"{repeats}.txt"
        path.write_text(WORDS * repeats, encoding="utf-8")
        made, settings = store.Store(tmp_path), Settings(files.a, files.b, (path,), by="line", top=3, context=128, sequential=True)
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


# ---- the command line


def cli_run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main(["compare", *map(str, arguments)])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


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
    assert numbers["text"]["stride"] == 16 and numbers["text"]["not_scored"] == 2
    assert "two &amp; &lt;b&gt;.txt" in (out / "x.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == ["x.html", "x.json"] and not list((tmp_path / "temporary").iterdir())


def test_color_is_for_terminals_or_on_demand(files, capsys):
    for option, colored in ((), False), (("--color",), True), (("--no-color",), False):
        code, shown, _ = cli_run(capsys, files.a, files.b, "--text", files.text[1], *option)
        assert code == 0 and ("\x1b[" in shown) == colored


def spoil(files, folder, how):
    """A checkpoint with something wrong."""
    target = shutil.copytree(files.folder / "b", folder / how)
    if how == "token":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<|new|>"])
        tokenizer.save_pretrained(target)
    elif how in ("normalizer", "moved"):
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
    elif how == "nan":
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        model.model.norm.weight.data[0] = math.nan
        model.save_pretrained(target)
    return target


@pytest.mark.parametrize("how, expected", {
    "token": "MODEL_B: expected the tokenizer of MODEL_A, got another; tokens: 1 only in B ('<|new|>': 300);",
    "moved": "MODEL_B: expected the tokenizer of MODEL_A, got another; tokens: 2 with another id (",
    "normalizer": "MODEL_B: expected the tokenizer of MODEL_A, got other tokens for the same text: number ",
    "begin": "MODEL_B: expected the tokenizer of MODEL_A, got other tokens for the same text: number 1 of ",
    "tokenless": "MODEL_B: expected a folder with a tokenizer, got ",
    "truncated": "MODEL_B: expected a causal LM that can be loaded, got ",
    "small": "MODEL_B: expected an lm_head of at least 300 rows, for the tokenizer's ids, got 250 in ",
    "base": "MODEL_B: expected a causal LM, got ",
    "headless": "MODEL_B: expected a causal LM with all its weights, got ",
    "nan": "MODEL_B: expected finite logits, got NaN from ",
}.items())
def test_checkpoints_that_cannot_be_compared(files, tmp_path, capsys, how, expected):
    code, shown, said = cli_run(capsys, files.a, spoil(files, tmp_path, how), "--text", *files.text)
    line = [line for line in said.splitlines() if "error:" in line]
    assert code == 2 and shown == "" and len(line) == 1 and said.endswith(line[0] + "\n")
    assert line[0].startswith(f"fastkl compare: error: {expected}") and "; remedy: " in line[0]


def test_arguments_that_cannot_be_used(files, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    text = ("--text", files.text[0])
    cases = {
        "--text: expected files with text, got the empty file": (files.a, files.b, "--text", tmp_path / "empty.txt"),
        "--text: expected files with text, got '/no/where', which": (files.a, files.b, "--text", files.text[0], "/no/where"),
        "--text: expected at least 2 tokens in every file, got 1": (files.a, files.b, "--text", tmp_path / "one.txt"),
        "--text: expected UTF-8 text, got byte 0xe9": (files.a, files.b, "--text", tmp_path / "latin.txt"),
        "MODEL_A: expected a model folder or a hub name, got './none', which": ("./none", files.b, *text),
        "MODEL_A: expected a model folder, got": (tmp_path, files.b, *text),
        "MODEL_B: expected a model folder or a hub name, got": (files.a, files.text[0], *text),
        "--context: expected at most 256 (max_position_embeddings), got 257": (files.a, files.b, *text, "--context", "257"),
        "--stride: expected fewer tokens than --context (8), got 8": (files.a, files.b, *text, "--context", "8", "--stride", "8"),
        "--html: expected a file in a folder that can be written to": (files.a, files.b, *text, "--html", tmp_path),
        "--json: expected a file in a folder that can be written to": (files.a, files.b, *text, "--json", tmp_path / "no" / "x.json"),
    }
    for expected, arguments in cases.items():
        code, shown, said = cli_run(capsys, *arguments)
        assert (code, shown) == (2, "") and said.startswith(f"fastkl compare: error: {expected}") and said.count("\n") == 1, said
    for wrong in itertools.product(("--top", "--context", "--by", "--dtype", "--device"), ("-1", "x")):
        assert cli_run(capsys, files.a, files.b, *text, *wrong)[0] == 2


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
