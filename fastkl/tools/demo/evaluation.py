"""What a policy has become: the figures of the final table, on fresh samples."""

from __future__ import annotations

import dataclasses
import math

import torch

import fastkl

from .corpus import Corpus, line_starts, windows
from .finetuning import rewarded_tokens
from .model import LanguageModel
from .sampling import sample
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one policy's samples, each the mean over all sampled tokens, and a few of the samples as (prompt, response).

    reward: share of tokens that are rewarded; kl: exact KL(policy‖reference), nats per token; perplexity: of the samples under the reference;
    entropy: of the policy, nats; distinct: distinct tokens / tokens of a sample; slow_path: share of rows that the kernels read again.
    """

    reward: float
    kl: float
    perplexity: float
    entropy: float
    distinct: float
    slow_path: float
    texts: list[tuple[str, str]]

    def figures(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in ("reward", "kl", "perplexity", "entropy", "distinct", "slow_path")}


@torch.no_grad()
def evaluate(policy: LanguageModel, reference: LanguageModel, corpus: Corpus, settings: Settings) -> Evaluation:
    """Sample responses to prompts from held-out files, the same ones for every policy, and measure them."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    prompts = windows(corpus.held_out, settings.prompt_length, settings.evaluation_samples, generator, line_starts(corpus, corpus.held_out))
    draw = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    tokens = sample(policy, prompts.to(settings.device), settings.response_length, settings.temperature, draw)
    response = tokens[:, settings.prompt_length:]
    logits, ref_logits = (model.response_logits(tokens, settings.response_length) for model in (policy, reference))
    stats = fastkl.token_stats(logits, response, ref_logits, temperature=settings.temperature)
    return Evaluation(
        reward=rewarded_tokens(corpus).to(settings.device)[response].float().mean().item(),
        kl=stats.kl.mean().item(),
        perplexity=math.exp(-stats.ref_logprob.mean().item()),
        entropy=stats.entropy.mean().item(),
        distinct=sum(row.unique().numel() for row in response) / response.numel(),
        slow_path=slow_path_fraction(logits / settings.temperature, ref_logits / settings.temperature),
        texts=[(corpus.text(row[:settings.prompt_length]), corpus.text(row[settings.prompt_length:])) for row in tokens[:4]],
    )


def slow_path_fraction(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """Share of rows that the Triton kernels would read again, because their one-pass formula does not hold there."""
    return fastkl.slow_path_rows(p_logits, q_logits).float().mean().item()
