"""The exact KL in TRL's GRPO and distillation trainers: losses and gradients of tiny random models
against plain torch on full logits, and against TRL's own."""

import contextlib
import copy
import itertools
import math
import operator
import runpy
import sys
import types

import family
import pytest
import torch
import trl_cases
from trl_cases import (
    BETA,
    COMPLETION,
    FAMILIES,
    ROUNDING,
    STUDENT,
    TEMPERATURE,
    V,
    assert_loss,
    batch,
    exact_kl,
    full_logits,
    k3_of,
    load,
    logged,
    logprobs,
    loss_mask,
    made,
    moved,
    perturb,
    plain_loss,
    tiny,
    trl,
)

from fastkl import testing
from fastkl.integrations.gkd import ExactGKDTrainer
from fastkl.integrations.transformers import KLCallback
from fastkl.integrations.trl import ExactDistillationTrainer, ExactGRPOTrainer
from fastkl.rl import AdaptiveBeta, FixedBeta, KLMonitor

GRPOTrainer = trl.GRPOTrainer
GRPO = ExactGRPOTrainer, GRPOTrainer
# A KL of about 0.05 is a mean of differences of log-probs of about 4.
KL_ROUNDING = 4 / 0.05 * ROUNDING


@pytest.fixture(scope="module")
def pair() -> tuple[ExactGRPOTrainer, GRPOTrainer]:
    # With the same policy, which is no longer the reference.
    return tuple(moved(made(kind, use_bias_correction_kl=False)) for kind in GRPO)


# ---- GRPO


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
def test_grpo_equals_plain_torch(pair, old) -> None:
    assert_loss(pair[0], batch(old), plain_loss(pair[0], batch(old)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "loss_type", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
)
def test_every_loss_type_reduces_the_kl_as_trl_does(pair, monkeypatch, loss_type, training) -> None:
    # TRL's own loss gets reference log-probs with which its estimate is the exact KL.
    exact, inputs = pair[0], batch()
    with torch.no_grad():
        logits, ref_logits = (full_logits(each, inputs) for each in (exact.model, exact.ref_model))
    inputs["ref_per_token_logps"] = logprobs(logits, inputs) + k3_of(exact_kl(logits, ref_logits))
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


def test_beta_zero_is_trls_own_loss() -> None:
    exact, plain = (moved(made(kind, beta=0.0, entropy_coef=0.01)) for kind in GRPO)
    expected = plain.compute_loss(plain.model, batch())
    assert_loss(exact, batch(), expected, 2 * ROUNDING, model=plain.model)
    assert exact.ref_model is None and exact.kl_callback is None and exact.kl_weight == 0
    metrics, own = exact._metrics["train"], plain._metrics["train"]
    assert metrics["entropy"] == pytest.approx(own["entropy"], rel=2 * ROUNDING)
    assert "kl" not in metrics


def test_training_with_a_controller() -> None:
    controller, alone = (AdaptiveBeta(BETA, target=0.05, horizon=1.0) for _ in range(2))
    trainer = made(
        ExactGRPOTrainer,
        callbacks=[KLCallback(controller, KLMonitor())],
        max_steps=4,
        eval_strategy="steps",
        eval_steps=4,
    )
    reference = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    torch.testing.assert_close(trainer.ref_model.state_dict(), reference, rtol=0, atol=0)
    means = logged(trainer, "kl/mean")
    assert len(means) == 4 and means[0] == 0.0 and min(means[1:]) > 1e-3
    betas = [alone.beta, *map(alone.update, means)]
    assert len(set(betas)) == 5 and trainer.kl_weight == pytest.approx(betas[-1], rel=1e-5)
    assert logged(trainer, "kl/beta") == pytest.approx(betas[:-1], rel=1e-5)
    # TRL's metric is a mean of the micro-batches' means.
    assert logged(trainer, "kl") == pytest.approx(means, rel=0.2)
    assert logged(trainer, "entropy")[0] > 0
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_kl"] > 1e-3 and "kl/mean" not in evaluation


def test_the_weight_is_the_controllers() -> None:
    trainer = moved(made(ExactGRPOTrainer, beta=0.9, callbacks=[KLCallback(FixedBeta(BETA))]))
    assert_loss(trainer, batch(), plain_loss(trainer, batch()))


def test_a_generation_used_twice_runs_the_reference_once() -> None:
    trainer, runs = made(ExactGRPOTrainer, num_iterations=2, max_steps=2), []
    trainer.ref_model.base_model.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    assert len(runs) == 2
    assert logged(trainer, "kl/mean")[0] == 0.0 and logged(trainer, "kl/mean")[1] > 1e-3


@pytest.mark.parametrize("given", [False, True], ids=["new adapter", "adapter with the model"])
def test_grpo_peft(given) -> None:
    # The reference is the model without its adapter, or with the adapter as it came.
    model, extra = load(STUDENT), dict(peft_config=trl_cases.LORA)
    if given:
        model, extra = trl_cases.peft.get_peft_model(model, trl_cases.LORA), {}
        perturb(model, 0.3)
    reference = copy.deepcopy(model)
    trainer, inputs = made(ExactGRPOTrainer, model, extra=extra), batch()
    assert trainer.ref_model is None
    moved(trainer, seed=6, size=0.3)
    base = GRPOTrainer._compute_loss(trainer, trainer.model, dict(inputs))
    kl = exact_kl(full_logits(trainer.model, inputs), full_logits(reference, inputs).detach())
    assert float(kl.detach().mean()) > 1e-3
    expected = base + BETA * kl[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]
    assert not any(".ref." in name for name in assert_loss(trainer, inputs, expected))
    assert trainer.model.training and trainer.model.active_adapter == "default"
    trainer.train()
    assert max(logged(trainer, "kl")) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_with_scaled_or_capped_logits(tmp_path, family) -> None:
    config, inputs = FAMILIES[family](), batch()
    config.tie_word_embeddings = True
    path = tiny(tmp_path / family, config)
    trainer, plain = (moved(made(kind, path)) for kind in GRPO)
    assert_loss(trainer, inputs, plain_loss(trainer, inputs))
    # In parts as well, as TRL asks for log-probs and entropies beside the generation.
    asked = [*trl_cases.sequence(inputs), COMPLETION]
    with torch.no_grad():
        got, parts, own = (
            each._get_per_token_logps_and_entropies(each.model, *asked, size, compute_entropy=True)
            for each, size in ((trainer, None), (trainer, 3), (plain, None))
        )
    for value, part, expected in zip(got[:2], parts[:2], own[:2], strict=True):
        testing.assert_near(value, expected, 2 * ROUNDING, 1e-12, "log-probs, entropies")
        testing.assert_near(part, expected, 2 * ROUNDING, 1e-12, "log-probs, entropies in parts")


def padded() -> torch.nn.Module:
    """Load the model with three rows of padding, which would be sampled often."""
    model = load(STUDENT)
    model.resize_token_embeddings(V, pad_to_multiple_of=16, mean_resizing=False)
    return model


def test_a_padded_policy() -> None:
    # Log-probs and KL are of the tokens that both models have, and no other is sampled.
    options = dict(max_steps=2, generation_kwargs={"suppress_tokens": [5]})
    trainer, inputs, seen = moved(made(ExactGRPOTrainer, padded(), **options)), batch(), []
    head = assert_loss(trainer, inputs, plain_loss(trainer, inputs))["lm_head.weight"]
    assert head.shape[0] == V + 3 and not head[V:].any()
    trainer.ref_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(int(args[0].max()))
    )
    trainer.model.lm_head.weight.data[V:] = 50 * trainer.model.lm_head.weight.data[:3]
    trainer.train()
    assert trainer.generation_config.suppress_tokens == [5, V, V + 1, V + 2] and max(seen) < V
    inputs["completion_ids"][0, 1] = V + 1
    with pytest.raises(ValueError, match=f"input_ids: expected ids below {V}, .*, got {V + 1}; "):
        trainer.compute_loss(trainer.model, inputs)


def test_a_padded_reference(tmp_path, pair) -> None:
    policy = load(STUDENT)
    padded().save_pretrained(tmp_path)
    policy.config._name_or_path = str(tmp_path)  # where TRL loads the reference from
    trainer = moved(made(ExactGRPOTrainer, policy))
    assert len(trainer.ref_model.lm_head.weight) == V + 3
    assert trainer.generation_config.suppress_tokens is None
    expected = pair[0].compute_loss(pair[0].model, batch())
    assert_loss(trainer, batch(), expected, 2 * ROUNDING, model=pair[0].model)


@pytest.mark.parametrize(
    "options, low, high",
    [
        ({}, 1e-4, 0.1),
        (dict(cast_lm_head_to_fp32=True), 0.0, 1e-5),
        (dict(extra=dict(logits_dtype=torch.float32)), 0.0, 1e-5),
    ],
    ids=["bfloat16 logits", "head cast to float32", "float32 logits"],
)
def test_16_bits(tmp_path, options, low, high) -> None:
    # Against float64 of the hidden states, the KL's error is that of the logits' type.
    config = trl_cases.transformers.LlamaConfig(**trl_cases.SIZES, tie_word_embeddings=False)
    path, inputs = tiny(tmp_path, config, dtype=torch.bfloat16), batch()
    trainer = moved(
        made(
            ExactGRPOTrainer,
            path,
            dtype=torch.bfloat16,
            model_init_kwargs={"dtype": "bfloat16"},
            **options,
        )
    )
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    logits, (ids, mask) = [], trl_cases.sequence(inputs)
    for model in (trainer.model, trainer.ref_model):
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert hidden.dtype == torch.bfloat16
        scores = hidden[:, -COMPLETION - 1 : -1].double() @ model.lm_head.weight.double().T
        logits.append(scores / TEMPERATURE)
    expected = float(exact_kl(*logits)[loss_mask(inputs)].mean().detach())
    assert low <= abs(trainer._metrics["train"]["kl"][-1] / expected - 1) <= high


# ---- distillation


@pytest.mark.parametrize(
    "families, per_token, beta",
    [
        ((), False, 0.0),
        ((), True, 1.0),
        (("granite", "cohere"), False, 1.0),
        (("cohere", "gemma"), True, 0.0),
        (("granite", "gemma"), False, 0.1),
        ((), True, 0.5),
    ],
)
def test_distillation(tmp_path, families, per_token, beta) -> None:
    paths = [tiny(tmp_path / name, FAMILIES[name](), seed) for seed, name in enumerate(families)]
    callbacks, inputs = [KLCallback(None, KLMonitor())] if per_token else [], batch()
    trainer = made(ExactDistillationTrainer, *paths, beta=beta, callbacks=callbacks)
    trainer.model.train()
    student, theirs = full_logits(trainer.model, inputs), full_logits(trainer.teacher_model, inputs)
    logs = [logits.log_softmax(-1) for logits in (theirs.detach(), student)]
    logs, kind = (logs[::-1] if beta == 1 else logs), "js" if 0 < beta < 1 else "kl"
    kl = family.textbook(*logs, kind, beta)[loss_mask(inputs)]
    assert_loss(trainer, inputs, kl.sum() / inputs["num_items_in_batch"], 2 * ROUNDING)
    trainer.model.eval()
    with torch.no_grad():
        evaluated = trainer.compute_loss(trainer.model, dict(inputs))
    testing.assert_near(evaluated, kl.mean(), 2 * ROUNDING, 0.0, "over the batch's own tokens")
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and min(losses) > 1e-2 and not logged(trainer, "entropy")
    if per_token:
        assert logged(trainer, "kl/mean") == pytest.approx(losses, rel=1e-4)


# ---- what is refused when a trainer is made, the GKD trainer among them


TRAINERS = {
    "GRPOTrainer": ExactGRPOTrainer,
    "DistillationTrainer": ExactDistillationTrainer,
    "experimental.gkd.GKDTrainer": ExactGKDTrainer,
}
DISTILLERS = [name for name in TRAINERS if name != "GRPOTrainer"]
FLAGS = {
    "is_fsdp_enabled": "fsdp",
    "is_deepspeed_enabled": "deepspeed",
    "_is_vlm": "multimodal",
}


@pytest.mark.parametrize(
    "name, flag",
    [*itertools.product(TRAINERS, FLAGS), ("GRPOTrainer", "aux_loss_enabled")],
)
def test_refused_without_the_hardware_or_model(monkeypatch, name, flag) -> None:
    kind = operator.attrgetter(name)(trl)
    original, words = kind.__init__, FLAGS.get(flag, "router_aux_loss_coef")

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        setattr(self, flag, True)

    monkeypatch.setattr(kind, "__init__", init)
    with pytest.raises(ValueError, match=f"args: expected .*, got .*{words}.*trl.{name}"):
        made(TRAINERS[name])


WEIGHTED = dict(callbacks=[KLCallback(FixedBeta(0.1))])
REFUSED = [
    (TRAINERS, dict(torch_compile=True), "args: .* got torch_compile"),
    (TRAINERS, dict(extra=dict(logits_dtype="float32")), "logits_dtype: .*, got str; "),
    (TRAINERS, dict(callbacks=[KLCallback(), KLCallback()]), "callbacks: expected one .*, got 2"),
    # The distillation trainer of TRL refuses it itself.
    (
        ["GRPOTrainer", "experimental.gkd.GKDTrainer"],
        dict(
            extra=dict(
                peft_config=trl_cases.peft.PromptTuningConfig(
                    num_virtual_tokens=2, task_type="CAUSAL_LM"
                )
            )
        ),
        "model: .*, got LlamaForCausalLM with prompt learning",
    ),
    (DISTILLERS, dict(beta=math.nan), r"args.beta: expected a number in \[0, 1\], got nan; "),
    (DISTILLERS, WEIGHTED, "callbacks: expected a KLCallback without controller"),
    (["DistillationTrainer"], dict(teacher=None), "args: .*, got no teacher_model"),
    (["GRPOTrainer"], dict(beta=-0.1), "args: .*, got beta below 0"),
    (["GRPOTrainer"], dict(beta=0.0, **WEIGHTED), "args.beta: expected above 0 .*, got 0"),
]


@pytest.mark.parametrize(
    "name, options, words",
    [(name, options, words) for names, options, words in REFUSED for name in names],
)
def test_refused_settings(name, options, words) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        made(TRAINERS[name], **options)


def test_late_callbacks(pair) -> None:
    with pytest.raises(ValueError, match="trainer: .* got a ExactGRPOTrainer; pass callbacks="):
        KLCallback().attach(pair[0])


@pytest.mark.parametrize("version", ["1.16.3", "1.15.2", "1.17.0", "2.16.0", "1.160.0", None])
def test_another_trl(monkeypatch, version) -> None:
    monkeypatch.setitem(sys.modules, "trl", version and types.SimpleNamespace(__version__=version))
    words = f"trl: expected version 1.16, .*, got {version}" if version else "not installed: trl"
    error = pytest.raises(ImportError, match=rf"{words}; remedy: pip install 'trl==1\.16\.\*'")
    with contextlib.nullcontext() if version == "1.16.3" else error:
        runpy.run_module("fastkl.integrations._trl")


def test_a_trl_that_computes_its_loss_otherwise(pair, monkeypatch) -> None:
    trainer = pair[0]
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros(()))
    with pytest.raises(RuntimeError, match="trl: expected GRPOTrainer._compute_loss to call"):
        trainer.compute_loss(trainer.model, batch())
