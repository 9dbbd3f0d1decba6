"""A trust region around any optimizer: a line search on the KL of each step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from . import _checks


class StepResult(NamedTuple):
    """Result of a step.

    accepted: "full", the optimizer's own step; "shrunk", a part of it; "undone", none of it.
    fraction: the part taken: 1.0, between, or 0.0. kl: the last measured value, nats: at the final
    parameters, or, if undone, at the shortest rejected step.
    """

    accepted: Literal["full", "shrunk", "undone"]
    fraction: float
    kl: float


@dataclasses.dataclass(eq=False)
class TrustRegion:
    """Shortens an optimizer's step until the mean KL from the old policy is within a bound.

    `step` is equivalent to

        old = parameters
        optimizer.step(closure)
        new = parameters
        for fraction in (1, shrink, shrink**2, ..., shrink**tries):
            parameters = old + fraction * (new - old)
            if mean_kl() <= max_kl:                         # a NaN or an infinity is not
                return StepResult("full" or "shrunk", fraction, kl)
        parameters = old                                    # to the bit
        return StepResult("undone", 0.0, kl)

    Used as

        old_logits = model(batch).logits.detach()
        loss.backward()
        result = TrustRegion(0.01).step(
            optimizer,
            lambda: kl_divergence(old_logits, model(batch).logits, mask, reduction="mean"),
        )

    Args:
        max_kl: the largest mean KL of a step, nats; positive.
        shrink: factor that shortens a step at each further try; between 0 and 1.
        tries: how many shortened steps are measured before the step is undone; at least 0.

    step(optimizer, mean_kl, closure=None):
        optimizer: any torch optimizer, with all its parameter groups; a parameter listed twice, or
            sharing its memory, is moved once.
        mean_kl: called without gradient 1 to 1 + tries times; returns KL(old‖new) at the current
            parameters, the mean over the batch, as a number or one-element tensor. Return the exact
            KL: with a sampled estimate, noise decides which steps are accepted. Switch dropout off
            in it. With several processes average over them, so that all take the same decision. To
            reject a step for another reason, as TRPO does if the objective has not improved, return
            infinity. The parameters before the step must be within max_kl: if the KL is measured
            from an older policy that is already max_kl away, every step is undone.
        closure: passed to the optimizer.

    A step synchronises once per call of mean_kl, to read its value, and nowhere else. It holds a
    copy of the parameters that can change (those that require grad), and a second copy once a step
    was too long.

    The optimizer's state is kept even if the step is undone: momenta and second moments are
    statistics of the gradients, valid whether or not the step is taken, and restoring them would
    take another one or two copies of the parameters. A gradient that is not finite therefore stays
    in them, as without a trust region; reject it beforehand: torch.nn.utils.clip_grad_norm_(...,
    error_if_nonfinite=True). An optimizer with its own copy of the parameters (float32 masters,
    averages) writes that copy at its next step: the undo does not restore it.

    Under FSDP2 each process moves its own shards. Its root module keeps the gathered parameters
    after a forward without a backward, and would measure, and train, the parameters of an earlier
    try: build it with fully_shard(model, reshard_after_forward=True), or end mean_kl with
    model.reshard().

    If the optimizer, mean_kl or closure raises, the parameters are restored before the exception
    propagates.

    Raises TypeError or ValueError for wrong arguments, and from `step` if mean_kl does not return a
    number.

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C: the backtracking
    line search, here along any optimizer's step.
    """

    max_kl: float
    _: dataclasses.KW_ONLY
    shrink: float = 0.5
    tries: int = 10

    def __post_init__(self) -> None:
        _checks.number(
            "max_kl",
            self.max_kl,
            "a positive finite number of nats",
            lambda x: 0 < x < math.inf,
            "0.01 is common",
        )
        _checks.number(
            "shrink",
            self.shrink,
            "a number between 0 and 1",
            lambda x: 0 < x < 1,
            "0.5 halves the step at each try",
        )
        _checks.number(
            "tries",
            self.tries,
            "a whole number of at least 0",
            lambda x: isinstance(x, int) and x >= 0,
            "0 undoes a step that is too long",
        )

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        mean_kl: Callable[[], float | torch.Tensor],
        closure: Callable[[], float | torch.Tensor] | None = None,
    ) -> StepResult:
        """Take one step of the optimizer, within max_kl; see the class."""
        _checks.expect(
            hasattr(optimizer, "param_groups") and callable(getattr(optimizer, "step", None)),
            "optimizer",
            "a torch optimizer",
            optimizer,
            "pass what has step() and param_groups",
            TypeError,
        )
        _checks.expect(
            callable(mean_kl),
            "mean_kl",
            "a function without arguments, called after the step",
            mean_kl,
            "wrap the measurement: lambda: kl_divergence(old_logits, model(batch).logits).mean()",
            TypeError,
        )
        _checks.expect(
            closure is None or callable(closure),
            "closure",
            "a function or None",
            closure,
            "pass what evaluates the loss again",
            TypeError,
        )
        # Each parameter once; no optimizer moves frozen ones.
        every = {id(each): each for group in optimizer.param_groups for each in group["params"]}
        parameters = [one for one in every.values() if one.requires_grad or one.grad is not None]
        old = [parameter.detach().clone() for parameter in parameters]
        try:
            optimizer.step(*(() if closure is None else (closure,)))
            for attempt in range(self.tries + 1):
                # Interpolate every fraction between both ends: halving in place would get stuck in
                # a 16-bit type, where half of the last bit rounds up again.
                if attempt == 1:
                    new = [parameter.detach().clone() for parameter in parameters]
                if attempt > 0:
                    _place(parameters, old, new, self.shrink**attempt)
                with torch.no_grad():
                    kl = _checks.number(
                        "mean_kl",
                        mean_kl(),
                        "one number or a one-element tensor",
                        lambda x: True,
                        "reduce it over the batch: .mean()",
                        tensor=True,
                    )
                if math.isfinite(kl) and kl <= self.max_kl:
                    return StepResult("shrunk" if attempt else "full", self.shrink**attempt, kl)
        except BaseException:
            _place(parameters, old)
            raise
        _place(parameters, old)
        return StepResult("undone", 0.0, kl)


@torch.no_grad()
def _place(
    parameters: list[torch.Tensor],
    old: list[torch.Tensor],
    new: list[torch.Tensor] | None = None,
    fraction: float = 0.0,
) -> None:
    """Set the parameters to old + fraction·(new - old); without `new` to old, to the bit."""
    for i, parameter in enumerate(parameters):
        parameter.copy_(old[i] if new is None else torch.lerp(old[i], new[i], fraction))
