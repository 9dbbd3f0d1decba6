"""Fisher-vector products, conjugate gradients and the natural gradient, against explicit float64
matrices.
"""

import math

import pytest
import torch
from test_trust_region import Calls

from fastkl import testing
from fastkl.rl.natural_gradient import conjugate_gradient, fisher_vector_product, natural_gradient

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
weighted = pytest.mark.parametrize(
    "weights", [None, torch.tensor([0.5, 2.0, 0.0, 1.25]).double()], ids=["mean", "weights"]
)
Named = dict[str, torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Case:
    """A policy of two layers, its parameters by name, and its float64 Fisher matrix."""

    def __init__(self, device: str = "cpu") -> None:
        shapes = {"first": (3, 2), "second": (2, 5), "bias": (5,)}
        self.batch = normal(4, 3).to(device)
        self.parameters, self.vector = (
            {name: normal(*shape, seed=seed).to(device) for name, shape in shapes.items()}
            for seed in (1, 2)
        )

    def function(self, parameters: Named) -> torch.Tensor:
        hidden = torch.tanh(self.batch @ parameters["first"])
        return hidden @ parameters["second"] + parameters["bias"]

    @staticmethod
    def flat(named: Named) -> torch.Tensor:
        return torch.cat([value.flatten() for value in named.values()]).double().cpu()

    def named(self, flat: torch.Tensor) -> Named:
        parts = flat.split([value.numel() for value in self.parameters.values()])
        shaped = zip(self.parameters.items(), parts, strict=True)
        return {name: part.reshape(value.shape).to(value) for (name, value), part in shaped}

    def log_p(self, flat: torch.Tensor) -> torch.Tensor:
        return self.function(self.named(flat)).log_softmax(-1)

    def fisher(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """E of ∇log π ∇log πᵀ, every token enumerated, the weighted mean over rows, [P, P]."""
        flat = self.flat(self.parameters)
        scores = torch.autograd.functional.jacobian(self.log_p, flat)
        weights = torch.ones(len(scores)).double() if weights is None else weights
        share = weights / weights.sum()
        return torch.einsum("n,nv,nvi,nvj->ij", share, self.log_p(flat).exp(), scores, scores)


def spd(size: int, rank: int | None = None) -> torch.Tensor:
    """Makes a symmetric positive (semi-)definite matrix with eigenvalues 1 … rank."""
    basis, values = torch.linalg.qr(normal(size, size)).Q, torch.arange(1, size + 1).double()
    return (basis * torch.where(values > (rank or size), 0.0, values)) @ basis.T


# ---- fisher_vector_product


@on_devices
@weighted
def test_fisher_vector_product(weights, device) -> None:
    case, host = Case(device=device), Case()
    on_device = None if weights is None else weights.to(device)
    result = fisher_vector_product(case.function, case.parameters, case.vector, weights=on_device)
    exact = host.fisher(weights) @ host.flat(host.vector)
    testing.assert_gradient(case.flat(result), exact, "F v", tolerance=1e-12)


def identity(z: torch.Tensor) -> torch.Tensor:
    return z


def peaked(kind: str) -> torch.Tensor:
    return testing.logits(kind, 16, 300, torch.Generator().manual_seed(0))


# A 16-bit model's logits from float32 parameters are right to half of the last bit. Logits up to 40
# apart: exp of a difference rounded to 2^-24 of it is right to 2.4e-6, and so is each of the two
# sums.
LOGITS = [
    *((normal(*shape, 6, seed=1), torch.float64, 1e-14) for shape in ((), (4,), (2, 3))),
    *(
        (normal(8, 33, seed=1).float(), dtype, torch.finfo(dtype).eps / 2)
        for dtype in (torch.bfloat16, torch.float16)
    ),
    *((peaked(kind), torch.float32, 1e-5) for kind in testing.KINDS),
]


@on_devices
@pytest.mark.parametrize("logits, dtype, tolerance", LOGITS)
def test_closed_form_of_logits(logits, dtype, tolerance, device) -> None:
    # With the logits themselves as parameters: (diag(p) - p pᵀ) v over the number of rows.
    logits, vector = (
        logits.to(device),
        5 * normal(*logits.shape, seed=2).to(device, logits.dtype) + 30,
    )
    weights = torch.ones(16, device=device) if dtype == torch.float32 else None
    result = fisher_vector_product(lambda z: z.to(dtype), logits, vector, weights=weights)
    p, v = (each.to(dtype).double() for each in (logits, vector))
    p = p.softmax(-1)
    v = v - v.gather(-1, p.argmax(-1, keepdim=True))
    exact = p * (v - (p * v).sum(-1, keepdim=True)) / p.shape[:-1].numel()
    assert result.dtype == logits.dtype
    testing.assert_gradient(result, exact, "F v", tolerance=tolerance)


def test_rows_and_tokens_that_take_no_part() -> None:
    # Rows of weight 0, whatever logits they have; no rows; tokens at -inf.
    logits, vector = normal(3, 4, seed=1), normal(3, 4, seed=2)
    garbage, weights = torch.zeros(3, 4), torch.tensor([1.0, 0.0, 3.0]).double()
    garbage[1] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    result = fisher_vector_product(lambda z: z + garbage, logits, vector, weights=weights)
    kept = fisher_vector_product(identity, logits[::2], vector[::2], weights=weights[::2])
    assert torch.equal(result[::2], kept) and not bool(result[1].any())
    assert not bool(
        fisher_vector_product(lambda z: z + garbage, logits, vector, weights=torch.zeros(3)).any()
    )
    assert (
        fisher_vector_product(lambda v: v.expand(0, 4), torch.ones(4), torch.ones(4)).tolist()
        == [0.0] * 4
    )
    keep = [0, 1, 3]
    result = fisher_vector_product(
        lambda z: z + torch.tensor([0.0, 0.0, -math.inf, 0.0]), logits, vector
    )
    exact = fisher_vector_product(identity, logits[:, keep], vector[:, keep])
    assert not bool(result[:, 2].any())
    testing.assert_gradient(result[:, keep], exact, "open tokens", tolerance=1e-15)
    # The logit of a probability 0 has an infinite derivative, which must not reach the other
    # tokens.
    p, direction = torch.tensor([0.25, 0.75, 0.0]).double(), torch.tensor([1.0, -1.0, 1.0]).double()
    assert fisher_vector_product(torch.log, p, direction)[:2].tolist() == pytest.approx(
        [16 / 4, -4 / 3]
    )


# ---- conjugate_gradient


@on_devices
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6])
def test_conjugate_gradient_is_the_best_of_its_krylov_space(iterations, damping, device) -> None:
    # After k products x minimises the error in the A-norm over b, A b, …; a dict is solved as
    # the one vector that it is.
    matrix, b = spd(6), normal(6, seed=7)
    damped, on_device = matrix + damping * torch.eye(6).double(), matrix.to(device)
    powers = torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], -1)
    space = torch.linalg.qr(powers).Q
    best = space @ torch.linalg.solve(space.T @ damped @ space, space.T @ b)
    more = {"iterations": iterations, "tolerance": 0.0, "damping": damping}
    testing.assert_gradient(
        conjugate_gradient(lambda v: on_device @ v, b.to(device), **more),
        best,
        "x",
        tolerance=1e-10,
    )
    named = {"a": b[:2].to(device).requires_grad_(), "b": b[2:].reshape(2, 2).to(device)}

    def product(v: Named) -> Named:
        image = on_device @ torch.cat([v["a"], v["b"].flatten()])
        return {"b": image[2:].reshape(2, 2), "a": image[:2]}

    x = conjugate_gradient(product, named, **more)
    testing.assert_gradient(Case.flat(x), best, "x", tolerance=1e-10)
    assert (
        list(x) == ["a", "b"]
        and not x["a"].requires_grad
        and torch.equal(Case.flat(named).detach(), b)
    )


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e20, 1e35])
def test_sizes_whose_squares_leave_float32(size) -> None:
    # x, and a natural gradient's direction, scale with b where b·b is 0 or infinite; two
    # waits per product and one before.
    matrix, b = spd(6).float(), normal(6, seed=7).float()
    with Calls() as calls:
        x = conjugate_gradient(lambda v: matrix @ v, b * size, iterations=6, tolerance=0.0)
    assert calls.counts["aten._local_scalar_dense.default"] == 13
    testing.assert_gradient(
        x.double() / size, torch.linalg.solve(matrix.double(), b.double()), "x", tolerance=1e-5
    )
    steps = [natural_gradient(identity, b, (b - b.mean()) * by, 0.01) for by in (size, 1.0)]
    testing.assert_gradient(*steps, "step", tolerance=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_tolerance_is_relative(scale) -> None:
    # It stops at the first residual within the tolerance of b's norm, whatever that is.
    matrix, b = spd(30), normal(30, seed=7) * scale

    def residual(iterations: int, tolerance: float) -> tuple[float, int]:
        calls = []
        x = conjugate_gradient(
            lambda v: calls.append(0) or matrix @ v, b, iterations=iterations, tolerance=tolerance
        )
        return float((b - matrix @ x).norm() / b.norm()), len(calls)

    error, products = residual(30, 1e-2)
    assert error <= 1e-2 < residual(products - 1, 0.0)[0]
    assert 3 < products < 30 and residual(5, 0.0)[1] == 5


def test_where_it_stops() -> None:
    # b = 0 needs no product; without curvature it stops at 0, damped it is b / damping;
    # singular, the smallest solution.
    flat, singular = torch.tensor([0.0, 0.0, 2.0]), spd(6, rank=4)
    assert conjugate_gradient(lambda v: 1 / 0, torch.zeros(3)).tolist() == [0.0] * 3
    assert conjugate_gradient(torch.zeros_like, flat).tolist() == [0.0] * 3
    assert conjugate_gradient(torch.zeros_like, flat, damping=0.5).tolist() == [0.0, 0.0, 4.0]
    b = singular @ normal(6, seed=7)
    x = conjugate_gradient(lambda v: singular @ v, b, iterations=4, tolerance=0.0)
    testing.assert_gradient(x, torch.linalg.pinv(singular, rtol=1e-10) @ b, "x", tolerance=1e-10)


# ---- natural_gradient


@on_devices
@weighted
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_direction_and_length(damping, weights, device) -> None:
    # Along (F + damping·I)⁻¹ g, and step·F step / 2 = max_kl with the undamped F, for any
    # length of the gradient.
    case, host = Case(device=device), Case()
    fisher, more = host.fisher(weights), {"iterations": 40, "tolerance": 1e-12, "damping": damping}
    # In the range of F, as the gradient of a function of these rows' probabilities is.
    gradient, values = fisher @ host.flat(host.vector), torch.linalg.eigh(fisher)
    inverse = torch.where(values[0] > 1e-10, 1 / (values[0] + damping), 0.0)
    direction = values[1] @ (inverse * (values[1].T @ gradient))
    exact = direction * torch.sqrt(0.04 / (direction @ fisher @ direction))
    on_device = None if weights is None else weights.to(device)
    for size in (1.0, 1e-4, 0.0):
        step = case.flat(
            natural_gradient(
                case.function,
                case.parameters,
                case.named(gradient * size),
                0.02,
                weights=on_device,
                **more,
            )
        )
        testing.assert_gradient(step, exact * (size > 0), "step", tolerance=1e-8)
        assert float(step @ fisher @ step) / 2 == pytest.approx(0.02 * (size > 0), rel=1e-12)
