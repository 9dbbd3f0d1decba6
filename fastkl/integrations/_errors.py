"""Errors of the integrations: argument, what was expected, what came, what to do."""

import torch


def expect(
    holds: object,
    name: str,
    what: str,
    got: object,
    remedy: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raise an error unless the condition holds; for a TypeError `got` is described by its type."""
    if not holds:
        if error is TypeError and isinstance(got, torch.Tensor):
            got = f"a {got.dtype} tensor {tuple(got.shape)}"
        elif error is TypeError:
            got = type(got).__name__
        raise error(f"{name}: expected {what}, got {got}; {remedy}")
