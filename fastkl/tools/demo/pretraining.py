"""The reference: a language model of the corpus."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..progress import progress
from .corpus import Corpus, windows
from .model import LanguageModel
from .settings import Settings

# Logits of so many rows at a time: larger tensors cost the CPU more in fresh pages than in arithmetic.
ROWS_PER_CHUNK = 256
WARM_UP_STEPS = 10
# The blocks start from nothing and learn faster than the tables, which start from bigram statistics.
BLOCK_RATE = 3.0
BIGRAM_SMOOTHING = 5.0


def train_reference(corpus: Corpus, settings: Settings) -> tuple[LanguageModel, list[float]]:
    """(model, loss per step in nats per token) after training on random excerpts of the corpus."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = LanguageModel(corpus.vocabulary, settings.width, settings.layers, settings.heads, settings.context)
    start_from_bigrams(model, corpus.train)
    model.to(settings.device)
    tables = [*model.embedding.parameters(), *model.head.parameters()]
    blocks = [*model.blocks.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.AdamW([dict(params=tables, scale=1.0), dict(params=blocks, scale=BLOCK_RATE)],
                                  lr=settings.reference_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses = []
    steps = progress(range(settings.reference_steps), "reference")
    for step in steps:
        rate = settings.reference_rate * min((step + 1) / WARM_UP_STEPS, 1.0 - step / settings.reference_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = windows(corpus.train, settings.context + 1, settings.reference_batch, generator).to(settings.device)
        optimizer.zero_grad(set_to_none=False)
        losses.append(_backward(model, batch[:, :-1], batch[:, 1:]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.set_postfix_str(f"loss {losses[-1]:.2f} nats", refresh=False)
    return model.eval().requires_grad_(False), losses


def _backward(model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Cross-entropy in nats per token, with its gradient added to the parameters."""
    hidden = model.hidden(inputs)
    cut = hidden.detach().flatten(0, 1).requires_grad_()
    total = 0.0
    for rows, target in zip(cut.split(ROWS_PER_CHUNK), targets.flatten().split(ROWS_PER_CHUNK), strict=True):
        loss = F.cross_entropy(model.head(rows), target, reduction="sum") / targets.numel()
        loss.backward()
        total += loss.item()
    hidden.backward(cut.grad.view_as(hidden))
    return total


@torch.no_grad()
def start_from_bigrams(model: LanguageModel, tokens: torch.Tensor) -> None:
    """Set embedding and head to the best low-rank bigram model of the tokens [n]: where minutes of training would get to.

    head(norm(embedding[i]))[j] ≈ log p(j) + log(1 + n_ij / (n_i p(j))), by a singular value decomposition weighted by how often i and j occur.
    """
    V, width = model.embedding.weight.shape
    pairs, n_ij = (tokens[:-1] * V + tokens[1:]).unique(return_counts=True)
    i, j = pairs // V, pairs % V
    counts = torch.bincount(tokens, minlength=V).float()
    frequency = (counts + 1.0) / (counts + 1.0).sum()
    lift = torch.log1p(n_ij / ((counts[i] + BIGRAM_SMOOTHING) * frequency[j]))
    row_weight, column_weight = counts.clamp(min=1.0).pow(0.5), counts.clamp(min=1.0).pow(0.25)
    weighted = torch.sparse_coo_tensor(torch.stack([i, j]), lift * row_weight[i] * column_weight[j], (V, V), check_invariants=False).coalesce()
    left, values, right = torch.svd_lowrank(weighted, q=width, niter=2)
    embedding, head = left * values.sqrt() / row_weight[:, None], right * values.sqrt() / column_weight[:, None]
    # The norm in front of the head scales each row to 1: keep the mean scale in the head.
    scale = (embedding.pow(2).mean(-1).sqrt() * counts).sum() / counts.sum()
    model.embedding.weight.copy_(embedding / scale)
    model.head.weight.copy_(head * scale)
    model.head.bias.copy_(frequency.log())


@torch.no_grad()
def held_out_loss(model: LanguageModel, corpus: Corpus, settings: Settings) -> float:
    """Cross-entropy in nats per token on files that training never saw."""
    batch = windows(corpus.held_out, settings.context + 1, settings.evaluation_samples, torch.Generator().manual_seed(0)).to(settings.device)
    return F.cross_entropy(model.head(model.hidden(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten()).item()
