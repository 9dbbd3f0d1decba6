"""KLCallback in transformers' Trainer, with a tiny random model: what it logs, what beta the next step uses, a resumed run."""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkl.integrations.transformers import KLCallback  # noqa: E402
from fastkl.rl import AdaptiveBeta, FixedBeta, KLMonitor, PPOAdaptiveBeta  # noqa: E402

V, LENGTH = 61, 7
# A mean over an optimizer step's tokens is a sum of 4·LENGTH float32 values, each addition rounded by eps/2 at most, on both sides: 3.3e-6.
ROUNDING = 4 * LENGTH * torch.finfo(torch.float32).eps


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

    def __init__(self, *args, penalty=None, callback=None, mean=False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.penalty, self.callback, self.mean, self.kept, self.reference = penalty, callback, mean, [], tiny(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean log-prob of the tokens, plus the penalty."""
        logits, mask = model(**inputs).logits, inputs["attention_mask"].bool()
        with torch.no_grad():
            ref_logits = self.reference(**inputs).logits
        kl = fastkl.kl_divergence(logits, ref_logits, mask=mask)
        if self.callback is not None and not self.mean:
            self.callback.record(kl, mask)
        loss = -logits.float().log_softmax(-1).mean() + (self.penalty(logits, ref_logits, mask) if self.penalty is not None else 0.01 * kl.mean())
        if self.mean:
            self.callback.record(self.penalty.last["kl"].expand(mask.shape), mask)
        if torch.is_grad_enabled():
            self.kept.append((kl.detach(), mask, None if self.penalty is None else self.penalty.beta))
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def trainer_of(folder, *, callbacks=(), penalty=None, callback=None, mean=False, **options) -> Penalised:
    """Two micro-batches of two sequences per optimizer step, four steps an epoch."""
    defaults = dict(output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1, use_cpu=True,
                    report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2, remove_unused_columns=False, seed=3)
    arguments = transformers.TrainingArguments(**{**defaults, **options})
    trainer = Penalised(tiny(0), arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks), penalty=penalty,
                        callback=callback, mean=mean)
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
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=ROUNDING)
    assert logged(trainer, "kl/max") == pytest.approx([largest for _, _, largest in means], rel=ROUNDING)
    betas = [alone.beta] + [alone.update(mean) for mean, _, _ in means]
    assert len(set(betas)) == 5
    assert logged(trainer, "kl/beta") == pytest.approx(betas[:-1], rel=ROUNDING)
    assert [beta for _, _, beta in trainer.kept[::2]] == pytest.approx(betas[:-1], rel=ROUNDING) == [beta for _, _, beta in trainer.kept[1::2]]
    assert controller.beta == pytest.approx(betas[-1], rel=ROUNDING)
    lines = [json.loads(line) for line in (tmp_path / "kl.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["kl/mean"] for line in lines] == logged(trainer, "kl/mean")
    assert [line["kl/tokens"] for line in lines] == [sum(int(mask.sum()) for _, mask, _ in trainer.kept[i:i + 2]) for i in range(0, 8, 2)]
    assert sum(monitor.profile()["tokens"]) == sum(int(mask.sum()) for _, mask, _ in trainer.kept)
    assert len(monitor.profile()["kl"]) == LENGTH


def test_the_mean_that_a_penalty_keeps_is_enough(tmp_path) -> None:
    """Recorded for each token: the mean over the micro-batches' tokens, which are not equally many, moves the beta that the penalty reads next.

    Evaluation calls the penalty too, and adds nothing.
    """
    controller, alone = (PPOAdaptiveBeta(0.1, target=1e-4) for _ in range(2))
    callback = KLCallback(controller)
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, penalty=fastkl.KLPenalty(controller), mean=True, eval_strategy="steps",
                         eval_steps=1)
    trainer.train()
    means = step_means(trainer)
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=ROUNDING)
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
    assert controller.beta == pytest.approx([alone.update(sequence, unit="sequence") for _, sequence, _ in means][-1], rel=ROUNDING)
    assert logged(trainer, "kl/mean") == pytest.approx([mean for mean, _, _ in means], rel=ROUNDING)


def test_figures_between_two_logs(tmp_path) -> None:
    """Means of the steps, the largest maximum, the last beta; what is left at the end goes to the summary; evaluation adds nothing."""
    controller = AdaptiveBeta(0.1, target=0.05, horizon=1.0)
    callback = KLCallback(controller, KLMonitor())
    trainer = trainer_of(tmp_path, callbacks=[callback], callback=callback, max_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    means = step_means(trainer)
    assert len(means) == 5
    pairs = [means[0:2], means[2:4], means[4:]]
    assert logged(trainer, "kl/mean") == pytest.approx([sum(mean for mean, _, _ in pair) / len(pair) for pair in pairs], rel=ROUNDING)
    assert logged(trainer, "kl/max") == pytest.approx([max(largest for _, _, largest in pair) for pair in pairs], rel=ROUNDING)
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
    assert resumed_monitor.summary()["kl/mean"] == pytest.approx(monitor.summary()["kl/mean"], rel=ROUNDING)
    assert logged(second, "kl/beta") == pytest.approx(logged(whole, "kl/beta"), rel=1e-6)


def test_a_checkpoint_of_another_controller(tmp_path) -> None:
    """An error that says whose state does not fit, or a warning where nothing takes it."""
    def trainer(controller, **options):
        callback = KLCallback(controller, None)
        return trainer_of(tmp_path, callbacks=[callback], callback=callback, save_strategy="steps", save_steps=2, **options)

    trainer(AdaptiveBeta(0.1, target=0.05, horizon=1.0), max_steps=2).train()
    with pytest.raises(ValueError, match="^controller: expected the one that .*, got another .*'AdaptiveBeta'.*; resume with"):
        trainer(FixedBeta(0.1)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.warns(UserWarning, match="the state of a controller, this callback has none"):
        trainer(None).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


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


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_means_that_end_no_run(unit) -> None:
    """k1 has a negative mean in many steps, which lowers beta; NaN and both infinities leave it, with one warning in a run."""
    callback = KLCallback(AdaptiveBeta(0.1, 0.05, horizon=10, unit=unit), KLMonitor())
    alone = AdaptiveBeta(0.1, 0.05, horizon=10, unit=unit)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, mean in enumerate((-0.001, math.nan, 0.2, math.inf, -math.inf, math.nan, -3.0)):
            state.global_step = step
            callback.record(torch.full((2, 5), mean))
            callback.on_step_end(None, state, control)
            if math.isfinite(mean):
                alone.update(torch.full((5,), mean).sum() / (5 if unit == "token" else 1), unit=unit)
            assert callback.controller.beta == pytest.approx(alone.beta, rel=1e-6)
    assert callback.controller.beta < 0.1
    assert [str(warning.message) for warning in caught if "KLCallback" in str(warning.message)] == [
        "KLCallback: expected a finite KL in optimizer step 1, got nan; beta stays 0.098, in this and every later step without one"]


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


def test_nothing_grows_where_nothing_logs() -> None:
    """A thousand steps without a log hold as much as one; the log that comes at last is of all of them."""
    callback = KLCallback(FixedBeta(0.1), KLMonitor())
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    sizes = []
    for step in range(1000):
        callback.record(torch.full((1, 2), step / 1000))
        callback.on_step_end(None, state, control)
        sizes.append(len(pickle.dumps({name: value for name, value in vars(callback).items() if name != "monitor"})))
    assert max(sizes) <= sizes[0] + 100
    logs = {}
    callback.on_log(None, state, control, logs)
    assert logs["kl/mean"] == pytest.approx(0.4995) and logs["kl/max"] == pytest.approx(0.999) and logs["kl/beta"] == 0.1


def test_the_sequences_of_micro_batches_of_different_lengths() -> None:
    """The monitor's profile counts from each sequence's first token that counts, whatever it was padded to; empty micro-batches add nothing."""
    monitor = KLMonitor()
    callback = KLCallback(None, monitor)
    callback.record(torch.tensor([[9.0, 1.0, 2.0], [1.0, 2.0, 9.0]]), torch.tensor([[False, True, True], [True, True, False]]))
    callback.record(torch.zeros(2, 0))
    callback.record(torch.tensor([[1.0, 2.0]] * 3))
    callback.on_step_end(None, transformers.TrainerState(), transformers.TrainerControl())
    assert monitor.profile() == {"position": [0, 1], "kl": [1.0, 2.0], "tokens": [5.0, 5.0]}


class FromTheHost(TorchDispatchMode):
    """Counts tensors made of Python's numbers: to get one to a GPU waits for all that it has still to do."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run it."""
        self.made += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


class Boundaries:
    """A monitor that keeps what it got."""

    def update(self, kl, mask, *, cu_seqlens, **keywords) -> dict[str, float]:
        """No figures."""
        self.got = cu_seqlens
        return {}


def step_with(monitor, device: str) -> None:
    """An optimizer step of two micro-batches."""
    callback = KLCallback(None, monitor)
    for kl in (torch.ones(2, 3, device=device), torch.ones(1, 4, device=device)):
        callback.record(kl)
    callback.on_step_end(None, transformers.TrainerState(), transformers.TrainerControl())


def test_the_boundaries_are_made_on_the_device() -> None:
    """Not of numbers on the host."""
    monitor, mode = Boundaries(), FromTheHost()
    with mode:
        step_with(monitor, "cpu")
        assert mode.made == 0
        torch.tensor([1])
        assert mode.made == 1
    assert monitor.got.tolist() == [0, 3, 6, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("monitor, waits", [(None, 1), (Boundaries(), 1), (KLMonitor(), 2)], ids=["none", "one that reads nothing", "KLMonitor"])
def test_waits_per_optimizer_step(monitor, waits) -> None:
    """For the totals, and for the monitor's figures."""
    step_with(monitor, "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step_with(monitor, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    assert len(found) == waits, found


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
