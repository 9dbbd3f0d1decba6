"""`fastkl compare` on tiny random checkpoints and PEFT adapters: values against plain float64."""

import functools
import json
import math
import shutil
import sys

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
from compare_cases import (  # noqa: E402
    COLUMNS,
    LOGIT,
    SIZES,
    TOLERANCE,
    VOCABULARY,
    assert_true,
    compare,
    jsd,
    make_files,  # noqa: F401
    make_tokenizer,
    refused,
    save,
    truth,
)
from safetensors.torch import save_file  # noqa: E402

import fastkl  # noqa: E402
from fastkl.tools.compare import figures, inputs, loading, measure, report  # noqa: E402


@pytest.mark.parametrize("window, stride", [(256, 256), (16, 12)])
def test_values_and_figures_are_those_of_plain_float64(files, window, stride):
    tokens, result, ids = compare(files, files.a, files.b, window=window, stride=stride)
    parts = [truth(files.a, files.b, document, window, stride) for document in ids]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    assert_true(tokens, whole)
    summary, same = result["summary"], whole["top_a"] == whole["top_b"]
    assert summary["tokens"] == len(tokens) - 2 == len(same)
    assert summary["same_top1"] == same.mean() and 0.05 < same.mean() < 0.95
    for name in figures.DIVERGENCES:
        got = [summary[name][key] for key in ("mean", "p50", "p95", "p99", "max")]
        true = [whole[name].mean(), *np.quantile(whole[name], [0.5, 0.95, 0.99, 1.0])]
        np.testing.assert_allclose(got, true, rtol=0, atol=TOLERANCE[name])
    for name in figures.MEANS[3:]:
        assert summary[name] == pytest.approx(whole[name].mean(), abs=2 * LOGIT)
    kl, worst = whole["kl_ab"], result["top"][0]
    assert worst["kl_ab"] == pytest.approx(kl.max(), abs=TOLERANCE["kl_ab"])
    chance = worst["expected_a"]["probability"]
    assert chance == pytest.approx(math.exp(whole["top_logprob_a"][kl.argmax()]), abs=1e-4)


TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
LLAMA4 = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}
LLAMA4 |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 64}
PROJECTED = dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 32)
SEEN = "ForConditionalGeneration"
# Class -> (options, (scale, cap) of its head).
MODELS = {
    "Gemma2ForCausalLM": ({**TEXT, "final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "GraniteForCausalLM": ({**SIZES, "logits_scaling": 0.5}, (2.0, None)),
    "CohereForCausalLM": ({**SIZES, "logit_scale": 0.5}, (0.5, None)),
    "PhiForCausalLM": (SIZES, (1.0, None)),  # a bias
    "GPT2LMHeadModel": (  # tied
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
        (1.0, None),
    ),
    f"Llava{SEEN}": (
        {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 290}
        | {"vision_config": {**VISION, "model_type": "clip_vision_model"}},
        (1.0, None),
    ),
    f"PaliGemma{SEEN}": (
        {"text_config": {**TEXT, "model_type": "gemma"}, "image_token_index": 290}
        | {"vision_config": {**SIGLIP, "projection_dim": 32}}
        | {"projection_dim": 32, "hidden_size": 32},
        (1.0, None),
    ),
    f"Llama4{SEEN}": (
        {"text_config": LLAMA4, "image_token_index": 290}
        | {"vision_config": {**VISION, **PROJECTED, "pixel_shuffle_ratio": 1.0}},
        (1.0, None),
    ),
    "Llama4ForCausalLM": ({**LLAMA4, "config": "Llama4TextConfig"}, (1.0, None)),
    f"Gemma3{SEEN}": (
        {"text_config": {**TEXT, "sliding_window": 64}, "mm_tokens_per_image": 4}
        | {"vision_config": SIGLIP},
        (1.0, None),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_of_families(files, tmp_path, name):
    # Beside a Llama's, which has another scale and cap.
    options, form = MODELS[name]
    other = save(tmp_path / "model", name, 1, **options)
    tokens, result, ids = compare(files, files.a, other, text=files.text[1:])
    assert_true(tokens, truth(files.a, other, ids[0]), slack=2)
    about = result["models"][1]
    assert (about["class"], about["logit_scale"], about["logit_softcap"]) == (name, *form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_beside_itself_differs_by_exactly_0(files, dtype):
    # Padding rows of an lm_head change no bit.
    options = {"window": 32, "stride": 24, "dtype": dtype, "text": files.text[1:]}
    same = compare(files, files.a, files.a, **options)[0]
    assert not any(same[name].any() for name in figures.DIVERGENCES)
    tables = [compare(files, files.a, b, **options)[0] for b in (files.b, files.padded)]
    assert tables[0].equals(tables[1])


# ---- vocabularies


def grown(files, folder, *tokens, rows=VOCABULARY + 4, source="b"):
    # A checkpoint with these tokens behind its vocabulary, and likely.
    model = transformers.AutoModelForCausalLM.from_pretrained(files.folder / source)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.lm_head.weight.data[VOCABULARY:] = 1.5
    model.save_pretrained(folder)
    make_tokenizer(*tokens).save_pretrained(folder)
    return str(folder)


def test_tokens_that_one_model_added_are_left_out_and_named(files, tmp_path):
    # Whether its lm_head has rows for them or not; padding rows are cut.
    tuned = grown(files, tmp_path / "tuned", "<pad>", "<call>")
    other = grown(files, tmp_path / "other", "<other>", "<pad>", source="a", rows=None)
    for a, b, left, options in (
        (other, tuned, (["<other>", "<pad>"], ["<pad>", "<call>"]), {}),
        (files.a, files.padded, ([], []), {}),
        (files.a, tuned, ([], ["<pad>", "<call>"]), {"tokenizer": "B"}),
        (files.a, tuned, ([], []), {"tokenizer": "A"}),
    ):
        tokens, result, ids = compare(files, a, b, text=files.text[1:], **options)
        assert_true(tokens, truth(a, b, ids[0]))
        assert result["text"]["vocabulary"] == VOCABULARY
        names = [[entry["token"] for entry in each] for each in result["text"]["left_out"].values()]
        assert names == list(left)
        assert all(repr(name) in report.text_line(result) for name in sum(left, []))


def test_a_reserved_token_that_was_renamed_is_left_out_in_the_middle(files, tmp_path):
    # Its id is within the vocabulary of both, and has probability 0 in both.
    renamed = shutil.copytree(files.b, tmp_path / "renamed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (renamed / name).read_text(encoding="utf-8")
        (renamed / name).write_text(text.replace('"<s>"', '"<start>"'), encoding="utf-8")
    tokens, result, ids = compare(files, files.a, str(renamed), text=files.text[1:])
    left = {"A": [{"id": 0, "token": "<s>"}], "B": [{"id": 0, "token": "<start>"}]}
    assert result["text"]["left_out"] == left
    assert_true(tokens, truth(files.a, files.b, ids[0], columns=range(1, VOCABULARY)))


# ---- from hidden states to values


def test_16_bit_models_have_float32_logits(monkeypatch):
    # As linear_token_stats(logits_dtype=torch.float32), in blocks of any size.
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(2, *shape, generator=make).bfloat16()  # noqa: E731
    hidden, heads = draw(50, 24), [*map(fastkl.Head, draw(400, 24), draw(400))]
    tokens = torch.randint(390, (50,), generator=make)
    vocabulary = inputs.Vocabulary(390, frozenset(), {})
    cut = [fastkl.Head(head.weight[:390], head.bias[:390]) for head in heads]
    stats = fastkl.linear_token_stats(
        hidden[0], cut[0], tokens, hidden[1], cut[1], logits_dtype=torch.float32
    )
    made = [functools.partial(loading.head_logits, head) for head in heads]
    for block, widened in ((1 << 23, 1 << 24), (7 * 390, 24 * 7)):
        monkeypatch.setattr(loading, "WIDENED", widened)
        values = measure.token_values(made, hidden, tokens, vocabulary, block, measure.block_values)
        names = ("logprob_a", "entropy_a", "logprob_b", "kl_ab", "kl_ba")
        found = [values[name] for name in names]
        np.testing.assert_allclose(found, torch.stack(stats[:5]), rtol=1e-5, atol=1e-5)


def test_forbidden_entries_and_small_divergences():
    # -inf in both logits adds nothing; in B's alone, the KL is infinite and the JSD is not.
    p, q = torch.randn(2, 9, 12).unbind(0)
    p[:, :2] = q[:, :2] = -math.inf
    q[4:, 3] = -math.inf
    near = p + 1e-3 * torch.randn(9, 12)
    for other, rtol in ((q, 1e-5), (near, 2e-3)):
        values = measure.block_values(p, other, torch.full((9,), 5))
        exact = jsd(*(logits[:, 2:].double().log_softmax(-1) for logits in (p, other)))
        np.testing.assert_allclose(values["jsd"], exact, rtol=rtol, atol=0)
        assert np.isinf(values["kl_ab"]).tolist() == torch.isinf(other[:, 3]).tolist()


# ---- adapters


def trained(base, folder, config=None, scale=0.3, saved=0.1, rows=None, **options):
    # A folder with an adapter on the base, with random changes of these standard deviations: of
    # LoRA's B and of saved modules.
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, config or peft.LoraConfig(r=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
        elif "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.add_(torch.randn_like(parameter) * saved)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 70, 71]},
    ],
)
def test_adapters_have_the_divergence_of_their_layers(files, tmp_path, options):
    # Without a tokenizer, they have that of the base.
    folder = trained(files.a, tmp_path / "adapter", **options)
    tokens, result, ids = compare(files, files.a, folder, text=files.text[1:])
    assert_true(tokens, truth(files.a, folder, ids[0]), slack=4)
    adapters = [model["adapter"] for model in result["models"]]
    assert adapters == [None, {"kind": "LORA", "base": files.a}]
    shown = report.text_report(result, 400)
    assert f"(LORA adapter on {files.a}, LlamaForCausalLM, float32, " in " ".join(shown.split())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"], "scale": 3e-4},
        {"modules_to_save": ["lm_head"], "scale": 0.0, "saved": 1e-4},
    ],
)
def test_a_change_below_bfloat16_is_not_rounded_away_in_the_head(files, tmp_path, options):
    # Nor in a head that the file holds in float32.
    narrow = str(tmp_path / "narrow")
    model = transformers.AutoModelForCausalLM.from_pretrained(files.a, dtype=torch.bfloat16)
    model.save_pretrained(narrow)
    make_tokenizer().save_pretrained(narrow)
    folder = trained(narrow, tmp_path / "adapter", **options)
    tokens, result, ids = compare(files, narrow, folder, text=files.text[1:])
    base, changed = (loading.Checkpoint("A", name).load("auto", "cpu") for name in (narrow, folder))
    assert result["models"][1]["dtype"] == "bfloat16"
    # The hidden states are those of the base, so the truth is the two heads' in float64.
    with torch.no_grad():
        hidden = base.hidden(torch.tensor(ids[0][:-1])).double()
    weights = (model.head.weight.double().t() for model in (base, changed))
    p, q = ((hidden @ weight).log_softmax(-1) for weight in weights)
    expected = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(tokens["kl_ab"][1:], expected, rtol=2e-2, atol=2e-8)
    assert 1e-9 < tokens["kl_ab"][1:].mean() < 1e-3
    gone = trained(narrow, tmp_path / "gone", scale=3e-13)
    said = compare(files, narrow, gone, text=files.text[1:])[1]["sentence"]
    assert said.endswith("A change that bfloat16 rounds away shows with --dtype float32.")


def test_an_adapter_with_added_tokens(files, tmp_path):
    # Its embeddings are in its file, and the base grows to them.
    saved = ["embed_tokens", "lm_head"]
    folder = trained(files.a, tmp_path / "x", rows=VOCABULARY + 4, modules_to_save=saved)
    make_tokenizer("<pad>").save_pretrained(folder)
    _, result, _ = compare(files, files.a, folder, text=files.text[1:])
    assert result["models"][1]["vocabulary"] == VOCABULARY + 4
    assert result["text"]["left_out"] == {"A": [], "B": [{"id": VOCABULARY, "token": "<pad>"}]}
    assert result["text"]["vocabulary"] == VOCABULARY and result["summary"]["kl_ab"]["mean"] > 1e-3


def unusable(files, folder, how):
    # An adapter with something wrong.
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    path = trained(files.a, folder, prompt if how == "prompt" else None)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    if how == "incomplete":
        save_file(dict(list(peft.load_peft_weights(path, device="cpu").items())[1:]), weights)
    elif how == "narrower":
        fields["base_model_name_or_path"] = save(folder / "base", **{**SIZES, "hidden_size": 16})
    elif how == "pickle":
        weights.unlink()
        torch.save({"x": print}, folder / "adapter_model.bin")
    fields |= {"base_model_name_or_path": "/no/where"} if how == "gone" else {}
    config.write_text("{" if how == "broken" else json.dumps(fields))
    return path


LOADS = "a folder that save_pretrained wrote, or a hub name"
FITS = "an adapter that fits its base model '"


@pytest.mark.parametrize(
    "how, expected",
    [
        *((how, LOADS) for how in ("gone", "broken", "prompt", "pickle")),
        *((how, FITS) for how in ("incomplete", "narrower")),
        ("peft is missing", ".*pip install peft"),
    ],
)
def test_adapters_that_cannot_be_used(files, tmp_path, capsys, monkeypatch, how, expected):
    # A model loads only where its weights must be seen for it.
    folder = unusable(files, tmp_path / "adapter", how)
    if expected != FITS:
        monkeypatch.setattr(loading.Checkpoint, "load", lambda *arguments: 1 / 0)
    if how == "peft is missing":
        monkeypatch.setitem(sys.modules, "peft", None)
    arguments = (files.a, folder, "--text", files.text[1], "--device", "cpu")
    refused(capsys, f"MODEL_B: expected {expected}", *arguments)


def test_a_whole_model_beside_an_adapter_is_the_model(files, tmp_path):
    # A config.json alone does not make a model.
    folder = trained(files.a, tmp_path / "adapter")
    shutil.copy(f"{files.a}/config.json", folder)
    assert loading.Checkpoint("B", folder).adapter["kind"] == "LORA"
    shutil.copy(f"{files.a}/model.safetensors", folder)
    assert loading.Checkpoint("B", folder).adapter is None
