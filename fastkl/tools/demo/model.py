"""A small decoder-only transformer in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Keys and values of the positions so far, one pair per layer; None before the first.
Cache = list[tuple[torch.Tensor, torch.Tensor] | None]


class LanguageModel(nn.Module):
    """Logits of the next token, with a vocabulary that dwarfs everything else in the model."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Hidden states [B, T, H] of tokens [B, T]. A cache from `empty_cache` holds the earlier positions, and is extended in place."""
        past = 0 if cache is None or cache[0] is None else cache[0][0].shape[2]
        h = self.embedding(tokens) + self.position[past:past + tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            h = block(h, cache, layer)
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
    """Causal attention and a two-layer perceptron, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        # Each block starts as the identity, so that the model starts as what embedding and head alone say.
        nn.init.zeros_(self.mixed.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        """The stream [B, T, H] after this block."""
        B, T, H = h.shape
        q, k, v = self.queries_keys_values(self.attention_norm(h)).view(B, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache[layer] is not None:
                k, v = torch.cat([cache[layer][0], k], 2), torch.cat([cache[layer][1], v], 2)
            cache[layer] = (k, v)
        # With a cache the tokens come one at a time after the first call: a single one sees everything before it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        h = h + self.mixed(attended.transpose(1, 2).reshape(B, T, H))
        return h + self.down(F.gelu(self.up(self.perceptron_norm(h))))
