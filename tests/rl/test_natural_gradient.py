"""Fisher-vector products, conjugate gradients and the natural gradient, against explicit float64 matrices."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from test_rl_trust_region import Calls

import fastkl
from fastkl.rl.natural_gradient import conjugate_gradient, fisher_vector_product, natural_gradient
from fastkl.rl.trust_region import TrustRegion

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Case:
    """A policy of two layers over V tokens on N rows, its parameters by name, and everything about it as explicit float64 matrices."""

    def __init__(self, rows: int = 4, vocabulary: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.batch = normal(rows, 3)
        self.parameters = {"first": normal(3, 2), "second": normal(2, vocabulary), "bias": normal(vocabulary)}
        self.vector = {name: normal(*value.shape) for name, value in self.parameters.items()}
        self.gradient = self.flat(self.vector)

    def function(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(self.batch @ parameters["first"]) @ parameters["second"] + parameters["bias"]

    @staticmethod
    def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.flatten() for value in named.values()]).double().cpu()

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split([value.numel() for value in self.parameters.values()])
        return {name: part.reshape(value.shape).to(value) for (name, value), part in zip(self.parameters.items(), parts, strict=True)}

    def log_p(self, flat: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, V] at flat float64 parameters."""
        return self.function(self.named(flat)).log_softmax(-1)

    def fisher(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """E over tokens of ∇log π ∇log πᵀ, every token enumerated, the weighted mean over rows, [P, P]."""
        flat = self.flat(self.parameters)
        scores = torch.autograd.functional.jacobian(self.log_p, flat)
        p = self.log_p(flat).exp()
        per_row = torch.einsum("nv,nvi,nvj->nij", p, scores, scores)
        weights = torch.ones(len(p), dtype=torch.float64) if weights is None else weights.double()
        return (weights[:, None, None] * per_row).sum(0) / weights.sum()

    def kl(self, step: torch.Tensor, *, backwards: bool = False, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted mean KL(here‖after a flat step), or of the two swapped."""
        flat = self.flat(self.parameters)
        here, there = self.log_p(flat), self.log_p(flat + step)
        first, second = (there, here) if backwards else (here, there)
        kl = (first.exp() * (first - second)).sum(-1)
        return kl.mean() if weights is None else (weights * kl).sum() / weights.sum()


def spd(size: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """A symmetric positive (semi-)definite float64 matrix with eigenvalues 1 … rank."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    values = torch.arange(1, size + 1, dtype=torch.float64)
    return (basis * torch.where(values > (rank or size), 0.0, values)) @ basis.T


def b_for(size: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- fisher_vector_product


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weights"])
def test_fisher_vector_product(weighted, device) -> None:
    """F v of the enumerated Fisher matrix, and of the second derivative of the KL in either direction."""
    case = Case(device=device)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64) if weighted else None
    result = fisher_vector_product(case.function, case.parameters, case.vector, weights=None if weights is None else weights.to(device))
    assert list(result) == list(case.parameters)
    host = Case()
    vector = host.flat(host.vector)
    zero = torch.zeros_like(vector)
    matrices = [host.fisher(weights)]
    matrices += [torch.autograd.functional.hessian(lambda s, b=b: host.kl(s, backwards=b, weights=weights), zero) for b in (False, True)]
    for matrix, what in zip(matrices, ("Fisher", "KL(old‖new)", "KL(new‖old)"), strict=True):
        cases.assert_gradient(case.flat(result), matrix @ vector, what, tolerance=1e-12)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_closed_form_of_logits(shape) -> None:
    """With the logits themselves as parameters, one tensor: (diag(p) - p pᵀ) v over the number of rows."""
    logits, vector = (torch.randn(*shape, 6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    p = logits.softmax(-1)
    exact = p * vector - p * (p * vector).sum(-1, keepdim=True)
    result = fisher_vector_product(lambda z: z, logits, vector)
    cases.assert_gradient(result, exact / max(1, torch.Size(shape).numel()), "F v", tolerance=1e-14)


def test_a_module_and_shared_weights() -> None:
    """functional_call on a module whose two layers share a weight: differentiated as one parameter; gradient buffers stay untouched."""
    torch.manual_seed(0)

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 3, dtype=torch.float64)
            self.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.embedding(tokens)) @ self.embedding.weight.T

    model, tokens = Tied(), torch.tensor([[0, 3], [4, 1]])
    parameters = dict(model.named_parameters())
    vector = {name: torch.randn_like(value) for name, value in reversed(parameters.items())}  # in another order
    result = fisher_vector_product(lambda named: torch.func.functional_call(model, named, (tokens,)), parameters, vector)
    weight = model.embedding.weight.detach()

    def kl(flat: torch.Tensor) -> torch.Tensor:
        table = weight + flat.reshape(weight.shape)
        new, old = ((torch.tanh(w[tokens.flatten()]) @ w.T).log_softmax(-1) for w in (table, weight))
        return (old.exp() * (old - new)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(kl, torch.zeros(15, dtype=torch.float64))
    exact = hessian @ vector["embedding.weight"].detach().flatten()
    cases.assert_gradient(result["embedding.weight"].flatten(), exact, "F v", tolerance=1e-12)
    assert not bool(result["unused"].any()) and list(result) == list(parameters)
    assert all(value.grad is None and not result[name].requires_grad for name, value in parameters.items())


def test_rows_of_weight_0_add_nothing() -> None:
    """Whatever logits they have; and all weights 0 give 0."""
    logits, vector = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    garbage = torch.zeros(3, 4, dtype=torch.float64)
    garbage[1] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    result = fisher_vector_product(lambda z: z + garbage, logits, vector, weights=weights)
    kept = fisher_vector_product(lambda z: z, logits[::2], vector[::2], weights=weights[::2])
    assert torch.equal(result[::2], kept) and result[1].tolist() == [0.0] * 4
    none = fisher_vector_product(lambda z: z + garbage, logits, vector, weights=torch.zeros(3))
    assert torch.equal(none, torch.zeros_like(logits))


def test_no_rows_and_excluded_tokens() -> None:
    """N = 0 gives 0; a token at -inf takes no part."""
    empty = fisher_vector_product(lambda v: v.expand(0, 4), torch.ones(4), torch.ones(4))
    assert empty.tolist() == [0.0] * 4
    logits, vector = (torch.randn(2, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    closed = torch.tensor([0.0, 0.0, -math.inf, 0.0], dtype=torch.float64)
    result = fisher_vector_product(lambda z: z + closed, logits, vector)
    keep = [0, 1, 3]
    exact = fisher_vector_product(lambda z: z, logits[:, keep], vector[:, keep])
    assert result[:, 2].tolist() == [0.0, 0.0]
    cases.assert_gradient(result[:, keep], exact, "open tokens", tolerance=1e-15)
    # The logit of a probability 0 has an infinite derivative, which must not reach the other tokens.
    p, direction = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    assert fisher_vector_product(torch.log, p, direction)[:2].tolist() == pytest.approx([16 / 4, -4 / 3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_float32_keeps_the_digits_of_peaked_rows(kind, device) -> None:
    """Logits up to 40 apart: exp of a difference rounded to 2^-24 of it is right to 2.4e-6, and so is each of the two sums: 1e-5 in all."""
    logits = cases.logits(kind, 16, 300, torch.Generator().manual_seed(0)).to(device)
    vector = 5 * torch.randn(16, 300, generator=torch.Generator().manual_seed(1)).to(device) + 30
    result = fisher_vector_product(lambda z: z, logits, vector, weights=torch.ones(16, device=device) / 16)
    p, v = logits.double().softmax(-1), vector.double()
    v = v - v.gather(-1, p.argmax(-1, keepdim=True))
    exact = p * (v - (p * v).sum(-1, keepdim=True)) / 16
    assert result.dtype == torch.float32
    error = (result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype) -> None:
    """A 16-bit model's logits from float32 parameters, as with adapters: right to the rounding of the result, half of the last bit."""
    logits, vector = (torch.randn(8, 33, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    result = fisher_vector_product(lambda z: z.to(dtype), logits, vector)
    p, v = logits.to(dtype).double().softmax(-1), vector.to(dtype).double()
    exact = p * (v - (p * v).sum(-1, keepdim=True)) / 8
    assert result.dtype == torch.float32
    cases.assert_gradient(result, exact, "F v", tolerance=0.5 * torch.finfo(dtype).eps)


# ---- conjugate_gradient


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6])
def test_conjugate_gradient_is_the_best_of_its_krylov_space(iterations, damping) -> None:
    """After k products x minimises the error in the A-norm over b, A b, …; after all it is the solution."""
    matrix, b = spd(6), b_for(6)
    x = conjugate_gradient(lambda v: matrix @ v, b, iterations=iterations, tolerance=0.0, damping=damping)
    damped = matrix + damping * torch.eye(6, dtype=torch.float64)
    space = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], -1)).Q
    best = space @ torch.linalg.solve(space.T @ damped @ space, space.T @ b)
    cases.assert_gradient(x, best, "x", tolerance=1e-10)
    if iterations == 6:
        cases.assert_gradient(x, torch.linalg.solve(damped, b), "solution", tolerance=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_by_name(device) -> None:
    """A dict is solved as the one vector that it is, in the order of b whatever that of the products; b is not changed."""
    matrix, b = spd(6).to(device), b_for(6).to(device)
    named = {"a": b[:2].clone().requires_grad_(), "b": b[2:].clone().reshape(2, 2)}

    def product(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image = matrix @ torch.cat([v["a"], v["b"].flatten()])
        return {"b": image[2:].reshape(2, 2), "a": image[:2]}

    x = conjugate_gradient(product, named, iterations=4)
    cases.assert_gradient(torch.cat([x["a"], x["b"].flatten()]), conjugate_gradient(lambda v: matrix @ v, b, iterations=4), "x", tolerance=1e-13)
    assert list(x) == ["a", "b"] and not x["a"].requires_grad
    assert torch.equal(named["a"], b[:2]) and torch.equal(named["b"].flatten(), b[2:])


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e20, 1e35])
def test_sizes_whose_squares_leave_float32(size) -> None:
    """x, and the direction of a natural gradient, scale with b where b·b is 0 or infinite; two waits per product and one before."""
    matrix, b = spd(6).float(), b_for(6).float()
    with Calls() as calls:
        x = conjugate_gradient(lambda v: matrix @ v, b * size, iterations=6, tolerance=0.0)
    assert calls.counts["aten._local_scalar_dense.default"] == 13
    cases.assert_gradient(x.double() / size, torch.linalg.solve(matrix.double(), b.double()), "x", tolerance=1e-5)
    cases.assert_gradient(*(natural_gradient(lambda z: z, b, (b - b.mean()) * by, 0.01) for by in (size, 1.0)), "step", tolerance=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_tolerance_is_relative(scale) -> None:
    """It stops at the first residual within the tolerance of b's norm, whatever that is, and x scales with b."""
    matrix, b = spd(30), b_for(30) * scale

    def residual(iterations: int, tolerance: float) -> tuple[float, int]:
        calls = []
        x = conjugate_gradient(lambda v: calls.append(0) or matrix @ v, b, iterations=iterations, tolerance=tolerance)
        return float((b - matrix @ x).norm() / b.norm()), len(calls)

    error, products = residual(30, 1e-2)
    assert error <= 1e-2 and 3 < products < 30
    assert residual(products - 1, 0.0)[0] > 1e-2
    assert residual(5, 0.0)[1] == 5


def test_nothing_to_solve_and_nothing_to_curve() -> None:
    """b = 0 needs no product; in the null space of A there is no curvature, and it stops at 0; damped it is b / damping."""
    assert conjugate_gradient(lambda v: 1 / 0, torch.zeros(3)).tolist() == [0.0] * 3
    flat = torch.tensor([0.0, 0.0, 2.0])
    assert conjugate_gradient(lambda v: torch.zeros_like(v), flat).tolist() == [0.0] * 3
    assert conjugate_gradient(lambda v: torch.zeros_like(v), flat, damping=0.5).tolist() == [0.0, 0.0, 4.0]
    assert conjugate_gradient(lambda v: v, flat).tolist() == flat.tolist()


def test_singular_and_consistent() -> None:
    """With b in the range of a singular A: the solution of the smallest norm."""
    matrix = spd(6, rank=4)
    b = matrix @ b_for(6)
    x = conjugate_gradient(lambda v: matrix @ v, b, iterations=4, tolerance=0.0)
    cases.assert_gradient(x, torch.linalg.pinv(matrix, rtol=1e-10) @ b, "x", tolerance=1e-10)


# ---- natural_gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weights"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_direction_and_length(damping, weighted, device) -> None:
    """Along (F + damping·I)⁻¹ g, and step·F step / 2 = max_kl with the undamped F, for any length of the gradient."""
    case, host = Case(device=device), Case()
    weights = torch.tensor([0.5, 2.0, 1.0, 1.25], dtype=torch.float64) if weighted else None
    fisher = host.fisher(weights)
    # In the range of F, as the gradient of what depends on these rows' probabilities is.
    gradient = fisher @ host.gradient
    on_device = None if weights is None else weights.to(device)
    step, scaled = (natural_gradient(case.function, case.parameters, case.named(gradient * size), 0.02, weights=on_device, iterations=40,
                                     tolerance=1e-12, damping=damping) for size in (1.0, 1e-4))
    flat = case.flat(step)
    values, basis = torch.linalg.eigh(fisher)
    inverse = torch.where(values > 1e-10, 1 / (values + damping), 0.0)
    direction = basis @ (inverse * (basis.T @ gradient))
    exact = direction * torch.sqrt(0.04 / (direction @ fisher @ direction))
    cases.assert_gradient(flat, exact, "step", tolerance=1e-8)
    assert float(flat @ fisher @ flat) / 2 == pytest.approx(0.02, rel=1e-12)
    cases.assert_gradient(case.flat(scaled), flat, "of a shorter gradient", tolerance=1e-8)


def test_the_kl_tends_to_max_kl() -> None:
    """The quadratic model is off by the third order: the relative error of the KL falls as the root of max_kl, in both directions."""
    case = Case()
    errors = {}
    for max_kl in (1e-3, 1e-5):
        step = case.flat(natural_gradient(case.function, case.parameters, case.named(case.fisher() @ case.gradient), max_kl, damping=0.0))
        for backwards in (False, True):
            errors[max_kl, backwards] = abs(float(case.kl(step, backwards=backwards)) / max_kl - 1)
    for backwards in (False, True):
        assert 0 < errors[1e-3, backwards] < 0.3
        assert 1 / 15 < errors[1e-5, backwards] / errors[1e-3, backwards] < 1 / 7


def test_closed_form_of_a_bandit() -> None:
    """For the expected reward of a softmax over logits: along reward minus its mean, of length √(2·max_kl / Var reward), and it goes up."""
    logits, reward = (torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    p = logits.softmax(-1)
    mean = (p * reward).sum()
    step = natural_gradient(lambda z: z, logits, p * (reward - mean), 0.01, damping=0.0, tolerance=0.0, iterations=5)
    exact = (reward - reward.mean()) * torch.sqrt(0.02 / (p * (reward - mean) ** 2).sum())
    cases.assert_gradient(step, exact, "step", tolerance=1e-10)
    assert float(((logits + step).softmax(-1) * reward).sum()) > float(mean)


def test_trpo_with_a_trust_region() -> None:
    """As in the docstring: each step within the bound by fastkl's exact KL, most of them near it, and the reward goes up."""
    case = Case(rows=16, vocabulary=11, dtype=torch.float32)
    reward = torch.randn(16, 11, generator=torch.Generator().manual_seed(3))
    parameters = {name: torch.nn.Parameter(value) for name, value in case.parameters.items()}

    def objective() -> torch.Tensor:
        return (case.function(parameters).softmax(-1) * reward).sum(-1).mean()

    rewards, kls = [float(objective().detach())], []
    for _ in range(10):
        old, before = case.function(parameters).detach(), rewards[-1]
        gradient = dict(zip(parameters, torch.autograd.grad(objective(), list(parameters.values())), strict=True))
        step = natural_gradient(case.function, parameters, gradient, 0.02)
        for name, parameter in parameters.items():
            parameter.grad = -step[name]

        def mean_kl(old: torch.Tensor = old, before: float = before) -> torch.Tensor | float:
            kl = fastkl.kl_divergence(old, case.function(parameters)).mean()
            return kl if float(objective()) > before else math.inf

        result = TrustRegion(0.02).step(torch.optim.SGD(parameters.values(), lr=1.0), mean_kl)
        kls.append(result.kl)
        rewards.append(float(objective().detach()))
        assert result.accepted != "undone" and rewards[-1] > before
        assert result.kl == pytest.approx(float(cases.truth(old, case.function(parameters).detach()).kl.mean()), rel=1e-4)
    assert max(kls) <= 0.02 and sorted(kls)[5] > 0.004
    assert rewards[-1] > rewards[0] + 0.3


def test_no_gradient_no_step() -> None:
    case = Case()
    zero = {name: torch.zeros_like(value) for name, value in case.parameters.items()}
    step = natural_gradient(case.function, case.parameters, zero, 0.01)
    assert all(not bool(value.any()) for value in step.values()) and list(step) == list(zero)


# ---- arguments

ONES = torch.ones(3)


def vector_case(vector):
    return fisher_vector_product(lambda named: named["a"], {"a": torch.ones(3), "b": torch.ones(2)}, vector)


@pytest.mark.parametrize("make, error, words", [
    (lambda: fisher_vector_product(ONES, ONES, ONES), TypeError, "function: expected a function.*got Tensor; for a module: lambda"),
    (lambda: fisher_vector_product(lambda z: z, [ONES], [ONES]), TypeError, "parameters: expected a tensor or a dict.*got list; for a module"),
    (lambda: fisher_vector_product(lambda z: z, {}, {}), TypeError, "parameters: expected .* got an empty dict"),
    (lambda: fisher_vector_product(lambda z: z, ONES.bfloat16(), ONES), TypeError, "parameters: expected float32 or float64, .*got torch.bfloat16"),
    (lambda: fisher_vector_product(lambda z: z, ONES, torch.ones(4)), ValueError, r"vector: expected as in parameters \(3,\).*got \(4,\)"),
    (lambda: fisher_vector_product(lambda z: z, ONES, ONES.double()), ValueError, "vector: .*torch.float32.*got .*torch.float64"),
    (lambda: fisher_vector_product(lambda z: z.sum(), ONES, ONES), ValueError, "function's result: expected logits"),
    (lambda: fisher_vector_product(lambda z: z, ONES, ONES, weights=ONES), ValueError, "weights: expected the leading shape"),
    (lambda: fisher_vector_product(lambda z: z, ONES, ONES, weights=torch.tensor(True)), TypeError, "weights: expected a float tensor"),
    (lambda: vector_case({"a": ONES, "c": ONES}), ValueError, r"vector: expected the names of parameters, got others: \['b', 'c'\]"),
    (lambda: vector_case({"a": ONES, "b": None}), TypeError, r"vector\['b'\]: expected a tensor, got NoneType; leave out"),
    (lambda: vector_case({"a": ONES, "b": ONES}), ValueError, r"vector\['b'\]: expected as in parameters \(2,\)"),
    (lambda: vector_case(ONES), ValueError, "vector: expected the names of parameters"),
    (lambda: conjugate_gradient(torch.eye(3), ONES), TypeError, "product: expected a function from v to A v, got Tensor; for a matrix"),
    (lambda: conjugate_gradient(lambda v: v, ONES.half()), TypeError, "b: expected float32 or float64"),
    (lambda: conjugate_gradient(lambda v: v[:2], ONES), ValueError, r"product's result: expected as in b \(3,\).*got \(2,\)"),
    (lambda: conjugate_gradient(lambda v: v * math.nan, ONES), ValueError, "product's result: expected finite values, got an inner product of nan"),
    (lambda: conjugate_gradient(lambda v: v, ONES * math.inf), ValueError, "b: expected finite values"),
    (lambda: conjugate_gradient(lambda v: v, ONES, iterations=0), ValueError, "iterations: expected how many products to take, at least 1, got 0"),
    (lambda: conjugate_gradient(lambda v: v, ONES, iterations=2.0), TypeError, "iterations"),
    (lambda: conjugate_gradient(lambda v: v, ONES, tolerance=-1.0), ValueError, "tolerance: expected a number from 0 to less than 1, got -1.0; it"),
    (lambda: conjugate_gradient(lambda v: v, ONES, tolerance=1.0), ValueError, "tolerance: expected a number from 0 to less than 1, got 1.0"),
    (lambda: conjugate_gradient(lambda v: v, ONES, damping=math.nan), ValueError, "damping: expected a finite number of at least 0, got nan"),
    (lambda: conjugate_gradient(lambda v: v, ONES, damping="0"), TypeError, "damping"),
    (lambda: natural_gradient(lambda z: z, ONES, ONES, 0.0), ValueError, "max_kl: expected a positive finite number of nats, got 0.0"),
    (lambda: natural_gradient(lambda z: z, ONES, ONES, torch.ones(())), TypeError, "max_kl"),
    (lambda: natural_gradient(lambda z: z, ONES, torch.ones(2), 0.1), ValueError, r"gradient: expected as in parameters \(3,\)"),
    (lambda: natural_gradient(lambda z: z, ONES, ONES * math.nan, 0.1), ValueError, "expected finite values"),
    (lambda: natural_gradient(lambda z: 0 * z, ONES, ONES, 0.1), ValueError, "gradient: expected a direction along which the policy's KL grows"),
    (lambda: natural_gradient(lambda z: z * math.nan, ONES, ONES, 0.1), ValueError, "product's result: expected finite values"),
])
def test_wrong_arguments(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()
