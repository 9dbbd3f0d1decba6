"""A small transformer: training on the corpus, sampling, checkpoint."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn

import fastkl

from ..console import progress
from ..files import json_text
from . import Settings
from .corpus import END_OF_FILE, Corpus, windows

# Keys and values of past positions, by layer.
Cache = dict[int, tuple[torch.Tensor, torch.Tensor]]
ROTARY_BASE = 10_000.0
WARM_UP_STEPS = 10
# Ratio of the blocks' learning rate to that of embedding and head; blocks start as the identity.
BLOCK_RATE = 3.0
BIGRAM_SMOOTHING = 5.0


class LanguageModel(nn.Module):
    """A decoder-only transformer with GPT-J's architecture and names, so transformers can load it.

    Most parameters are in the embedding and the lm_head.
    """

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__()
        width, size = settings.width, settings.width // settings.heads
        self.transformer: Any = nn.ModuleDict(
            dict(
                wte=nn.Embedding(vocabulary, width),
                h=nn.ModuleList(Block(width, settings.heads) for _ in range(settings.layers)),
                ln_f=nn.LayerNorm(width),
            )
        )
        self.lm_head = nn.Linear(width, vocabulary)
        # e^(i·angle) for each position and pair of adjacent entries.
        frequency = ROTARY_BASE ** (-torch.arange(0, size, 2).float() / size)
        angle = torch.arange(settings.context).float()[:, None] * frequency
        rotation = torch.polar(torch.ones_like(angle), angle)
        self.register_buffer("rotation", rotation, persistent=False)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Return hidden states [B, T, H] of tokens [B, T] that follow the cache; append to the
        cache.
        """
        past = cache[0][0].shape[2] if cache else 0
        rotation = self.get_buffer("rotation")[past : past + tokens.shape[1]]
        stream = self.transformer["wte"](tokens)
        for layer, block in enumerate(self.transformer["h"]):
            stream = block(stream, rotation, cache, layer)
        return cast(torch.Tensor, self.transformer["ln_f"](stream))

    def response_hidden(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Return hidden states [B, length, H] that predict the last `length` of tokens [B, T]."""
        return self.hidden(tokens[:, :-1])[:, -length:]


class Block(nn.Module):
    """Causal attention and an MLP in parallel, added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn: Any = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(width, width, bias=False) for name in ("q", "k", "v", "out")}
        )
        self.mlp = nn.Sequential(
            OrderedDict(
                fc_in=nn.Linear(width, 4 * width),
                act=nn.GELU("tanh"),
                fc_out=nn.Linear(4 * width, width),
            )
        )
        # Each block starts as the identity, so the model starts as embedding and head only.
        for name in ("attn.out_proj.weight", "mlp.fc_out.weight", "mlp.fc_out.bias"):
            nn.init.zeros_(self.get_parameter(name))

    def forward(
        self, stream: torch.Tensor, rotation: torch.Tensor, cache: Cache | None, layer: int
    ) -> torch.Tensor:
        """Return the residual stream [B, T, H] after this block; rotation: for the T positions."""
        normal, attn = self.ln_1(stream), self.attn
        q, k, v = (
            attn[name](normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        if cache is not None:
            if layer in cache:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = k, v
        # With a cache, every call after the first has one token, which attends to all positions.
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=stream.shape[1] > 1
        )
        mixed = attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return cast(torch.Tensor, stream + mixed + self.mlp(normal))


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to queries or keys [B, heads, T, size]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


@torch.no_grad()
def sample(
    model: LanguageModel, prompts: torch.Tensor, settings: Settings, draw: torch.Generator
) -> torch.Tensor:
    """Return prompts [B, P] with sampled responses, [B, P + T]; draw: on the model's device."""
    tokens, cache, step = [prompts], Cache(), prompts
    for _ in range(settings.response_length):
        logits = model.lm_head(model.hidden(step, cache)[:, -1])
        # Inverse transform sampling is 20 times faster than multinomial on a CPU.
        cumulative = (logits / settings.temperature).softmax(-1).cumsum(-1)
        level = torch.rand(len(logits), 1, generator=draw, device=logits.device)
        step = torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True)
        # A level rounded up to the total would make searchsorted return V.
        tokens.append(step.clamp_(max=logits.shape[-1] - 1))
    return torch.cat(tokens, 1)


def cross_entropy(model: LanguageModel, batch: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy of excerpts [B, T + 1], nats, from hidden states."""
    hidden, head = model.hidden(batch[:, :-1]), model.lm_head
    return -fastkl.linear_token_stats(
        hidden, head.weight, batch[:, 1:], bias=head.bias
    ).logprob.mean()


def train_reference(
    corpus: Corpus,
    settings: Settings,
    loss_of: Callable[[LanguageModel, torch.Tensor], torch.Tensor] = cross_entropy,
    title: str = "reference",
) -> tuple[LanguageModel, list[float]]:
    """Minimise loss_of(model, excerpts [B, T + 1]) on random excerpts of the corpus; return (model,
    loss of each step in nats per token).
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = LanguageModel(corpus.vocabulary, settings)
    start_from_bigrams(model, corpus.train)
    model.to(settings.device)
    rate, count = settings.reference_rate, settings.reference_steps
    losses: list[float] = []
    stack = model.transformer
    groups: list[dict[str, Any]] = [
        dict(params=[*stack["wte"].parameters(), *model.lm_head.parameters()]),
        dict(params=[*stack["h"].parameters(), *stack["ln_f"].parameters()], lr=rate * BLOCK_RATE),
    ]
    optimizer = torch.optim.AdamW(groups, rate, (0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, 1.0 - step / count)
    )
    for _ in (steps := progress(range(count), title)):
        batch = windows(corpus.train, settings.context + 1, settings.reference_batch, generator)
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, batch.to(settings.device))
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        steps.set_postfix_str(f"loss {losses[-1]:.2f} nats", refresh=False)
    return model.eval().requires_grad_(False), losses


@torch.no_grad()
def start_from_bigrams(model: LanguageModel, tokens: torch.Tensor) -> None:
    """Initialise embedding and head to the best low-rank bigram model of tokens [n].

    head(norm(embedding[i]))[j] ≈ log p(j) + log(1 + n_ij / (n_i p(j))), by a singular value
    decomposition weighted by how often i and j occur.
    """
    embedding, head = model.transformer["wte"].weight, model.lm_head
    V, width = embedding.shape
    pairs, n_ij = (tokens[:-1] * V + tokens[1:]).unique(return_counts=True)
    i, j = pairs // V, pairs % V
    counts = torch.bincount(tokens, minlength=V).float()
    frequency = (counts + 1.0) / (counts + 1.0).sum()
    lift = torch.log1p(n_ij / ((counts[i] + BIGRAM_SMOOTHING) * frequency[j]))
    row_weight, column_weight = counts.clamp(min=1.0).pow(0.5), counts.clamp(min=1.0).pow(0.25)
    weighted = lift * row_weight[i] * column_weight[j]
    table = torch.sparse_coo_tensor(torch.stack([i, j]), weighted, (V, V), check_invariants=False)
    left, values, right = torch.svd_lowrank(table.coalesce(), q=width, niter=2)
    rows = left * values.sqrt() / row_weight[:, None]
    columns = right * values.sqrt() / column_weight[:, None]
    # The LayerNorm before the head normalises each row; move the mean scale into the head.
    scale = (rows.pow(2).mean(-1).sqrt() * counts).sum() / counts.sum()
    embedding.copy_(rows / scale)
    head.weight.copy_(columns * scale)
    head.bias.copy_(frequency.log())


def checkpoint_files(model: LanguageModel, corpus: Corpus, settings: Settings) -> dict[str, bytes]:
    """Return config.json, model.safetensors and the tokenizer's files, by name."""
    end = corpus.tokenizer.token_to_id(END_OF_FILE)
    config = dict(
        architectures=["GPTJForCausalLM"],
        model_type="gptj",
        vocab_size=corpus.vocabulary,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        rotary_dim=settings.width // settings.heads,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
        dtype="float32",
    )
    tokenizer = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=END_OF_FILE,
        model_max_length=settings.context,
    )
    return {
        "tokenizer.json": corpus.tokenizer.to_str().encode(),
        "tokenizer_config.json": json_text(tokenizer).encode(),
        "model.safetensors": save(model.state_dict(), metadata={"format": "pt"}),
        "config.json": json_text(config).encode(),
    }
