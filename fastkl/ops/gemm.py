"""The GEMMs of an lm_head, one torch call each, with float32 accumulation and without widening
whole operands.

On a GPU each product is one cuBLAS call on the operands in place, written directly to the result.
On a CPU torch has no product of 16-bit operands with a float32 result: the weight is widened a
block at a time, and each block of its gradient is rounded to 16 bits before it is added to the sum.
"""

from collections.abc import Iterator

import torch

# Elements per block that a CPU converts at a time.
BLOCK_ELEMENTS = 1 << 20
# Devices on which torch multiplies 16-bit operands into a float32 result (addmm: torch ≥ 2.10,
# pytorch/pytorch#167931); "meta" checks the call without data.
WIDE_PRODUCTS = ("cuda", "meta")


def logits_into(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Compute out [n, V] = hidden [n, H] @ weight [V, H]ᵀ + bias [V]; out may be float32 for 16-bit
    operands.
    """
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
    elif hidden.device.type not in WIDE_PRODUCTS:
        wide = hidden.to(out.dtype)
        for rows in _blocks(weight):
            out[:, rows] = wide @ weight[rows].to(out.dtype).t()
            if bias is not None:
                out[:, rows] += bias[rows]
    elif bias is None:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(bias)
        torch.addmm(out, hidden, weight.t(), out_dtype=out.dtype, out=out)


def add_weight_gradient(
    total: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, *, first: bool
) -> None:
    """Compute total [V, H] += grad_logits [n, V]ᵀ @ hidden [n, H], with total float32 for 16-bit
    operands; `first`: = instead of +=, total is uninitialised.
    """
    operand = grad_logits.t()
    if total.dtype == hidden.dtype:
        torch.mm(operand, hidden, out=total) if first else total.addmm_(operand, hidden)
    elif hidden.device.type not in WIDE_PRODUCTS:
        for rows in _blocks(total):
            product = operand[rows] @ hidden
            total[rows].copy_(product) if first else total[rows].add_(product)
    elif first:
        torch.mm(operand, hidden, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, operand, hidden, out_dtype=total.dtype, out=total)


def add_bias_gradient(total: torch.Tensor, grad_logits: torch.Tensor, *, first: bool) -> None:
    """Compute total [V] += Σ over tokens of grad_logits [n, V], summed in total's type."""
    # On a CPU sum(dtype=…) widens its whole input, so sum by blocks.
    step = (
        total.shape[0]
        if grad_logits.device.type in WIDE_PRODUCTS
        else max(1, BLOCK_ELEMENTS // max(1, grad_logits.shape[0]))
    )
    for part, columns in zip(total.split(step), grad_logits.split(step, dim=1), strict=True):
        summed = columns.sum(0, dtype=total.dtype)
        part.copy_(summed) if first else part.add_(summed)


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
