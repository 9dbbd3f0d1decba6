"""What the tests of TRL's trainers share: tiny random models and trainers of them, a micro-batch, and the truth from full logits."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

trl = pytest.importorskip("trl")
if trl.__version__.split(".")[:2] != ["1", "16"]:
    pytest.skip(f"fastkl.integrations.trl is for TRL 1.16, here is {trl.__version__}", allow_module_level=True)

import pyarrow  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from datasets.table import InMemoryTable  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import DistillationConfig, GRPOConfig  # noqa: E402
from trl.experimental.gkd import GKDConfig  # noqa: E402

from fastkl.integrations.gkd import ExactGKDTrainer  # noqa: E402
from fastkl.integrations.trl import ExactDistillationTrainer, ExactGRPOTrainer  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))]
V, BETA, TEMPERATURE = len(WORDS), 0.3, 0.7
PROMPT, COMPLETION = 4, 6
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=1)

# A float32 addition rounds by eps/2 at most. One behind the other are those of a logit (16 products), of a log-softmax (V) and of a loss (a batch of
# four completions). They add up as a random walk; four of its standard deviations, of the sum of magnitudes: 2.4e-6.
ROUNDING = 4 * (16 + V + 4 * COMPLETION) ** 0.5 * torch.finfo(torch.float32).eps / 2


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words to ids."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                                padding_side="left")


def prompts() -> Dataset:
    """Eight prompts. The fingerprint is given, since datasets would pickle the table for one."""
    return Dataset(InMemoryTable(pyarrow.table({"prompt": ["w1 w2 w3 w4", "w5 w6"] * 4})), fingerprint="prompts")


def tiny(folder: Path, config: transformers.PretrainedConfig | None = None, seed: int = 0, **keywords) -> str:
    """A folder with a random model, from which TRL loads policy and reference."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config or transformers.LlamaConfig(**SIZES), **keywords)
    model.save_pretrained(folder)
    return str(folder)


def lengths(completions, **kwargs) -> list[float]:
    """A reward."""
    return [float(len(completion)) for completion in completions]


def grpo(folder: str, kind: type = ExactGRPOTrainer, model: object = None, callbacks: tuple = (), extra: dict | None = None, **options):
    """A trainer of one optimizer step per two micro-batches of four completions."""
    defaults = dict(output_dir=f"{folder}/out", per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=2, max_steps=3,
                    max_completion_length=COMPLETION, beta=BETA, temperature=TEMPERATURE, bf16=False, use_cpu=True, report_to="none",
                    logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer = kind(model or folder, lengths, args=GRPOConfig(**{**defaults, **options}), train_dataset=prompts(), eval_dataset=prompts(),
                   processing_class=tokenizer(), callbacks=list(callbacks), **(extra or {}))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def distillation(folder: str, teacher: str | None, kind: type = ExactDistillationTrainer, callbacks: tuple = (), extra: dict | None = None,
                 **options):
    """A trainer of one optimizer step per two micro-batches of two prompts."""
    defaults = dict(output_dir=f"{folder}/out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, beta=1.0,
                    max_completion_length=COMPLETION, temperature=TEMPERATURE, bf16=False, use_cpu=True, report_to="none", logging_steps=1,
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant")
    model = None if teacher is None else transformers.AutoModelForCausalLM.from_pretrained(teacher)
    trainer = kind(folder, model, args=DistillationConfig(**{**defaults, **options}), train_dataset=prompts(), eval_dataset=prompts(),
                   processing_class=tokenizer(), callbacks=list(callbacks), **(extra or {}))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def examples() -> Dataset:
    """Four prompts with completions of different lengths, as DataCollatorForChatML takes them."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(4, 6), (2, 3), (3, 5), (4, 1)] * 2
    ids = [torch.randint(3, V, (prompt + completion,), generator=generator).tolist() for prompt, completion in sizes]
    masks = [[0] * prompt + [1] * completion for prompt, completion in sizes]
    table = pyarrow.table({"prompt": [""] * len(sizes), "input_ids": ids, "completion_mask": masks})
    return Dataset(InMemoryTable(table), fingerprint="examples")


def gkd(folder: str, teacher: str, kind: type = ExactGKDTrainer, callbacks: tuple = (), extra: dict | None = None, dtype: torch.dtype = torch.float32,
        **options):
    """A trainer of one optimizer step per two micro-batches of two examples, on their completions."""
    defaults = dict(output_dir=f"{folder}/out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, beta=1.0, lmbda=0.0,
                    max_new_tokens=COMPLETION, temperature=TEMPERATURE, bf16=False, use_cpu=True, report_to="none", logging_steps=1,
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_length=64)
    models = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (folder, teacher))
    trainer = kind(*models, args=GKDConfig(**{**defaults, **options}), train_dataset=examples(), eval_dataset=examples(),
                   processing_class=tokenizer(), callbacks=list(callbacks), **(extra or {}))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# Models whose logits are not their lm_head's product alone.
FAMILIES = {
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.5),
    "gemma": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"),
}


def readme_names(folder: Path) -> dict[str, object]:
    """What the README's lines find in a program: models with their tokenizers, configurations of two steps, data, a reward."""
    wider = transformers.LlamaConfig(**{**SIZES, "hidden_size": 24})
    paths = [tiny(folder / "student"), tiny(folder / "teacher", wider, seed=1)]
    for path in paths:
        tokenizer().save_pretrained(path)
    student, teacher = map(transformers.AutoModelForCausalLM.from_pretrained, paths)
    shared = dict(output_dir=str(folder / "out"), max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    return {
        "model": paths[0], "student": student, "teacher": teacher, "reward": lengths, "prompts": prompts(), "conversations": examples(),
        "tokenizer": tokenizer(),
        "grpo_config": GRPOConfig(beta=0.04, per_device_train_batch_size=4, num_generations=4, max_completion_length=COMPLETION, **shared),
        "distillation_config": DistillationConfig(per_device_train_batch_size=2, max_completion_length=COMPLETION, **shared),
        "gkd_config": GKDConfig(beta=1.0, per_device_train_batch_size=2, max_new_tokens=COMPLETION, max_length=64, **shared),
    }


def perturb(model: torch.nn.Module, size: float = 0.05, seed: int = 5) -> None:
    """Move a model's trainable parameters, so that its KL to what it was is about 0.05."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def moved(trainer, seed: int = 5, size: float = 0.05):
    """The trainer in the middle of an accumulation of two micro-batches, its policy no longer what it was."""
    perturb(trainer.model, size, seed)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def batch(old: bool = True) -> dict[str, torch.Tensor]:
    """A micro-batch as GRPOTrainer makes it: prompts padded on the left, completions on the right, one without a token, tool tokens in one."""
    generator = torch.Generator().manual_seed(2)
    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([[0], [2], [1], [0]])).long()
    completion_mask = (torch.arange(COMPLETION) < torch.tensor([[6], [3], [0], [5]])).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 2:4] = 0
    inputs = {"prompt_ids": torch.randint(3, V, (4, PROMPT), generator=generator) * prompt_mask, "prompt_mask": prompt_mask,
              "completion_ids": torch.randint(3, V, (4, COMPLETION), generator=generator) * completion_mask, "completion_mask": completion_mask,
              "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]), "num_items_in_batch": torch.tensor(21), "tool_mask": tool_mask}
    if old:
        inputs["old_per_token_logps"] = -4 + torch.randn(4, COMPLETION, generator=generator)
    return inputs


def full_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], temperature: float = TEMPERATURE) -> torch.Tensor:
    """What the model itself returns for the completion tokens, float64 from there on."""
    sequence = {name: torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for name, part in
                (("input_ids", "ids"), ("attention_mask", "mask"))}
    return model(**sequence).logits[:, -COMPLETION - 1:-1].double() / temperature


def exact_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(P‖Q) per token from two log-softmaxes."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens that count."""
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name, of the parameters that require it; what a backward() left before is not in them."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2 * ROUNDING) -> None:
    """Gradients of the same names within a relative L2 norm: backward has as many additions as forward."""
    assert got.keys() == expected.keys() and any(bool(value.any()) for value in expected.values())
    for name, value in expected.items():
        assert float((got[name] - value).norm()) <= tolerance * float(value.norm()), name


def made_with(monkeypatch, trainer: type, attribute: str) -> None:
    """Let a trainer of TRL's be made with an attribute that needs hardware or models that are not here."""
    original = trainer.__init__

    def make(self, *args, **kwargs):
        original(self, *args, **kwargs)
        setattr(self, attribute, True)

    monkeypatch.setattr(trainer, "__init__", make)


def adapter_config():
    """LoRA on the attention."""
    return pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
