"""The exact KL in TRL's GKD trainer, with tiny random models: losses and gradients against TRL's own and plain torch on full logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from trl_cases import FAMILIES, ROUNDING, SIZES, V, adapter_config, assert_same, exact_kl, gkd, gradients, tiny, transformers, trl

from fastkl import testing
from fastkl.integrations.gkd import ExactGKDTrainer
from fastkl.integrations.transformers import KLCallback
from fastkl.rl import KLMonitor

GKDTrainer = trl.experimental.gkd.GKDTrainer
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random Llama, the student."""
    return tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A wider random Llama."""
    return tiny(tmp_path_factory.mktemp("teacher"), transformers.LlamaConfig(**{**SIZES, "hidden_size": 24, "initializer_range": 0.1}), seed=1)


def batch() -> dict[str, torch.Tensor]:
    """Sequences padded on the left, prompts of different lengths, a hole in one completion and a sequence without a label."""
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [1], [0]])).long()
    labels = torch.where(torch.arange(9) >= torch.tensor([[3], [5], [9], [8]]), ids, -100)
    labels[0, 5:7] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("per_token", [False, True], ids=["sum", "with a callback"])
@pytest.mark.parametrize("items", [None, 21, torch.tensor(21)], ids=["own tokens", "items", "items as a tensor"])
@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["forward", "reverse"])
def test_loss_and_gradients_are_trls(folder, teacher, beta, items, per_token) -> None:
    """In float64, in both directions; at a temperature of generation, which is not the divergence's; the teacher gets no gradient."""
    callbacks = [KLCallback(None, KLMonitor())] if per_token else []
    exact, plain = (gkd(folder, teacher, kind, callbacks, dtype=torch.float64, beta=beta) for kind in (ExactGKDTrainer, GKDTrainer))
    inputs, losses = batch(), []
    for trainer in (exact, plain):
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items))
    logits, teacher_logits = ((model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1])
                              for model in (plain.model, plain.teacher_model))
    kl = exact_kl(*((logits, teacher_logits) if beta == 1 else (teacher_logits, logits)))[inputs["labels"][:, 1:] != -100]
    assert len(kl) == 9
    for loss in losses:
        testing.assert_near(loss, kl.sum() / (9 if items is None else 21), 1e-12, 0.0, "loss")
    to_teacher = torch.autograd.grad(losses[0], list(exact.teacher_model.parameters()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in to_teacher)
    got, expected = (gradients(loss, trainer.model) for loss, trainer in zip(losses, (exact, plain), strict=True))
    testing.assert_near(got["lm_head.weight"], expected["lm_head.weight"], 1e-11, 1e-15, "gradient of the head")
    # Llama's norms are in float32, whatever the model's type: what is behind them may be rounded to either side, in several places.
    assert_same(got, expected, 4 * EPS)


# Gemma's attention in float64 gives NaN where all is masked.
@pytest.mark.parametrize("student, teacher, dtype", [("granite", "cohere", torch.float64), ("gemma", "granite", torch.float32)])
def test_models_of_different_scales_and_caps(tmp_path, student, teacher, dtype) -> None:
    """Each model's own: loss and gradients are TRL's, and two steps are made."""
    paths = [tiny(tmp_path / name, FAMILIES[name](), seed) for seed, name in enumerate((student, teacher))]
    exact, plain = (gkd(*paths, kind, dtype=dtype) for kind in (ExactGKDTrainer, GKDTrainer))
    losses = [trainer.compute_loss(trainer.model, batch()) for trainer in (exact, plain)]
    exactly = dtype == torch.float64
    testing.assert_near(losses[0], losses[1], 1e-12 if exactly else 2 * ROUNDING, 0.0, "loss")
    # Norms are in float32, whatever the model's type.
    assert_same(*(gradients(loss, trainer.model) for loss, trainer in zip(losses, (exact, plain), strict=True)), 4 * EPS if exactly else 2 * ROUNDING)
    exact.train()
    assert all(entry["loss"] > 1e-2 for entry in exact.state.log_history if "loss" in entry) and exact.state.global_step == 2


def test_outputs_and_evaluation(folder, teacher) -> None:
    """return_outputs gives what the model returns, without gradient; evaluation is the mean over each batch's tokens, as TRL's; a batch without
    labels is 0."""
    exact, plain = (gkd(folder, teacher, kind) for kind in (ExactGKDTrainer, GKDTrainer))
    inputs = batch()
    results = [trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True) for trainer in (exact, plain)]
    testing.assert_near(results[0][0], results[1][0], 2 * ROUNDING, 0.0, "loss")
    assert torch.equal(results[0][1].logits, results[1][1].logits) and not results[0][1].logits.requires_grad
    losses = [trainer.evaluate()["eval_loss"] for trainer in (exact, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2 * ROUNDING) and losses[0] > 0.1
    nothing = exact.compute_loss(exact.model, {**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert not any(bool(parameter.grad.any()) for parameter in exact.model.parameters() if parameter.grad is not None)


def test_training_is_trls(folder, teacher) -> None:
    """Two steps of SGD with two micro-batches of different numbers of tokens each: losses and weights; the monitor's mean is the loss."""
    exact, plain = gkd(folder, teacher, callbacks=[KLCallback(None, KLMonitor())]), gkd(folder, teacher, GKDTrainer)
    before = {name: value.clone() for name, value in exact.model.named_parameters()}
    logs = []
    for trainer in (exact, plain):
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert [entry["loss"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[1]], rel=2 * ROUNDING)
    assert [entry["kl/mean"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=2 * ROUNDING)
    assert len(logs[0]) == 2 and logs[0][0]["kl/mean"] > 0.1
    for (name, got), expected in zip(exact.model.named_parameters(), plain.model.parameters(), strict=True):
        # The weights are rounded themselves, in each of the two steps.
        step = float((expected - before[name]).detach().norm())
        assert step > 0 and float((got - expected).detach().norm()) <= 4 * ROUNDING * step + 2 * EPS * float(expected.detach().norm()), name


@pytest.mark.parametrize("options", [dict(lmbda=1.0), dict(seq_kd=True)], ids=["the student's", "the teacher's"])
def test_training_on_what_is_generated(folder, teacher, options) -> None:
    """Completions of the student, or of the teacher."""
    trainer = gkd(folder, teacher, callbacks=[KLCallback(None, KLMonitor())], **options)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl/mean" in entry]
    assert len(steps) == 2 and all(step["kl/mean"] > 0.1 and 0 < step["kl/tokens"] <= 24 for step in steps)


@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["forward", "reverse"])
def test_peft(folder, teacher, beta) -> None:
    """The adapter learns, and nothing else; loss and gradients are TRL's; a step is made."""
    exact, plain = (gkd(folder, teacher, kind, extra=dict(peft_config=adapter_config()), beta=beta) for kind in (ExactGKDTrainer, GKDTrainer))
    plain.model.load_state_dict(exact.model.state_dict())
    losses = [trainer.compute_loss(trainer.model, batch()) for trainer in (exact, plain)]
    testing.assert_near(losses[0], losses[1], 2 * ROUNDING, 0.0, "loss")
    got = gradients(losses[0], exact.model)
    assert got and all("lora" in name for name in got)
    assert_same({name: value for name, value in got.items() if "lora_B" in name},
                {name: value for name, value in gradients(losses[1], plain.model).items() if "lora_B" in name})
    exact.train()


def test_autocast(folder, teacher) -> None:
    """bf16=True with float32 weights: hidden states and logits of bfloat16, within its rounding of the float32 loss; logits_dtype goes through."""
    losses = [float(trainer.compute_loss(trainer.model, batch()).detach()) for trainer in (
        gkd(folder, teacher), gkd(folder, teacher, bf16=True), gkd(folder, teacher, bf16=True, extra=dict(logits_dtype=torch.float32)))]
    assert len(set(losses)) == 3 and losses[1:] == pytest.approx(losses[:1] * 2, rel=0.05)
    gkd(folder, teacher, bf16=True, max_steps=1).train()


def test_inside_ddps_forward(folder, teacher, tmp_path) -> None:
    """DDP prepares its reduction in its own forward: without it, gradients of other processes would be left out."""
    trainer = gkd(folder, teacher)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped, reduced = DistributedDataParallel(trainer.model), []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(2 * bucket.buffer())
            return future

        wrapped.register_comm_hook(None, hook)
        trainer.compute_loss(wrapped, batch()).backward()
    finally:
        torch.distributed.destroy_process_group()
    twice = {name: parameter.grad / 2 for name, parameter in trainer.model.named_parameters()}
    assert sum(reduced) == sum(parameter.numel() for parameter in trainer.model.parameters())
    assert_same(twice, gradients(trainer.compute_loss(trainer.model, batch()), trainer.model))


# ---- what is refused


def test_models_that_are_not_supported(folder, teacher) -> None:
    """They fail when the trainer is made; what it refuses as the other trainer does is in test_integrations_distillation.py."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="got prompt learning"):
        gkd(folder, teacher, extra=dict(peft_config=peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))
