"""What a training step needs from hidden states on, counted allocation by allocation: through logits, and without them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator

import torch

from .objective import Batch, FromHiddenStates, ThroughLogits
from .settings import Settings


def compare_memory(batch: Batch, settings: Settings) -> dict:
    """Bytes that loss and gradient of a batch allocate in both ways, as `allocations`, and "logits": those of both models and the gradient.

    The gradient is that to the policy's hidden states and head, so that both ways return the same tensors.
    """
    learned = (batch.policy.hidden, *batch.policy.head.parameters())

    def loss_and_gradient(way: type) -> tuple[torch.Tensor, ...]:
        stats, penalty = way(settings.initial_beta, settings).penalised(batch)
        return torch.autograd.grad(penalty - stats.logprob.mean(), learned)

    logits = batch.tokens.numel() * batch.policy.head.out_features * batch.policy.hidden.element_size()
    return {
        "tokens": batch.tokens.numel(), "chunk_size": settings.chunk_size, "logits": 3 * logits,
        "through_logits": allocations(lambda: loss_and_gradient(ThroughLogits)),
        "from_hidden_states": allocations(lambda: loss_and_gradient(FromHiddenStates)),
    }


def allocations(call: Callable) -> dict[str, int]:
    """Bytes that call() allocates: "peak", the most at any time, its result included, and "largest", those of the largest tensor.

    torch.profiler reports every allocation of torch, those inside an op included.
    """
    with _silent_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return {"peak": max(itertools.accumulate(changes)), "largest": max(changes)}


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ code writes lines of its own to stderr, whatever its log level; they would end up among the progress bars."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
