"""A small decoder-only transformer in plain torch: GPT-J's architecture, so that whatever reads Hugging Face checkpoints reads this one's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Keys and values of the positions so far, one pair per layer; None before the first.
Cache = list[tuple[torch.Tensor, torch.Tensor] | None]
ROTARY_BASE = 10_000.0


class LanguageModel(nn.Module):
    """Logits of the next token, with a vocabulary that dwarfs everything else in the model."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("rotation", rotations(context, width // heads), persistent=False)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Hidden states [B, T, H] of tokens [B, T]. A cache from `empty_cache` holds the earlier positions, and is extended in place."""
        past = 0 if cache is None or cache[0] is None else cache[0][0].shape[2]
        rotation = self.rotation[:, past:past + tokens.shape[1]]
        h = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            h = block(h, rotation, cache, layer)
        return self.norm(h)

    def empty_cache(self) -> Cache:
        """A cache before the first position."""
        return [None] * len(self.blocks)

    def response_hidden(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states [B, length, H] that predict the last `length` tokens of tokens [B, T]."""
        return self.hidden(tokens[:, :-1])[:, -length:]

    def response_logits(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Logits [B, length, V] that predict the last `length` tokens of tokens [B, T]."""
        return self.head(self.response_hidden(tokens, length))


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, both on the normalised stream, side by side, and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # Each block starts as the identity, so that the model starts as what embedding and head alone say.
        for zero in (self.mixed.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(zero)

    def forward(self, h: torch.Tensor, rotation: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        """The stream [B, T, H] after this block; rotation: that of the T positions."""
        B, T, H = h.shape
        normal = self.norm(h)
        q, k, v = self.queries_keys_values(normal).view(B, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, rotation), rotated(k, rotation)
        if cache is not None:
            if cache[layer] is not None:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = (k, v)
        # With a cache the tokens come one at a time after the first call: a single one sees everything before it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return h + self.mixed(attended.transpose(1, 2).reshape(B, T, H)) + self.down(F.gelu(self.up(normal), approximate="tanh"))


def rotations(context: int, size: int) -> torch.Tensor:
    """[2, context, size]: cosine and sine of each position's angle for each of the size / 2 pairs of neighbours, twice in a row."""
    angle = torch.arange(context).float()[:, None] * ROTARY_BASE ** (-torch.arange(0, size, 2).float() / size)
    return torch.stack([angle.cos(), angle.sin()]).repeat_interleave(2, -1)


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Queries or keys [B, heads, T, size], each pair of neighbours turned by its position's angle."""
    across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * rotation[0] + across * rotation[1]
