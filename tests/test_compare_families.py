"""`fastkl compare` on checkpoints that read images as well, with text alone: tiny random ones of every family that people bring."""

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from compare_cases import SIZES, cli_run, compare, make_files, save, silent  # noqa: E402, F401

TEXT = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
ROTARY = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
QWEN_IDS = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
FAMILIES = {
    "Mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
        "image_token_index": 290,
    },
    "Llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": 290,
    },
    "PaliGemma": {
        "text_config": {**TEXT, "model_type": "gemma"},
        "vision_config": {**SIGLIP, "projection_dim": 32},
        "image_token_index": 290,
        "projection_dim": 32,
        "hidden_size": 32,
    },
    "Qwen2VL": {
        "text_config": ROTARY,
        "vision_config": {**QWEN, "embed_dim": 32, "mlp_ratio": 2},
        **QWEN_IDS,
    },
    "Qwen2_5_VL": {
        "text_config": ROTARY,
        "vision_config": {
            **QWEN,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        **QWEN_IDS,
    },
    "Qwen3VL": {
        "text_config": ROTARY,
        "vision_config": {
            **QWEN,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **QWEN_IDS,
    },
    "Llama4": {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0],
        },
        "vision_config": {
            **VISION,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
            "pixel_shuffle_ratio": 1.0,
        },
        "image_token_index": 290,
    },
    "Gemma3": {
        "text_config": {**TEXT, "sliding_window": 64},
        "vision_config": SIGLIP,
        "image_token_index": 290,
        "mm_tokens_per_image": 4,
    },
}


@torch.no_grad()
def log_probs(folder, ids, family):
    """[n - 1, V] in float64, by the model's own logits; PaliGemma reads text from left to right where it is told so."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64
    ).eval()
    read = torch.tensor([ids[:-1]])
    told = {"token_type_ids": torch.ones_like(read)} if family == "PaliGemma" else {}
    return model(input_ids=read, **told).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone(files, tmp_path, family):
    a, b = (
        save(
            tmp_path / str(seed),
            files.tokenizer,
            family,
            seed,
            "ForConditionalGeneration",
            **FAMILIES[family],
        )
        for seed in (0, 1)
    )
    values, result, ids = compare(files, a, b, tmp_path / "out", text=files.text[1:])
    p, q = (log_probs(folder, ids[0], family) for folder in (a, b))
    assert result["models"][0]["class"] == f"{family}ForConditionalGeneration"
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.mean() > 0.05
    np.testing.assert_allclose(
        values["kl_ab"][1:], expected, atol=1e-5
    )  # a float32 logit of up to 20 is off by 2e-6, and so are 4 of them


def test_llama_4_without_its_vision_part(files, tmp_path):
    a, b = (
        save(
            tmp_path / str(seed),
            files.tokenizer,
            "Llama4Text",
            seed,
            "ForCausalLM",
            "Llama4",
            **FAMILIES["Llama4"]["text_config"],
        )
        for seed in (0, 1)
    )
    values, result, ids = compare(files, a, b, tmp_path / "out", text=files.text[1:])
    assert result["models"][0]["class"] == "Llama4ForCausalLM" and values["kl_ab"].mean() > 0.05


@pytest.mark.parametrize(
    "kind, options",
    [
        (
            "T5",
            {
                "vocab_size": 300,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 16,
                "num_layers": 1,
                "num_heads": 2,
            },
        ),
        ("Bart", {"vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_an_encoder_is_refused_before_it_loads(files, tmp_path, capsys, kind, options):
    folder = tmp_path / "encoder"
    getattr(transformers, f"{kind}Config")(
        **options, architectures=[f"{kind}ForConditionalGeneration"]
    ).save_pretrained(folder)
    code, shown, said = cli_run(capsys, files.a, folder, "--text", files.text[1])
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert (
        f"error: MODEL_B: expected a causal LM, got '{folder}', a {kind}ForConditionalGeneration; remedy: "
        in said
    )
