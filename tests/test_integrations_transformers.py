"""KLCallback in transformers' Trainer, with a tiny random model: what it logs, what beta the next step uses, a resumed run."""

from __future__ import annotations

import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import fastkl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkl.integrations.transformers import KLCallback  # noqa: E402
from fastkl.rl import AdaptiveBeta, FixedBeta, KLMonitor, PPOAdaptiveBeta  # noqa: E402

V, LENGTH = 61, 7


class Tokens(torch.utils.data.Dataset):
    """Sixteen random sequences; the first LENGTH - i % 3 tokens of sequence i count."""

    def __init__(self) -> None:
        self.ids = torch.randint(V, (16, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": (torch.arange(LENGTH) < LENGTH - index % 3).long()}


def tiny(seed: int) -> torch.nn.Module:
    """A random Llama; weights of ten times the usual size, so that two seeds differ by a KL of about 0.1."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2))


class Penalised(transformers.Trainer):
    """A Trainer with a KL penalty in its loss, as a user would write it; `kept` is what each micro-batch had."""

    def __init__(self, *args, penalty=None, callback=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.penalty, self.callback, self.kept, self.reference = penalty, callback, [], tiny(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean log-prob of the tokens, plus the penalty."""
        logits, mask = model(**inputs).logits, inputs["attention_mask"].bool()
        with torch.no_grad():
            ref_logits = self.reference(**inputs).logits
        kl = fastkl.kl_divergence(logits, ref_logits, mask=mask)
        if self.callback is not None:
            self.callback.record(kl, mask)
        loss = -logits.float().log_softmax(-1).mean() + (self.penalty(logits, ref_logits, mask) if self.penalty is not None else 0.01 * kl.mean())
        if torch.is_grad_enabled():
            self.kept.append((kl.detach(), mask, None if self.penalty is None else self.penalty.beta))
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def trainer_of(folder, *, callbacks=(), penalty=None, callback=None, **options) -> Penalised:
    """Two micro-batches of two sequences per optimizer step, four steps an epoch."""
    defaults = dict(output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1, use_cpu=True,
                    report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2, remove_unused_columns=False, seed=3)
    arguments = transformers.TrainingArguments(**{**defaults, **options})
    trainer = Penalised(tiny(0), arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks), penalty=penalty,
                        callback=callback)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def step_means(trainer: Penalised) -> list[tuple[float, float, float]]:
    """(mean KL per token, per sequence, largest) of each optimizer step, from what the loss saw."""
    means = []
    for first in range(0, len(trainer.kept), 2):
        kl = torch.cat([kl[mask] for kl, mask, _ in trainer.kept[first:first + 2]])
        rows = sum(len(kl) for kl, _, _ in trainer.kept[first:first + 2])
        means.append((float(kl.mean()), float(kl.sum()) / rows, float(kl.max())))
    return means


def logged(trainer: Penalised, name: str) -> list[float]:
    """A figure of the training logs."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_monitor_and_controller_once_per_optimizer_step(tmp_path) -> None:
    """Figures of both micro-batches in log_history, the JSON file has the same; beta moves as the controller alone would move it."""
    controller, alone = (AdaptiveBeta(0.1, target=0.05, horizon=1.0) for _ in range(2))
    monitor = KLMonitor(threshold=0.1, jsonl=tmp_path / "kl.jsonl")
    callback = KLCallback(controller, monitor)
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, penalty=fastkl.KLPenalty(controller))
    trainer.train()
    means = step_means(trainer)
    assert len(means) == 4
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=1e-5)
    assert logged(trainer, "kl/max") == pytest.approx([largest for _, _, largest in means], rel=1e-5)
    betas = [alone.beta] + [alone.update(mean) for mean, _, _ in means]
    assert len(set(betas)) == 5
    assert logged(trainer, "kl/beta") == pytest.approx(betas[:-1], rel=1e-5)
    assert [beta for _, _, beta in trainer.kept[::2]] == pytest.approx(betas[:-1], rel=1e-5) == [beta for _, _, beta in trainer.kept[1::2]]
    assert controller.beta == pytest.approx(betas[-1], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "kl.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["kl/mean"] for line in lines] == logged(trainer, "kl/mean")
    assert [line["kl/tokens"] for line in lines] == [sum(int(mask.sum()) for _, mask, _ in trainer.kept[i:i + 2]) for i in range(0, 8, 2)]
    assert sum(monitor.profile()["tokens"]) == sum(int(mask.sum()) for _, mask, _ in trainer.kept)
    assert len(monitor.profile()["kl"]) == LENGTH


def test_a_penalty_is_enough(tmp_path) -> None:
    """Nothing but penalty=: the mean over the micro-batches' tokens, which are not equally many, moves the beta that the penalty reads next.

    Evaluation calls the penalty too, and adds nothing.
    """
    controller, alone = (PPOAdaptiveBeta(0.1, target=1e-4) for _ in range(2))
    penalty = fastkl.KLPenalty(controller)
    trainer = trainer_of(tmp_path, callbacks=[KLCallback(controller, penalty=penalty)], penalty=penalty, eval_strategy="steps",
                         eval_steps=1)
    trainer.train()
    means = step_means(trainer)
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=1e-5)
    assert len({int(mask.sum()) for _, mask, _ in trainer.kept}) > 1
    betas = [alone.beta] + [alone.update(mean) for mean, _, _ in means]
    assert [beta for _, _, beta in trainer.kept[::2]] == pytest.approx(betas[:-1]) and betas[1] == pytest.approx(0.2)


def test_a_controller_per_sequence(tmp_path) -> None:
    """Gets the KL summed over each sequence; the log stays per token."""
    controller, alone = (AdaptiveBeta(0.1, target=0.5, horizon=1.0, unit="sequence") for _ in range(2))
    callback = KLCallback(controller)
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, max_steps=2)
    trainer.train()
    means = step_means(trainer)
    assert controller.beta == pytest.approx([alone.update(sequence) for _, sequence, _ in means][-1], rel=1e-5)
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=1e-5)


def test_figures_between_two_logs(tmp_path) -> None:
    """Means of the steps, the largest maximum, the last beta; what is left at the end goes to the summary; evaluation adds nothing."""
    controller = AdaptiveBeta(0.1, target=0.05, horizon=1.0)
    callback = KLCallback(controller, KLMonitor())
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, max_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    means = step_means(trainer)
    assert len(means) == 5
    pairs = [means[0:2], means[2:4], means[4:]]
    assert logged(trainer, "kl/mean") == pytest.approx([sum(mean for mean, _, _ in pair) / len(pair) for pair in pairs], rel=1e-5)
    assert logged(trainer, "kl/max") == pytest.approx([max(largest for _, _, largest in pair) for pair in pairs], rel=1e-5)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 5 and not any(name.startswith("kl/") for entry in evaluations for name in entry)
    assert "train_runtime" in trainer.state.log_history[-1] and "kl/mean" in trainer.state.log_history[-1]


class Reporter(transformers.TrainerCallback):
    """What report_to's callbacks see."""

    def __init__(self) -> None:
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Keep a copy."""
        self.seen.append(dict(logs))


def test_attached_it_comes_before_the_reporters(tmp_path) -> None:
    """attach() after the trainer is made: a callback that was there before sees the figures, and once only."""
    reporter, callback = Reporter(), KLCallback()
    trainer = trainer_of(tmp_path, callbacks=[reporter, callback], callback=callback, max_steps=1)
    assert callback.attach(trainer) is callback
    trainer.train()
    assert trainer.callback_handler.callbacks.count(callback) == 1
    assert [entry["kl/mean"] for entry in reporter.seen if "kl/mean" in entry] == logged(trainer, "kl/mean") != []


def test_a_resumed_run_goes_on_the_same(tmp_path) -> None:
    """Four steps at once, and two and two with a checkpoint between: the same betas, controller and monitor."""
    def run(folder, **options):
        controller, monitor = AdaptiveBeta(0.1, target=0.05, horizon=1.0), KLMonitor()
        callback = KLCallback(controller, monitor)
        trainer = trainer_of(folder, callbacks=[callback], callback=callback, penalty=fastkl.KLPenalty(controller), save_strategy="steps",
                             save_steps=2, lr_scheduler_type="constant", **options)
        return trainer, controller, monitor

    whole, controller, monitor = run(tmp_path / "whole")
    whole.train()
    first, _, _ = run(tmp_path / "parts", max_steps=2)
    first.train()
    second, resumed, resumed_monitor = run(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert [beta for _, _, beta in whole.kept[4:]] == pytest.approx([beta for _, _, beta in second.kept], rel=1e-6)
    assert resumed.state_dict()["beta"] == pytest.approx(controller.state_dict()["beta"], rel=1e-6) != 0.1
    assert resumed_monitor.summary()["steps"] == 4.0
    assert resumed_monitor.summary()["kl/mean"] == pytest.approx(monitor.summary()["kl/mean"], rel=1e-5)
    assert logged(second, "kl/beta") == pytest.approx(logged(whole, "kl/beta"), rel=1e-6)


def test_a_checkpoint_without_it(tmp_path) -> None:
    """A callback that joins at a resumption begins with its own state, and can be saved again."""
    trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    controller = FixedBeta(0.3)
    callback = KLCallback(controller)
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["KLCallback"]["attributes"]["controller"] == controller.state_dict()


def test_a_kl_that_is_not_finite(tmp_path) -> None:
    """Leaves beta as it was, and says so."""
    controller = AdaptiveBeta(0.1, target=0.05, horizon=1.0)
    callback = KLCallback(controller)
    trainer = trainer_of(tmp_path, callbacks=[callback], max_steps=1)
    compute = trainer.compute_loss

    def broken(*args, **kwargs):
        callback.record(torch.tensor([[0.1, math.inf]]))
        return compute(*args, **kwargs)

    trainer.compute_loss = broken
    with pytest.warns(UserWarning, match="expected a finite KL in optimizer step 1, got inf; beta stays 0.1"):
        trainer.train()
    assert controller.beta == 0.1 and logged(trainer, "kl/mean") == [math.inf]


def test_masked_tokens_do_not_count() -> None:
    """Whatever they hold; nor does a step whose tokens are all masked."""
    controller = AdaptiveBeta(0.1, target=0.05, horizon=1.0)
    callback = KLCallback(controller)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.record(torch.tensor([[0.2, math.nan]], requires_grad=True), torch.tensor([[True, False]]))
    callback.on_step_end(None, state, control)
    assert controller.beta == pytest.approx(0.12)
    callback.record(torch.tensor([[math.nan]]), torch.tensor([[False]]))
    callback.on_step_end(None, state, control)
    assert controller.beta == pytest.approx(0.12)
    callback.on_step_end(None, state, control)  # a step without any is nothing to do, once there was one
    logs = {}
    callback.on_log(None, state, control, logs)
    assert logs == pytest.approx({"kl/mean": 0.2, "kl/beta": 0.12})


def test_a_callback_that_hears_nothing(tmp_path) -> None:
    """Fails in the first step rather than logging nothing for a day."""
    with pytest.raises(RuntimeError, match="expected a KL in the first optimizer step"):
        trainer_of(tmp_path, callbacks=[KLCallback(FixedBeta(0.1))]).train()


def test_settings_that_would_lose_it(tmp_path) -> None:
    """Two callbacks in one trainer, and transformers' own restoring of callbacks."""
    two = [KLCallback(), KLCallback()]
    with pytest.raises(ValueError, match="expected one KLCallback, got 2"):
        trainer_of(tmp_path, callbacks=two, callback=two[0]).train()
    callback = KLCallback()
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint: expected False"):
        trainer_of(tmp_path, callbacks=[callback], callback=callback, restore_callback_states_from_checkpoint=True).train()


@pytest.mark.parametrize("arguments, keywords, error, words", [
    ((0.1,), {}, TypeError, "controller: expected an object with beta and update, got float without beta"),
    ((None, object()), {}, TypeError, "monitor: expected an object with update"),
    ((), dict(penalty=0.1), TypeError, "penalty: expected a fastkl.KLPenalty"),
    ((), dict(penalty=torch.nn.Linear(2, 2)), TypeError, "penalty: expected a fastkl.KLPenalty"),
    ((None, KLMonitor()), dict(penalty=fastkl.KLPenalty(0.1)), ValueError, r"monitor: expected None with penalty=.*record\(kl, mask\)"),
    ((AdaptiveBeta(0.1, 6.0, 10.0, unit="sequence"),), dict(penalty=fastkl.KLPenalty(0.1)), ValueError, "controller: expected a KL per token"),
])
def test_wrong_settings(arguments, keywords, error, words) -> None:
    """They fail when the callback is made."""
    with pytest.raises(error, match=words):
        KLCallback(*arguments, **keywords)


@pytest.mark.parametrize("arguments, keywords, error, words", [
    ((0.1,), {}, TypeError, "kl: expected a float tensor"), ((torch.tensor(0.1),), {}, TypeError, r"kl: .*\[\.\.\., T\]"),
    ((torch.ones(2, 3), torch.ones(2, 3)), {}, TypeError, "mask: expected a bool tensor"),
    ((torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)), {}, ValueError, "mask: expected the shape of kl"),
    ((torch.ones(2, 3),), dict(entropy=torch.ones(3)), ValueError, "entropy: expected the shape of kl"),
])
def test_wrong_records(arguments, keywords, error, words) -> None:
    """They fail where they are recorded."""
    with pytest.raises(error, match=words):
        KLCallback().record(*arguments, **keywords)
