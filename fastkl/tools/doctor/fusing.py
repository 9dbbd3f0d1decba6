"""Checks that row_fused, whose programs wait for one another, terminates and agrees with two launches, in a process with a time limit."""

from __future__ import annotations

import subprocess
import sys

import torch

import fastkl

from .checks import Context, DisagreementError, Outcome

# Seconds; compiling takes most of them.
LIMIT = 90.0
# Few rows and many, rows of one program and of several: [N, V].
SHAPES = ((8, 128256), (3000, 4096), (20000, 504))
# Two launches sum a row's segments in another order.
TOLERANCE = {"rtol": 1.6e-2, "atol": 1e-7}


def check_fused(context: Context) -> Outcome:
    """Compare the sum of a KL and its gradient from one launch with those from two, whichever kernels.config uses."""
    command = [sys.executable, "-c", f"from {__name__} import agree; agree({str(context.device)!r}, {SHAPES!r})"]
    limit = min(LIMIT, max(1.0, context.time_left()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        if limit < LIMIT:
            return Outcome("skipped", "no time left")
        raise DisagreementError(f"one launch did not end within {LIMIT:.0f} s; it is not used unless kernels/config.py says so") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DisagreementError(lines[-1])
    return Outcome("ok", "the same as two launches")


def agree(device: str, shapes: tuple[tuple[int, int], ...]) -> None:
    """Raise AssertionError where the loss or its gradient differs between one launch and two."""
    from fastkl.kernels import config

    for rows, vocabulary in shapes:
        generator = torch.Generator(device).manual_seed(0)
        p = torch.randn(rows, vocabulary, generator=generator, device=device) * 3
        q = (p + 0.1 * torch.randn(rows, vocabulary, generator=generator, device=device)).bfloat16()
        found = []
        for on in (False, True):
            config.fuses = lambda arch, on=on: on
            x = p.bfloat16().requires_grad_()
            with fastkl.use_backend("triton"):
                loss = fastkl.kl_divergence(x, q, reduction="sum")
            assert ("SummedKL" in loss.grad_fn.name()) == on, "row_fused did not take the rows"
            found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1][1], found[0][1], **TOLERANCE)
