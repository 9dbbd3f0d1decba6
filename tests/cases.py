"""Logits to test with, and the truth about them: fp64 of the same inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# Gradients of a smaller norm are compared absolutely, as a KL below 1e-8 is: what a row with p_max = 1 - 1e-14 has left. Between rows 50 apart,
# a float32 centre lies up to 2e-6 from the mean, and the mean of what is left is known to 2^-24 of that: 1e-13 a rounding, 1e-5 of this floor
# for three.
GRADIENT_FLOOR = 3e-8
KINDS = ("normal1", "normal3", "normal8", "zipf", "peaked", "very_peaked")


class Truth(NamedTuple):
    """fp64 statistics of a pair of logits, computed from two log-softmaxes; the KLs in the form Σ p·(expm1(d) - d), d = log q - log p."""

    log_p: torch.Tensor
    log_q: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    ref_kl: torch.Tensor


def truth(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> Truth:
    """The fp64 truth of logits [..., V] of any type; temperature a float or [...]."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    log_p = (p_logits.double() / temperature).log_softmax(-1)
    log_q = (q_logits.double() / temperature).log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p

    def expectation(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.where(weight == 0, 0.0, weight * value).sum(-1)

    # Where e^d overflows, p·(e^d - 1 - d) is taken as q - p - p·d.
    kl = torch.where(d.abs() < 1, p * (torch.expm1(d) - d), q - p - torch.where(p == 0, 0.0, p * d)).sum(-1)
    ref_kl = torch.where(d.abs() < 1, q * (torch.expm1(-d) + d), p - q + torch.where(q == 0, 0.0, q * d)).sum(-1)
    return Truth(log_p, log_q, -expectation(p, log_p), kl, ref_kl)


def logits(kind: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 logits [rows, vocabulary] of one of KINDS; a peaked row has its peak anywhere."""
    noise = torch.randn(rows, vocabulary, generator=generator)
    if kind.startswith("normal"):
        return noise * float(kind.removeprefix("normal"))
    if kind == "zipf":
        order = torch.rand(rows, vocabulary, generator=generator).argsort(-1) + 1.0
        return -1.1 * order.log() + 0.3 * noise
    height = 30.0 if kind == "very_peaked" else 18.0
    peak = torch.randint(vocabulary, (rows,), generator=generator)
    return noise * 3.0 + height * torch.nn.functional.one_hot(peak, vocabulary)


def pair(kind: str, rows: int, vocabulary: int, size: float, *, shift: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0,
         device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of P and of Q = P + size·noise + shift. The KL is near size²/2 on flat rows, far smaller on peaked ones."""
    generator = torch.Generator().manual_seed(seed)
    p = logits(kind, rows, vocabulary, generator)
    q = p + size * torch.randn(rows, vocabulary, generator=generator) + shift
    return p.to(dtype).to(device), q.to(dtype).to(device)


def kl_tolerance(kl: torch.Tensor) -> torch.Tensor:
    """The error allowed for a KL: 1e-4·KL + 1e-8 below 1e-2, 2e-5·KL from there."""
    return torch.where(kl < 1e-2, 1e-4 * kl + 1e-8, 2e-5 * kl)


def assert_kl(result: torch.Tensor, exact: torch.Tensor, what: str = "kl") -> None:
    """Raise with the worst entry where a KL misses kl_tolerance; NaN and negative values fail."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    excess = (result - exact).abs() / kl_tolerance(exact)
    bad = ~(excess <= 1) | (result < 0)
    if bool(bad.any()):
        worst = int(torch.where(bad, excess.nan_to_num(float("inf")), 0.0).argmax())
        raise AssertionError(f"{what}: got {result.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g} at {worst}: "
                             f"{excess.flatten()[worst]:.3g} times the tolerance; {int(bad.sum())} of {bad.numel()} wrong")


def assert_near(result: torch.Tensor, exact: torch.Tensor, relative: float, absolute: float, what: str) -> None:
    """Raise with the worst entry where |result - exact| > relative·|exact| + absolute; NaN fails."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    excess = (result - exact).abs() / (relative * exact.abs() + absolute)
    if not bool((excess <= 1).all()):
        worst = int(excess.nan_to_num(float("inf")).argmax())
        raise AssertionError(f"{what}: got {result.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g} at {worst}: "
                             f"{excess.flatten()[worst]:.3g} times the tolerance")


def assert_gradient(result: torch.Tensor, exact: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise where a row's gradient is off by more than `tolerance` in relative L2 norm, or of GRADIENT_FLOOR if the truth is smaller."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm(dim=-1)
    error = (result - exact).norm(dim=-1) / torch.where(norm == 0, 1.0, norm.clamp(min=GRADIENT_FLOOR))
    if not bool((error <= tolerance).all()):
        worst = int(error.nan_to_num(float("inf")).argmax())
        raise AssertionError(f"{what}: relative L2 error {error.flatten()[worst]:.3g} in row {worst}, allowed {tolerance:.3g}")


class Gradients(NamedTuple):
    """fp64 gradients with respect to the logits of P and of Q."""

    p: torch.Tensor
    q: torch.Tensor


def kl_gradients(exact: Truth, upstream: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> Gradients:
    """The fp64 gradients of Σ upstream·KL(P‖Q): p·(E_p[d] - d)/T and (q - p)/T for d = log q - log p; p = 0 adds nothing to the first.

    d counts from its value at the most probable entry: on a peaked row E_p[d] - d is far smaller there than d itself.
    """
    p, d = exact.log_p.exp(), exact.log_q - exact.log_p
    weight = upstream.detach().double().cpu() / (temperature.double().cpu() if isinstance(temperature, torch.Tensor) else temperature)
    peak = exact.log_p.argmax(-1, keepdim=True)
    from_peak = (exact.log_q - exact.log_q.gather(-1, peak)) - (exact.log_p - exact.log_p.gather(-1, peak))
    weighted = torch.where(p == 0, 0.0, p * from_peak)
    grad_p = p * weighted.sum(-1, keepdim=True) - weighted
    return Gradients(grad_p * weight[..., None], torch.where(d.abs() < 1, p * torch.expm1(d), exact.log_q.exp() - p) * weight[..., None])


def assert_rounded_gradient(result: torch.Tensor, exact: torch.Tensor, what: str, *, truncated: bool = False) -> None:
    """Raise where a row's gradient is worse than the truth rounded to the gradient's type: 1e-5 in float32, in relative L2 norm.

    In a shorter type the rounding of the result dwarfs the arithmetic, which can only move a value across a rounding boundary now and then:
    1.01 of the rounding error of the truth, and 1e-5. The gradient to Q is there the difference q - p of two probabilities rounded in float32,
    2^-23 of them at the most, times upstream gradients over temperatures of up to 4: 1e-6 in norm, as the README's limits say. Triton's
    interpreter truncates where a GPU rounds to bfloat16 (`truncated`).
    """
    if result.dtype == torch.float32:
        assert_gradient(result, exact, what)
        return
    exact = exact.detach().double().cpu()
    rounded = exact.float().to(result.dtype)
    if truncated and result.dtype == torch.bfloat16:
        rounded = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    norm = exact.norm(dim=-1)
    norm = torch.where(norm == 0, 1.0, norm.clamp(min=GRADIENT_FLOOR))
    error, rounding = ((value.detach().double().cpu() - exact).norm(dim=-1) / norm for value in (result, rounded))
    absolute = 1e-6 if "gradient to q" in what else 0.0
    excess = error - (1.01 * rounding + 1e-5 + absolute / norm)
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(float("inf")).argmax())
        raise AssertionError(f"{what}: relative L2 error {error.flatten()[worst]:.4g} in row {worst}, of which rounding the truth to {result.dtype} "
                             f"is {rounding.flatten()[worst]:.4g}")


def sizes_pair(kind: str, sizes: tuple[float, ...], shifts: tuple[float, ...], vocabulary: int, dtype: torch.dtype, seed: int = 0
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """One row for each size of the difference, the shift of Q going round."""
    rows = [pair(kind, 1, vocabulary, size, shift=shifts[i % len(shifts)], dtype=dtype, seed=seed + i) for i, size in enumerate(sizes)]
    return torch.cat([p for p, _ in rows]), torch.cat([q for _, q in rows])


def leaf(value: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own that requires grad, whatever its strides."""
    return value.detach().requires_grad_()


def upstream_for(value: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random upstream gradients of a result, of both signs and away from 0."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + 1000))
    return (noise + noise.sign()).to(value)


def bits(value: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as integers, so that equality is to the bit and NaN equals itself."""
    return value.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise where two tensors differ in type, shape or any bit."""
    assert result.dtype == expected.dtype and result.shape == expected.shape, f"{what}: {result.dtype} {tuple(result.shape)}, " \
        f"expected {expected.dtype} {tuple(expected.shape)}"
    different = bits(result) != bits(expected)
    if bool(different.any()):
        first = int(different.flatten().int().argmax())
        raise AssertionError(f"{what}: {int(different.sum())} of {different.numel()} differ, the first at {first}: "
                             f"{result.detach().flatten()[first]:.9g} is not {expected.detach().flatten()[first]:.9g}")


# Views of a base tensor [4, 5, 6, V + 3] that logits come in: what each needs of strides and offsets is in its name.
LAYOUTS = {
    "no leading dimension": lambda base: base[1, 2, 3],
    "rows": lambda base: base[1, 2, :5],
    "batch and time": lambda base: base[1, :2, :3],
    "a dimension of size 1": lambda base: base[:2, 1:2, :3],
    "time without the last": lambda base: base[1, :2, :4][:, :-1],
    "time without the first": lambda base: base[1, :2, :4][:, 1:],
    "transposed batch and time": lambda base: base[1, :3, :2].transpose(0, 1),
    "three leading dimensions that do not merge": lambda base: base[::3, ::4, ::5],
    "expanded rows": lambda base: base[1, 2, :1].expand(3, -1),
    "expanded batch": lambda base: base[1, 2, :3].expand(2, -1, -1),
}


def compute_as_a_gpu() -> None:
    """Make Triton's interpreter as exact as a GPU is, and no more.

    A multiply-add rounds once: unfused, x·log2(e) - origin alone costs 1e-5 of an e^x for |x| = 200. Division, 2^x, logarithms and reciprocal
    square roots are off by up to about two units in the last place, as the approximate instructions are that Triton compiles them to (PTX ISA:
    ex2.approx and rsqrt.approx 2^-22, div.full 2 ulp, lg2.approx 2^-22 absolute near 1): by a part that looks random and depends on the result
    alone. Powers of two, as 2^0, are exact, and whole logarithms.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def create_fma(self, x, y, z):
        wide = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return handle(wide.astype(z.data.dtype), z.dtype.scalar)

    def noise(values, whole):
        """In [-1, 1], from the bits of float32 values; 0 for powers of two, and for whole numbers too if asked."""
        bits = values.view("uint32").astype("uint64")
        exact = (bits & 0x7FFFFF == 0) | (whole & (values == np.rint(values)))
        return np.where(exact, 0.0, (bits * 2654435761 >> 7) % 2001 / 1000.0 - 1)

    def approximate(create, relative, absolute=0.0, whole=False):
        def created(self, *arguments):
            result = create(self, *arguments)
            values = np.asarray(result.data)
            if values.dtype != np.float32:
                return result
            wide = values.astype("float64")
            with np.errstate(invalid="ignore"):
                wide = wide + noise(values, whole) * (relative * np.abs(wide) + absolute)
            return handle(np.where(np.isfinite(values), wide, values).astype("float32"), result.dtype)

        return created

    if builder.create_fma.__name__ == "create_fma" and builder.create_fma.__module__ == __name__:
        return
    builder.create_fma = create_fma
    about_logarithms = (2.0**-23, 2.0**-22, True)
    for name, errors in {"create_fdiv": (2.0**-23,), "create_exp2": (2.0**-22.5,), "create_rsqrt": (2.0**-22.5,),
                         "create_log2": about_logarithms, "create_log": about_logarithms}.items():
        setattr(builder, name, approximate(getattr(builder, name), *errors))


def captured(call) -> tuple:
    """(CUDA graph of call(), its results): once outside, so that everything is compiled and allocated, then captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
