"""Rows whose two distributions lie far apart, and rows of huge logits: every field and gradient
against float64, of random families and of single cases.

FASTKL_FAR_ROWS=20000 checks that many rows instead of a few hundred, newly drawn.
"""

import math
import os
import types
from typing import NamedTuple

import hypothesis
import pytest
import torch
from cases import INTERPRETING
from family import MEMBERS, plain_gradients
from hypothesis import strategies as st

from fastkl import LinearKLPenalty, kl_divergence, linear_token_stats, testing, token_stats

ROWS = 16
FILLS = (-100.0, -1e3, -1e4, -1e6, -1e9, -1e15, -1e30, torch.finfo(torch.float32).min, -math.inf)
WANTED = int(os.environ.get("FASTKL_FAR_ROWS", "0"))


# Parameters of ROWS rows, drawn with random numbers of `seed`. peaks: the height of one entry of
# P and of one of Q. masked: the side that holds `fill`; "apart": other entries on each side.
FAMILIES = st.builds(
    types.SimpleNamespace,
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from((2, 7, 64, 300)),
    spread=st.sampled_from((0.0, 1.0, 3.0)),
    difference=st.sampled_from((0.0, 1e-3, 0.1, 1.0)),
    peaks=st.tuples(*[st.sampled_from((0.0, 6.0, 9.0, 12.0, 16.0, 20.0, 40.0, 90.0))] * 2),
    same_peak=st.booleans(),
    masked=st.sampled_from(("", "p", "q", "both", "apart")),
    fill=st.sampled_from(FILLS),
    shift=st.sampled_from((0.0, 0.0, 50.0, 1e3, -1e4, 1e6)),
    scale=st.sampled_from((1.0,) * 6 + (1e2, 1e4, 1e10, 1e20, 1e30)),
    temperature=st.sampled_from((1.0, 1.0, 0.7, 1.3, 1e-2, 30.0)),
    dtype=st.sampled_from((torch.float32,) * 3 + (torch.bfloat16, torch.float16)),
)


def make(family: types.SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(family.seed)
    shape = ROWS, family.vocabulary
    first, second, keep, tokens = torch.randint(
        family.vocabulary, (4, ROWS, 1), generator=generator
    )
    x = family.spread * torch.randn(shape, generator=generator)
    y = x + family.difference * torch.randn(shape, generator=generator)
    at_q = first if family.same_peak else second
    for side, place, peak in ((x, first, family.peaks[0]), (y, at_q, family.peaks[1])):
        side.scatter_add_(1, place, torch.full((ROWS, 1), peak))
    x, y = x * family.scale, y * family.scale + family.shift
    kind = torch.finfo(family.dtype)
    smallest = max(family.fill, kind.min) if family.fill > -math.inf else family.fill
    mask, other = (torch.rand(2, *shape, generator=generator) < 0.3).scatter_(
        2, keep.expand(2, ROWS, 1), False
    )
    if family.masked in ("p", "both", "apart"):
        x[mask] = smallest
    if family.masked in ("q", "both", "apart"):
        y[other if family.masked == "apart" else mask] = smallest
    x, y = (torch.where(side > -math.inf, side.clamp(kind.min, kind.max), side) for side in (x, y))
    return x.to(family.dtype), y.to(family.dtype), tokens[:, 0]


# field: whose gradients are checked; one of testing.FIELDS, "kl alone", or a key of MEMBERS.
class Case(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    tokens: torch.Tensor
    temperature: float = 1.0
    field: str = "kl"


Answer = tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]


def truth(case: Case) -> Answer:
    exact, ones = testing.truth(case.x, case.y, case.temperature), torch.ones(len(case.x))
    fields, stats = [case.field.split()[0]], exact.stats(case.tokens)
    if case.field in MEMBERS:
        stats = {"kl": MEMBERS[case.field].exact(case.x, case.y, case.temperature)}
        if case.field != "jeffreys":
            return stats, MEMBERS[case.field].exact_gradients(*case[:2], ones, case.temperature)
        fields = ["kl", "ref_kl"]  # added up in float64, one would lose the other's digits
    upstream = dict.fromkeys(fields, ones)
    return stats, testing.gradients(exact, upstream, case.tokens, case.temperature)


def plain(case: Case) -> tuple[torch.Tensor, ...]:
    if case.field in MEMBERS:
        sides, ones = [side.float() for side in case[:2]], torch.ones(len(case.x))
        return plain_gradients(MEMBERS[case.field], *sides, ones, case.temperature)
    x, y = (testing.leaf(side.float()) for side in case[:2])
    log_p, log_q = ((side / case.temperature).log_softmax(-1) for side in (x, y))
    fields = {
        "logprob": log_p.gather(-1, case.tokens[:, None]),
        "entropy": -(log_p.exp() * log_p),
        "ref_logprob": log_q.gather(-1, case.tokens[:, None]),
        "kl": log_p.exp() * (log_p - log_q),
        "ref_kl": log_q.exp() * (log_q - log_p),
        "lse": (x / case.temperature).logsumexp(-1),
        "ref_lse": (y / case.temperature).logsumexp(-1),
    }
    return torch.autograd.grad(fields[case.field.split()[0]].sum(), (x, y), materialize_grads=True)


def found(case: Case, device: str) -> Answer:
    x, y = (testing.leaf(side.to(device)) for side in case[:2])
    if case.field in testing.FIELDS:
        fields = token_stats(x, case.tokens.to(device), y, temperature=case.temperature)._asdict()
    else:
        function = MEMBERS.get(case.field, kl_divergence)
        fields = {"kl": function(x, y, temperature=case.temperature)}
    total = fields.get(case.field, fields["kl"]).sum()
    grads = torch.autograd.grad(total, (x, y), materialize_grads=True)
    fields = {name: value.detach().double().cpu() for name, value in fields.items()}
    return fields, tuple(grad.double().cpu() for grad in grads)


# The largest error of each entry in a gradient's type, where float32 has it right to 4e-6 of
# itself. Triton's interpreter truncates where a GPU rounds to bfloat16: a unit in the last place
# on one side of a boundary.
def rounding(exact: torch.Tensor, dtype: torch.dtype, implementation) -> torch.Tensor:
    errors = []
    for value in (exact, exact * (1 - 4e-6)):
        near = value.to(dtype)
        if implementation.interpreted and dtype == torch.bfloat16:
            near = (value.float().view(torch.int32) & -65536).view(torch.float32)
        errors.append((exact - near.double()).abs())
    return torch.maximum(*errors)


# Count as infinite anything that float32 may round to infinity, and all NaN as equal.
def settled(value: torch.Tensor) -> torch.Tensor:
    value = torch.where(value.abs() > 3e38, value.sign() * math.inf, value.float().double())
    return torch.where(value.isnan(), 7.0, value)


# Every field within the bounds and of its sign; neither a KL nor an entropy is -0.
def assert_fields(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], what) -> None:
    for field, value in got.items():
        testing.assert_stats({field: settled(value)}, {field: settled(exact[field])}, str(what))
        signs = value <= 0 if "logprob" in field else ~value.signbit()
        assert "lse" in field or bool((signs | value.isnan()).all()), (field, what)


def assert_right(case: Case, implementation, what) -> None:
    (fields, sides), (got, gradients) = truth(case), found(case, implementation.device)
    assert_fields(got, fields, what)
    dtype = case.x.dtype
    for side, expected, gradient, other in zip("pq", sides, gradients, plain(case), strict=True):
        norm = expected.norm(dim=-1)
        error, plains_error = ((v.double() - expected).norm(dim=-1) for v in (gradient, other))
        counted = (expected.abs() < (6e4 if dtype == torch.float16 else 3e38)).all(-1)
        if case.field in MEMBERS:
            # Float64's exponents, and with them the truth, have no digits beyond.
            counted &= fields["kl"] < 1e9
        plains_error = torch.where(plains_error.isfinite() & counted, plains_error, 0.0)
        # A family's rows are alike: plain torch is right by luck in one or the other.
        relative = torch.where(counted, plains_error / norm.clamp(min=1e-30), 0.0).max()
        own = torch.maximum(plains_error.max(), relative * norm)
        absolute = 3e-13 / case.temperature + 1.5e-45
        if "renyi" in case.field:
            # The gradient is α/(α - 1) times a difference of two probabilities.
            order = MEMBERS[case.field].share
            absolute *= 1 + order / abs(1 - order)
        elif case.field in testing.FIELDS and "kl" not in case.field and implementation.kernels:
            # Beside a near-certain token, 1 - p is no better known than log-probabilities are.
            absolute += 2e-6 / case.temperature
        if dtype != torch.float32:
            # A gradient's own rounding, and that of a difference of float32 probabilities.
            absolute += (
                1.01 * rounding(expected, dtype, implementation).norm(dim=-1)
                + 1e-6 / case.temperature
            )
        error, allowed = error[counted], (torch.maximum(1e-5 * norm, own) + absolute)[counted]
        testing.assert_near(error, torch.zeros_like(error), 0.0, allowed, f"grad {side}: {what}")


@pytest.mark.parametrize("names", [(*testing.FIELDS, "kl alone"), tuple(MEMBERS)], ids=len)
def test_far_rows(implementation, names) -> None:
    rows = WANTED or (160 if implementation.interpreted else 640)

    @hypothesis.settings(
        max_examples=rows // ROWS,
        deadline=None,
        database=None,
        derandomize=not WANTED,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(FAMILIES, st.sampled_from(names))
    def check(family: types.SimpleNamespace, name: str) -> None:
        assert_right(Case(*make(family), family.temperature, name), implementation, (name, family))

    check()


# ---- single cases, each (x, y[, temperature])

BIG = torch.finfo(torch.float32).max


def noise(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


# Tokens 0 of nearly all probability, once of all: no log-probability is above 0, of either model;
# the entropy of a one-hot row is 0, not -0.
def certain() -> tuple[torch.Tensor, torch.Tensor]:
    rows = 16 if INTERPRETING else 256
    x = noise(rows, 100)
    x[:, 0] += 50 * (1 + torch.rand(rows, generator=torch.Generator().manual_seed(1)))
    x[0, 1:] = -math.inf
    return x, x + 1e-3


# Peaks whose x·log2(e) rounds to the next whole number, beside nearly no other probability.
def rounding_up() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((3, 64), -40.0)
    x[:, 0] = torch.tensor([14.556090, 15.249238, 13.862943])
    y = x.clone()
    y[:, 3] = x[:, 0] - 2.0
    return x, y


# KL(P‖Q) is that of the masked entry nearly alone, KL(Q‖P) hundreds of times smaller.
def light_mask(fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([[-0.5375, 5.7692, 0.8638, 2.8104, 0.0, 5.5563, 2.6901]])
    x[:, 4] = math.log(1.2 / -fill) + 6.4
    y = x + torch.tensor([[0.3, -0.2, 0.1, -0.3, 0.0, 0.2, -0.1]])
    y[:, 4] = fill
    return x, y


# A KL of 0.2 to 0.6 nats from one improbable entry 20 to 50 nats away; the gradient to Q is tiny.
def few_far_entries() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.zeros(12, 2), torch.zeros(12, 2)
    far = torch.linspace(20.0, 50.0, 12)
    x[:, 0] = -torch.log(far / torch.linspace(0.2, 0.6, 4).repeat(3))
    y[:, 0] = x[:, 0] - far
    return x, y + 0.3


# P and Q mask different entries, P also Q's peak: E_q[d] overflows float32, the gradients do not.
def masked_peaks() -> tuple[torch.Tensor, torch.Tensor, float]:
    x, y = noise(2, 300), noise(4, 300)[2:]
    y[:, 0] = 3.0
    x[:, :12], y[:, 200:] = -BIG, -BIG
    return x, y, 0.7


# Row 0: a mask of finfo.min in Q that P has 1e-15 of.
OF_TEMPERATURES = (
    torch.tensor([[0.0, -35.0, -1.0], [1e-30, 0.0, 2e-30]]),
    torch.tensor([[0.0, -BIG, -1.0], [0.0, 1e-30, 0.0]]),
)
MASKED = torch.tensor([[-BIG, 0.0, 2.0]]), torch.tensor([[-BIG, 0.5, -1.0]])
SINGLE = {
    # Equal logits of any size are uniform.
    **{
        f"all {v:.3g}": (torch.full((1, 64), v), noise(1, 64))
        for v in (-1e9, 1e10, 1e30, -BIG, BIG)
    },
    # The ends of the range of temperatures.
    **{f"T={t:.3g}": (*OF_TEMPERATURES, t) for t in (2.0**-126, 1e-30, 0.01, 1e30, 2.0**126)},
    # The log-probability of an entry that both mask is finite wherever float32 can hold it.
    "masked peaks": masked_peaks(),
    **{f"a masked token, T={t}": (*MASKED, t) for t in (1.0, 1.3, 2.0)},
    # q = -inf makes KL infinite where float64's p is above 0: up to 745 nats below the log-sum-exp.
    **{
        f"{below} below, {dtype}": tuple(
            torch.tensor([[0.0, third, 0.5]], dtype=dtype) for third in (-below, -math.inf)
        )
        for below in (80.0, 120.0, 700.0, 800.0)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "a peak of one alone": (torch.tensor([[5.0, 0, 1]]), torch.tensor([[-math.inf, 0, 1]])),
    # E_q[d] is nearly d at Q's peak: the gradient to Q has no digits but from d relative to it.
    **{
        f"a sure token masked by {fill:.0e}": (
            torch.tensor([[fill, 0.0, 0.5]]),
            torch.tensor([[30.0, 0.0, 0.5]]),
        )
        for fill in (-1e9, -BIG / 2)
    },
    "certain tokens": certain(),
    "a peak that rounds up": rounding_up(),
    "few far entries": few_far_entries(),
    # The rounding of lse_q - lse_p, some 1e-7 of the largest d, must not enter a mean.
    **{
        f"a peak of {peak} in Q": (x, torch.cat((torch.full((4, 1), peak), y), 1))
        for peak, x, y in (
            (8.0, noise(4, 5000), noise(4, 5000)[:, 1:]),
            (12.0, noise(8, 2000)[:4], noise(4, 1999)),
        )
    },
    **{f"a light mask of {fill:g}": light_mask(fill) for fill in (-50.0, -100.0, -1e4, -1e6)},
    # exp(2·d) of the second entry overflows, which Rényi's gradient of order 2 takes.
    "an improbable entry 50 nats apart": (
        torch.tensor([[0.0, -100.0, 0.5, 1.0]]).bfloat16(),
        torch.tensor([[0.0, -150.0, 0.0, 2.0]]).bfloat16(),
    ),
    # r of Rényi's divergence lies where one model has no probability, and log Z is large.
    **{
        f"peaks {gap:g} apart": (
            torch.tensor([[0.0, gap, 0.5] + [0.0] * 5000]),
            torch.tensor([[gap * 0.2, 0.0, 0.25] + [-1.0] * 5000]),
        )
        for gap in (1e3, 1e5, 1e8)
    },
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "field",
    ["kl", "ref_kl", "kl alone", "js 0.1", "skew_kl 0.5", "renyi 0.3", "renyi 2.0", "jeffreys"],
)
@pytest.mark.parametrize("name", SINGLE)
def test_single_cases(implementation, name, field, turned) -> None:
    x, y, *temperature = SINGLE[name]
    pair = (y, x) if turned else (x, y)
    case = Case(*pair, torch.zeros(len(x), dtype=torch.long), *temperature, field=field)
    assert_right(case, implementation, name)


# A row whose KL is infinite and has an upstream gradient of 0 keeps the gradient of its other
# fields.
def test_an_infinite_kl_that_is_left_out(implementation) -> None:
    x, y = torch.zeros(1, 8), torch.zeros(1, 8)
    y[0, 3] = -math.inf
    one, zero = torch.ones(1), torch.zeros(1)
    for sides in ((x, y), (y, x)):
        p, q = (testing.leaf(side.to(implementation.device)) for side in sides)
        stats = token_stats(p, torch.tensor([1], device=p.device), q)
        fields = (stats.logprob, stats.ref_logprob, stats.kl, stats.ref_kl)
        grads = torch.autograd.grad(fields, (p, q), [v.to(p) for v in (one, one, zero, zero)])
        for grad, side in zip(grads, sides, strict=True):
            expected = torch.nn.functional.one_hot(torch.tensor([1]), 8) - side.softmax(-1)
            testing.assert_near(grad, expected, 1e-6, 1e-6, "gradient")


# ---- penalties and hidden states


# Actions of one model masked by a bias of its lm_head: an entry that the first model masks has
# probability 0; one that the second masks by -inf makes the KL infinite.
@pytest.mark.parametrize("fill", [-1e9, -1e30, -math.inf])
@pytest.mark.parametrize("masked", ["policy", "reference"])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_penalties_beside_a_mask(implementation, direction, masked, fill) -> None:
    if implementation.interpreted and fill != -1e9:
        pytest.skip("one size of mask in the interpreter is enough: the far rows have all")
    hidden, ref_hidden, weight = noise(72, 8).split((ROWS, ROWS, 40))
    biases, penalty = torch.zeros(2, 40), LinearKLPenalty(1.0, direction=direction)
    biases[int(masked == "reference"), 30:] = fill
    leaf = hidden.double().requires_grad_()
    wide = [
        side.double() @ weight.double().t() + bias
        for side, bias in zip((leaf, ref_hidden), biases, strict=True)
    ]
    exact = testing.truth(*(wide if direction.startswith("policy") else wide[::-1])).kl.mean()
    states, head, others, bias, ref_bias = (
        value.to(implementation.device) for value in (hidden, weight, ref_hidden, *biases)
    )
    states.requires_grad_()
    loss = penalty(states, head, others, head.clone(), bias=bias, ref_bias=ref_bias)
    testing.assert_near(loss, exact, 2e-5, 1e-8, "loss")
    if bool(exact.isfinite()):
        expected = torch.autograd.grad(exact, leaf)[0].flatten()
        testing.assert_gradient(torch.autograd.grad(loss, states)[0].flatten(), expected)


# ref_kl of rows with two peaks, from hidden states and over several programs of a row: gradients to
# both models. To the weights alone: a product over all entries has roundings of its own.
def test_no_gradient_takes_the_place_of_logits_to_be_read_again(implementation) -> None:
    vocabulary = 70001
    weight, ref_weight, hidden = noise(2 * vocabulary + 2, 4).split((vocabulary, vocabulary, 2))
    ref_weight, hidden = weight + 0.01 * ref_weight, 0.1 * hidden
    hidden[:, 0] = 1.0
    tokens = torch.tensor([5, 69000])
    weight[tokens, 0], ref_weight[tokens, 0] = torch.tensor([[13.0, 9.0], [9.0, 14.0]])
    given = (hidden, weight, hidden.clone(), ref_weight)
    values = [testing.leaf(value.to(implementation.device)) for value in given]
    stats = linear_token_stats(*values[:2], tokens.to(implementation.device), *values[2:])
    assert bool(((stats.kl + stats.ref_kl > 1) & (torch.maximum(stats.kl, stats.ref_kl) < 8)).all())
    wide = [testing.leaf(value.double()) for value in given]
    ref_kl = testing.truth(wide[0] @ wide[1].t(), wide[2] @ wide[3].t()).ref_kl
    exact = torch.autograd.grad(ref_kl.sum(), wide[1::2])
    for grad, expected in zip(
        torch.autograd.grad(stats.ref_kl.sum(), values[1::2]), exact, strict=True
    ):
        testing.assert_gradient(grad.flatten(), expected.flatten())
