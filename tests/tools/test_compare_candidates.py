"""Several candidates, the floor, reference files, tables of tokens, and models in memory."""

import json
import math
import re

import pytest
import torch

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
transformers = pytest.importorskip("transformers")
from compare_cases import (  # noqa: E402
    VOCABULARY,
    cli_run,
    compare,
    make_files,  # noqa: F401
    make_loads,  # noqa: F401
    make_tokenizer,
    refused,
)

from fastkl.tools.compare import compare_models, figures  # noqa: E402
from fastkl.tools.errors import UseError  # noqa: E402


@pytest.fixture(name="near", scope="session")
def make_near(files):
    # A checkpoint between a and b, and texts of twelve documents.
    model = transformers.AutoModelForCausalLM.from_pretrained(files.a)
    other = transformers.AutoModelForCausalLM.from_pretrained(files.b)
    with torch.no_grad():
        for own, far in zip(model.parameters(), other.parameters(), strict=True):
            own.lerp_(far, 0.1)
    model.save_pretrained(files.folder / "near")
    make_tokenizer().save_pretrained(files.folder / "near")
    words = files.text[0].read_text(encoding="utf-8").split()
    path = files.folder / "many.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(words[at : at + 3 + at % 5])}) + "\n" for at in range(12)
        )
    )
    return str(files.folder / "near"), path


def run(capsys, *arguments):
    code, shown, said = cli_run(capsys, *arguments, "--device", "cpu")
    assert code == 0, said
    return shown


def test_candidates_are_ranked_with_the_figures_of_each_alone(files, near, tmp_path, capsys):
    near, text = near
    whole, plot, tokens = (tmp_path / name for name in ("x.json", "x.svg", "x.jsonl"))
    arguments = (files.a, files.b, near, "--text", text, "--floor")
    shown = run(capsys, *arguments, "--json", whole, "--plot", plot, "--tokens", tokens)
    found = json.loads(whole.read_text(encoding="utf-8"))
    assert [each["letter"] for each in found["candidates"]] == ["C", "B"]
    table = pd.read_json(tokens, lines=True)
    for entry, name in zip(found["candidates"], (near, files.b), strict=True):
        own, result, _ = compare(files, files.a, name, text=(text,))
        assert entry["summary"] == result["summary"] and entry["buckets"] == result["buckets"]
        assert f"{entry['summary']['kl_ab']['mean']:.4g}" in shown
        rows = table[table["candidate"] == name]
        np.testing.assert_allclose(rows["kl_ab"], own["kl_ab"], rtol=1e-12, atol=1e-15)
        assert rows["document"].tolist() == own["document"].tolist()
    wide = compare(files, files.a, files.a, text=(text,), dtype="float32")
    assert 0 < found["floor"]["kl_ab"]["mean"] < 1e-2 and wide[0]["kl_ab"].max() == 0
    assert found["candidates"][0]["models"][1]["bytes"] == sum(
        file.stat().st_size for file in (files.folder / "near").glob("*.safetensors")
    )
    (change,) = found["differences"]
    means = [each["summary"]["kl_ab"]["mean"] for each in found["candidates"]]
    assert change["mean"] == pytest.approx(means[1] - means[0], rel=1e-6)
    assert 0 < change["interval"][0] < change["mean"] < change["interval"][1]
    assert change["p"] == pytest.approx(2**-11, abs=2e-3)
    assert entry["summary"]["bootstrap"] == {"unit": "document", "units": 12}
    assert "<svg" in plot.read_text() and "near" in plot.read_text()


def test_tokens_that_a_third_model_added_are_named(files, tmp_path, capsys):
    third = tmp_path / "third"
    model = transformers.AutoModelForCausalLM.from_pretrained(files.b)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    model.save_pretrained(third, safe_serialization=True)
    make_tokenizer("<call>").save_pretrained(third)
    shown = run(capsys, files.a, files.b, third, "--text", files.text[1])
    assert "tokens left out of C 1 ('<call>')" in " ".join(shown.split())
    assert "differences of mean KL" in shown and "p = " not in shown  # one window


TEXT = ("--text", "-")


def test_a_file_in_as_place_and_an_output_are_two(files, near, tmp_path, capsys):
    path = tmp_path / "base.safetensors"
    run(capsys, files.a, "--text", near[1], "--save-reference", path)
    before = path.read_bytes()
    refused(capsys, "--json: expected a file that has no other use", path, files.b, "--json", path)
    # Checkpoints may share files, and have a text to compare on.
    shared = tmp_path / "shared"
    shared.mkdir()
    for file in (files.folder / "b").iterdir():
        (shared / file.name).symlink_to(file)
    config = shared / "config.json"
    run(capsys, files.b, shared, "--text", config)
    refused(capsys, "--json: expected a file that has", files.b, shared, "--json", config, *TEXT)
    short = tmp_path / "short"
    model = transformers.AutoModelForCausalLM.from_pretrained(files.b)
    model.config.max_position_embeddings = 64
    model.save_pretrained(short)
    make_tokenizer().save_pretrained(short)
    refused(capsys, "--window: expected at most 64 .max_position", path, short)
    assert path.read_bytes() == before


def test_llama_cpps_table_of_each_candidate(files, near, capsys):
    arguments = (files.a, files.b, near[0], "--text", files.text[0], "--window", "16")
    shown = run(capsys, *arguments, "--format", "llama.cpp")
    assert len(re.findall("^Mean    KLD:", shown, flags=re.M)) == 2
    assert f"B     {files.b}" in shown and f"C     {near[0]}" in shown


# ---- figures


@pytest.mark.parametrize("units", [10, 3000])
def test_intervals_hold_the_mean_as_often_as_they_say(units, monkeypatch):
    # Documents of normal means and unequal lengths, drawn anew 200 times.
    monkeypatch.setattr(figures, "DRAWS", 300)
    monkeypatch.setattr(figures, "MOST_UNITS", 60)
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        document = np.repeat(np.arange(units), generator.integers(10, 21, units))
        made = pd.DataFrame({"document": document, "x": generator.normal(size=units)[document]})
        low, high = figures.intervals(made, ["x"])["x"]
        held += low <= 0 <= high
    assert 0.9 <= held / 200 <= 0.99


def test_no_interval_of_few_units_or_of_an_infinite_mean():
    made = pd.DataFrame(
        {"document": np.arange(10), "window": 0, "kl_ab": 1.0, "x": np.arange(10.0)}
    )
    assert [*figures.intervals(made.assign(kl_ab=math.inf), ["kl_ab", "x"])] == ["x"]
    assert figures.intervals(made[:9], ["x"]) == {}
    long = pd.DataFrame({"document": np.repeat(np.arange(3000), np.arange(3000) % 7 + 1), "x": 2.0})
    np.testing.assert_allclose(figures.intervals(long, ["x"])["x"], 2.0, rtol=1e-12)
    found = figures.difference(made.assign(kl_ab=math.inf), made.assign(kl_ab=math.inf))
    assert math.isnan(found.pop("mean")) and found == {"interval": None, "p": None}


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.1])
def test_a_difference_is_told_from_chance(shift):
    # The p of two sides, beside the normal one of 200 documents.
    generator = np.random.default_rng(1)
    document = np.repeat(np.arange(200), 3)
    noise = generator.normal(size=200)[document]
    made = pd.DataFrame({"document": document, "window": 0, "kl_ab": 5.0})
    found = figures.difference(made.assign(kl_ab=5 + shift + noise), made)
    change = 3 * (shift + noise[::3])
    normal = math.erfc(abs(change.sum()) / math.sqrt(2 * (change**2).sum()))
    assert found["p"] == pytest.approx(normal, abs=0.05)  # 2000 signs
    assert found["mean"] == pytest.approx(shift + noise.mean())


def test_buckets_and_bins_count_every_token_once(files):
    tokens, result, _ = compare(files, files.a, files.b)
    scored = figures.scored_of(tokens)
    for name in ("buckets", "histogram", "positions"):
        assert sum(each["tokens"] for each in result[name]) == len(scored)
    for name in ("buckets", "positions"):
        total = sum(each["tokens"] * each["kl_ab"] for each in result[name])
        assert total / len(scored) == pytest.approx(scored["kl_ab"].mean())
    sure = np.exp(scored["top_logprob_a"]) >= 0.5
    above = [each for each in result["buckets"] if each["from"] >= 0.5]
    assert sum(each["tokens"] for each in above) == sure.sum()
    edge = pd.DataFrame({"kl_ab": [1.0, 2.0], "top_logprob_a": [0.0, math.log(0.25)]})
    found = figures.buckets(edge.assign(tv=0.5, same_top1=1.0))
    assert [(each["from"], each["kl_ab"]) for each in found] == [(0.25, 2.0), (0.99, 1.0)]
    half = figures.histogram(scored.assign(kl_ab=[0.0, 1.0] + [0.5] * (len(scored) - 2)))
    assert half[0] == {"from": 0.0, "tokens": 1} and half[-1] == {"from": 1.0, "tokens": 1}
    assert result["summary"]["acceptance"] == pytest.approx(1 - scored["tv"].mean())


# ---- reference files


def test_a_reference_file_stands_for_its_model(files, near, tmp_path, capsys, loads):
    # Text, windows, tokenizer and head are in it: the values are those beside the model itself.
    path, wrong = tmp_path / "base.safetensors", tmp_path / "x.safetensors"
    options = ("--text", near[1], "--window", "16", "--score", "all")
    shown = run(capsys, files.a, *options, "--save-reference", path)
    assert shown.strip() == f"wrote {path}" and loads == [files.a]
    tables = []
    for base, rest in ((files.a, options), (path, ())):
        tables.append(tmp_path / f"{len(tables)}.parquet")
        run(capsys, base, files.b, *rest, "--tokens", tables[-1])
    direct, stored = map(pd.read_parquet, tables)
    pd.testing.assert_frame_equal(direct, stored)
    assert direct["kl_ab"].notna().sum() > 20
    refused(capsys, "--text: expected nothing, for MODEL_A", path, files.b, *options[:2])
    refused(
        capsys, "--save-reference: expected a model as MODEL_A", path, "--save-reference", wrong
    )
    moved = tmp_path / "moved"
    make_tokenizer(" sat").save_pretrained(moved)
    transformers.AutoModelForCausalLM.from_pretrained(files.b).save_pretrained(moved)
    refused(capsys, "--text: expected text in tokens that all models have", path, moved)
    wrong.write_bytes(b"no such file")
    refused(capsys, "MODEL_A: expected a file that --save-reference wrote", wrong, files.b)


# ---- models in memory


def test_models_in_memory_have_the_figures_of_their_checkpoints(files, near):
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(name) for name in (files.a, files.b)
    ]
    models[0].train()
    texts = [json.loads(line)["text"] for line in near[1].read_text().splitlines()]
    made = compare_models(*models, texts, make_tokenizer(), window=16)
    own, result, _ = compare(files, files.a, files.b, text=(near[1],), window=16)
    np.testing.assert_array_equal(made.tokens["kl_ab"], own["kl_ab"])
    assert made.report["summary"] == result["summary"]
    assert models[0].training and not models[1].training
    assert f"{result['summary']['kl_ab']['mean']:.4g}" in str(made)
    assert "Mean    KLD:" in made.llama_table()
    assert made.report["models"][0]["vocabulary"] == VOCABULARY
    for wrong, expected in (
        ({"texts": "a text"}, "^texts: expected a list of str, got 'a text'"),
        ({"texts": []}, r"^texts: expected a list of str, got \[\]"),
        ({"score": "x"}, "^score: expected one of "),
        ({"window": 257}, "^window: expected at most 256 "),
        ({"model_b": 7}, "^model_b: expected a causal LM of transformers, got int"),
    ):
        given = dict(zip(("model_a", "model_b"), models, strict=True)) | {"texts": texts}
        with pytest.raises(UseError, match=expected):
            compare_models(**(given | wrong), tokenizer=make_tokenizer())


def test_an_adapter_in_memory_is_compared_and_left_as_it_was(files, monkeypatch):
    # On a rank of a training job, too: it is that rank's own call.
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(files.a) for _ in "ab")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(tuned, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    ids = torch.arange(20)[None]
    before = tuned(input_ids=ids).logits
    made = compare_models(base, tuned, ["the cat sat on a mat"] * 2, make_tokenizer())
    assert torch.equal(tuned(input_ids=ids).logits, before) and made.report["models"][1]["adapter"]
    ids = torch.tensor(made.tokens["id"][made.tokens["document"] == "#1"].to_numpy())[None]
    with torch.no_grad():
        p, q = (each(input_ids=ids).logits[0, :-1].log_softmax(-1) for each in (base, tuned))
    exact = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(
        made.tokens["kl_ab"][1 : len(exact) + 1], exact, rtol=1e-3, atol=1e-5
    )
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(
        UseError, match="^model_b: expected an adapter of the weights, got a PROMPT"
    ):
        compare_models(base, peft.get_peft_model(base, prompt), ["the cat"], make_tokenizer())


SAVED = ("--save-reference", "{}/x.safetensors")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("A",), "MODEL_B: expected a model, got none"),
        (("A", *["B"] * 26), "MODEL_B: expected at most 25 candidates, got 26"),
        (("A", "B", "B", "--html", "{}/x"), "--html: expected one candidate, got 2"),
        (("A", *SAVED, "--tokens", "{}/x.jsonl"), "--tokens: expected a candidate, got 0"),
        (("A", *SAVED, "--floor"), "--floor: expected a candidate, got 0"),
        (("A", *SAVED, "--tokenizer=B"), "--tokenizer: expected a model's letter, got B"),
        (("A", "B", "--score", "second-half"), "--text: expected a document of at least 256 "),
        (
            ("A", "B", "--score", "second-half", "--window", "16", "--stride", "6"),
            "--stride: expected at least the 7 tokens that a window of 16 scores, got 6",
        ),
    ],
)
def test_arguments_that_cannot_be_used(files, tmp_path, capsys, loads, arguments, expected):
    given = [{"A": files.a, "B": files.b}.get(each, each.format(tmp_path)) for each in arguments]
    refused(capsys, expected, *given, "--text", files.text[1])
    assert not loads
