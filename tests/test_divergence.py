"""kl_divergence: its digits against fp64, its properties, and what infinities, NaN, masks and
memory layouts do to it.
"""

from __future__ import annotations

import math
import os

import cases
import pytest
import torch

from fastkl import kl_divergence, slow_path_rows, testing

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    cases.compute_as_a_gpu()

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Sizes of log q - log p: a KL from about 1e-8 to 1e2 on rows of KINDS, and up to 1e4.
SIZES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
FAR = (200.0, 2000.0)
SHIFTS = (0.0, 50.0, -50.0)
VOCABULARIES = [1, 2, 3, 7, 8, 9, 127, 4096, 4097, 32768, 32769, 50257, 262144]


# In the interpreter float16 is left to test_mixed_types and test_tokens: to a kernel it is a load
# and a store, as bfloat16 is.
TYPES = {name: FLOATS[name] for name in ("fp32", "bf16")} if INTERPRETING else FLOATS


@pytest.fixture(params=TYPES.values(), ids=TYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type of logits."""
    return request.param


def outcome(
    p: torch.Tensor, q: torch.Tensor, device: str, upstream: torch.Tensor | None = None, **keywords
) -> tuple[torch.Tensor, ...]:
    """(kl, dP, dQ) on `device` for these very strides, and random upstream gradients where none are
    given.
    """
    p, q = testing.leaf(p.to(device)), testing.leaf(q.to(device))
    result = kl_divergence(p, q, **keywords)
    upstream = testing.upstream_for(result) if upstream is None else upstream
    return result, *torch.autograd.grad(result, (p, q), upstream.to(result))


def check_results(
    implementation,
    results: tuple[torch.Tensor, ...],
    p: torch.Tensor,
    q: torch.Tensor,
    what: str = "kl",
    temperature: float | torch.Tensor = 1.0,
) -> None:
    """What outcome() returned for logits p, q agrees with fp64 of them; the result is float32 and
    where the logits are.
    """
    result, *grads = results
    assert (
        result.dtype == torch.float32
        and result.device.type == implementation.device
        and result.shape == p.shape[:-1]
    )
    exact = testing.truth(
        p.cpu(),
        q.cpu(),
        temperature.cpu() if isinstance(temperature, torch.Tensor) else temperature,
    )
    testing.assert_kl(result, exact.kl, what)
    expected = testing.kl_gradients(exact, testing.upstream_for(result), temperature)
    for name, grad, value, logits in zip("pq", grads, expected, (p, q), strict=True):
        assert grad.dtype == logits.dtype and grad.shape == logits.shape
        testing.assert_rounded_gradient(
            grad,
            value,
            f"{what}, gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=implementation.interpreted,
        )


def check(implementation, p: torch.Tensor, q: torch.Tensor, what: str = "kl", **keywords) -> None:
    """kl_divergence and both gradients agree with fp64 of the same CPU inputs."""
    check_results(
        implementation,
        outcome(p, q, implementation.device, **keywords),
        p,
        q,
        what,
        keywords.get("temperature", 1.0),
    )


# ---- accuracy


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 50257, 128256])
def test_against_fp64(implementation, kind, vocabulary, dtype) -> None:
    """KL in either direction and its gradients, from 1e-8 to 1e2 nats, with and without a constant
    between the logits.
    """
    sizes = SIZES if dtype != torch.float16 else SIZES[2:]
    shifts = [SHIFTS] if vocabulary > 1000 else [(shift,) for shift in SHIFTS]
    if implementation.interpreted:
        number, shifts = testing.KINDS.index(kind), [SHIFTS]
        sizes = (
            sizes
            if vocabulary == 1000
            else sizes[number % 3 :: 3][: 2 if vocabulary == 50257 else 1]
        )
    for some in shifts:
        p, q = testing.sizes_pair(kind, sizes, some, vocabulary, dtype)
        check(implementation, p, q, "kl(p, q)")
        if not (implementation.interpreted and vocabulary > 1000):
            check(implementation, q, p, "kl(q, p)")


@pytest.mark.parametrize("kind", testing.KINDS)
def test_rows_far_apart_against_fp64(implementation, kind, dtype) -> None:
    """The same where KL is hundreds to 1e4 nats; the rows that the kernels read again."""
    if dtype == torch.float16:
        pytest.skip("logits as far apart overflow fp16")
    p, q = testing.sizes_pair(
        kind, FAR, (0.0, 50.0), 1000 if implementation.interpreted else 50257, dtype
    )
    check(implementation, p, q, "kl(p, q)")
    check(implementation, q, p, "kl(q, p)")


def test_accuracy_table(implementation, capsys) -> None:
    """Worst relative error per decade of the KL, beside F.kl_div of two float32 log-softmaxes:
    within tolerance, and better where KL is small.
    """
    rows, vocabulary = (4, 1000) if implementation.interpreted else (8, 32768)
    lines = [f"{'KL':>6} {'kind':>12} {'fastkl':>9} {'F.kl_div':>9}"]
    worse = []
    for kind in testing.KINDS:
        sizes = (
            [10 ** (-5 + 6 * i / (4 * rows - 1)) for i in range(4 * rows)]
            if not implementation.interpreted
            else SIZES
        )
        p, q = (
            value.to(implementation.device)
            for value in testing.sizes_pair(kind, tuple(sizes), (0.0,), vocabulary, torch.float32)
        )
        exact = testing.truth(p, q).kl
        ours = kl_divergence(p, q)
        testing.assert_kl(ours, exact)
        plain = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        decade = exact.log10().floor()
        for value in sorted(set(decade.tolist())):
            if value < -9:
                continue
            errors = [
                float(((result - exact).abs() / exact)[decade == value].max())
                for result in (ours, plain)
            ]
            lines.append(f"{f'1e{value:.0f}':>6} {kind:>12} {errors[0]:9.1e} {errors[1]:9.1e}")
            if -8 <= value < -2 and errors[0] >= errors[1]:
                worse.append(lines[-1])
    with capsys.disabled():
        print(f"\n{implementation.backend}, V={vocabulary}, float32\n" + "\n".join(lines))
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize(
    "policy, ref", [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")]
)
@pytest.mark.parametrize("vocabulary", [1003, 4096])
def test_mixed_types(implementation, policy, ref, vocabulary) -> None:
    """Policy and reference of different types: each gradient comes in the type of its own logits."""
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0, 10.0), SHIFTS, vocabulary, torch.float32)
    check(implementation, p.to(FLOATS[policy]), q.to(FLOATS[ref]))


def test_direction_by_hand(implementation) -> None:
    """The expectation is under the first argument: closed forms of two and of three classes."""
    for p, q in (((0.8, 0.2), (0.5, 0.5)), ((0.7, 0.2, 0.1), (0.25, 0.25, 0.5))):
        there, back = (
            sum(a * math.log(a / b) for a, b in zip(*pair, strict=True))
            for pair in ((p, q), (q, p))
        )
        assert abs(there - back) > 1e-2
        logits = [torch.tensor(value, device=implementation.device).log() for value in (p, q)]
        testing.assert_near(kl_divergence(*logits), torch.tensor(there), 2e-6, 0, "KL(P‖Q)")
        testing.assert_near(
            kl_divergence(*reversed(logits)), torch.tensor(back), 2e-6, 0, "KL(Q‖P)"
        )


def test_gradcheck_in_fp64(implementation) -> None:
    """The reference in float64: results in float64, and gradients that finite differences confirm."""
    if implementation.kernels:
        pytest.skip("float64 is the reference's")
    p, q = (value.double().requires_grad_() for value in testing.pair("normal3", 4, 5, 0.7))
    mask, temperature, result = (
        torch.tensor([True, False, True, True]),
        torch.tensor([0.5, 1.0, 2.0, 1.3]),
        kl_divergence(p, q),
    )
    assert result.dtype == torch.float64 and torch.allclose(
        result, testing.truth(p, q).kl, rtol=1e-13
    )
    assert torch.autograd.gradcheck(
        lambda p, q: kl_divergence(p, q, mask=mask, temperature=temperature), (p, q)
    )


# ---- properties


@pytest.mark.parametrize("vocabulary", [2, 4099])
def test_never_negative(implementation, dtype, vocabulary) -> None:
    """However close the rows are."""
    for kind in testing.KINDS[:: 2 if implementation.interpreted else 1]:
        p, q = testing.sizes_pair(kind, (1e-7, 1e-6, 1e-5, 1e-4), SHIFTS, vocabulary, dtype)
        assert bool(
            (kl_divergence(p.to(implementation.device), q.to(implementation.device)) >= 0).all()
        )


@pytest.mark.parametrize("vocabulary", [1, 129, 4096, 40001])
def test_identical_rows(implementation, dtype, vocabulary) -> None:
    """KL exactly 0 with gradients exactly 0: the same tensor twice, a copy, a copy that lies
    elsewhere in its 16 bytes, with -inf entries.
    """
    kinds = (
        testing.KINDS[:2]
        if implementation.interpreted and vocabulary == 40001
        else testing.KINDS[::2]
    )
    p = torch.cat(
        [
            testing.pair(kind, 1, vocabulary, 0.0, dtype=dtype, seed=i)[0]
            for i, kind in enumerate(kinds)
        ]
    )
    p = p.to(implementation.device)
    if vocabulary > 1:
        p[1, 1::3] = -math.inf
    elsewhere = torch.empty(p.numel() + 1, dtype=dtype, device=p.device)[1:].view_as(p).copy_(p)
    for name, q in (("the same", p), ("a copy", p.clone()), ("elsewhere", elsewhere)):
        for what, value in zip(
            ("kl", "gradient to p", "gradient to q"),
            outcome(p, q, implementation.device),
            strict=True,
        ):
            assert bool((value == 0).all()), f"{name}: {what} up to {value.abs().max():.3g}"


def test_constant_shift(implementation) -> None:
    """Logits on a grid, so that shifting is exact: KL and gradients of shifted rows hold to the
    same truth.
    """
    p, q = (
        torch.round(value * 1024) / 1024
        for value in testing.sizes_pair(
            "normal3", (2e-3, 0.02, 0.3, 3.0), (0.0,), 1009, torch.float32
        )
    )
    exact = testing.truth(p, q)
    for shift_p, shift_q in (
        (64.0, -64.0),
        (-200.0, 0.0),
        (8.0, 1000.0),
        (-1000.0, 1000.0),
        (0.25, 3.5),
    ):
        assert torch.equal((p + shift_p) - shift_p, p) and torch.equal((q + shift_q) - shift_q, q)
        result, *grads = outcome(p + shift_p, q + shift_q, implementation.device)
        testing.assert_kl(result, exact.kl, f"shifts {shift_p}, {shift_q}")
        for grad, expected in zip(
            grads, testing.kl_gradients(exact, testing.upstream_for(result)), strict=True
        ):
            testing.assert_gradient(grad, expected, f"shifts {shift_p}, {shift_q}")


@pytest.mark.parametrize("kind", testing.KINDS)
def test_gradients_sum_to_zero(implementation, kind) -> None:
    """Over the vocabulary, as those of every function of a softmax: within 1e-5 of their absolute
    sum.
    """
    for grad in outcome(
        *testing.sizes_pair(kind, (0.01, 0.1, 1.0), SHIFTS, 5003, torch.float32),
        implementation.device,
    )[1:]:
        grad = grad.double()
        assert bool((grad.sum(-1).abs() <= 1e-5 * grad.abs().sum(-1)).all())


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1, 3.0, "per row", "per row in bfloat16"])
def test_temperature(implementation, temperature, dtype) -> None:
    """Both logits are divided by it and the gradient follows: one number, or one per row."""
    if isinstance(temperature, str):
        temperature = torch.tensor(
            [[0.25, 0.5, 1.0], [1.5, 2.0, 0.75]], device=implementation.device
        )
        temperature = temperature.bfloat16() if "bfloat16" in str(temperature) else temperature
    p, q = testing.sizes_pair("normal3", (1e-3, 1e-2, 0.1, 1.0, 3.0, 5.0), (0.0, 7.0), 515, dtype)
    check(implementation, p.view(2, 3, -1), q.view(2, 3, -1), temperature=temperature)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_mask(implementation, dtype, garbage) -> None:
    """Rows that do not count hold anything: exactly 0, gradient exactly 0; the others have the bits
    of a call without them.
    """
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0, 0.1, 0.3), SHIFTS, 1003, dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    expected = outcome(
        p[mask], q[mask], implementation.device, testing.upstream_for(torch.empty(6))[mask]
    )
    p[~mask], q[1], q[4, ::2] = garbage, garbage, math.nan
    results = outcome(p, q, implementation.device, mask=mask.to(implementation.device))
    for result, value, name in zip(
        results, expected, ("kl", "gradient to p", "gradient to q"), strict=True
    ):
        testing.assert_same_bits(result[mask.to(result.device)], value, name)
        assert bool((result[~mask.to(result.device)] == 0).all()), name
    nothing = torch.zeros(6, dtype=torch.bool, device=implementation.device)
    assert all(
        bool((value == 0).all()) for value in outcome(p, q, implementation.device, mask=nothing)
    )


def test_zero_upstream(implementation, dtype) -> None:
    """Gradient exactly 0, also of a row of NaN; the other rows as ever."""
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0), SHIFTS, 1003, dtype)
    upstream = torch.tensor([1.5, 0.0, -2.0, 0.0])
    expected = outcome(p, q, implementation.device, upstream)
    p[1], q[3, 5] = math.nan, math.nan
    for result, value in zip(
        outcome(p, q, implementation.device, upstream)[1:], expected[1:], strict=True
    ):
        assert bool((result[1::2] == 0).all())
        testing.assert_same_bits(result[::2], value[::2], "gradient of the other rows")


def test_expanded_upstream(implementation) -> None:
    """An upstream gradient of stride 0, as sum() and mean() give it, is the same one written out."""
    p, q = testing.sizes_pair("normal3", (0.01, 0.1, 1.0, 10.0), SHIFTS, 515, torch.float32)
    upstream = torch.full((4, 2), 1.75, device=implementation.device)
    written = outcome(p, q, implementation.device, torch.full((4,), 1.75))
    for strided in (upstream[0, 0].expand(4), upstream[:, 1]):
        for result, value in zip(
            outcome(p, q, implementation.device, strided), written, strict=True
        ):
            testing.assert_same_bits(result, value, "gradient")
    p, q = (testing.leaf(value.to(implementation.device)) for value in (p, q))
    (kl_divergence(p, q).sum() * 1.75).backward()
    testing.assert_same_bits(p.grad, written[1], "gradient of sum()")


# ---- shapes and memory


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_rows(implementation, leading, dtype) -> None:
    """No rows, no results, gradients of the right shape."""
    p = torch.empty(*leading, 17, dtype=dtype)
    result, grad_p, grad_q = outcome(p, p.clone(), implementation.device)
    assert result.shape == leading and result.dtype == torch.float32
    assert grad_p.shape == grad_q.shape == p.shape and grad_p.dtype == dtype


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vocabulary_sizes(implementation, vocabulary, dtype) -> None:
    """One entry, powers of two and their neighbours, and more than any model has."""
    sizes = (
        (0.1, 1.0)[: 1 if vocabulary > 50257 else 2] if vocabulary > 4097 else (1e-3, 0.1, 1.0, 5.0)
    )
    check(implementation, *testing.sizes_pair("normal3", sizes, SHIFTS, vocabulary, dtype))


@pytest.mark.parametrize("layout_q", ["batch and time", "same"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(implementation, layout, layout_q, dtype) -> None:
    """Leading shapes and strides of every sort, of one argument or of both; the memory around and
    under them stays as it was.
    """
    base_p, base_q = (
        value.view(4, 5, 6, -1).to(implementation.device)
        for value in testing.pair("normal3", 120, 43, 0.3, dtype=dtype)
    )
    p, q = (testing.LAYOUTS[layout](base[..., :40]) for base in (base_p, base_q))
    q = q if layout_q == "same" else q.clone(memory_format=torch.contiguous_format)
    before = [testing.bits(value).clone() for value in (base_p, base_q, q)]
    check_results(implementation, outcome(p, q, implementation.device), p, q)
    for value, kept in zip((base_p, base_q, q), before, strict=True):
        assert torch.equal(testing.bits(value), kept), "an input was written to"


@pytest.mark.parametrize("offset_p, offset_q", [(1, 1), (3, 0), (5, 2)])
@pytest.mark.parametrize("vocabulary, padding", [(513, 0), (512, 8), (77, 3)])
def test_storage_offsets_and_padded_rows(
    implementation, offset_p, offset_q, vocabulary, padding, dtype
) -> None:
    """Rows that start anywhere, with NaN before, between and behind them: nothing outside is read
    into a result.
    """
    made = []
    for value, offset in zip(
        testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype), (offset_p, offset_q), strict=True
    ):
        storage = torch.full(
            (offset + 3 * (vocabulary + padding) + 16,),
            math.nan,
            dtype=dtype,
            device=implementation.device,
        )
        made.append(
            storage.as_strided((3, vocabulary), (vocabulary + padding, 1), offset).copy_(value)
        )
    check_results(implementation, outcome(*made, implementation.device), *made)


@pytest.mark.parametrize("vocabulary", [1, 9, 5003])
def test_every_output_is_written(implementation, monkeypatch, vocabulary, dtype) -> None:
    """New memory is full of NaN: none of it is left in results or gradients, nor changes a bit of
    them.
    """
    p, q = testing.pair("normal3", 3, vocabulary, 0.3, dtype=dtype)
    mask = torch.tensor([True, False, True], device=implementation.device)
    expected = outcome(p, q, implementation.device, mask=mask)
    poisoned = []

    def poison(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            poisoned.append(made.shape)
            return made.fill_(math.nan) if made.is_floating_point() else made.fill_(7)

        return call

    for owner, name in (
        (torch.Tensor, "new_empty"),
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    results = outcome(p, q, implementation.device, mask=mask)
    monkeypatch.undo()
    assert any(tuple(shape) == (3,) for shape in poisoned) and any(
        tuple(shape) == (3, vocabulary) for shape in poisoned
    )
    for result, value in zip(results, expected, strict=True):
        testing.assert_same_bits(result, value, "result")


def test_slow_path_rows(implementation) -> None:
    """Names the rows that hold an infinity or a NaN, or are far apart, and no other."""
    p, q = (value.to(implementation.device) for value in testing.pair("normal3", 6, 300, 0.1))
    p[1, 3], q[2, 7], q[4] = -math.inf, math.nan, q[4] * 50
    assert slow_path_rows(p.view(2, 3, -1), q.view(2, 3, -1)).tolist() == [
        [False, True, True],
        [False, True, False],
    ]


# ---- special values


def with_holes(
    vocabulary: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and the entries where holes go: scattered ones, the first, the last and a whole
    stretch.
    """
    p, q = testing.sizes_pair("normal3", (1e-3, 0.1, 1.0), (0.0, 50.0), vocabulary, dtype)
    holes = torch.zeros(vocabulary, dtype=torch.bool)
    holes[::7] = holes[-1] = holes[vocabulary // 2 : vocabulary * 3 // 4] = True
    return p, q, holes


@pytest.mark.parametrize("hole", [-math.inf, "lowest"])
@pytest.mark.parametrize("vocabulary", [50, 5003])
def test_holes_in_both(implementation, dtype, vocabulary, hole) -> None:
    """-inf, or the lowest finite number, in both: as if the entries were not there; their gradient
    is exactly 0, small KLs keep their digits.
    """
    p, q, holes = with_holes(vocabulary, dtype)
    p[:, holes] = q[:, holes] = torch.finfo(dtype).min if hole == "lowest" else hole
    result, *grads = outcome(p, q, implementation.device)
    exact = testing.truth(p[:, ~holes], q[:, ~holes])
    testing.assert_kl(result, exact.kl)
    for name, grad, value in zip(
        "pq", grads, testing.kl_gradients(exact, testing.upstream_for(result)), strict=True
    ):
        assert bool((grad[:, holes.to(grad.device)] == 0).all()), f"gradient to {name} at the holes"
        testing.assert_rounded_gradient(
            grad.cpu()[:, ~holes],
            value,
            f"gradient to {name}",
            absolute=1e-6 * (name == "q"),
            truncated=implementation.interpreted,
        )


def test_holes_in_q_only(implementation, dtype) -> None:
    """P has mass where Q has none: +inf, never NaN, in these rows and in no other; one hole in a
    large row is enough.
    """
    p, q, holes = with_holes(5003, dtype)
    expected = kl_divergence(p.to(implementation.device), q.to(implementation.device))
    q[0, holes], q[2, 4999] = -math.inf, -math.inf
    p[2, 4999] = p[2].max()
    result, grad_p, grad_q = outcome(p, q, implementation.device)
    assert result[0] == math.inf and result[2] == math.inf
    testing.assert_same_bits(result[1], expected[1], "the other row")
    assert bool(grad_p[1].isfinite().all()) and bool(grad_q[1].isfinite().all())


@pytest.mark.parametrize("hole", [-math.inf, -1e9, -1e4, "lowest"])
def test_holes_in_p_only(implementation, dtype, hole) -> None:
    """Q has mass where P has none: a finite KL(P‖Q) and gradients, right, with exactly 0 for P at
    the holes.
    """
    p, q, holes = with_holes(5003, dtype)
    p[:, holes] = max(
        torch.finfo(dtype).min if hole == "lowest" else hole,
        -math.inf if hole == -math.inf else torch.finfo(dtype).min,
    )
    results = outcome(p, q, implementation.device)
    check_results(implementation, results, p, q)
    assert bool((results[1][:, holes.to(results[1].device)] == 0).all()) and bool(
        results[2].isfinite().all()
    )


@pytest.mark.parametrize("hole", [-1e9, -1e4, "lowest"])
def test_finite_holes_in_q_only(implementation, dtype, hole) -> None:
    """A finite logit far below the others is a finite, huge KL where P has mass there."""
    p, q, holes = with_holes(5003, dtype)
    q[:, holes] = max(-math.inf if hole == "lowest" else hole, torch.finfo(dtype).min)
    testing.assert_kl(
        kl_divergence(p.to(implementation.device), q.to(implementation.device)),
        testing.truth(p, q).kl,
    )


@pytest.mark.parametrize("vocabulary", [9, 1003])
def test_nan_poisons_its_own_row(implementation, dtype, vocabulary) -> None:
    """A NaN, a +inf or nothing but -inf makes its row NaN; the others keep their bits, in the
    results and in the gradients.
    """
    p, q = testing.pair("normal3", 9, vocabulary, 0.3, dtype=dtype)
    expected = outcome(p, q, implementation.device)
    p[1, 4], q[2, vocabulary - 1], p[3], q[4], p[6, 2], q[7, 0] = (math.nan,) * 4 + (math.inf,) * 2
    p[8], q[8] = -math.inf, -math.inf
    results = outcome(p, q, implementation.device)
    assert results[0].isnan().tolist() == [False, True, True, True, True, False, True, True, True]
    for result, value in zip(results, expected, strict=True):
        testing.assert_same_bits(result[::5], value[::5], "the other rows")


@pytest.mark.parametrize("level", [-90.0, -1e4, 1e4])
def test_far_from_zero(implementation, dtype, level) -> None:
    """All logits far below 0 (where e^x is 0 in float32) or far above: the truth of these inputs."""
    p, q = testing.pair("normal3", 4, 1003, 0.5)
    check(implementation, (p + level).to(dtype), (q + level).to(dtype))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits(implementation, dtype, scale) -> None:
    """Logits that lie 1e4 apart, of rows that have nothing to do with each other."""
    p, q = (
        testing.pair("normal1", 3, 1003, 0.0, seed=seed)[0].mul(scale).to(dtype) for seed in (0, 1)
    )
    result, *grads = outcome(p, q, implementation.device)
    testing.assert_kl(result, testing.truth(p, q).kl)
    assert all(bool(grad.isfinite().all()) for grad in grads)
