"""The exact KL in TRL's distillation trainer, with tiny random models: losses and gradients against plain torch on full logits, and TRL's own."""

from __future__ import annotations

import operator

import pytest
import torch
from trl_cases import (
    FAMILIES,
    ROUNDING,
    SIZES,
    adapter_config,
    assert_same,
    batch,
    distillation,
    exact_kl,
    full_logits,
    gkd,
    gradients,
    loss_mask,
    made_with,
    tiny,
    transformers,
    trl,
)

from fastkl import testing
from fastkl.integrations.transformers import KLCallback
from fastkl.integrations.trl import ExactDistillationTrainer
from fastkl.rl import FixedBeta, KLMonitor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random Llama, the student."""
    return tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A wider random Llama."""
    return tiny(tmp_path_factory.mktemp("teacher"), transformers.LlamaConfig(**{**SIZES, "hidden_size": 24, "initializer_range": 0.1}), seed=1)


@pytest.mark.parametrize("per_token", [False, True], ids=["sum", "with a callback"])
@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["forward", "reverse"])
def test_distillation_equals_plain_torch_and_trl(folder, teacher, beta, per_token) -> None:
    """Loss and gradients, in both directions; under no_grad the mean over the batch's own tokens."""
    trainer = distillation(folder, teacher, beta=beta, callbacks=[KLCallback(None, KLMonitor())] if per_token else [])
    plain = distillation(folder, teacher, trl.DistillationTrainer, beta=beta)
    inputs = batch()
    for each in (trainer, plain):
        each.model.train()
    losses = [each.compute_loss(each.model, dict(inputs)) for each in (trainer, plain)]
    student_logits = full_logits(trainer.model, inputs)
    teacher_logits = full_logits(trainer.teacher_model, inputs).detach()
    kl = exact_kl(student_logits, teacher_logits) if beta == 1 else exact_kl(teacher_logits, student_logits)
    expected = kl[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]
    for loss, name in zip(losses, ("loss", "TRL's loss"), strict=True):
        testing.assert_near(loss, expected, ROUNDING, 0.0, name)
    to_teacher = torch.autograd.grad(losses[0], list(trainer.teacher_model.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in to_teacher)
    got = gradients(losses[0], trainer.model)
    assert_same(got, gradients(expected, trainer.model))
    assert_same(got, gradients(losses[1], plain.model))
    trainer.model.eval()
    with torch.no_grad():
        testing.assert_near(trainer.compute_loss(trainer.model, dict(inputs)), kl[loss_mask(inputs)].mean(), ROUNDING, 0.0, "evaluation")


PAIRS = pytest.mark.parametrize("student, teacher", [("granite", "cohere"), ("cohere", "gemma"), ("gemma", "granite")])


@PAIRS
@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["forward", "reverse"])
def test_models_of_different_scales_and_caps(tmp_path, student, teacher, beta) -> None:
    """Each model's own: loss and gradients are TRL's and those of the models' own logits, and two steps are made."""
    paths = [tiny(tmp_path / name, FAMILIES[name](), seed) for seed, name in enumerate((student, teacher))]
    trainer, plain = (distillation(*paths, kind, beta=beta) for kind in (ExactDistillationTrainer, trl.DistillationTrainer))
    inputs = batch()
    losses = [each.compute_loss(each.model.train(), dict(inputs)) for each in (trainer, plain)]
    logits = [full_logits(trainer.model, inputs), full_logits(trainer.teacher_model, inputs).detach()]
    expected = exact_kl(*(logits if beta == 1 else logits[::-1]))[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]
    for loss in losses:
        testing.assert_near(loss, expected, 2 * ROUNDING, 0.0, "loss")
    got = gradients(losses[0], trainer.model)
    assert_same(got, gradients(expected, trainer.model))
    assert_same(got, gradients(losses[1], plain.model))
    trainer.train()
    assert all(entry["loss"] > 1e-2 for entry in trainer.state.log_history if "loss" in entry) and trainer.state.global_step == 2


def test_distillation_training(folder, teacher) -> None:
    """A few steps with a monitor, whose mean is the loss, and without; LoRA students too."""
    trainer = distillation(folder, teacher, callbacks=[KLCallback(None, KLMonitor())], max_steps=3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl/mean" in entry]
    assert len(steps) == 3 and all("entropy" not in step for step in steps)
    assert [step["kl/mean"] for step in steps] == pytest.approx([step["loss"] for step in steps], rel=1e-4)
    distilled = distillation(folder, teacher, extra=dict(peft_config=adapter_config(), logits_dtype=torch.float32))
    distilled.train()
    assert [entry["loss"] for entry in distilled.state.log_history if "loss" in entry][0] > 0.1


# ---- what both distillation trainers refuse


BOTH = pytest.mark.parametrize("make, name", [(distillation, "DistillationTrainer"), (gkd, "experimental.gkd.GKDTrainer")],
                               ids=["distillation", "gkd"])


@BOTH
@pytest.mark.parametrize("attribute, words", [("is_fsdp_enabled", "fsdp"), ("is_deepspeed_enabled", "deepspeed"), ("_is_vlm", "multimodal")])
def test_options_that_are_not_supported(folder, teacher, monkeypatch, make, name, attribute, words) -> None:
    """Named in the error, with the trainer to use instead."""
    made_with(monkeypatch, operator.attrgetter(name)(trl), attribute)
    with pytest.raises(ValueError, match=f"expected options that Exact{name.rpartition('.')[2]} supports, got .*{words}.*trl.{name}"):
        make(folder, teacher)


@BOTH
def test_settings_that_are_not_supported(folder, teacher, tmp_path, make, name) -> None:
    """They fail when the trainer is made."""
    with pytest.raises(ValueError, match=rf"args.beta: expected 0 \(forward KL\) or 1 \(reverse KL\), got 0.5; use trl.{name}"):
        make(folder, teacher, beta=0.5)
    with pytest.raises(ValueError, match="got torch_compile"):
        make(folder, teacher, torch_compile=True)
    with pytest.raises(TypeError, match="logits_dtype: expected None or a torch.dtype, got str; pass torch.float32"):
        make(folder, teacher, extra=dict(logits_dtype="float32"))
    with pytest.raises(ValueError, match="expected a KLCallback without controller"):
        make(folder, teacher, callbacks=[KLCallback(FixedBeta(0.1))])
    with pytest.raises(ValueError, match="expected one KLCallback, got 2"):
        make(folder, teacher, callbacks=[KLCallback(), KLCallback()])
    wider = tiny(tmp_path / "wider", transformers.LlamaConfig(**{**SIZES, "vocab_size": 64}))
    with pytest.raises(ValueError, match="vocab_size"):
        make(folder, wider)


def test_distillation_without_a_teacher(folder) -> None:
    with pytest.raises(ValueError, match="got no teacher_model"):
        distillation(folder, None)
