"""head_of: backbone and Head of tiny random models, against the models' own logits."""

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
GEMMA = dict(head_dim=8, final_logit_softcapping=2.0)


def config_of(kind: str, **options):
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **options})


def model_of(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config_of(kind, **options), attn_implementation="eager"
    )


def assert_its_logits(model: torch.nn.Module) -> Head:
    backbone, head = head_of(model)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state.double()
    bias = None if head.bias is None else head.bias.double()
    got = head.logit_scale * F.linear(hidden, head.weight.double(), bias)
    got = got if head.softcap is None else head.softcap * torch.tanh(got / head.softcap)
    assert got.shape == logits.shape
    testing.assert_near(got, logits, 0.0, 1e-5 * float(logits.abs().max()), "logits")
    return head


@pytest.mark.parametrize("kind, options, softcap, scale", [
    ("Llama", {}, None, 1.0),
    ("Phi", {}, None, 1.0),
    ("Gemma2", GEMMA, 2.0, 1.0),
    # Logits too small to show the cap have it all the same.
    ("Gemma2", dict(head_dim=8, initializer_range=1e-3), 30.0, 1.0),
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
    model = model_of(kind, **options)
    head = assert_its_logits(model)
    assert (head.softcap, head.logit_scale) == (softcap, pytest.approx(scale, rel=1e-12))
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert (head.bias is None) == (kind != "Phi")


def test_a_padded_lm_head() -> None:
    # Rows that the model's own logits leave out are cut; the gradient reaches the whole weight.
    inkling = transformers.models.inkling2
    torch.manual_seed(0)
    model = inkling.modeling_inkling2.Inkling2ForCausalLM(
        inkling.Inkling2TextConfig(**SIZES, unpadded_vocab_size=57)
    )
    head = assert_its_logits(model)
    assert head.weight.shape == (57, 16) and head.softcap == 30.0
    head.weight.sum().backward()
    assert model.lm_head.weight.grad.shape == (V, 16)


def test_names_in_the_config_that_the_code_does_not_use() -> None:
    model = model_of("Llama")
    model.config.logit_scale, model.config.final_logit_softcapping = "inv_sqrt_d_model", 1.0
    model.config.dim_model_base = 4
    assert assert_its_logits(model)[2:4] == (None, 1.0)
    # MiniCPM's remote code divides by hidden_size / dim_model_base.
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    assert head_of(model)[1][2:4] == (None, 0.25)


@pytest.mark.parametrize("kind, scale", [("Granite", 1 / 1.01), ("HyperCLOVAX", 1.01)])
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast", "float64"])
def test_types(kind, scale, way) -> None:
    # 16-bit logits tell 1.01 from its inverse, although the tolerance would allow both.
    model, autocast = model_of(kind, logits_scaling=1.01), way == "autocast"
    model = model if autocast else model.to(getattr(torch, way))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head = head_of(model)[1]
    assert head.logit_scale == pytest.approx(scale, rel=1e-12)
    assert head.weight is model.lm_head.weight


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("Granite", logits_scaling=8.0, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    head_of(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {True, False}
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.base_model._forward_hooks and not model.lm_head._forward_hooks
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("kind, text, vision, form", [
    ("PaliGemma", ("Gemma2", GEMMA), "SiglipVision", (2.0, 1.0)),
    # LLaVA does not apply its text model's factor.
    ("Llava", ("Granite", dict(logits_scaling=8.0)), "CLIPVision", (None, 1.0)),
])  # fmt: skip
def test_multimodal_models(kind, text, vision, form) -> None:
    parts = dict(
        text_config=config_of(text[0], **text[1]),
        vision_config=getattr(transformers, f"{vision}Config")(
            **dict(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ),
        image_token_id=60,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**parts, projection_dim=16)
    )
    assert assert_its_logits(model)[2:4] == form


# ---- PEFT


def adapted(**options):
    peft = pytest.importorskip("peft")
    lora = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(
        model_of("Granite", logits_scaling=8.0, tie_word_embeddings=False),
        peft.LoraConfig(**{**lora, **options}),
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
    model, saved = adapted(**options), "modules_to_save" in options
    head = assert_its_logits(model)
    assert head.logit_scale == 1 / 8 and head.weight.requires_grad == saved
    with model.disable_adapter():
        off = assert_its_logits(model)
    assert (off.weight is head.weight) != saved


def test_a_merged_adapter_on_the_lm_head() -> None:
    assert_its_logits(adapted(target_modules=["q_proj", "lm_head"]).merge_and_unload())


# ---- what is refused


def changed(kind: str, change, **options):
    model = model_of(kind, **options)
    change(model.lm_head)
    return model


def hooked(lm_head: torch.nn.Module) -> None:
    lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)


def zeroed(lm_head: torch.nn.Module) -> None:
    torch.nn.init.zeros_(lm_head.weight)


def packed(lm_head: torch.nn.Module) -> None:
    lm_head.weight = torch.nn.Parameter(torch.zeros(V, 8, dtype=torch.uint8), requires_grad=False)
    lm_head.forward = lambda hidden: hidden @ torch.ones(16, V)


ON_HEAD = dict(target_modules=["q_proj", "lm_head"])
LANGUAGE_MODEL = "a language model of transformers with an lm_head, got"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: 3, f"{LANGUAGE_MODEL} int"),
        (lambda: None, f"{LANGUAGE_MODEL} NoneType"),
        (lambda: torch.nn.Linear(2, 2), f"{LANGUAGE_MODEL} Linear"),
        (
            lambda: model_of("Llama").model,
            f"{LANGUAGE_MODEL} LlamaModel; load it with AutoModelForCausalLM",
        ),
        # An adapter is refused before it has learnt anything as well.
        (
            lambda: adapted(**ON_HEAD),
            "an lm_head that is one weight, got Granite.*; take lm_head out",
        ),
        (lambda: adapted(**ON_HEAD, init_lora_weights=True), "an lm_head that is one weight, got"),
        (
            lambda: changed("Granite", hooked, logits_scaling=8.0),
            "logits that are softcap.* got others from Granite.* names logits_scaling=8.0; ",
        ),
        (
            lambda: changed("Granite", zeroed, logits_scaling=8.0),
            "logits that tell the factors .* apart, got zeros; pass a Head",
        ),
        (
            lambda: model_of("ModernBertDecoder"),
            "logits .* whose config names no soft cap or factor",
        ),
        (
            lambda: model_of("OPT", ffn_dim=32, word_embed_proj_dim=16),
            "a forward that gives .* OPTForCausalLM, whose forward does not call base_model; call",
        ),
        (
            lambda: transformers.Llama4ForCausalLM(
                transformers.Llama4TextConfig(
                    vocab_size=V,
                    hidden_size=16,
                    intermediate_size=32,
                    intermediate_size_mlp=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=8,
                )
            ),
            "a forward that gives .* Llama4ForCausalLM, whose base_model is the whole model; call",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=V,
                    d_model=16,
                    d_kv=8,
                    d_ff=32,
                    num_layers=1,
                    num_heads=2,
                    decoder_start_token_id=0,
                )
            ),
            "a decoder, got the encoder-decoder T5ForConditionalGeneration",
        ),
        (
            lambda: changed("Llama", packed),
            r"an lm_head.weight \[V, 16\] of floats, got torch.uint8 \(61, 8\)",
        ),
    ],
)
def test_refused(make, words) -> None:
    model = make()
    with pytest.raises((TypeError, ValueError), match=f"^model: expected {words}"):
        head_of(model)


def test_a_zero_head_without_a_choice_of_factors() -> None:
    assert head_of(changed("Llama", zeroed))[1][2:4] == (None, 1.0)
