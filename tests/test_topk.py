"""Divergences from a teacher known by its top k: values and gradients against the textbook's
formulas in float64, lists as samplers and trainers pass them, and properties.
"""

import math
from typing import get_args

import memory
import pytest
import torch
from cases import INTERPRETING, assert_same, check_ops, padded

import fastkl
from fastkl import testing, topk

DIRECTIONS, TAILS = get_args(topk.TopkDirection), get_args(topk.Tail)
SIZES = (1e-3, 0.1, 3.0) if INTERPRETING else (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
VOCABULARY = 203 if INTERPRETING else 1003
PER_ROW = torch.tensor([0.5, 0.8, 1.0, 1.3, 2.0, 4.0])[: len(SIZES)]
# Kernels sum the student's rest in float32. The teacher's is known in float64, so that on a near
# row the difference of the two, a term or a gradient, has the whole error of the sum.
REST_ERROR = 2.0**-24
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_tail = pytest.mark.parametrize("tail", TAILS)


# A teacher's K most probable tokens, the first one first.
def top(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, ids = teacher.double().log_softmax(-1).topk(k)
    return logprobs.float(), ids


# Student's logits and the teacher's list, one row for each of SIZES.
def example(
    kind: str = "normal3", k: int = 5, vocabulary: int = VOCABULARY, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    teacher, student = testing.sizes_pair(kind, SIZES, (0.0, 7.0), vocabulary, dtype)
    return student, *top(teacher, k)


# The textbook's formulas in float64: (divergence [...], Σ|terms| [...]). Cells are all tokens, of
# which the listed ones are kept, and the rest. -x + y adds nothing where both sum to 1.
def textbook(logits, logprobs, ids, direction, tail, beta=0.5, clip=None, temperature=1.0):
    vocabulary = logits.shape[-1]
    divisor = torch.as_tensor(temperature, dtype=torch.float64)[..., None]
    log_q = (logits.double() / divisor).log_softmax(-1)
    present = (logprobs > -math.inf) & (ids >= 0) & (ids < vocabulary)
    place = torch.where(present, ids, 0).long()
    given = torch.where(present, logprobs.double().exp(), 0.0)
    p = torch.zeros_like(log_q).scatter_add(-1, place, given)
    keep = torch.zeros_like(log_q).scatter_add(-1, place, present.double()) > 0
    mass = p.sum(-1, keepdim=True)
    if tail == "renormalize":
        p, log_q = p / mass, log_q - log_q.masked_fill(~keep, -math.inf).logsumexp(-1, True)
    if tail == "bucket":
        rest = log_q.masked_fill(keep, -math.inf).logsumexp(-1, True)
        p_rest = (1 - mass).clamp(min=0.0)
        kept = (rest > -math.inf) & ((p_rest > 0) | (direction != "student||teacher"))
        p, log_q = torch.cat([p, p_rest], -1), torch.cat([log_q, rest], -1)
        keep = torch.cat([keep, kept], -1)
    p, log_q = torch.where(keep, p, 1.0), torch.where(keep, log_q, 0.0)
    q = log_q.exp()
    m = (beta * p + (1 - beta) * q).log()
    plain = tail == "ignore" or clip is not None
    terms = {
        "teacher||student": lambda: torch.xlogy(p, p) - p * log_q + (0 if plain else q - p),
        "student||teacher": lambda: q * (log_q - p.log()) + (0 if plain else p - q),
        "js": lambda: beta * (torch.xlogy(p, p) - p * m) + (1 - beta) * q * (log_q - m),
    }[direction]()
    terms = torch.where(keep, terms, 0.0)
    terms = terms if clip is None else terms.clamp(max=clip)
    return terms.sum(-1), terms.abs().sum(-1)


# Value and gradient, on `device`.
def outcome(device: str, logits, logprobs, ids, *mask, upstream=None, **how) -> list[torch.Tensor]:
    leaf = testing.leaf(logits.to(device))
    rest = [value.to(device) for value in (logprobs, ids, *mask)]
    how = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in how.items()}
    value = fastkl.topk_kl_divergence(leaf, *rest, **how)
    upstream = testing.upstream_for(value) if upstream is None else upstream.to(value)
    return [value, *torch.autograd.grad(value, leaf, upstream)]


def check(implementation, logits, logprobs, ids, **how) -> torch.Tensor:
    value, grad = outcome(implementation.device, logits, logprobs, ids, **how)
    leaf = testing.leaf(logits.double())
    exact, size = textbook(leaf, logprobs, ids, **how)
    assert value.dtype == torch.float32 and grad.dtype == logits.dtype
    if how["tail"] == "ignore" or how.get("clip"):
        # Terms of a near row are differences: float64's own rounding, or the rest's in float32.
        absolute = REST_ERROR if implementation.kernels else 1e-13
        testing.assert_near(value, exact, 0.0, 1e-6 * size + absolute, f"{how}")
    else:
        testing.assert_kl(value, exact, f"{how}")
    upstream = testing.upstream_for(value.cpu()).double()
    (right,) = torch.autograd.grad(exact, leaf, upstream)
    if implementation.kernels and grad.dtype == torch.float32:
        allowed = testing.GRADIENT_LIMIT * right.norm(dim=-1)
        allowed += REST_ERROR * (upstream / how.get("temperature", 1.0)).abs()
        assert bool(((grad.cpu().double() - right).norm(dim=-1) <= allowed).all()), f"{how}"
        return value
    more = {"absolute": 1e-6 * implementation.kernels, "truncated": INTERPRETING}
    testing.assert_rounded_gradient(grad, right, f"gradient, {how}", **more)
    return value


# ---- accuracy


@pytest.mark.parametrize("kind", testing.KINDS[1 :: 2 if INTERPRETING else 1])
@each_tail
@each_direction
def test_against_fp64(implementation, direction, tail, kind, dtype) -> None:
    for k in (1, 20) if kind == "normal3" else (20,):
        check(implementation, *example(kind, k, dtype=dtype), direction=direction, tail=tail)


@pytest.mark.parametrize("vocabulary", (7, 8, 40001))
@each_direction
def test_vocabularies(implementation, direction, vocabulary, dtype) -> None:
    student, *teacher = example(vocabulary=vocabulary, dtype=dtype)
    for offset in (0, 1):
        logits = padded(student, 0, offset)
        check(implementation, logits, *teacher, direction=direction, tail="bucket")


@pytest.mark.parametrize("temperature", (0.7, PER_ROW), ids=str)
@each_tail
@each_direction
def test_temperature(implementation, direction, tail, temperature) -> None:
    how = {"direction": direction, "tail": tail, "temperature": temperature}
    check(implementation, *example(), **how, **({"beta": 0.2} if direction == "js" else {}))


# A student whose rest has a probability from 1e-3 to 1e-20, far below a float32 unit of 1, or
# whose list has one from 1e-86 to 1e-434.
@pytest.mark.parametrize("tail, factor", [("bucket", 1.0), ("renormalize", -20.0)])
@each_direction
def test_small_rests(implementation, direction, tail, factor, dtype) -> None:
    student, logprobs, ids = example(dtype=dtype)
    heights = torch.linspace(10.0, 50.0, len(SIZES))[:, None].expand_as(ids).to(dtype)
    student = student.scatter_add(-1, ids, heights * factor)
    check(implementation, student, logprobs, ids, direction=direction, tail=tail)


# No rest is left, whatever the rounding of the listed mass.
@pytest.mark.parametrize("vocabulary", (1, 7, VOCABULARY))
@each_tail
@each_direction
def test_all_tokens_listed(implementation, direction, tail, vocabulary) -> None:
    given = example(k=vocabulary, vocabulary=vocabulary)
    check(implementation, *given, direction=direction, tail=tail)


# ---- lists


LISTS = {
    "-inf": (-math.inf, 0),
    "id -1, of ragged lists": (0.0, -1),
    "id of V": (0.0, VOCABULARY),
    "largest id": (0.0, 2**31 - 1),
}


@pytest.mark.parametrize("name", LISTS)
def test_absent_entries(implementation, name) -> None:
    student, logprobs, ids = example()
    expected = outcome(implementation.device, student, logprobs, ids)
    columns = torch.tensor([5, 3, 0, 6, 4, 2, 1])
    for dtype in (torch.int32, torch.int64):
        logprob, index = LISTS[name]
        more = torch.nn.functional.pad(logprobs, (0, 2), value=logprob)[:, columns]
        padded_ids = torch.nn.functional.pad(ids, (0, 2), value=index)[:, columns].to(dtype)
        assert_same(outcome(implementation.device, student, more, padded_ids), expected)


@each_tail
@each_direction
def test_repeated_ids_add_up(implementation, direction, tail) -> None:
    student, logprobs, ids = example()
    logprobs, ids = torch.cat([logprobs, logprobs[:, :2]], -1), torch.cat([ids, ids[:, :2]], -1)
    logprobs[:, [0, 5]] -= math.log(2)
    logprobs[:, 1] += math.log(0.75)
    logprobs[:, 6] += math.log(0.25)
    check(implementation, student, logprobs, ids, direction=direction, tail=tail)


# Rows without entries and masked ones, verl's padding of log-prob 0 and id 0 among them.
@each_tail
def test_rows_that_do_not_count(implementation, tail) -> None:
    student, logprobs, ids = (torch.cat([x, x]).clone()[:6] for x in example())
    upstream, device = torch.arange(1.0, 7.0), implementation.device
    counted = torch.tensor([True, False, True, False, False, True])
    expected = outcome(
        device,
        *(x[counted] for x in (student, logprobs, ids)),
        upstream=upstream[counted],
        tail=tail,
    )
    mask = torch.tensor([True, False, True, True, False, True])
    student[1], logprobs[1], ids[1] = math.nan, 0.0, 0
    student[3], logprobs[3] = math.nan, -math.inf
    logprobs[4] = math.nan
    value, grad = outcome(device, student, logprobs, ids, mask, upstream=upstream, tail=tail)
    assert_same([value[counted], grad[counted]], expected)
    assert not bool(value[~counted].any()) and not bool(grad[~counted].any())
    given = [x.to(device) for x in (student, logprobs, ids, mask)]
    mean = fastkl.topk_kl_divergence(*given, tail=tail, reduction="mean")
    torch.testing.assert_close(mean, expected[0].sum() / 3)


# 16-bit log-probabilities may sum to a little more than 1: no rest, and nothing is rescaled.
@each_tail
@each_direction
@pytest.mark.parametrize("mass", (1.000001, 1.004))
def test_mass_of_one_or_more(implementation, direction, tail, mass) -> None:
    student, logprobs, ids = example()
    logprobs = (logprobs.double().softmax(-1) * mass).log()
    check(implementation, student, logprobs, ids, direction=direction, tail=tail)


def test_mass_of_padding(implementation) -> None:
    student, logprobs, ids = (x.to(implementation.device) for x in example())
    logprobs[1], ids[1] = 0.0, 0
    if implementation.kernels:
        value, grad = outcome(implementation.device, student, logprobs, ids)
        assert value.isnan().nonzero().tolist() == [[1]] and bool(grad[1].isnan().all())
        return
    with pytest.raises(ValueError, match="topk_logprobs: .*at most 1.05, got 5; mask padded"):
        fastkl.topk_kl_divergence(student, logprobs, ids)
    logprobs[1, 1:] = -math.inf
    assert bool(fastkl.topk_kl_divergence(student, logprobs, ids).isfinite().all())


# Lists longer than the kernels take go through torch's operations.
@each_tail
@each_direction
def test_long_lists(kernels, monkeypatch, direction, tail) -> None:
    how = {"direction": direction, "tail": tail}
    expected = outcome(kernels.device, *example(), **how)
    monkeypatch.setattr(topk, "LARGEST_K", 4)
    results = outcome(kernels.device, *example(), **how)
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-8)


# From forward to backward the kernels keep the listed logits and 68 bytes per token.
def test_memory(kernels) -> None:
    student, *lists = (x.to(kernels.device) for x in example(k=20))
    leaf = testing.leaf(student)
    held = memory.saved(lambda: fastkl.topk_kl_divergence(leaf, *lists, direction="js"))
    for own in (leaf, *lists):
        held.pop(own.untyped_storage().data_ptr())
    assert sum(held.values()) == (4 * 20 + 68) * len(SIZES)


# Of lists that leave out some of the most probable tokens, as vLLM's do that end with the prompt's.
@each_tail
@each_direction
def test_clip(implementation, direction, tail) -> None:
    student, logprobs, ids = example(k=8)
    logprobs, ids = (torch.cat([value[:, ::2]] * 2) for value in (logprobs, ids))
    student = torch.cat([student, student.flip(-1)])
    how = {"direction": direction, "tail": tail}
    clipped = check(implementation, student, logprobs, ids, clip=0.001, **how)
    assert bool((clipped < outcome(implementation.device, student, logprobs, ids, **how)[0]).any())


def test_a_weighted_mean(implementation) -> None:
    device, weights = implementation.device, testing.upstream_for(torch.empty(len(SIZES)))
    value, grad = outcome(device, *example(), upstream=weights / 2.5)
    more = {"weights": weights, "reduction": "mean", "normalizer": 2.5}
    results = outcome(device, *example(), upstream=torch.ones(()), **more)
    expected = [(weights.to(device) * value).sum() / 2.5, grad]
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9)


# ---- properties


# Log-probabilities in float64: float32 ones are another distribution's.
@each_tail
@each_direction
def test_equal_distributions(implementation, direction, tail) -> None:
    teacher = testing.logits("normal3", 3, VOCABULARY, torch.Generator().manual_seed(0))
    logprobs, ids = teacher.double().log_softmax(-1).topk(7)
    how = {"direction": direction, "tail": tail}
    value, grad = outcome(implementation.device, teacher, logprobs, ids, **how)
    assert bool((value.abs() <= (1e-8 if implementation.kernels else 1e-12)).all()), value
    if tail != "ignore":
        assert bool((grad.abs() <= 1e-6).all())


def test_a_rows_bits_are_its_own(implementation, dtype) -> None:
    given, device = example("zipf", dtype=dtype), implementation.device
    count = len(SIZES)
    whole = outcome(device, *given, upstream=torch.ones(count))
    for index in (torch.arange(count).flip(0), *torch.arange(count)[:, None]):
        part = outcome(device, *(x[index] for x in given), upstream=torch.ones(len(index)))
        assert_same(part, [value[index] for value in whole])


@each_tail
def test_masses(implementation, tail) -> None:
    student, logprobs, ids = example()
    given = [x.to(implementation.device) for x in (student, logprobs, ids)]
    mask = torch.arange(len(SIZES), device=implementation.device) != 1
    stats = fastkl.topk_stats(testing.leaf(given[0]), *given[1:], mask, tail=tail, temperature=2.0)
    assert_same([stats.kl], [fastkl.topk_kl_divergence(*given, mask, tail=tail, temperature=2.0)])
    assert not stats.student_mass.requires_grad and not stats.teacher_mass.requires_grad
    exact = (student.double() / 2).softmax(-1).gather(-1, ids).sum(-1), logprobs.exp().sum(-1)
    for mass, right in zip(stats[1:], exact, strict=True):
        testing.assert_near(mass, right * mask.cpu(), 2e-6, 2e-6, "mass")


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_leading_shapes(implementation, leading) -> None:
    student, logprobs, ids = example()
    count = math.prod(leading)
    given = (
        x.repeat(3, 1)[:count].reshape(*leading, x.shape[-1]) for x in (student, logprobs, ids)
    )
    value, grad = outcome(implementation.device, *given)
    assert value.shape == leading and grad.shape == (*leading, VOCABULARY)


@pytest.mark.parametrize("temperature", (0.7, PER_ROW), ids=str)
def test_opcheck(implementation, temperature) -> None:
    given = (implementation.device, *example(vocabulary=19), torch.ones(len(SIZES)).bool())
    assert len(check_ops(lambda: outcome(*given, temperature=temperature))) == 2


# ---- wrong arguments


WRONG = [
    (dict(topk_logprobs=torch.zeros(2, 3, requires_grad=True)), "topk_logprobs"),
    (dict(topk_logprobs=torch.zeros(2, 4)), "topk_logprobs"),
    (dict(topk_ids=torch.zeros(2, 3)), "topk_ids"),
    (dict(topk_ids=torch.zeros(3, 3, dtype=torch.long)), "topk_ids"),
    (dict(topk_ids=torch.zeros(2, 0).long(), topk_logprobs=torch.zeros(2, 0)), "topk_ids"),
    (dict(topk_ids=torch.zeros(2).long(), topk_logprobs=torch.zeros(2)), "topk_ids"),
    (dict(direction="teacher"), "direction"),
    (dict(tail="drop"), "tail"),
    (dict(beta=1.1), "beta"),
    (dict(clip=0), "clip"),
]


@pytest.mark.parametrize("wrong, argument", WRONG, ids=str)
@pytest.mark.parametrize("function", [fastkl.topk_kl_divergence, fastkl.topk_stats])
def test_wrong_arguments(function, wrong, argument) -> None:
    right = {
        "logits": torch.zeros(2, 7),
        "topk_logprobs": torch.full((2, 3), -2.0),
        "topk_ids": torch.arange(3).repeat(2, 1),
    }
    with pytest.raises((TypeError, ValueError), match=f"^{argument}.*: expected .+, got .+; .+"):
        function(**{**right, **wrong})


# One of several equal peaks is listed: the mass of the others and the gradient are right at any
# size, and masked entries have no mass. The first size is within 1e-5 of a multiple of log 2.
@pytest.mark.parametrize(
    "size", [900.398193359375, 1e3, -1e3, 1e4, 5e8, 1e10, 1e17, 1e30, -5e8, -1e10, -1e30]
)
@pytest.mark.parametrize("low", ["four times", "masked"])
@pytest.mark.parametrize("peaks", [2, 3])
def test_logits_of_any_size(implementation, size, low, peaks) -> None:
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((1, 9), lowest if low == "masked" else min(0.0, 4 * size))
    logits[0, 3 : 3 + peaks] = size
    leaf, ids = testing.leaf(logits.to(implementation.device)), torch.tensor([[3]])
    lists = torch.full((1, 1), -math.log(4)).to(leaf), ids.to(leaf.device)
    stats = fastkl.topk_stats(leaf, *lists)
    testing.assert_near(stats.student_mass, torch.full((1,), 1 / peaks), 1e-6, 0.0, "mass")
    (grad,) = torch.autograd.grad(stats.kl.sum(), leaf)
    expected, gap = torch.zeros(1, 9), 1 / peaks - 1 / 4
    expected[0, 3 : 3 + peaks] = -gap / (peaks - 1)
    expected[0, 3] = gap
    testing.assert_near(grad, expected, 1e-6, 0.0, "gradient")


# The rest of a list of all peaks is masked, or the list is; a masked row may hold NaN and a
# temperature of 0. No NaN comes up on the way, which torch's anomaly mode would refuse.
@pytest.mark.parametrize("hole", [-math.inf, torch.finfo(torch.float32).min])
def test_holes(implementation, hole) -> None:
    logits = torch.zeros(3, 9)
    logits[0, 2:], logits[1, :2], logits[2] = hole, hole, math.nan
    leaf, mask = testing.leaf(logits.to(implementation.device)), torch.arange(3) < 2
    lists = torch.full((3, 2), -math.log(2)), torch.tensor([[0, 1]] * 3)
    temperature = torch.tensor([0.7, 2.0, 0.0], device=leaf.device)
    listed = [each.to(leaf.device) for each in (*lists, mask)]
    for direction in ("student||teacher", "js"):
        with torch.autograd.detect_anomaly():
            stats = fastkl.topk_stats(leaf, *listed, direction=direction, temperature=temperature)
            (grad,) = torch.autograd.grad(stats.kl.sum(), leaf)
        assert stats.student_mass.tolist() == [1.0, 0.0, 0.0] and bool(grad.isfinite().all())
    assert bool(fastkl.topk_stats(leaf, *listed).kl[1] > 1e8)
