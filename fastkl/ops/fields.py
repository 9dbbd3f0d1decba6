"""The vocabulary of row statistics: fields, saved values, per-row arguments."""

from typing import Any, NamedTuple, TypeVar

import torch

from .. import reference
from ..parallel import WHOLE, Cut

FIELDS = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl", "lse", "ref_lse")
# Fields that depend on the policy, and on the reference.
POLICY_FIELDS = ("logprob", "entropy", "kl", "ref_kl", "lse")
REFERENCE_FIELDS = ("ref_logprob", "kl", "ref_kl", "ref_lse")
# PerRow: a vector [N], or None if absent. Values: the same, or one number for all rows.
PerRow = TypeVar("PerRow", torch.Tensor, torch.Tensor | None)
Values = TypeVar("Values", torch.Tensor, torch.Tensor | None, torch.Tensor | float)
SAVED = reference.SAVED  # values per row saved for backward, the same number on either backend


# Fields of a policy alone or with its reference, without or with token ids, joined by commas. A
# table, because compilers warn about a cached function.
FIELDS_OF = {
    (reference, tokens): ",".join(
        name
        for name in FIELDS
        if (reference or name not in REFERENCE_FIELDS) and (tokens or "logprob" not in name)
    )
    for reference in (False, True)
    for tokens in (False, True)
}


def result_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return float64 for float64 logits (reference only), else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class Scaling(NamedTuple):
    """Soft caps of P's and of Q's logits (0: none), and the factor of Q's capped logits.

    ratio: that factor, Q's inverse temperature over P's: a number, or a contiguous vector [N] in
    the type of the results.
    """

    softcap: float = 0.0
    ref_softcap: float = 0.0
    ratio: float | torch.Tensor = 1.0

    @property
    def none(self) -> bool:
        """Return whether the logits are used as they are."""
        ratio = self.ratio
        return not (
            self.softcap or self.ref_softcap or isinstance(ratio, torch.Tensor) or ratio != 1
        )


class Divergence(NamedTuple):
    """The divergence in field "kl": a kind of f_divergences.py or "kl", and its alpha or beta (0 if
    it has none).
    """

    kind: str = "kl"
    share: float = 0.0


class RowArgs(NamedTuple):
    """Logits [..., V] of N rows and per-row arguments; vectors are [N] and contiguous.

    q, tokens, mask: None if absent. temperature: a number or a vector. divergence: if not the KL,
    "kl" is the only field. cut: position of the logits in a split vocabulary; token ids then refer
    to the whole vocabulary. call_rows: rows of a call on hidden states, of which these are a chunk.
    """

    p: torch.Tensor
    q: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: float | torch.Tensor = 1.0
    scaling: Scaling = Scaling()
    divergence: Divergence = Divergence()
    cut: Cut = WHOLE
    call_rows: int = 0

    def at(self, rows: slice | torch.Tensor, p: torch.Tensor, q: torch.Tensor | None) -> "RowArgs":
        """Return the arguments of the rows `rows`, whose logits are p and q."""
        _, _, tokens, mask, temperature, scaling, divergence, cut, call_rows = self
        return RowArgs(
            p,
            q,
            None if tokens is None else tokens[rows],
            None if mask is None else mask[rows],
            temperature[rows] if isinstance(temperature, torch.Tensor) else temperature,
            scaling._replace(ratio=scaling.ratio[rows])
            if isinstance(scaling.ratio, torch.Tensor)
            else scaling,
            divergence,
            cut,
            call_rows,
        )


class Outside(NamedTuple):
    """The log-sum-exp of N rows over the entries not in a list of ids, relative to a peak.

    log_sum [N]: log Σ exp((x - peak)/T) of soft-capped logits x, -inf without entries. peak [N]:
    from Engine.outside and fill_topk, the largest of these entries; after fill_listed, the largest
    listed one, or 0 if that is -inf; undefined in a masked row. Both are float64. saved [N, SAVED]:
    values for Engine.outside_gradient.
    """

    log_sum: torch.Tensor
    peak: torch.Tensor
    saved: torch.Tensor

    def at(self, rows: slice) -> "Outside":
        """Return the rows `rows`."""
        return Outside(self.log_sum[rows], self.peak[rows], self.saved[rows])


def row_args(
    p: torch.Tensor,
    q: torch.Tensor | None,
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    others: tuple[Any, ...] = ("kl", 0.0, ""),
) -> RowArgs:
    """Pack arguments of leading shape [...]; temperatures, unless None, replace the number; others:
    the fields of a Divergence and of a Cut.
    """
    if p.dim() != 2:
        tokens, mask, temperatures = flat(tokens), flat(mask), flat(temperatures)
    args = RowArgs(
        p,
        q,
        None if tokens is None else tokens.contiguous(),
        None if mask is None else mask.contiguous(),
        temperature if temperatures is None else temperatures.contiguous(),
    )
    kind, share, group, *places = others
    if group:
        args = args._replace(cut=Cut(group, *places))
    return args if kind == "kl" else args._replace(divergence=Divergence(kind, share))


def flat(value: PerRow) -> PerRow:
    """Return a per-row tensor as a contiguous vector."""
    if value is None or (value.dim() == 1 and value.is_contiguous()):
        return value
    return value.reshape(-1).contiguous()


def rows_of(value: Values, rows: torch.Tensor | slice) -> Values:
    """Return the rows `rows` of a per-row tensor; any other value as it is."""
    return value[rows] if isinstance(value, torch.Tensor) else value


def rows_of_each(
    values: dict[str, torch.Tensor], rows: slice | torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the rows `rows` of each per-row tensor."""
    return {name: value[rows] for name, value in values.items()}
