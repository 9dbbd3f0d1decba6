"""The exact KL in TRL's GKD trainer: losses and gradients of tiny random models against TRL's own
and plain torch on full logits; adapters and autocast in the other trainers too. test_trl.py has the
refused settings of all trainers.
"""

import pytest
import torch
import trl_cases
from trl_cases import (
    EPS,
    LORA,
    ROUNDING,
    V,
    assert_loss,
    gradients,
    logged,
    made,
    moved,
    perturb,
    trl,
)

from fastkl import testing
from fastkl.integrations.gkd import ExactGKDTrainer
from fastkl.integrations.transformers import KLCallback
from fastkl.integrations.trl import ExactDistillationTrainer, ExactGRPOTrainer
from fastkl.rl import KLMonitor

KINDS = (ExactGKDTrainer, trl_cases.gkd.GKDTrainer)


def batch() -> dict[str, torch.Tensor]:
    """Make sequences padded on the left: one has a hole in its completion, one has no label."""
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [1], [0]])).long()
    labels = torch.where(torch.arange(9) >= torch.tensor([[3], [5], [9], [8]]), ids, -100)
    labels[0, 5:7] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "beta, items, per_token",
    [
        *((0.0, None, False), (1.0, 21, False), (0.0, torch.tensor(21), True), (1.0, None, True)),
        *((0.5, None, False), (0.1, torch.tensor(21), False), (0.9, 21, True)),
    ],
)
def test_loss_and_gradients_are_trls(beta, items, per_token) -> None:
    # In float64; the temperature is that of generation and not the divergence's.
    options = dict(dtype=torch.float64, beta=beta)
    callbacks, inputs = [KLCallback(None, KLMonitor())] if per_token else [], batch()
    exact = made(KINDS[0], callbacks=callbacks, **options)
    plain = made(KINDS[1], **options)
    own = plain.compute_loss(plain.model, dict(inputs), num_items_in_batch=items)
    # Llama's norms are in float32, whatever the model's type, and round to either side.
    options = dict(model=plain.model, gradient=4 * EPS, num_items_in_batch=items)
    head = assert_loss(exact, inputs, own, 1e-12, **options)["lm_head.weight"]
    testing.assert_near(
        head, gradients(own, plain.model)["lm_head.weight"], 1e-11, 1e-15, "gradient of the head"
    )


@pytest.mark.parametrize(
    "kinds, inputs",
    [
        (KINDS, batch()),
        ((ExactDistillationTrainer, trl.DistillationTrainer), trl_cases.batch()),
    ],
    ids=["gkd", "distillation"],
)
def test_peft(kinds, inputs) -> None:
    exact, plain = (made(kind, extra=dict(peft_config=LORA)) for kind in kinds)
    perturb(exact.model)
    plain.model.load_state_dict(exact.model.state_dict())
    own = plain.compute_loss(plain.model, dict(inputs))
    assert all(
        "lora" in name for name in assert_loss(exact, inputs, own, 2 * ROUNDING, model=plain.model)
    )
    exact.train()


def test_outputs_and_evaluation() -> None:
    exact, plain = (made(kind) for kind in KINDS)
    loss, outputs = exact.compute_loss(exact.model, batch(), return_outputs=True)
    own, own_outputs = plain.compute_loss(plain.model, batch(), return_outputs=True)
    testing.assert_near(loss, own, 2 * ROUNDING, 0.0, "loss")
    assert torch.equal(outputs.logits, own_outputs.logits) and not outputs.logits.requires_grad
    loss, own_loss = (trainer.evaluate()["eval_loss"] for trainer in (exact, plain))
    assert loss == pytest.approx(own_loss, rel=2 * ROUNDING) and loss > 0.1
    nothing = exact.compute_loss(exact.model, {**batch(), "labels": torch.full((4, 9), -100)})
    assert float(nothing.detach()) == 0.0
    assert not any(bool(value.any()) for value in gradients(nothing, exact.model).values())


# GKD's own: half of each model, half of the completions generated.
DEFAULTS = {
    name: getattr(trl_cases.gkd.GKDConfig, name)
    for name in ("beta", "lmbda", "temperature", "optim")
}


# Float64 models to the digits of the losses that Trainer adds up and logs, in float32.
@pytest.mark.parametrize(
    "dtype, options, tolerance",
    [
        (torch.float32, {}, 2 * ROUNDING),
        (torch.float64, {"beta": 0.1}, 4 * EPS),
        (torch.float64, DEFAULTS, 4 * EPS),
    ],
)
def test_training_is_trls(dtype, options, tolerance) -> None:
    # Two steps, with two micro-batches of different numbers of tokens each: the loss of the second
    # is of weights that the first has moved.
    exact = made(KINDS[0], callbacks=[KLCallback(None, KLMonitor())], dtype=dtype, **options)
    plain = made(KINDS[1], dtype=dtype, **options)
    for trainer in (exact, plain):
        trl_cases.transformers.set_seed(0)
        trainer.train()
    losses, own, means = logged(exact, "loss"), logged(plain, "loss"), logged(exact, "kl/mean")
    assert losses == pytest.approx(own, rel=tolerance) and len(losses) == 2
    # With generated completions the loss is over another number of tokens.
    assert "lmbda" in options or means == pytest.approx(losses, rel=2 * ROUNDING)
    assert abs(own[1] - own[0]) > 1e-4


@pytest.mark.parametrize(
    "kind, inputs",
    [
        (ExactGKDTrainer, batch()),
        (ExactDistillationTrainer, trl_cases.batch()),
        (ExactGRPOTrainer, trl_cases.batch()),
    ],
)
def test_autocast(kind, inputs) -> None:
    # Within bfloat16's rounding of the float32 loss; logits_dtype goes through.
    options = ({}, dict(bf16=True), dict(bf16=True, extra=dict(logits_dtype=torch.float32)))
    trainers = [moved(made(kind, max_steps=1, **each)) for each in options]
    losses = [float(each.compute_loss(each.model, dict(inputs)).detach()) for each in trainers]
    assert len(set(losses)) == 3 and losses[1:] == pytest.approx(losses[:1] * 2, rel=0.05)
    trainers[1].train()


def test_inside_the_wrappers_forward() -> None:
    # DDP prepares its reduction in its own forward: outside, other processes' gradients are lost.
    trainer, within = made(KINDS[0]), []
    wrapped = torch.nn.DataParallel(trainer.model)
    wrapped.register_forward_pre_hook(lambda *_: within.append("begins"))
    wrapped.register_forward_hook(lambda *_: within.append("ends"))
    trainer.model.base_model.register_forward_hook(lambda *_: within.append("states"))
    trainer.compute_loss(wrapped, batch())
    assert within == ["begins", "states", "ends"]
