"""The natural gradient of a softmax policy: products with its Fisher matrix, conjugate gradients,
and a step of a given KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch

from . import _checks

# What is differentiated, and every vector beside it: one tensor, or tensors by name as in
# dict(model.named_parameters()).
Tensors = torch.Tensor | dict[str, torch.Tensor]
Given = torch.Tensor | Mapping[str, torch.Tensor]


@overload
def fisher_vector_product(
    function: Callable[[torch.Tensor], torch.Tensor],
    parameters: torch.Tensor,
    vector: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
) -> torch.Tensor: ...
@overload
def fisher_vector_product(
    function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    vector: Mapping[str, torch.Tensor],
    *,
    weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]: ...
@torch.no_grad()
def fisher_vector_product(
    function: Callable[[Any], torch.Tensor],
    parameters: Given,
    vector: Given,
    *,
    weights: torch.Tensor | None = None,
) -> Tensors:
    """F v, with F the Fisher matrix of the policy softmax(function(parameters)), averaged over the
    rows of its logits.

    Equivalent, without forming the Jacobian, to

        J = torch.func.jacrev(function)(parameters)         # [N, V, P], for N rows and P parameters
        p = function(parameters).softmax(-1)                # [N, V]
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        F = (weights[:, None, None] * (J.mT @ H @ J)).sum(0) / weights.sum()
        return F @ vector

    which is the expectation of ∇log π ∇log πᵀ over tokens drawn from the policy (exact, none is
    drawn), and the second derivative with respect to new, at new = parameters, of the weighted mean
    of KL(parameters‖new), and of KL(new‖parameters).

    Args:
        function: parameters → logits [..., V] of any float type (float16 is short of range for a
            mean over many rows). It is called twice, under torch.func.jvp and vjp: it must be
            deterministic (no dropout) and made of operations with both derivatives, as
            torch.func.functional_call(model, parameters, (tokens,)) is with attention's math
            implementation; fastkl's own operations have no forward-mode derivative.
        parameters: a float32 or float64 tensor, or a dict of such tensors by name.
        vector: shaped as parameters.
        weights: float [...], what each row counts, at least 0 (not looked at); None counts all
            alike. A row of weight 0 adds exactly 0 whatever logits it has, if their derivatives are
            finite: replace the inputs of padding that is not. All 0 gives 0. For a mask pass
            mask.float().

    Returns:
        As parameters, detached; nothing is written to .grad. Several tensors the size of the logits
        are held meanwhile.

    Raises:
        TypeError, ValueError: wrong type, structure, shape or device.

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C.1; Schraudolph,
    Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (2002).
    """
    if not callable(function):
        raise TypeError(
            f"function: expected a function from parameters to logits, got "
            f"{type(function).__name__}; "
            f"for a module: lambda parameters: torch.func.functional_call(model, parameters, "
            f"(tokens,))"
        )
    point = _named("parameters", parameters)
    tangents = _like("vector", vector, "parameters", point)
    primal = _packed(point, parameters)
    policy = partial(_logits_of, function)
    logits, tangent = torch.func.jvp(policy, (primal,), (_packed(tangents, parameters),))[:2]
    _checks.logits("function's result", logits)
    _checks.token_weights(weights, logits.shape[:-1], logits.device)
    pull_back = torch.func.vjp(policy, primal)[1]
    result: Tensors = pull_back(_softmax_fisher(logits, tangent, weights).to(logits.dtype))[0]
    return result


def _logits_of(function: Callable[[Any], torch.Tensor], parameters: Tensors) -> torch.Tensor:
    """Call the function, and check that it returns a tensor."""
    logits = function(parameters)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"function: expected one that returns logits [..., V], got one that returns "
            f"{type(logits).__name__}; return the logits alone"
        )
    return logits


def _softmax_fisher(
    logits: torch.Tensor, tangent: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """(diag(p) - p pᵀ) tangent of every row, times the row's share of the mean, [..., V]."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p = logits.to(dtype).softmax(-1)
    u = tangent.to(dtype)
    # Counted from its value at the most probable entry: on a peaked row u - E_p[u] is far smaller
    # there than u.
    u = u - u.gather(-1, p.argmax(-1, keepdim=True))
    # An excluded token's logit, -inf, may have any derivative.
    u = torch.where(p == 0, 0.0, u)
    product = p * (u - (p * u).sum(-1, keepdim=True))
    if weights is None:
        return product / product.shape[:-1].numel()
    weights = weights.to(dtype)
    share = (weights / weights.sum())[..., None]
    return torch.where(weights[..., None] == 0, 0.0, product * share)


@overload
def conjugate_gradient(
    product: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    *,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 0.0,
) -> torch.Tensor: ...
@overload
def conjugate_gradient(
    product: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    b: Mapping[str, torch.Tensor],
    *,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 0.0,
) -> dict[str, torch.Tensor]: ...
@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Any], Given],
    b: Given,
    *,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 0.0,
) -> Tensors:
    """x with (A + damping·I) x = b, for a symmetric positive semi-definite A known by its products.

    Equivalent to torch.linalg.solve(A + damping * I, b) where it may run to the end; stopped
    before, x is the best of what `iterations` products can reach: of all combinations of b, A b,
    ..., A^(iterations - 1) b the one with the smallest error in the norm of A + damping·I.

    Args:
        product: v → A v, both shaped as b.
        b: a float32 or float64 tensor of any shape, or a dict of such tensors by name; not changed.
        iterations: how many products at the most; at least 1.
        tolerance: stop once the norm of the residual is at most this part of the norm of b; from 0
            to less than 1.
        damping: added to the diagonal; at least 0. Where A is singular and b not in its range there
            is no solution, and without damping x grows without bound. It also stops, without an
            error, where rounding leaves no positive curvature along the next direction.

    Returns:
        x, shaped as b, detached; no size of b is too small or too large for its type. b = 0 gives 0
        without a product. Waits for the device once, and twice per iteration, for the inner
        products.

    Raises:
        TypeError, ValueError: wrong arguments; a product that is not finite or not shaped as b.

    Source: Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems (1952).
    """
    if not callable(product):
        raise TypeError(
            f"product: expected a function from v to A v, got {type(product).__name__}; for a "
            f"matrix: lambda v: A @ v"
        )
    _checks.whole_number("iterations", iterations, "how many products to take", "10 are common")
    _checks.number(
        "tolerance",
        tolerance,
        "a number from 0 to less than 1",
        lambda x: 0 <= x < 1,
        "it is a part of the norm of b",
    )
    _checks.number(
        "damping",
        damping,
        "a finite number of at least 0",
        lambda x: 0 <= x < math.inf,
        "1e-3 is common",
    )
    residual, scale = _scaled(_named("b", b))
    solution = {name: torch.zeros_like(value) for name, value in residual.items()}
    direction = {name: value.clone() for name, value in residual.items()}
    square = _dot("b", residual, residual)
    enough = tolerance**2 * square
    for _ in range(iterations):
        if square <= enough:
            break
        image = _like("product's result", product(_packed(direction, b)), "b", residual)
        image = {name: value.add(direction[name], alpha=damping) for name, value in image.items()}
        curvature = _dot("product's result", direction, image)
        if curvature <= 0:
            break
        length = square / curvature
        for name in residual:
            solution[name].add_(direction[name], alpha=length)
            residual[name].sub_(image[name], alpha=length)
        square, before = _dot("product's result", residual, residual), square
        for name in residual:
            direction[name].mul_(square / before).add_(residual[name])
    return _packed(
        {name: value.mul_(scale.to(value.device)) for name, value in solution.items()}, b
    )


@overload
def natural_gradient(
    function: Callable[[torch.Tensor], torch.Tensor],
    parameters: torch.Tensor,
    gradient: torch.Tensor,
    max_kl: float,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 1e-3,
) -> torch.Tensor: ...
@overload
def natural_gradient(
    function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    gradient: Mapping[str, torch.Tensor],
    max_kl: float,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 1e-3,
) -> dict[str, torch.Tensor]: ...
@torch.no_grad()
def natural_gradient(
    function: Callable[[Any], torch.Tensor],
    parameters: Given,
    gradient: Given,
    max_kl: float,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 1e-6,
    damping: float = 1e-3,
) -> Tensors:
    """The step along F⁻¹ gradient that, by the quadratic model of the KL, moves the policy by
    max_kl.

    Equivalent to

        direction = conjugate_gradient(product, gradient, damping=damping)       # product: v → F v, fisher_vector_product
        step = direction * (2 * max_kl / direction @ product(direction)).sqrt()

    so that step·F step / 2 = max_kl, to which the mean KL of the policy after the step tends as
    max_kl does to 0. The step goes up: add it to the parameters to increase what `gradient` is the
    gradient of. Its length does not depend on that of the gradient.

    One step of TRPO, with its line search on the exact KL (mean_kl as in TrustRegion):

        step = natural_gradient(function, parameters, gradient_of_objective, max_kl)
        for name, parameter in parameters.items():
            parameter.grad = -step[name]
        TrustRegion(max_kl).step(torch.optim.SGD(parameters.values(), lr=1.0), mean_kl)

    Args:
        function, parameters, weights: as in fisher_vector_product. Where the policy has a
            temperature, function divides by it.
        gradient: shaped as parameters, of what is to grow; for a loss pass the negative.
        max_kl: nats, the weighted mean per row; positive.
        iterations, tolerance: as in conjugate_gradient; an iteration costs two forwards and a
            backward.
        damping: added to the diagonal of F to find the direction, not to scale the step; compare it
            with v·Fv / v·v along the gradient v. F is singular as a rule: N rows feel N·(V - 1)
            directions at most. The gradient of a function of these rows' probabilities lies in F's
            range and could do without; one that other rows contributed to cannot.

    Returns:
        The step, as parameters, detached; 0 for a gradient of 0. Waits as conjugate_gradient does,
        and once more, or twice where the curvature is 0.

    Raises:
        TypeError, ValueError: wrong arguments; a gradient or Fisher product that is not finite; a
            direction along which the policy does not change, so that no length gives max_kl.

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C; Amari, Natural
    Gradient Works Efficiently in Learning (1998).
    """
    _checks.number(
        "max_kl",
        max_kl,
        "a positive finite number of nats",
        lambda x: 0 < x < math.inf,
        "0.01 is common",
    )
    _like("gradient", gradient, "parameters", _named("parameters", parameters))
    product: Callable[[Any], Any] = partial(
        fisher_vector_product, function, parameters, weights=weights
    )
    direction = conjugate_gradient(
        product, gradient, iterations=iterations, tolerance=tolerance, damping=damping
    )
    named, _ = _scaled(_named("direction", direction))
    curvature = _dot(
        "Fisher product",
        named,
        _like("Fisher product", product(_packed(named, parameters)), "parameters", named),
    )
    if curvature <= 0:
        if _dot("direction", named, named) == 0:
            return direction
        raise ValueError(
            f"gradient: expected a direction along which the policy's KL grows, got one of "
            f"curvature {curvature:g}; "
            f"take the gradient from the same function and rows, or skip the step"
        )
    length = math.sqrt(2 * max_kl / curvature)
    return _packed({name: value.mul_(length) for name, value in named.items()}, parameters)


def _named(name: str, value: Given) -> dict[str, torch.Tensor]:
    """A dict of float32 or float64 tensors by name; a tensor alone is one without a name."""
    if not isinstance(value, (torch.Tensor, dict)) or isinstance(value, dict) and not value:
        got = "an empty dict" if isinstance(value, dict) else type(value).__name__
        raise TypeError(
            f"{name}: expected a tensor or a dict of tensors by name, got {got}; for a module: "
            f"dict(model.named_parameters())"
        )
    named = {"": value} if isinstance(value, torch.Tensor) else dict(value)
    for key, tensor in named.items():
        where = f"{name}[{key!r}]" if isinstance(value, dict) else name
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{where}: expected a tensor, got {type(tensor).__name__}; leave out what takes "
                f"no part, in every dict alike"
            )
        _checks.not_sharded(where, tensor, "float32 or float64", f"pass {where}.full_tensor()")
        if tensor.is_meta:
            raise ValueError(
                f"{where}: expected values, got a tensor on the meta device, which has "
                f"none; pass real tensors"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{where}: expected float32 or float64, since 16 bits do not hold a Fisher "
                f"product, got {tensor.dtype}; "
                f"pass copies: .float()"
            )
    return named


def _like(
    name: str, value: Given, other_name: str, other: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of `value` in the order of `other`, after a check that names, shapes, types and
    devices are its own.
    """
    named = _named(name, value)
    if named.keys() != other.keys():
        raise ValueError(
            f"{name}: expected the names of {other_name}, got others: "
            f"{sorted(named.keys() ^ other.keys())} are in one of them only; "
            f"take both from the same parameters"
        )
    for key, expected in other.items():
        got = named[key]
        if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
            where = f"{name}[{key!r}]" if key else name
            raise ValueError(
                f"{where}: expected as in {other_name} {tuple(expected.shape)}, {expected.dtype}, "
                f"{expected.device}, got "
                f"{tuple(got.shape)}, {got.dtype}, {got.device}; take both from the same parameters"
            )
    return {key: named[key] for key in other}


def _packed(named: dict[str, torch.Tensor], like: Given) -> Tensors:
    return named[""] if isinstance(like, torch.Tensor) else named


def _scaled(named: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors over their largest entry, that entry): the squares of float32 below 1e-23 or
    above 1e19 are 0 or infinite.
    """
    device = next(iter(named.values())).device
    norms = [
        torch.linalg.vector_norm(value, math.inf).to(device, torch.float64)
        for value in named.values()
        if value.numel()
    ]
    scale = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms]).max()
    scale = torch.where(scale == 0, 1.0, scale)
    return {name: value / scale.to(value.device) for name, value in named.items()}, scale


def _dot(name: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The inner product, finite; waits for the device once."""
    parts = [(first[key] * second[key]).sum() for key in first]
    value = float(torch.stack([part.to(parts[0].device, torch.float64) for part in parts]).sum())
    if not math.isfinite(value):
        raise ValueError(
            f"{name}: expected finite values, got an inner product of {value}; look for a NaN, an "
            f"infinity or an overflow there"
        )
    return value
