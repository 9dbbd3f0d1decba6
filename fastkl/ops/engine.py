"""The two engines that compute row statistics and their gradients: the kernels and the reference.

Both take logits of any leading shape and strides, and write into the caller's tensors. Row
gradients are with respect to the raw logits, before soft caps and temperatures.
"""

import abc
import math
from collections.abc import Iterator
from typing import Any

import torch

from . import reference_rows, shard_rows
from .fields import Divergence, Outside, RowArgs, rows_of, rows_of_each
from .near_series import near_series
from .problems import (
    fused_launchers,
    launchers,
    outside_launchers,
    problems,
)


class Engine(abc.ABC):
    """Row statistics and gradients of one implementation.

    checks_values: whether tensor values are checked: cheap on a CPU, a synchronisation on a GPU.
    """

    checks_values: bool

    @abc.abstractmethod
    def forward(self, args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
        """Fill outputs ([N] per field) and saved [N, SAVED]."""

    def steps(
        self, args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor
    ) -> Iterator[None]:
        """Run forward on a split vocabulary and return an iterator that pauses while a gather runs,
        here an empty one.
        """
        self.forward(args, outputs, saved)
        return iter(())

    @abc.abstractmethod
    def backward(
        self,
        args: RowArgs,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        grad_p: torch.Tensor | None,
        grad_q: torch.Tensor | None,
    ) -> None:
        """Fill the gradients ([N, V], both with the same row stride) from upstream ones [N].

        They may overwrite the logits, except if the gradient of ref_kl to Q is requested: fallback
        rows are then read again.
        """

    @abc.abstractmethod
    def computes_together(self, args: RowArgs, grad_p: torch.Tensor) -> bool:
        """Return whether one pass computes a KL and its gradient to P, [N, V] or of P's shape."""

    @abc.abstractmethod
    def together(
        self,
        args: RowArgs,
        kl: torch.Tensor,
        saved: torch.Tensor,
        weights: torch.Tensor,
        grad_p: torch.Tensor,
    ) -> None:
        """Fill kl [N], saved, and the gradient of Σ weights·kl to P in one pass."""

    def kl_and_gradients(
        self,
        args: RowArgs,
        kl: torch.Tensor,
        saved: torch.Tensor,
        weights: torch.Tensor,
        grad_p: torch.Tensor | None,
        grad_q: torch.Tensor | None,
    ) -> None:
        """Fill kl [N], saved, and the gradients of Σ weights·kl."""
        to_p_alone = grad_q is None and args.divergence.kind == "kl" and not args.cut.group
        if grad_p is not None and to_p_alone and self.computes_together(args, grad_p):
            self.together(args, kl, saved, weights, grad_p)
        else:
            self.forward(args, {"kl": kl}, saved)
            self.backward(args, saved, {"kl": weights}, grad_p, grad_q)

    @abc.abstractmethod
    def outside(
        self, args: RowArgs, ids: torch.Tensor, others: Outside, reference_dtype: torch.dtype
    ) -> None:
        """Fill `others` for the entries that are not in ids [N, K], sorted in each row; zeros
        for a masked row.

        reference_dtype: of the reference's exponentials. The kernels' are float32; both sum in
        float64.
        """

    @abc.abstractmethod
    def outside_gradient(
        self, args: RowArgs, others: Outside, upstream: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Fill the gradient [N, V] of Σ upstream·log_sum; its entries at the ids are unspecified.

        others: as filled by `outside`, possibly with another peak.
        """

    @abc.abstractmethod
    def scale_of(self, temperature: float | torch.Tensor) -> float | torch.Tensor:
        """Return 1/T in float64, rounded as `outside` rounds it."""

    @abc.abstractmethod
    def scale(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Multiply a contiguous gradient in place by a scalar tensor; 0 times anything is 0."""


class Kernels(Engine):
    """The Triton kernels."""

    checks_values = False
    steps = staticmethod(shard_rows.steps)

    def forward(self, args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
        if args.cut.group:
            for _ in shard_rows.steps(args, outputs, saved):
                pass
            return
        for rows, problem in problems(args):
            part = (outputs, saved) if rows is None else (rows_of_each(outputs, rows), saved[rows])
            _forward(args.divergence, problem, *part)

    def backward(
        self,
        args: RowArgs,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        grad_p: torch.Tensor | None,
        grad_q: torch.Tensor | None,
    ) -> None:
        if args.cut.group:
            args = shard_rows.local(args)
            grad_p, grad_q = shard_rows.zero_padding(args, (grad_p, grad_q))
        p, q = args.p, args.q
        if p.stride(-1) != 1 or (q is not None and q.stride(-1) != 1):
            # A saved-tensor hook may return logits with another stride along the vocabulary.
            args = args._replace(p=p.contiguous(), q=None if q is None else q.contiguous())
        for rows, problem in problems(args):
            part = (saved, upstream, grad_p, grad_q)
            if rows is not None:
                part = (
                    saved[rows],
                    rows_of_each(upstream, rows),
                    rows_of(grad_p, rows),
                    rows_of(grad_q, rows),
                )
            _backward(args.divergence, problem, *part)

    def computes_together(self, args: RowArgs, grad_p: torch.Tensor) -> bool:
        launch = launchers()
        if not launch.config.fuses(launch.architecture(args.p.device)[0]):
            return False
        (_, problem), *others = problems(args)
        return not others and fused_launchers().fuses(problem, grad_p.view(-1, grad_p.shape[-1]))

    def together(
        self,
        args: RowArgs,
        kl: torch.Tensor,
        saved: torch.Tensor,
        weights: torch.Tensor,
        grad_p: torch.Tensor,
    ) -> None:
        ((_, problem),) = problems(args)
        weights = weights.to(torch.float32).contiguous()
        fused_launchers().fused(problem, weights, kl, saved, grad_p)

    def outside(
        self, args: RowArgs, ids: torch.Tensor, others: Outside, reference_dtype: torch.dtype
    ) -> None:
        for rows, problem in problems(args):
            part = slice(None) if rows is None else rows
            outside_launchers().outside(problem, ids[part], None, None, others.at(part))

    def outside_gradient(
        self, args: RowArgs, others: Outside, upstream: torch.Tensor, grad: torch.Tensor
    ) -> None:
        # -upstream times a log-probability's gradient without its one-hot term: no token is -1.
        tokens = torch.full(upstream.shape, -1, dtype=torch.int64, device=upstream.device)
        self.backward(
            args._replace(tokens=tokens), others.saved, {"logprob": -upstream.float()}, grad, None
        )

    def scale_of(self, temperature: float | torch.Tensor) -> float | torch.Tensor:
        if not isinstance(temperature, torch.Tensor):
            return 1.0 / temperature
        return temperature.float().double().reciprocal()  # kernels read float32

    def scale(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        fused_launchers().scale(gradient.view(-1), factor.reshape(1))


def _forward(
    divergence: Divergence, problem: Any, outputs: dict[str, torch.Tensor], saved: torch.Tensor
) -> None:
    """Fill the fields of a problem; "kl" holds the divergence."""
    if divergence.kind == "jeffreys":
        value = outputs["kl"]
        ref_kl = torch.empty_like(value)
        launchers().forward(problem, {"kl": value, "ref_kl": ref_kl}, saved)
        value += ref_kl
    else:
        launchers().forward(problem, outputs, saved, near_series(divergence))


def _backward(
    divergence: Divergence,
    problem: Any,
    saved: torch.Tensor,
    upstream: dict[str, torch.Tensor],
    *grads: torch.Tensor | None,
) -> None:
    """Fill the gradients of a problem."""
    if divergence.kind == "jeffreys":
        weights = upstream["kl"]
        launchers().backward(problem, saved, {"kl": weights, "ref_kl": weights}, *grads)
    else:
        launchers().backward(problem, saved, upstream, *grads, near_series(divergence))


class Reference(Engine):
    """The plain torch reference, on a CPU through cpu_rows."""

    checks_values = True
    computes_together = staticmethod(reference_rows.computes_together)
    together = staticmethod(reference_rows.kl_and_gradient)
    outside = staticmethod(reference_rows.outside)
    outside_gradient = staticmethod(reference_rows.outside_gradient)

    def forward(self, args: RowArgs, outputs: dict[str, torch.Tensor], saved: torch.Tensor) -> None:
        reference_rows.forward(shard_rows.whole(args), outputs, saved)

    def backward(
        self,
        args: RowArgs,
        saved: torch.Tensor,
        upstream: dict[str, torch.Tensor],
        grad_p: torch.Tensor | None,
        grad_q: torch.Tensor | None,
    ) -> None:
        if args.cut.group:
            return shard_rows.backward(
                reference_rows.backward, args, saved, upstream, (grad_p, grad_q)
            )
        reference_rows.backward(args, saved, upstream, grad_p, grad_q)

    def scale_of(self, temperature: float | torch.Tensor) -> float | torch.Tensor:
        return 1.0 / (
            temperature.double() if isinstance(temperature, torch.Tensor) else temperature
        )

    def scale(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        number = float(factor)
        if number == 0.0:
            gradient.zero_()
        elif not math.isfinite(number):
            gradient.copy_(torch.where(gradient == 0, 0.0, gradient * factor))
        elif number != 1.0:
            gradient.mul_(factor)


ENGINES: dict[str, Engine] = {"triton": Kernels(), "reference": Reference()}
