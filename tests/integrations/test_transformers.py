"""KLCallback in transformers' Trainer with a tiny random model: figures, betas and checkpoints."""

import json
import math
import runpy
import sys
from types import SimpleNamespace
from unittest import mock

import call_sites
import pytest
import torch
from cases import waits

import fastkl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkl.integrations.transformers import KLCallback, TeacherMixin  # noqa: E402
from fastkl.rl import AdaptiveBeta, FixedBeta, KLMonitor  # noqa: E402

V, LENGTH = 61, 7
# A mean over an optimizer step's tokens is a sum of 4·LENGTH float32 values; each addition rounds
# by eps/2 at most, on both sides: 3.3e-6.
ROUNDING = 4 * LENGTH * torch.finfo(torch.float32).eps
# The first LENGTH - i % 3 tokens of sequence i count.
TOKENS = [
    {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < LENGTH - i % 3).long()}
    for i, ids in enumerate(
        torch.randint(V, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    )
]


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **dict(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            ),
            vocab_size=V,
            initializer_range=0.2,
        )
    )


class Penalised(transformers.Trainer):
    """A Trainer with a KL penalty in its loss, as a user would write it.

    `kept` has the KL, mask and beta of each micro-batch. With mean=True the callback gets the mean
    that the penalty keeps; the penalty's weight is that of the callback's controller.
    """

    def __init__(self, callback: KLCallback, mean: bool, **keywords) -> None:
        super().__init__(**keywords)
        self.callback, self.mean, self.kept, self.reference = callback, mean, [], tiny(1)
        self.penalty = fastkl.KLPenalty(callback.controller or FixedBeta(0.01))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, mask = model(**inputs).logits, inputs["attention_mask"].bool()
        with torch.no_grad():
            ref_logits = self.reference(**inputs).logits
        kl, penalty = fastkl.kl_divergence(logits, ref_logits, mask), self.penalty
        loss = penalty(logits, ref_logits, mask) - logits.log_softmax(-1).mean()
        self.callback.record(penalty.last["kl"].expand(mask.shape) if self.mean else kl, mask)
        if torch.is_grad_enabled():
            self.kept.append((kl.detach()[mask], len(mask), penalty.beta))
        return (loss, {}) if return_outputs else loss


DEFAULTS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=4,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    save_steps=2,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    remove_unused_columns=False,
    label_names=["input_ids"],  # so that the evaluation computes a loss
    seed=3,
)


def trainer_of(folder, callback, mean=False, callbacks=None, **options) -> Penalised:
    trainer = Penalised(
        callback,
        mean,
        model=tiny(0),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**DEFAULTS, **options}),
        train_dataset=TOKENS,
        eval_dataset=TOKENS[:2],
        callbacks=[callback] if callbacks is None else callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def adaptive(unit: str = "token", target: float = 0.05) -> AdaptiveBeta:
    return AdaptiveBeta(0.1, target=target, horizon=1.0, unit=unit)


def logged(trainer: Penalised, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


STATE, CONTROL = transformers.TrainerState(), transformers.TrainerControl()


@pytest.mark.parametrize(
    "unit, mean, monitored, every",
    [
        ("token", False, True, 1),
        ("token", False, True, 2),
        ("token", True, False, 1),
        ("sequence", False, False, 1),
    ],
)
def test_once_per_optimizer_step(tmp_path, unit, mean, monitored, every) -> None:
    # Attached after the trainer is made, it comes before a reporter that was there.
    controller, alone = (adaptive(unit, 0.05 if unit == "token" else 0.5) for _ in range(2))
    monitor = KLMonitor(jsonl=tmp_path / "kl.jsonl") if monitored else None
    callback, reporter, seen = KLCallback(controller, monitor), transformers.TrainerCallback(), []
    reporter.on_log = lambda *args, logs, **kwargs: seen.append(dict(logs))
    trainer = trainer_of(
        tmp_path, callback, mean, [reporter, callback], logging_steps=every, max_steps=5
    )
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    micro = iter(trainer.kept)
    steps = [
        (torch.cat([one[0], two[0]]), one[1] + two[1])
        for one, two in zip(micro, micro, strict=True)
    ]
    assert len(steps) == 5 and len({len(kl) for kl, _ in steps}) > 1
    per = [float(kl.sum()) / (len(kl) if unit == "token" else rows) for kl, rows in steps]
    betas = [alone.beta, *(alone.update(value, unit=unit) for value in per)]
    assert len(set(betas)) == 6 and controller.beta == pytest.approx(betas[-1], rel=ROUNDING)
    assert [beta for _, _, beta in trainer.kept] == pytest.approx(
        [beta for beta in betas[:-1] for _ in range(2)], rel=ROUNDING
    )
    # Between two logs: the mean of the steps' means, the largest, the last beta.
    groups = [slice(first, first + every) for first in range(0, 5, every)]
    means = [float(torch.stack([kl.mean() for kl, _ in steps[group]]).mean()) for group in groups]
    assert logged(trainer, "kl/mean") == pytest.approx(means, rel=ROUNDING)
    assert [logs["kl/mean"] for logs in seen if "kl/mean" in logs] == logged(trainer, "kl/mean")
    assert logged(trainer, "kl/beta") == pytest.approx(
        [betas[:5][group][-1] for group in groups], rel=ROUNDING
    )
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 5
    assert not any(name.startswith("kl/") for entry in evaluations for name in entry)
    if monitored:
        largest = [max(float(kl.max()) for kl, _ in steps[group]) for group in groups]
        assert logged(trainer, "kl/max") == pytest.approx(largest, rel=ROUNDING)
        lines = [json.loads(line) for line in (tmp_path / "kl.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert [line["beta"] for line in lines] == pytest.approx(betas[:5], rel=ROUNDING)
        assert {*logged(trainer, "kl/target")} == {line["kl/target"] for line in lines} == {0.05}
        assert [line["kl/tokens"] for line in lines] == [len(kl) for kl, _ in steps]


# ---- checkpoints


def run(folder, callback, resume: bool, steps: int = 4, **options) -> Penalised:
    options = dict(save_strategy="steps", max_steps=steps, **options)
    trainer = trainer_of(folder, callback, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def test_a_resumed_run_goes_on_the_same(tmp_path) -> None:
    callback, first, resumed = (KLCallback(adaptive(), KLMonitor()) for _ in range(3))
    whole = run(tmp_path / "whole", callback, False)
    run(tmp_path, first, False, 2)
    second = run(tmp_path, resumed, True)
    used = [[beta for _, _, beta in trainer.kept] for trainer in (whole, second)]
    assert used[1] == pytest.approx(used[0][4:], rel=1e-6)
    assert resumed.controller.beta == pytest.approx(callback.controller.beta, rel=1e-6) != 0.1
    got, expected = (each.monitor.summary() for each in (resumed, callback))
    assert (got["steps"], got["kl/mean"]) == (4, pytest.approx(expected["kl/mean"], rel=ROUNDING))
    assert logged(second, "kl/beta") == pytest.approx(logged(whole, "kl/beta"), rel=1e-6)


def test_checkpoints_of_another_callback_or_none(tmp_path) -> None:
    run(tmp_path, KLCallback(adaptive()), False, 2)
    with pytest.raises(ValueError, match="^state: expected class .*FixedBeta, got AdaptiveBeta; "):
        run(tmp_path, KLCallback(FixedBeta(0.1)), True)
    with pytest.warns(UserWarning, match="the state of a controller, this callback has none"):
        run(tmp_path, KLCallback(), True)
    # A callback that joins at a resumption begins with its own state, and can be saved again.
    folder, joining = tmp_path / "without", KLCallback(FixedBeta(0.3))
    run(folder, KLCallback(), False, 2, callbacks=[])
    run(folder, joining, True, callbacks=[joining])
    saved = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert (
        saved["stateful_callbacks"]["KLCallback"]["attributes"]["controller"]
        == joining.controller.state_dict()
    )


# ---- steps without a trainer


def step(callback, *micro_batches, state=STATE, **figures) -> dict[str, float]:
    """Make an optimizer step of micro-batches, KL and mask, and return what is logged after it."""
    logs = {}
    for given in micro_batches:
        callback.record(*given, **figures)
    callback.on_step_end(None, state, CONTROL)
    callback.on_log(None, state, CONTROL, logs)
    return logs


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_means_that_end_no_run(unit) -> None:
    # k1 is negative in many steps and lowers beta; NaN and infinities leave it, with one warning.
    callback, alone = KLCallback(adaptive(unit), KLMonitor()), adaptive(unit)
    with pytest.warns(UserWarning, match="got nan; beta stays") as caught:
        for mean in (-0.001, math.nan, 0.2, math.inf, -math.inf, math.nan, -3.0):
            logs = step(callback, [torch.full((2, 5), mean)])
            if math.isfinite(mean):
                alone.update(mean * (1 if unit == "token" else 5), unit=unit)
            assert callback.controller.beta == pytest.approx(alone.beta, rel=1e-6)
            assert logs.get("kl/mean", math.nan) == pytest.approx(mean, nan_ok=True)
    assert len([each for each in caught if "KLCallback" in str(each.message)]) == 1


def test_masked_tokens_and_empty_steps_do_not_count() -> None:
    callback = KLCallback(adaptive())
    masked = torch.tensor([[0.2, math.nan]]), torch.tensor([[True, False]])
    assert step(callback, masked) == pytest.approx({"kl/mean": 0.2, "kl/beta": 0.1})
    assert step(callback, [each[:, 1:] for each in masked]) == pytest.approx({"kl/beta": 0.12})
    assert step(callback) == {} and callback.controller.beta == pytest.approx(0.12)


@pytest.mark.parametrize("monitored", [False, True])
def test_several_processes(monkeypatch, monitored) -> None:
    # The others have two tokens with a KL of 0.5 each; a monitor is the first process's.
    others, second = torch.tensor([1.0, 2.0, 1.0]), transformers.TrainerState()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: totals.add_(others))
    monkeypatch.setattr(second, "is_world_process_zero", False)
    callback, alone = KLCallback(adaptive(), KLMonitor() if monitored else None), adaptive()
    logs = step(callback, [torch.tensor([[0.2, 0.1]])], state=second)
    assert callback.controller.beta == pytest.approx(alone.update(0.325))
    assert logs == pytest.approx({"kl/beta": 0.1} | ({} if monitored else {"kl/mean": 0.325}))


def three(device: str) -> list[list[torch.Tensor]]:
    return [[torch.ones(shape, device=device)] for shape in ((2, 3), (2, 0), (1, 4))]


def test_the_monitor_gets_one_packed_batch() -> None:
    monitor = mock.Mock()
    monitor.update.return_value = {"entropy": 2.0}
    logs = step(KLCallback(None, monitor), *three("cpu")[:1], entropy=2 * torch.ones(2, 3))
    assert monitor.update.call_args.kwargs["entropy"].tolist() == [2.0] * 6
    assert logs == {"kl/entropy": 2.0}
    step(KLCallback(None, monitor), *three("cpu"))
    got = monitor.update.call_args.kwargs
    assert got["cu_seqlens"].tolist() == [0, 3, 6, 6, 6, 10] and got["entropy"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("monitor, count", [(None, 1), (KLMonitor(), 2)])
def test_waits_per_optimizer_step(monitor, count) -> None:
    assert waits(lambda: step(KLCallback(None, monitor), *three("cuda"))) == count


# ---- what is refused


@pytest.mark.parametrize(
    "callbacks, options, words",
    [
        ([], {}, "KLCallback: expected a KL in the first optimizer step, got none"),
        ([KLCallback()], {}, "callbacks: expected one KLCallback, got 2"),
        (
            [],
            dict(restore_callback_states_from_checkpoint=True),
            "restore_callback_states_from_checkpoint: expected False with a KLCallback, got True",
        ),
    ],
)
def test_runs_that_would_lose_it(tmp_path, callbacks, options, words) -> None:
    own = KLCallback()
    trainer = trainer_of(tmp_path, KLCallback(), callbacks=[own, *callbacks], **options)
    with pytest.raises((ValueError, RuntimeError), match=f"^{words}"):
        trainer.train()


CALLBACK, BATCH = KLCallback(), SimpleNamespace(beta=0.1, update=print, unit="batch")
KL, NESTED = torch.ones(2, 3), torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)


@pytest.mark.parametrize(
    "call, arguments, words",
    [
        (
            KLCallback,
            dict(controller=0.1),
            "controller: expected an object with beta and update, got",
        ),
        (KLCallback, dict(monitor=3), "monitor: expected an object with update, got int"),
        (KLCallback, dict(controller=BATCH), "controller: expected one whose unit is .*"),
        *(
            (CALLBACK.record, dict(kl=kl), "kl: expected a float tensor .*, got .*float")
            for kl in (0.1, KL.to(torch.float8_e4m3fn))
        ),
        (TeacherMixin, dict(teacher="a name"), "teacher: expected a model, got str; "),
        (
            TeacherMixin.compute_loss,
            dict(self=None, model=None, inputs=dict(input_ids=KL)),
            "inputs: expected labels, got input_ids; ",
        ),
        (CALLBACK.record, dict(kl=torch.tensor(0.1)), r"kl: expected \[\.\.\., T\], got a scalar"),
        *(
            (CALLBACK.record, dict(kl=kl), "kl: expected a plain tensor, ")
            for kl in (KL.to_sparse(), NESTED)
        ),
        (CALLBACK.record, dict(kl=KL, mask=KL), "mask: expected a bool tensor"),
        (
            CALLBACK.record,
            dict(kl=KL, mask=KL.bool().to_sparse()),
            "mask: expected a plain tensor, ",
        ),
        (CALLBACK.record, dict(kl=KL, mask=KL[:, 1:].bool()), r"mask: expected .*\(2, 3\), "),
        (CALLBACK.record, dict(kl=KL, entropy=KL[0]), r"entropy: expected .*\(2, 3\), "),
        (CALLBACK.record, dict(kl=KL, entropy=0.5), "entropy: expected a float tensor"),
        *(
            (CALLBACK.attach, dict(trainer=each), "trainer: expected a transformers.Trainer, got ")
            for each in (None, SimpleNamespace(callback_handler=None))
        ),
    ],
)
def test_wrong_arguments(call, arguments, words) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        call(**arguments)


def test_without_transformers(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="not installed: transformers; remedy: pip install"):
        runpy.run_module("fastkl.integrations.transformers")


# ---- a teacher


def test_a_teacher(tmp_path) -> None:
    # Two optimizer steps over all sequences, in two micro-batches, against plain torch on all. The
    # teacher's vocabulary is padded: its last entries take no part.
    models = [tiny(seed).double() for seed in (0, 0, 1)]
    models[2].resize_token_embeddings(V + 3, mean_resizing=False)
    Distiller = type("Distiller", (TeacherMixin, transformers.Trainer), {})
    options = dict(
        **dict(max_steps=2, optim="sgd", eval_strategy="no", learning_rate=0.1),
        **dict(label_names=["labels"], max_grad_norm=0.0),
    )
    labelled = [
        {**each, "labels": each["input_ids"].masked_fill(each["attention_mask"] == 0, -100)}
        for each in TOKENS[:4]
    ]
    trainer = Distiller(
        models[0],
        transformers.TrainingArguments(str(tmp_path), **{**DEFAULTS, **options}),
        teacher=models[2],
        distillation_loss=fastkl.DistillationLoss("kl", 0.3, 2.0),
        train_dataset=labelled,
        eval_dataset=labelled,
    )
    trainer.train()
    batch = {name: torch.stack([each[name] for each in labelled]) for name in labelled[0]}
    labels, optimizer = batch.pop("labels")[:, 1:], torch.optim.SGD(models[1].parameters(), 0.1)
    for logged_loss in [*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]]:
        student, teacher = (model(**batch).logits[:, :-1, :V] for model in models[1:])
        logs = ((logits / 2).log_softmax(-1) for logits in (teacher, student))
        kl = call_sites.kl(*logs)[labels != -100].mean()
        ce = torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())
        expected = 0.7 * ce + 0.3 * 4 * kl
        # Llama's norms, and the losses that Trainer logs, are in float32.
        assert logged_loss == pytest.approx(float(expected.detach()), rel=ROUNDING)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
