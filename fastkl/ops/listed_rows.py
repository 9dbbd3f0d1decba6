"""Logits of a few ids per token and their gradients, without computing the other logits: GEMMs with
K rows of the lm_head's weight per token instead of the whole weight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .chunks import WORKSPACE, WORKSPACE_ON_A_GPU, ChunkedHead
from .fields import result_dtype

# Reading K rows of the weight is cheaper than all logits up to K = V / SMALL_PART: one logit of a
# GEMM takes about 1/300 of the time of a row read on a GPU, 1/15 on a CPU.
SMALL_PART = 256


class Listed(NamedTuple):
    """An lm_head and ids [N, K] in 0 … V-1; mask [N]: the tokens that count, None for all."""

    head: ChunkedHead
    ids: torch.Tensor
    mask: torch.Tensor | None

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield (tokens, their hidden states [c, H], rows of the weight [c, K, H])."""
        hidden, weight = self.head.hidden, self.head.weight
        workspace = WORKSPACE.get(hidden.device.type, WORKSPACE_ON_A_GPU)
        # A row, its gradient in float32, and the sum of its gradients.
        row_bytes = weight.shape[1] * (weight.itemsize + 8)
        step = max(1, workspace // (self.ids.shape[-1] * row_bytes))
        for start in range(0, len(hidden), step):
            tokens = slice(start, start + step)
            states = hidden[tokens]
            if self.mask is not None:
                # Zero masked states: 0·NaN in a GEMM would spread.
                states = torch.where(self.mask[tokens][:, None], states, 0)
            yield tokens, states, weight[self.ids[tokens]]

    def logits(self) -> torch.Tensor:
        """Compute the logits [N, K] in the head's logits_dtype."""
        head = self.head
        found = head.hidden.new_empty(self.ids.shape, dtype=head.logits_dtype)
        for tokens, states, rows in self.chunks():
            rows, states = rows.to(found.dtype), states.to(found.dtype)[..., None]
            if head.bias is None:
                product = torch.bmm(rows, states)
            else:  # rounded once, as in all logits
                bias = head.bias[self.ids[tokens]].to(found.dtype)[..., None]
                product = torch.baddbmm(bias, rows, states)
            found[tokens] = product[..., 0]
        return found

    def gradients(self, upstream: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Compute the gradients of Σ upstream·logits named in `names`: hidden, weight, bias.

        The sums over tokens are in float32 and in a fixed order: entries are sorted by id, summed
        by segments, and added to each id once.
        """
        head, wide = self.head, result_dtype(self.head.weight)
        found = {
            name: torch.zeros_like(value, dtype=wide)
            for name, value in (("weight", head.weight), ("bias", head.bias))
            if value is not None and name in names
        }
        if "hidden" in names:
            found["hidden"] = torch.empty_like(head.hidden, memory_format=torch.contiguous_format)
        for tokens, states, rows in self.chunks():
            grad = upstream[tokens].to(states.dtype)
            if "hidden" in found:
                found["hidden"][tokens] = torch.bmm(grad[:, None], rows)[:, 0]
            ids, order = self.ids[tokens].flatten().sort(stable=True)
            segment = torch.nn.functional.pad(ids[1:] != ids[:-1], (1, 0)).cumsum(0)
            lengths = torch.zeros_like(ids).scatter_add_(0, segment, torch.ones_like(ids))
            # Segments beyond the last are empty; their sums of 0 go to id 0.
            own = torch.zeros_like(ids).scatter_(0, segment, ids)
            values, token = grad.flatten()[order].to(wide), order // grad.shape[-1]
            for name in found.keys() & {"weight", "bias"}:
                terms = values if name == "bias" else values[:, None] * states[token]
                sums = torch.segment_reduce(
                    terms, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True
                )
                found[name].index_add_(0, own, sums)
        return found
