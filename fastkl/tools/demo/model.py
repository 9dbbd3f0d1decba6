"""A small transformer: its training on the corpus, samples from it, and its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from ..console import progress
from ..files import write_whole
from . import Settings
from .corpus import END_OF_FILE, Corpus, windows

# Keys and values of the positions so far, by layer.
Cache = dict[int, tuple[torch.Tensor, torch.Tensor]]
ROTARY_BASE = 10_000.0
# Rows of logits at a time: with more, page faults cost a CPU more than the arithmetic.
ROWS_PER_CHUNK = 256
WARM_UP_STEPS = 10
# Learning rate of the blocks, which start as the identity, over that of embedding and head.
BLOCK_RATE = 3.0
BIGRAM_SMOOTHING = 5.0


class LanguageModel(nn.Module):
    """A decoder-only transformer with GPT-J's architecture and, but for `qkv_proj`, its names.

    So transformers reads its checkpoint. Most of its parameters are the vocabulary's.
    """

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__()
        width, size = settings.width, settings.width // settings.heads
        wte = nn.Embedding(vocabulary, width)
        h = nn.ModuleList(Block(width, settings.heads) for _ in range(settings.layers))
        self.transformer: Any = nn.ModuleDict(dict(wte=wte, h=h, ln_f=nn.LayerNorm(width)))
        self.lm_head = nn.Linear(width, vocabulary)
        # Cosine and sine of each position's angle, for each pair of neighbouring entries.
        frequency = ROTARY_BASE ** (-torch.arange(0, size, 2).float() / size)
        angle = torch.arange(settings.context).float()[:, None] * frequency
        rotation = torch.stack([angle.cos(), angle.sin()]).repeat_interleave(2, -1)
        self.register_buffer("rotation", rotation, persistent=False)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Return hidden states [B, T, H] of tokens [B, T] after those in the cache, which grows."""
        past = cache[0][0].shape[2] if cache else 0
        rotation = self.get_buffer("rotation")[:, past : past + tokens.shape[1]]
        stream: torch.Tensor = self.transformer["wte"](tokens)
        for layer, block in enumerate(self.transformer["h"]):
            stream = block(stream, rotation, cache, layer)
        stream = self.transformer["ln_f"](stream)
        return stream

    def response_hidden(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Return hidden states [B, length, H] that predict the last tokens of tokens [B, T]."""
        return self.hidden(tokens[:, :-1])[:, -length:]


class Block(nn.Module):
    """Causal attention and an MLP in parallel, added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        qkv, out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # Each block starts as the identity: the model starts as its embedding and head alone.
        for zero in (out.weight, down.weight, down.bias):
            nn.init.zeros_(zero)
        self.attn: Any = nn.ModuleDict(dict(qkv_proj=qkv, out_proj=out))
        self.mlp: Any = nn.ModuleDict(dict(fc_in=up, fc_out=down))

    def forward(
        self, stream: torch.Tensor, rotation: torch.Tensor, cache: Cache | None, layer: int
    ) -> torch.Tensor:
        """Return the residual stream [B, T, H] after this block; rotation: of the T positions."""
        B, T, H = stream.shape
        normal = self.ln_1(stream)
        qkv = self.attn["qkv_proj"](normal).view(B, T, 3, self.heads, H // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        if cache is not None:
            if layer in cache:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = k, v
        # With a cache, every call but the first has one token, which sees all before it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        mixed: torch.Tensor = self.attn["out_proj"](attended.transpose(1, 2).reshape(B, T, H))
        up = F.gelu(self.mlp["fc_in"](normal), approximate="tanh")
        down: torch.Tensor = self.mlp["fc_out"](up)
        return stream + mixed + down


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to queries or keys [B, heads, T, size]."""
    across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * rotation[0] + across * rotation[1]


@torch.no_grad()
def sample(
    model: LanguageModel, prompts: torch.Tensor, settings: Settings, draw: torch.Generator
) -> torch.Tensor:
    """Return prompts [B, P] with sampled responses, [B, P + T]; draw: on the model's device."""
    tokens, cache, step = [prompts], Cache(), prompts
    for _ in range(settings.response_length):
        logits = model.lm_head(model.hidden(step, cache)[:, -1])
        # Inverse transform sampling: 20 times faster on a CPU than multinomial.
        cumulative = (logits / settings.temperature).softmax(-1).cumsum(-1)
        level = torch.rand(len(logits), 1, generator=draw, device=logits.device)
        step = torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True)
        # Rounding may put the level at the very top, where searchsorted would answer V.
        tokens.append(step.clamp_(max=logits.shape[-1] - 1))
    return torch.cat(tokens, 1)


def train_reference(
    corpus: Corpus,
    settings: Settings,
    backward: Callable[[LanguageModel, torch.Tensor], float] | None = None,
    title: str = "reference",
) -> tuple[LanguageModel, list[float]]:
    """Train on random excerpts of the corpus; return (model, loss per step in nats per token).

    backward: returns the loss of excerpts [B, T + 1] and adds its gradient; default: cross-entropy.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = LanguageModel(corpus.vocabulary, settings)
    start_from_bigrams(model, corpus.train)
    model.to(settings.device)
    parts = model.transformer
    tables = [*parts["wte"].parameters(), *model.lm_head.parameters()]
    blocks = [*parts["h"].parameters(), *parts["ln_f"].parameters()]
    groups = [dict(params=tables, scale=1.0), dict(params=blocks, scale=BLOCK_RATE)]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.reference_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    losses: list[float] = []
    steps = progress(range(settings.reference_steps), title)
    for step in steps:
        share = min((step + 1) / WARM_UP_STEPS, 1.0 - step / settings.reference_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.reference_rate * share * group["scale"]
        batch = windows(corpus.train, settings.context + 1, settings.reference_batch, generator)
        optimizer.zero_grad(set_to_none=False)
        losses.append((backward or _backward)(model, batch.to(settings.device)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.set_postfix_str(f"loss {losses[-1]:.2f} nats", refresh=False)
    return model.eval().requires_grad_(False), losses


def _backward(model: LanguageModel, batch: torch.Tensor) -> float:
    """Return the cross-entropy, nats per token, and add its gradient to the parameters."""
    hidden = model.hidden(batch[:, :-1])
    cut = hidden.detach().flatten(0, 1).requires_grad_()
    targets, total = batch[:, 1:].flatten(), 0.0
    for rows, target in zip(cut.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        loss = F.cross_entropy(model.lm_head(rows), target, reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    hidden.backward(torch.as_tensor(cut.grad).view_as(hidden))
    return total


@torch.no_grad()
def start_from_bigrams(model: LanguageModel, tokens: torch.Tensor) -> None:
    """Set embedding and head to the best low-rank bigram model of tokens [n], to save training.

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
    # The LayerNorm before the head normalises each row: keep the mean scale in the head.
    scale = (rows.pow(2).mean(-1).sqrt() * counts).sum() / counts.sum()
    embedding.copy_(rows / scale)
    head.weight.copy_(columns * scale)
    head.bias.copy_(frequency.log())


def save_checkpoint(model: LanguageModel, corpus: Corpus, settings: Settings, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into a folder, each file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, value in model.state_dict().items():
        # GPT-J has a matrix each for queries, keys and values.
        fused = "qkv_proj" in name
        for letter, part in zip("qkv", value.chunk(3) if fused else [value], strict=False):
            weights[name.replace("qkv_proj", f"{letter}_proj")] = part.cpu().contiguous()
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
    write_whole(folder / "tokenizer.json", corpus.tokenizer.to_str().encode())
    write_whole(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=1).encode())
    write_whole(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())
