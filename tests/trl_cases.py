"""Tiny random models and TRL's trainers of them, a micro-batch, and the truth from full logits."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fastkl import testing

trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
if trl.__version__.split(".")[:2] != ["1", "16"]:
    pytest.skip(f"expected TRL 1.16, got {trl.__version__}", allow_module_level=True)

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.experimental import gkd  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))]
V, BETA, TEMPERATURE = len(WORDS), 0.3, 0.7
PROMPT, COMPLETION = 4, 6
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
load = transformers.AutoModelForCausalLM.from_pretrained
# Models whose logits are not their lm_head's product alone.
FAMILIES = {
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.5),
    "gemma": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"
    ),
}

# Float32 additions round by eps/2 at most. A logit (16 products), a log-softmax (V) and a loss
# (four completions) add one after another, as a random walk: four standard deviations, 2.4e-6 of
# the sum of magnitudes.
EPS = torch.finfo(torch.float32).eps
ROUNDING = 4 * (16 + V + 4 * COMPLETION) ** 0.5 * EPS / 2


# ---- models and data


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


PROMPTS = Dataset.from_dict(dict(prompt=["w1 w2 w3 w4", "w5 w6"] * 4))
# Tokens of a prompt and of its completion.
PAIRS = [(4, 6), (2, 3), (3, 5), (4, 1)] * 2
EXAMPLES = Dataset.from_dict(
    dict(
        prompt=[""] * len(PAIRS),
        input_ids=[[3 + (7 * i + 5 * j) % 58 for j in range(sum(p))] for i, p in enumerate(PAIRS)],
        completion_mask=[[0] * prompt + [1] * completion for prompt, completion in PAIRS],
    )
)


def tiny(folder, config=None, seed: int = 0, **keywords) -> str:
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(
        config or transformers.LlamaConfig(**SIZES), **keywords
    ).save_pretrained(folder)
    return str(folder)


FOLDER = tempfile.TemporaryDirectory()
# Two tiny random Llamas: a student or policy, and a wider teacher.
STUDENT = tiny(f"{FOLDER.name}/student")
TEACHER = tiny(
    f"{FOLDER.name}/teacher",
    transformers.LlamaConfig(**{**SIZES, "hidden_size": 24, "initializer_range": 0.1}),
    seed=1,
)


def perturb(model: torch.nn.Module, size: float = 0.05, seed: int = 5) -> None:
    """Move a model's trainable parameters: by default its KL to its former self is about 0.05."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


LORA = peft.LoraConfig(
    r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
)


# ---- trainers: one optimizer step per two micro-batches

COMMON = dict(
    gradient_accumulation_steps=2,
    max_steps=2,
    temperature=TEMPERATURE,
    bf16=False,
    use_cpu=True,
    report_to="none",
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
)
CONFIGS = {
    trl.GRPOTrainer: (
        trl.GRPOConfig,
        dict(
            beta=BETA,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=COMPLETION,
        ),
    ),
    trl.DistillationTrainer: (
        trl.DistillationConfig,
        dict(beta=1.0, per_device_train_batch_size=2, max_completion_length=COMPLETION),
    ),
    gkd.GKDTrainer: (
        gkd.GKDConfig,
        dict(
            beta=1.0,
            per_device_train_batch_size=2,
            max_new_tokens=COMPLETION,
            max_length=64,
            lmbda=0.0,
            optim="sgd",
        ),
    ),
}


def settings(kind: type, **options):
    config, own = next(each for base, each in CONFIGS.items() if issubclass(kind, base))
    return config(**{**COMMON, **own, "output_dir": f"{FOLDER.name}/out", **options})


def lengths(completions, **kwargs) -> list[float]:
    return [float(len(completion)) for completion in completions]


def made(
    kind,
    student=STUDENT,
    teacher=TEACHER,
    callbacks=(),
    extra=None,
    dtype=torch.float32,
    **options,
):
    """Make a trainer; options are its configuration's, a model is itself or its path."""
    student, teacher = (
        load(each, dtype=dtype) if isinstance(each, str) else each for each in (student, teacher)
    )
    of_grpo = issubclass(kind, trl.GRPOTrainer)
    data = EXAMPLES if issubclass(kind, gkd.GKDTrainer) else PROMPTS
    trainer = kind(
        model=student,
        args=settings(kind, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **(dict(reward_funcs=lengths) if of_grpo else dict(teacher_model=teacher)),
        **(extra or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def moved(trainer, seed: int = 5, size: float = 0.05):
    """Put a trainer in the middle of an accumulation, its policy no longer the reference."""
    perturb(trainer.model, size, seed)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- a micro-batch of GRPOTrainer and DistillationTrainer, and its truth


def batch(old: bool = True) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right: one is empty, one has tool tokens."""
    generator = torch.Generator().manual_seed(2)
    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([[0], [2], [1], [0]])).long()
    mask = (torch.arange(COMPLETION) < torch.tensor([[6], [3], [0], [5]])).long()
    tool_mask = torch.ones_like(mask)
    tool_mask[0, 2:4] = 0
    inputs = {
        "prompt_ids": torch.randint(3, V, (4, PROMPT), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, V, (4, COMPLETION), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]),
        "num_items_in_batch": torch.tensor(21),
        "tool_mask": tool_mask,
    }
    if old:
        inputs["old_per_token_logps"] = -4 + torch.randn(4, COMPLETION, generator=generator)
    return inputs


def sequence(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    ]


def full_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, mask = sequence(inputs)
    return (
        model(input_ids=ids, attention_mask=mask).logits[:, -COMPLETION - 1 : -1].double()
        / TEMPERATURE
    )


def exact_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool()


def k3_of(kl: torch.Tensor) -> torch.Tensor:
    """Solve e^x - x - 1 = kl for x ≥ 0: with it as ref_logp - logp, TRL's own estimate is kl."""
    x = (2 * kl).sqrt().clamp(max=2.0)
    for _ in range(50):
        x = (x - ((torch.expm1(x) - x - kl) / torch.expm1(x).clamp(min=1e-12))).clamp(min=0)
    return x


def logprobs(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]


def plain_loss(trainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a loss of type dapo from the models' own logits, of the tokens that both have."""
    logits = full_logits(trainer.model, inputs)[..., :V]
    logp = logprobs(logits, inputs)
    ratio = (logp - inputs.get("old_per_token_logps", logp.detach())).exp()
    advantages = inputs["advantages"][:, None]
    kl = exact_kl(logits, full_logits(trainer.ref_model, inputs)[..., :V].detach())
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + BETA * kl
    assert float(kl.detach()[loss_mask(inputs)].mean()) > 1e-3
    return per_token[loss_mask(inputs)].sum() / inputs["num_items_in_batch"]


# ---- comparisons


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(
        zip(named, torch.autograd.grad(loss, named.values(), retain_graph=True), strict=True)
    )


def assert_loss(
    trainer, inputs, expected, tolerance=ROUNDING, *, model=None, gradient=2 * ROUNDING, **keywords
):
    """Compare a trainer's loss and gradients with an expected loss of its own or another model.

    A reference or teacher gets no gradient. Returns the gradients.
    """
    loss = trainer.compute_loss(trainer.model, dict(inputs), **keywords)
    testing.assert_near(loss, expected, tolerance, 0.0, "loss")
    models = [getattr(trainer, name, None) for name in ("ref_model", "teacher_model")]
    if frozen := [value for each in models if each is not None for value in each.parameters()]:
        reached = torch.autograd.grad(loss, frozen, retain_graph=True, allow_unused=True)
        assert set(reached) == {None}
    got, exact = gradients(loss, trainer.model), gradients(expected, model or trainer.model)
    assert got.keys() == exact.keys() and any(bool(value.any()) for value in exact.values())
    for name, value in exact.items():
        assert float((got[name] - value).norm()) <= gradient * float(value.norm()), name
    return got


# ---- the lines of README and docs


def readme_names() -> dict[str, object]:
    tokenizer().save_pretrained(STUDENT)
    return {
        "model": STUDENT,
        "student": load(STUDENT),
        "teacher": load(TEACHER),
        "reward": lengths,
        "prompts": PROMPTS,
        "conversations": EXAMPLES,
        "tokenizer": tokenizer(),
        "grpo_config": settings(trl.GRPOTrainer),
        "distillation_config": settings(trl.DistillationTrainer),
        "gkd_config": settings(gkd.GKDTrainer),
    }


def link_models(folder: Path) -> None:
    """Give the tiny models, with their tokenizer, the names that docs/trainers has, in a folder."""
    words = tokenizer()
    words.chat_template = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    words.save_pretrained(STUDENT)
    (folder / "Qwen").mkdir()
    for name, path in {"Qwen3-0.6B": STUDENT, "Qwen3-4B": TEACHER}.items():
        (folder / "Qwen" / name).symlink_to(path)
