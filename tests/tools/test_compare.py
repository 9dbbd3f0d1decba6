"""`fastkl compare` with tiny random checkpoints: its values against plain float64."""

import math
import shutil

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
    cli_run,
    compare,
    make_files,  # noqa: F401
    make_tokenizer,
    save,
    truth,
)

import fastkl  # noqa: E402
from fastkl.tools.compare import inputs, loading, measure, report  # noqa: E402


@pytest.mark.parametrize("context, overlap", [(256, 0), (16, 4)])
def test_values_and_figures_are_those_of_plain_float64(files, context, overlap):
    tokens, result, ids = compare(files, files.a, files.b, context=context, overlap=overlap)
    parts = [truth(files.a, files.b, document, context, overlap) for document in ids]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    assert_true(tokens, whole)
    summary, same = result["summary"], whole["top_a"] == whole["top_b"]
    assert summary["tokens"] == len(tokens) - 2 == sum(tokens["scored"])
    assert summary["same_top1"] == same.mean() and 0.05 < same.mean() < 0.95
    for name in measure.DIVERGENCES:
        got = [summary[name][key] for key in ("mean", "p50", "p95", "p99", "max")]
        true = [whole[name].mean(), *np.quantile(whole[name], [0.5, 0.95, 0.99, 1.0])]
        np.testing.assert_allclose(got, true, rtol=0, atol=TOLERANCE[name])
    for name in measure.MEANS[3:]:
        assert summary[name] == pytest.approx(whole[name].mean(), abs=2 * LOGIT)
    kl, worst = whole["kl_ab"], result["top"][0]
    own = tokens["kl_ab"].astype(np.float64)
    above = own[own > summary["kl_ab"]["p99"]].sum() / own.sum()
    assert summary["share_above_p99"] == pytest.approx(above, rel=1e-12)
    assert worst["kl_ab"] == pytest.approx(kl.max(), abs=TOLERANCE["kl_ab"])
    chance = worst["expected_a"]["probability"]
    assert chance == pytest.approx(math.exp(whole["top_logprob_a"][kl.argmax()]), abs=1e-4)


TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
QWEN = {"text_config": {**TEXT, "rope_parameters": ROPE}, "image_token_id": 290}
QWEN |= {"video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
WIDE = {"intermediate_size": 48, "out_hidden_size": 32}
LLAMA4 = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}
LLAMA4 |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 64}
PROJECTED = {
    name: 32 for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim")
}
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
    f"Qwen2_5_VL{SEEN}": (
        {**QWEN, "vision_config": {**QWEN_VISION, **WIDE, "fullatt_block_indexes": [0]}},
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
    """Beside a Llama's, which has another scale and cap."""
    options, form = MODELS[name]
    other = save(tmp_path / "model", name, 1, **options)
    tokens, result, ids = compare(files, files.a, other, text=files.text[1:])
    assert_true(tokens, truth(files.a, other, ids[0]), slack=2)
    about = result["models"][1]
    assert (about["class"], about["logit_scale"], about["logit_softcap"]) == (name, *form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_after_the_other_gives_the_same_bits(files, dtype):
    options = {"context": 32, "overlap": 8, "dtype": dtype}
    ways = [compare(files, files.a, files.padded, sequential=way, **options) for way in (0, 1)]
    assert ways[0][0].tobytes() == ways[1][0].tobytes() and ways[0][1] == ways[1][1]
    same = compare(files, files.a, files.a, **options)
    assert not any(same[0][name].any() for name in measure.DIVERGENCES)


def test_too_little_room_for_hidden_states_is_known_before_they_are_made(
    files, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(loading.Model, "hidden", lambda *_: pytest.fail("the model runs"))
    arguments = (files.a, files.b, "--text", *files.text, "--device", "cpu", "--sequential")
    code, shown, said = cli_run(capsys, *arguments)
    assert (code, shown) == (1, "") and "error: No space left for " in said and "TMPDIR" in said


def test_a_token_in_front_gives_the_first_its_context(files, tmp_path):
    for name in "ab":
        shutil.copytree(files.folder / name, tmp_path / name)
        make_tokenizer(begin=True).save_pretrained(tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    tokens, result, ids = compare(files, a, b, text=files.text[:1])
    assert ids[0][0] == 0 and result["text"]["not_scored"] == 0
    assert_true(tokens, truth(a, b, ids[0]))


# ---- vocabularies


def grown(files, folder, *tokens, rows=VOCABULARY + 4, source="b"):
    """A checkpoint with these tokens behind its vocabulary, and likely."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files.folder / source)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.lm_head.weight.data[VOCABULARY:] = 1.5
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokens_that_one_model_added_are_left_out_and_named(files, tmp_path):
    """Whether its lm_head has rows for them or not; padding rows are cut."""
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
    """Its id is within the vocabulary of both, and has probability 0 in both."""
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
    """As linear_token_stats(logits_dtype=torch.float32), in blocks of any size."""
    make = torch.Generator().manual_seed(0)
    hidden = [torch.randn(50, 24, generator=make).bfloat16() for _ in range(2)]
    heads = [
        fastkl.Head(
            torch.randn(400, 24, generator=make).bfloat16(), torch.randn(400, generator=make)
        )
        for _ in range(2)
    ]
    tokens = torch.randint(390, (50,), generator=make)
    vocabulary = inputs.Vocabulary(390, frozenset(), {})
    cut = [
        head._replace(weight=head.weight[:390], bias=head.bias[:390].bfloat16()) for head in heads
    ]
    heads = [head._replace(bias=head.bias.bfloat16()) for head in heads]
    stats = fastkl.linear_token_stats(
        hidden[0], cut[0], tokens, hidden[1], cut[1], logits_dtype=torch.float32
    )
    for blocks, widened in ((1 << 23, 1 << 24), (700, 24 * 7)):
        monkeypatch.setattr(measure, "BLOCK_LOGITS", {"cpu": blocks, "cuda": 1})
        monkeypatch.setattr(loading, "WIDENED", widened)
        values = measure.token_values(heads, hidden, tokens, vocabulary)
        names = ("logprob_a", "entropy_a", "logprob_b", "kl_ab", "kl_ba")
        for name, expected in zip(names, stats, strict=True):
            np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-5)


def test_forbidden_entries_and_small_divergences():
    """-inf in both logits adds nothing; in B's alone, the KL is infinite and the JSD is not."""
    p, q = torch.randn(2, 9, 12).unbind(0)
    p[:, :2] = q[:, :2] = -math.inf
    q[4:, 3] = -math.inf
    near = p + 1e-3 * torch.randn(9, 12)
    for other, rtol in ((q, 1e-5), (near, 2e-3)):
        values = measure.block_values(p, other, torch.full((9,), 5))
        log_p, log_q = (logits.double().log_softmax(-1)[:, 2:] for logits in (p, other))
        mixture = torch.log((log_p.exp() + log_q.exp()) / 2)
        logs = ((log.exp() * (log - mixture)).nan_to_num(0.0).sum(-1) for log in (log_p, log_q))
        np.testing.assert_allclose(values["jsd"], sum(logs) / 2, rtol=rtol, atol=0)
        assert np.isinf(values["kl_ab"]).tolist() == torch.isinf(other[:, 3]).tolist()
