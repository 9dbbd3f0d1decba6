"""The exact KL in TRL's GRPO trainer, with tiny random models: losses and gradients against plain torch on full logits, and against TRL's own."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from trl_cases import (
    BETA,
    COMPLETION,
    FAMILIES,
    ROUNDING,
    SIZES,
    TEMPERATURE,
    V,
    adapter_config,
    assert_same,
    batch,
    exact_kl,
    full_logits,
    gradients,
    grpo,
    loss_mask,
    made_with,
    moved,
    perturb,
    tiny,
    transformers,
    trl,
)

from fastkl import testing
from fastkl.integrations import _trl as shared
from fastkl.integrations.transformers import KLCallback
from fastkl.integrations.trl import ExactGRPOTrainer
from fastkl.rl import AdaptiveBeta, FixedBeta, KLMonitor

GRPOTrainer = trl.GRPOTrainer
# A KL of about 0.05 is a mean of differences of log-probs of about 4.
KL_ROUNDING = 4 / 0.05 * ROUNDING
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def k3_of(kl: torch.Tensor) -> torch.Tensor:
    """The x ≥ 0 with e^x - x - 1 = kl, by Newton's method: with it as ref_logp - logp, TRL's own estimate is this kl."""
    x = (2 * kl).sqrt().clamp(max=2.0)
    for _ in range(50):
        x = (x - (torch.expm1(x) - x - kl) / torch.expm1(x).clamp(min=1e-12)).clamp(min=0)
    return x


def plain_loss(trainer: ExactGRPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of type dapo from the models' own logits in float64, of the tokens that both models have."""
    logits = full_logits(trainer.model, inputs)[..., :V]
    with torch.no_grad():
        ref_logits = full_logits(trainer.ref_model, inputs)[..., :V]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    ratio = (logp - inputs["old_per_token_logps"].double() if "old_per_token_logps" in inputs else logp - logp.detach()).exp()
    advantages, kl = inputs["advantages"][:, None], exact_kl(logits, ref_logits)
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + BETA * kl
    assert float(kl.detach()[loss_mask(inputs)].mean()) > 1e-3
    return per_token[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random Llama."""
    return tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pair(folder) -> tuple[ExactGRPOTrainer, GRPOTrainer]:
    """The trainer and TRL's own with the same policy, which is no longer the reference."""
    return moved(grpo(folder)), moved(grpo(folder, GRPOTrainer, use_bias_correction_kl=False))


# ---- GRPO


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
def test_loss_and_gradients_equal_plain_torch(pair, old) -> None:
    """Policy term and KL from full logits in float64, loss type dapo; the reference gets no gradient."""
    trainer, inputs = pair[0], batch(old)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    expected = plain_loss(trainer, inputs)
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    to_reference = torch.autograd.grad(loss, list(trainer.ref_model.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in to_reference)
    assert_same(gradients(loss, trainer.model), gradients(expected, trainer.model))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_reduces_the_kl_as_trl_does(pair, monkeypatch, loss_type, training) -> None:
    """TRL's own loss, given reference log-probs with which its estimate is the exact KL of each token."""
    exact, plain = pair
    inputs = batch()
    with torch.no_grad():
        logits, ref_logits = full_logits(exact.model, inputs), full_logits(exact.ref_model, inputs)
        logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        inputs["ref_per_token_logps"] = logp + k3_of(exact_kl(logits, ref_logits))
    for trainer in pair:
        monkeypatch.setattr(trainer, "loss_type", loss_type)
        monkeypatch.setattr(trainer.args, "steps_per_generation", 5)
        trainer.model.train(training)
    losses = [trainer.compute_loss(trainer.model, dict(inputs)) for trainer in pair]
    without = GRPOTrainer._compute_loss(exact, exact.model, dict(inputs))
    for trainer in pair:
        trainer.model.train()
    # Advantages of about 1 and of both signs cancel in some; both sides are rounded.
    testing.assert_near(losses[0], losses[1], 2 * ROUNDING, 2 * ROUNDING, "loss")
    assert float((losses[0] - without).detach()) > 1e-4, "the KL's part is too small to see"
    metrics = [trainer._metrics["train" if training else "eval"]["kl"][-1] for trainer in pair]
    assert metrics[0] == pytest.approx(metrics[1], rel=KL_ROUNDING) and metrics[0] > 1e-3


def test_beta_zero_is_trls_own_loss(folder) -> None:
    """No reference, no callback; log-probs and entropies come from hidden states all the same."""
    exact, plain = (moved(grpo(folder, kind, beta=0.0, entropy_coef=0.01)) for kind in (ExactGRPOTrainer, GRPOTrainer))
    losses = [trainer.compute_loss(trainer.model, batch()) for trainer in (exact, plain)]
    assert exact.ref_model is None and exact.kl_callback is None and exact.kl_weight == 0
    testing.assert_near(losses[0], losses[1], 2 * ROUNDING, 0.0, "loss")
    assert_same(gradients(losses[0], exact.model), gradients(losses[1], plain.model))
    assert exact._metrics["train"]["entropy"] == pytest.approx(plain._metrics["train"]["entropy"], rel=2 * ROUNDING)
    assert "kl" not in exact._metrics["train"]


def test_log_probs_equal_trls(pair) -> None:
    """Also in parts, as TRL asks for them beside the generation."""
    exact, plain = pair
    inputs = batch()
    sequence = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask")]
    with torch.no_grad():
        expected = plain._get_per_token_logps_and_entropies(plain.model, *sequence, COMPLETION, compute_entropy=True)
        for batch_size in (None, 3):
            got = exact._get_per_token_logps_and_entropies(exact.model, *sequence, COMPLETION, batch_size=batch_size, compute_entropy=True)
            for value, exact_value in zip(got[:2], expected[:2], strict=True):
                testing.assert_near(value, exact_value, 2 * ROUNDING, 1e-12, "log-probs, entropies")
            assert got[2] is None


def test_training_with_a_controller(folder) -> None:
    """Each optimizer step uses the beta that the step before left; the KL is in log_history under TRL's name and the monitor's."""
    controller, alone = (AdaptiveBeta(BETA, target=0.05, horizon=1.0) for _ in range(2))
    trainer = grpo(folder, callbacks=[KLCallback(controller, KLMonitor())], max_steps=4, eval_strategy="steps", eval_steps=4)
    used, reduced = [], trainer._reduced
    trainer._reduced = lambda *arguments: (used.append(trainer.kl_weight) if trainer.model.training else None, reduced(*arguments))[1]
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl/mean" in entry]
    assert len(steps) == 4 and steps[0]["kl/mean"] == 0.0 and min(step["kl/mean"] for step in steps[1:]) > 1e-3
    betas = [alone.beta, *(alone.update(step["kl/mean"]) for step in steps)]
    assert len(set(betas)) == 5
    assert used == pytest.approx([beta for beta in betas[:-1] for _ in range(2)], rel=1e-5)
    assert [step["kl/beta"] for step in steps] == pytest.approx(betas[:-1], rel=1e-5)
    # TRL's metric is a mean of the micro-batches' means.
    assert [step["kl"] for step in steps] == pytest.approx([step["kl/mean"] for step in steps], rel=0.2)
    assert steps[0]["entropy"] > 0 and all(step["kl/max"] >= step["kl/p50"] for step in steps)
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_kl"] > 1e-3 and "kl/mean" not in evaluation
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_weight_is_the_controllers(pair) -> None:
    """The loss is linear in it."""
    trainer, inputs = pair[0], batch()
    controller = FixedBeta(0.0)
    trainer.kl_callback.controller = controller
    try:
        losses = []
        for beta in (0.0, 0.5, 1.0):
            controller._beta = beta
            losses.append(float(trainer.compute_loss(trainer.model, dict(inputs)).detach()))
    finally:
        trainer.kl_callback.controller = None
        trainer.kl_callback._micro_batches.clear()
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4) and losses[1] - losses[0] > 1e-3


def test_generated_twice_used_runs_the_reference_once(folder) -> None:
    """num_iterations=2: the second pass over a generation takes the hidden states that the first one kept."""
    trainer = grpo(folder, num_iterations=2, max_steps=2)
    runs = []
    trainer.ref_model.base_model.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    assert len(runs) == 2
    steps = [entry["kl/mean"] for entry in trainer.state.log_history if "kl/mean" in entry]
    assert steps[0] == 0.0 and steps[1] > 1e-3


# ---- other models


@pytest.mark.parametrize("given", [False, True], ids=["new adapter", "adapter that came with the model"])
def test_peft(folder, given) -> None:
    """The reference is the model without the adapter, or the adapter as it came; loss and gradients as plain torch with two models."""
    config = adapter_config()
    if given:
        import peft
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
        perturb(model, 0.3)
        reference = copy.deepcopy(model)
        trainer = grpo(folder, model=model)
    else:
        trainer = grpo(folder, extra=dict(peft_config=config))
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert trainer.ref_model is None
    inputs = batch()
    moved(trainer, seed=6, size=0.3)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    base = GRPOTrainer._compute_loss(trainer, trainer.model, dict(inputs))
    kl = exact_kl(full_logits(trainer.model, inputs), full_logits(reference, inputs).detach())
    expected = base + BETA * kl[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]
    assert float(kl.detach().mean()) > 1e-3
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    got = gradients(loss, trainer.model)
    assert_same(got, gradients(expected, trainer.model))
    assert trainer.model.training and trainer.model.active_adapter == "default" and not any(".ref." in name for name in got)
    trainer.train()
    assert [entry for entry in trainer.state.log_history if entry.get("kl", 0) > 1e-4]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_are_scaled_or_capped(tmp_path, family) -> None:
    """Factor and cap are in the log-probs and in the KL, as in TRL's own; the head that is the embedding learns through both; steps are made."""
    config = FAMILIES[family]()
    config.tie_word_embeddings = True
    path = tiny(tmp_path / family, config)
    trainer, plain = moved(grpo(path, max_steps=2)), moved(grpo(path, GRPOTrainer, max_steps=2))
    inputs = batch()
    loss, expected = trainer.compute_loss(trainer.model, dict(inputs)), plain_loss(trainer, inputs)
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    assert_same(gradients(loss, trainer.model), gradients(expected, trainer.model))
    sequence = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask")]
    with torch.no_grad():
        got, own = (each._get_per_token_logps_and_entropies(each.model, *sequence, COMPLETION, compute_entropy=True) for each in (trainer, plain))
    for value, expected in zip(got[:2], own[:2], strict=True):
        testing.assert_near(value, expected, 2 * ROUNDING, 1e-12, "log-probs, entropies")
    trainer.kl_callback._micro_batches.clear()
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl/mean" in entry]
    assert len(steps) == 2 and all(step["kl/mean"] > 1e-3 and step["grad_norm"] > 0 for step in steps)


def padded(folder: str) -> torch.nn.Module:
    """The policy with three rows of padding, which would be sampled often."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(V, pad_to_multiple_of=16, mean_resizing=False)
    assert len(model.get_output_embeddings().weight) == V + 3
    return model


def test_a_padded_policy(folder) -> None:
    """Log-probs and KL are of the tokens that both models have, and no other is sampled; the padding's rows get no gradient."""
    trainer, inputs = moved(grpo(folder, model=padded(folder), max_steps=2, generation_kwargs={"suppress_tokens": [5]})), batch()
    loss, expected = trainer.compute_loss(trainer.model, dict(inputs)), plain_loss(trainer, inputs)
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    got = gradients(loss, trainer.model)
    assert_same(got, gradients(expected, trainer.model))
    assert got["lm_head.weight"].shape[0] == V + 3 and not got["lm_head.weight"][V:].any()
    trainer.kl_callback._micro_batches.clear()
    sampled, shared = [], trainer._hidden
    trainer._hidden = lambda model, ids, *rest: (sampled.append(ids), shared(model, ids, *rest))[1]
    trainer.model.lm_head.weight.data[V:] = 50 * trainer.model.lm_head.weight.data[:3]
    trainer.train()
    ids = torch.cat([value.reshape(-1) for value in sampled])
    assert trainer.generation_config.suppress_tokens == [5, V, V + 1, V + 2] and int(ids.max()) < V
    assert len([entry for entry in trainer.state.log_history if "kl/mean" in entry]) == 2


def test_a_token_that_the_reference_lacks(folder, pair) -> None:
    """An error before the reference's embedding meets it; a padded reference has all of a policy's tokens."""
    trainer, inputs = grpo(folder, model=padded(folder)), batch()
    inputs["completion_ids"][0, 1] = V + 1
    with pytest.raises(ValueError, match=rf"input_ids: expected ids below {V}, the tokens that policy and reference share, got {V + 1}; resize"):
        trainer.compute_loss(trainer.model, inputs)
    trainer = moved(grpo(folder))
    trainer.ref_model.resize_token_embeddings(V, pad_to_multiple_of=16, mean_resizing=False)
    trainer._policy_head, trainer._ref_head = shared.checked_heads(trainer, trainer.ref_model, "")
    trainer._suppress_padding()
    assert trainer.generation_config.suppress_tokens is None
    losses = [each.compute_loss(each.model, batch()) for each in (trainer, pair[0])]
    pair[0].kl_callback._micro_batches.clear()
    testing.assert_near(losses[0], losses[1], 2 * ROUNDING, 0.0, "loss")


@pytest.mark.parametrize("options, low, high", [({}, 1e-4, 0.1), (dict(cast_lm_head_to_fp32=True), 0.0, 1e-5),
                                                (dict(extra=dict(logits_dtype=torch.float32)), 0.0, 1e-5)],
                         ids=["bfloat16 logits", "head cast to float32", "float32 logits"])
def test_16_bits(tmp_path, options, low, high) -> None:
    """A bfloat16 model's KL against float64 of its hidden states: the relative error is that of the logits' type."""
    trainer = moved(grpo(tiny(tmp_path / "bfloat16", transformers.LlamaConfig(**SIZES, tie_word_embeddings=False), dtype=torch.bfloat16),
                         model_init_kwargs={"dtype": "bfloat16"}, **options))
    inputs = batch()
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    sequence = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask")]
    hidden = [trainer._hidden(model, *sequence, COMPLETION) for model in (trainer.model, trainer.ref_model)]
    assert all(value.dtype == torch.bfloat16 for value in hidden)
    logits = [value.double() @ model.lm_head.weight.double().T / TEMPERATURE
              for value, model in zip(hidden, (trainer.model, trainer.ref_model), strict=True)]
    expected = float(exact_kl(*logits)[loss_mask(inputs)].mean().detach())
    assert low <= abs(trainer._metrics["train"]["kl"][-1] / expected - 1) <= high


def test_autocast(folder) -> None:
    """bf16=True with float32 weights, as TRL trains by default: within bfloat16's rounding of the float32 loss."""
    losses = []
    for options in (dict(bf16=True), {}):
        trainer = moved(grpo(folder, **options))
        hidden = trainer._hidden(trainer.model, batch()["prompt_ids"], batch()["prompt_mask"], 2)
        losses.append((float(trainer.compute_loss(trainer.model, batch()).detach()), hidden.detach().float()))
    assert losses[0][0] != losses[1][0] == pytest.approx(losses[0][0], rel=0.05)
    assert not torch.equal(losses[0][1], losses[1][1])
    grpo(folder, bf16=True, max_steps=1).train()


# ---- what is refused


@pytest.mark.parametrize("attribute, words", [("is_fsdp_enabled", "fsdp"), ("is_deepspeed_enabled", "deepspeed"), ("_is_vlm", "multimodal"),
                                              ("aux_loss_enabled", "router_aux_loss_coef")])
def test_options_that_are_not_supported(folder, monkeypatch, attribute, words) -> None:
    """Named in the error."""
    made_with(monkeypatch, GRPOTrainer, attribute)
    with pytest.raises(ValueError, match=f"expected options that ExactGRPOTrainer supports, got .*{words}.*trl.GRPOTrainer"):
        grpo(folder)


def test_settings_that_contradict(folder) -> None:
    """They fail when the trainer is made."""
    with pytest.raises(ValueError, match="got torch_compile"):
        grpo(folder, torch_compile=True)
    with pytest.raises(TypeError, match="logits_dtype: expected None or a torch.dtype, got str; pass torch.float32"):
        grpo(folder, extra=dict(logits_dtype="float32"))
    with pytest.raises(ValueError, match="got beta below 0"):
        grpo(folder, beta=-0.1)
    with pytest.raises(ValueError, match="args.beta: expected above 0 with a KLCallback, got 0"):
        grpo(folder, beta=0.0, callbacks=[KLCallback(FixedBeta(0.1))])
    with pytest.raises(ValueError, match="expected one KLCallback, got 2"):
        grpo(folder, callbacks=[KLCallback(), KLCallback()])
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="got prompt learning"):
        grpo(folder, extra=dict(peft_config=peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))


def test_a_callback_that_comes_too_late(pair) -> None:
    with pytest.raises(ValueError, match=r"got a ExactGRPOTrainer; pass callbacks=\[callback\] when it is made"):
        KLCallback(None, KLMonitor()).attach(pair[0])


def test_a_model_with_logits_of_its_own(folder) -> None:
    """They are not what the lm_head gives and the config names, and the trainers say so, in float32 also where the difference is small."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder)
    policy.lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(ValueError, match="model: expected logits that .* got others from LlamaForCausalLM, .*; .* train with trl.GRPOTrainer"):
        grpo(folder, model=policy)
    policy.lm_head._forward_hooks.clear()
    grpo(folder, model=policy)


def test_a_head_of_zeros(tmp_path) -> None:
    """Logits of 0 are what its product gives."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "zeros")
    grpo(str(tmp_path / "zeros"))


def another_import(monkeypatch, module: object, version: str) -> None:
    """Import what checks the version once more, with this as trl."""
    monkeypatch.setitem(sys.modules, "trl", module)
    if module is not None:
        monkeypatch.setattr(module, "__version__", version)
    spec = importlib.util.spec_from_file_location("fastkl.integrations.another", shared.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_another_trl(monkeypatch) -> None:
    """Another version and none at all: an error that names the version tested and the remedy."""
    another_import(monkeypatch, trl, "1.16.3")
    for version in ("1.15.2", "1.17.0", "2.16.0", "1.160.0"):
        with pytest.raises(ImportError, match=rf"trl: expected version 1\.16, .*, got {version}; remedy: pip install 'trl==1\.16\.\*'"):
            another_import(monkeypatch, trl, version)
    with pytest.raises(ImportError, match="not installed: trl; remedy: pip install"):
        another_import(monkeypatch, None, "")


def test_a_trl_that_computes_its_loss_otherwise(pair, monkeypatch) -> None:
    """If the overridden method is not called, there is an error and not a loss without KL."""
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros((), requires_grad=True))
    with pytest.raises(RuntimeError, match="expected GRPOTrainer._compute_loss to call _get_per_token_logps_and_entropies as in 1.16"):
        pair[0].compute_loss(pair[0].model, batch())
