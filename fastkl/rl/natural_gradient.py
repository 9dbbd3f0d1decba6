"""The natural gradient of a softmax policy: products with its Fisher matrix, conjugate gradients,
and a step of a given KL.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch

from . import _checks
from .vectors import Given, Tensors, dot, like, named_tensors, packed, scaled


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
    """Compute F v, F the Fisher matrix of the policy softmax(function(parameters)), the mean over
    the rows of its logits.

    Equivalent, without forming the Jacobian, to

        J = torch.func.jacrev(function)(parameters)         # [N, V, P], for N rows and P parameters
        p = function(parameters).softmax(-1)                # [N, V]
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        F = (weights[:, None, None] * (J.mT @ H @ J)).sum(0) / weights.sum()
        return F @ vector

    F is the expectation of ∇log π ∇log πᵀ over tokens of the policy, summed over the vocabulary and
    not sampled, and the second derivative with respect to new, at new = parameters, of the weighted
    mean of KL(parameters‖new) and of KL(new‖parameters).

    Args:
        function: parameters → logits [..., V] of any float type (float16 has too small a range for
            a mean over many rows). It is called twice, under torch.func.jvp and vjp: it must be
            deterministic (no dropout) and made of operations with both derivatives, as
            torch.func.functional_call(model, parameters, (tokens,)) is with attention's math
            implementation; fastkl's own operations have no forward-mode derivative.
        parameters: a float32 or float64 tensor, or a dict of such tensors by name.
        vector: shaped as parameters.
        weights: float [...], the weight of each row, at least 0 (their values are not read); None:
            all alike. A row of weight 0 adds exactly 0 whatever logits it has, if their derivatives
            are finite: replace the inputs of padding where they are not. All 0 gives 0. For a mask
            pass mask.float().

    Returns:
        As parameters, detached; nothing is written to .grad. Several tensors the size of the logits
        are held meanwhile.

    Raises:
        TypeError, ValueError: wrong type, structure, shape or device.

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C.1; Schraudolph,
    Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (2002).
    """
    _checks.expect(
        callable(function),
        "function",
        "a function from parameters to logits",
        function,
        "for a module: lambda parameters: torch.func.functional_call(model, parameters, (tokens,))",
        TypeError,
    )

    def policy(point: Any) -> torch.Tensor:
        logits = function(point)
        _checks.expect(
            isinstance(logits, torch.Tensor),
            "function",
            "one that returns logits [..., V]",
            logits,
            "return the logits alone",
            TypeError,
        )
        return logits

    point = named_tensors("parameters", parameters)
    tangents = like("vector", vector, "parameters", point)
    primal = packed(point, parameters)
    logits, tangent = torch.func.jvp(policy, (primal,), (packed(tangents, parameters),))[:2]
    _checks.logits("function's result", logits)
    _checks.token_weights(weights, logits.shape[:-1], logits.device)
    pull_back = torch.func.vjp(policy, primal)[1]
    result: Tensors = pull_back(_softmax_fisher(logits, tangent, weights).to(logits.dtype))[0]
    return result


def _softmax_fisher(
    logits: torch.Tensor, tangent: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Compute (diag(p) - p pᵀ) tangent of every row, times its share of the mean, [..., V]."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p, u = logits.to(dtype).softmax(-1), tangent.to(dtype)
    # Subtract the value at the most probable entry: on a peaked row u - E_p[u] is far smaller there
    # than u.
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
    """Solve (A + damping·I) x = b for a symmetric positive semi-definite A known by its products.

    Equivalent to torch.linalg.solve(A + damping * I, b) if it converges. Stopped earlier, x is the
    combination of b, A b, ..., A^(iterations - 1) b with the smallest error in the norm of A +
    damping·I.

    Args:
        product: v → A v, both shaped as b.
        b: a float32 or float64 tensor of any shape, or a dict of such tensors by name; not changed.
        iterations: largest number of products; at least 1.
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
    _checks.expect(
        callable(product),
        "product",
        "a function from v to A v",
        product,
        "for a matrix: lambda v: A @ v",
        TypeError,
    )
    _checks.whole_number("iterations", iterations, "a number of products", "10 are common")
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
    residual, scale = scaled(named_tensors("b", b))
    solution = {name: torch.zeros_like(value) for name, value in residual.items()}
    direction = {name: value.clone() for name, value in residual.items()}
    square = dot("b", residual, residual)
    enough = tolerance**2 * square
    for _ in range(iterations):
        if square <= enough:
            break
        image = like("product's result", product(packed(direction, b)), "b", residual)
        image = {name: value.add(direction[name], alpha=damping) for name, value in image.items()}
        curvature = dot("product's result", direction, image)
        if curvature <= 0:
            break
        length = square / curvature
        for name in residual:
            solution[name].add_(direction[name], alpha=length)
            residual[name].sub_(image[name], alpha=length)
        square, before = dot("product's result", residual, residual), square
        for name in residual:
            direction[name].mul_(square / before).add_(residual[name])
    return packed({name: value.mul_(scale.to(value.device)) for name, value in solution.items()}, b)


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
    """Compute the step along F⁻¹ gradient that moves the policy by max_kl in the quadratic model of
    the KL.

    Equivalent to

        def product(v):
            return fisher_vector_product(function, parameters, v, weights=weights)

        direction = conjugate_gradient(product, gradient, damping=damping)
        step = direction * (2 * max_kl / direction @ product(direction)).sqrt()

    so that step·F step / 2 = max_kl; the mean KL of the policy after the step approaches it as
    max_kl goes to 0. The step is one of ascent: add it to the parameters to increase the function
    that `gradient` belongs to. Its length does not depend on that of the gradient.

    One step of TRPO, with its line search on the exact KL (mean_kl as in TrustRegion):

        step = natural_gradient(function, parameters, gradient_of_objective, max_kl)
        for name, parameter in parameters.items():
            parameter.grad = -step[name]
        TrustRegion(max_kl).step(torch.optim.SGD(parameters.values(), lr=1.0), mean_kl)

    Args:
        function, parameters, weights: as in fisher_vector_product. Where the policy has a
            temperature, function divides by it.
        gradient: shaped as parameters, of the objective to increase; for a loss pass the negative.
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
    like("gradient", gradient, "parameters", named_tensors("parameters", parameters))
    product: Callable[[Any], Any] = partial(
        fisher_vector_product, function, parameters, weights=weights
    )
    direction = conjugate_gradient(
        product, gradient, iterations=iterations, tolerance=tolerance, damping=damping
    )
    named, _ = scaled(named_tensors("direction", direction))
    curvature = dot(
        "Fisher product",
        named,
        like("Fisher product", product(packed(named, parameters)), "parameters", named),
    )
    if curvature <= 0:
        _checks.expect(
            dot("direction", named, named) == 0,
            "gradient",
            "a direction along which the policy's KL grows",
            f"one of curvature {curvature:g}",
            "take the gradient from the same function and rows, or skip the step",
        )
        return direction
    length = math.sqrt(2 * max_kl / curvature)
    return packed({name: value.mul_(length) for name, value in named.items()}, parameters)
