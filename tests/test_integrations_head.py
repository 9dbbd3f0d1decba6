"""head_of: the backbone and the Head of tiny random models, against the models' own logits."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F

from fastkl import Head, testing

transformers = pytest.importorskip("transformers")

from fastkl.integrations.transformers import head_of  # noqa: E402

V = 61
SIZES = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=1,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def model_of(kind: str, seed: int = 0, **options) -> torch.nn.Module:
    """Make a random model from the name of its configuration's class."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def made(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Compute a Head's logits by its definition, in float64."""
    bias = None if head.bias is None else head.bias.double()
    logits = head.logit_scale * F.linear(hidden.double(), head.weight.double(), bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def assert_its_logits(model: torch.nn.Module, tolerance: float = 1e-5) -> Head:
    """Compare what head_of returns with the model on tokens that the check did not see."""
    backbone, head = head_of(model)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
        got = made(head, backbone(input_ids=ids, use_cache=False).last_hidden_state)
    assert got.shape == logits.shape
    testing.assert_near(got, logits, 0.0, tolerance * float(logits.abs().max()), "logits")
    return head


@pytest.mark.parametrize("kind, options, softcap, scale", [
    ("Llama", {}, None, 1.0),
    ("Phi", {}, None, 1.0),
    ("Gemma2", dict(head_dim=8, final_logit_softcapping=2.0), 2.0, 1.0),
    ("RecurrentGemma", dict(logits_soft_cap=3.0), 3.0, 1.0),
    ("NanoChat", {}, 15.0, 1.0),
    ("Granite", dict(logits_scaling=8.0), None, 1 / 8),
    ("Granite", dict(logits_scaling=1.01), None, 1 / 1.01),
    ("GraniteMoe", dict(logits_scaling=3.0), None, 1 / 3),
    ("HyperCLOVAX", dict(logits_scaling=8.0), None, 8.0),
    ("HyperCLOVAX", dict(logits_scaling=1.01), None, 1.01),
    ("Cohere", dict(logit_scale=0.3), None, 0.3),
    ("Cohere2", {}, None, 0.0625),
    ("FalconH1", dict(lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4), None, 0.3),
    ("MiniCPM3", dict(dim_model_base=4), None, 0.25),
])  # fmt: skip
def test_families(kind, options, softcap, scale) -> None:
    """Soft cap and factor as the model's code applies them; the tensors are the model's own."""
    model = model_of(kind, **options)
    head = assert_its_logits(model)
    assert (head.softcap, head.logit_scale) == (softcap, pytest.approx(scale, rel=1e-12))
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert (head.bias is None) == (kind != "Phi")


def test_a_padded_lm_head() -> None:
    """Rows that the model's own logits leave out are cut; the gradient reaches the whole weight."""
    torch.manual_seed(0)
    config = transformers.models.inkling2.Inkling2TextConfig(**SIZES, unpadded_vocab_size=57)
    model = transformers.models.inkling2.modeling_inkling2.Inkling2ForCausalLM(config)
    head = assert_its_logits(model)
    assert head.weight.shape == (57, 16) and head.softcap == 30.0
    head.weight.sum().backward()
    assert model.lm_head.weight.grad.shape == (V, 16)


def test_remote_code() -> None:
    """MiniCPM's own code divides by hidden_size / dim_model_base; unused names are passed over."""
    model = model_of("Llama")
    model.config.logit_scale, model.config.final_logit_softcapping = "inv_sqrt_d_model", 1.0
    assert assert_its_logits(model)[2:4] == (None, 1.0)
    model.config.dim_model_base = 4
    assert assert_its_logits(model)[2:4] == (None, 1.0)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    assert head_of(model)[1][2:4] == (None, 0.25)


def test_a_small_cap_is_the_configs() -> None:
    """Logits too small to show the cap have it all the same."""
    assert head_of(model_of("Gemma2", head_dim=8, initializer_range=1e-3))[1].softcap == 30.0


@pytest.mark.parametrize(
    "kind, options, scale",
    [
        ("Granite", dict(logits_scaling=1.01), 1 / 1.01),
        ("HyperCLOVAX", dict(logits_scaling=1.01), 1.01),
    ],
)
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast", "float64"])
def test_types(kind, options, scale, way) -> None:
    """16-bit logits tell 1.01 from its inverse, although the tolerance would allow both."""
    model = model_of(kind, **options)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            head = head_of(model)[1]
    else:
        head = head_of(model.to(getattr(torch, way)))[1]
    assert (
        head.logit_scale == pytest.approx(scale, rel=1e-12) and head.weight is model.lm_head.weight
    )


def test_the_model_is_left_as_it_was() -> None:
    """Each module's own mode, its hooks and gradients; dropout does not disturb the check."""
    model = model_of("Granite", logits_scaling=8.0, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    head_of(model)
    assert {name: module.training for name, module in model.named_modules()} == before and len(
        set(before.values())
    ) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.base_model._forward_hooks and not model.lm_head._forward_hooks
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


def test_multimodal_models() -> None:
    """With text alone; LLaVA does not apply its text model's factor, and neither does the Head."""
    torch.manual_seed(0)
    gemma = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    config = transformers.PaliGemmaConfig(
        text_config=gemma,
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_id=60,
        projection_dim=16,
    )
    assert head_of(transformers.PaliGemmaForConditionalGeneration(config))[1][2:4] == (2.0, 1.0)
    granite = transformers.GraniteConfig(**SIZES, logits_scaling=8.0)
    config = transformers.LlavaConfig(
        text_config=granite,
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=60,
    )
    assert assert_its_logits(transformers.LlavaForConditionalGeneration(config))[2:4] == (None, 1.0)


# ---- PEFT


def adapted(**options):
    """Make a Granite with LoRA that has learnt something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{
            "r": 2,
            "target_modules": ["q_proj"],
            "task_type": "CAUSAL_LM",
            "init_lora_weights": False,
            **options,
        }
    )
    model = peft.get_peft_model(
        model_of("Granite", logits_scaling=8.0, tie_word_embeddings=False), config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, dict(modules_to_save=["lm_head"]), dict(target_modules=["q_proj", "embed_tokens"])],
    ids=["attention", "lm_head saved", "embedding"],
)
def test_peft(options) -> None:
    """The head of the adapter that is on."""
    model = adapted(**options)
    head = assert_its_logits(model)
    assert head.logit_scale == 1 / 8 and head.weight.requires_grad == ("modules_to_save" in options)
    with model.disable_adapter():
        off = assert_its_logits(model)
    assert (off.weight is head.weight) == ("modules_to_save" not in options)


def test_an_adapter_on_the_lm_head() -> None:
    """Refused, also before it has learnt anything; merged it is one weight."""
    for initial in (True, False):
        with pytest.raises(
            ValueError,
            match="expected an lm_head that is one weight, got GraniteForC.*; take lm_head out",
        ):
            head_of(adapted(target_modules=["q_proj", "lm_head"], init_lora_weights=initial))
    assert_its_logits(adapted(target_modules=["q_proj", "lm_head"]).merge_and_unload())


def test_prompt_learning() -> None:
    """Refused: the backbone alone lacks the prompt."""
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError,
        match="hidden states of the tokens alone, got LlamaForCausalLM with prompt learning; use",
    ):
        head_of(
            peft.get_peft_model(
                model_of("Llama"),
                peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            )
        )


# ---- what is refused


@pytest.mark.parametrize("model", [3, None, torch.nn.Linear(2, 2)], ids=repr)
def test_no_language_model(model) -> None:
    with pytest.raises(
        TypeError,
        match="model: expected a language model of transformers with an lm_head, got .*; load it",
    ):
        head_of(model)


def test_logits_of_another_form() -> None:
    """A remedy, and what the config names, stand in each error."""
    bare = model_of("Llama").model
    with pytest.raises(TypeError, match="got LlamaModel; load it with AutoModelForCausalLM"):
        head_of(bare)
    model = model_of("Granite", logits_scaling=8.0)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(
        ValueError,
        match="model: expected logits that are softcap.* got others from GraniteForCausalLM, "
        "whose config names logits_scaling=8.0; compute with the model's own logits",
    ):
        head_of(model)
    hook.remove()
    model.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="got zeros; pass a Head of your own"):
        head_of(model)


def test_other_kinds_of_models() -> None:
    """A head of several layers, a backbone that is not run, two models in one, packed weights."""
    transformed = model_of("ModernBertDecoder")
    with pytest.raises(
        ValueError,
        match="got others from ModernBertDecoderForCausalLM, whose config names no soft cap",
    ):
        head_of(transformed)
    torch.manual_seed(0)
    elsewhere = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=1,
            ffn_dim=32,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    with pytest.raises(
        ValueError,
        match="model: expected a forward that runs base_model, got OPTForCausalLM",
    ):
        head_of(elsewhere)
    both = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    with pytest.raises(
        ValueError,
        match="model: expected a decoder, got the encoder-decoder T5ForConditionalGeneration",
    ):
        head_of(both)
    packed = model_of("Llama")
    packed.lm_head.weight = torch.nn.Parameter(
        torch.zeros(V, 8, dtype=torch.uint8), requires_grad=False
    )
    packed.lm_head.forward = lambda hidden: hidden @ torch.ones(16, V)
    with pytest.raises(
        ValueError,
        match=r"expected an lm_head.weight \[V, 16\] of floats, got torch.uint8 \(61, 8\)",
    ):
        head_of(packed)


def test_a_zero_head_without_a_choice() -> None:
    """Logits of 0 are what its product gives."""
    model = model_of("Llama")
    model.lm_head.weight.data.zero_()
    assert head_of(model)[1][2:4] == (None, 1.0)
