"""recompute= of the functions on hidden states: the same numbers with fewer products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from test_linear_costs import CHUNK, SMALL, H, N, V, peak, products, tensors

import fastkl
from fastkl import linear
from fastkl.linear import Head
from fastkl.ops import engine, gemm, lm_head

FIELDS = fastkl.TokenStats._fields
LEARNED = "hidden,weight", "hidden", "hidden,weight,ref_hidden,ref_weight", "ref_hidden,ref_weight"
keeping = pytest.mark.parametrize("recompute", [False, None], ids=["kept", "default"])


def stats_of(made: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """All fields of linear_token_stats."""
    device = made["hidden"].device
    tokens = (torch.arange(made["hidden"].shape[:-1].numel(), device=device) * 7) % V
    tokens = tokens.reshape(made["hidden"].shape[:-1])
    stats = fastkl.linear_token_stats(tokens=tokens, **made, **options)
    return {name: value for name, value in stats._asdict().items() if value is not None}


def backward(stats: dict[str, torch.Tensor], made: dict, fields: tuple = FIELDS, **options) -> list:
    """Gradients for an upstream gradient of its own for each field and token; None for none."""
    asked = [
        (value, number + torch.linspace(0.5, 1, value.numel(), device=value.device))
        for number, (name, value) in enumerate(stats.items())
        if name in fields and value.requires_grad
    ]
    learned = list({id(v): v for v in made.values() if v.requires_grad}.values())
    values, upstream = zip(*((v, u.reshape(v.shape)) for v, u in asked), strict=True)
    return list(torch.autograd.grad(values, learned, upstream, allow_unused=True, **options))


def outcome(made: dict, fields: tuple = FIELDS, **options) -> list[torch.Tensor | None]:
    """Values and gradients."""
    stats = stats_of(made, **options)
    return [*(value.detach() for value in stats.values()), *backward(stats, made, fields)]


def assert_same(results: list, expected: list) -> None:
    """The same bits."""
    for result, value in zip(results, expected, strict=True):
        assert (result is None) == (value is None)
        assert result is None or torch.equal(result, value)


# ---- numbers

OPTIONS = {
    "plain": {},
    "masked chunks": {"chunk_size": CHUNK},
    "float32 logits": {"logits_dtype": torch.float32},
    "masked softcap": {"softcap": 2.0, "temperature": 0.7},
    "masked ratio": {"temperature": 0.7, "ref_temperature": 1.3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(implementation, learned, options, dtype) -> None:
    """Kept or computed again, with products of the same shapes: for each set of fields."""
    made = tensors(implementation.device, learned=learned, dtype=dtype)
    given = dict(OPTIONS[options])
    if "masked" in options:
        given["mask"] = (torch.arange(N) % 3 != 1).to(implementation.device)
    for fields in (FIELDS, FIELDS[:2], ("ref_logprob",), ("kl",)):
        if fields[0] in FIELDS[:2] and fields != FIELDS and not learned.startswith("hidden"):
            continue
        if fields == ("ref_logprob",) and "ref_" not in learned:
            continue
        again = outcome(made, fields, recompute=True, **given)
        assert_same(outcome(made, fields, recompute=False, **given), again)


@keeping
def test_heads_biases_and_leading_dimensions(implementation, recompute) -> None:
    """Heads of their own bias, soft cap and scale over [2, 12] tokens, one weight shared."""
    flat = tensors(implementation.device, learned="hidden,ref_hidden", dtype=torch.float32)
    bias = torch.linspace(-1, 1, V, device=implementation.device).requires_grad_()
    weight = flat["weight"].requires_grad_()
    made = {name: flat[name].detach().reshape(2, -1, H) for name in ("hidden", "ref_hidden")}
    for shape in ((), (0, 3)):
        if shape:
            made = {name: value.new_empty(*shape, H) for name, value in made.items()}
        leaves = [value.requires_grad_() for value in made.values()]
        found = []
        for again in (True, recompute):
            stats = fastkl.linear_token_stats(
                made["hidden"],
                Head(weight, bias, 3.0, 0.5),
                torch.ones(made["hidden"].shape[:-1], dtype=torch.long, device=bias.device),
                made["ref_hidden"],
                Head(weight, 2 * bias, None, 2.0),
                recompute=again,
            )
            total = sum(((i + 1) * value).sum() for i, value in enumerate(stats))
            found.append([*stats, *torch.autograd.grad(total, [*leaves, weight, bias])])
        assert_same(found[1], found[0])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_one_product_beside_windows(implementation, monkeypatch, masked) -> None:
    """Where the products differ in shape, gradients are apart by no more than their rounding."""
    made = tensors(implementation.device, dtype=torch.float32)
    mask = (torch.arange(N) % 3 != 1).to(implementation.device) if masked else None
    monkeypatch.setattr(lm_head, "LARGEST_CHUNK", CHUNK)
    monkeypatch.setattr(lm_head, "WORKSPACE_ON_A_GPU", 1)
    monkeypatch.setitem(lm_head.WORKSPACE, "cpu", 1)
    again, kept = (outcome(made, mask=mask, recompute=value) for value in (True, None))
    for result, value in zip(kept, again, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields, in_place", [(("kl",), True), (("ref_kl",), False)])
def test_in_place(monkeypatch, fields, in_place) -> None:
    """Gradients take the place of their logits, but where rows are read again."""
    made, seen = tensors("cpu", learned=LEARNED[2]), []
    compute = engine.backward

    def note(backend, p, q, tokens, mask, temperature, saved, upstream, grad_p, grad_q, scaling):
        seen.extend(g.data_ptr() == x.data_ptr() for x, g in ((p, grad_p), (q, grad_q)))
        compute(backend, p, q, tokens, mask, temperature, saved, upstream, grad_p, grad_q, scaling)

    monkeypatch.setattr(engine, "backward", note)
    backward(stats_of(made, recompute=False, chunk_size=CHUNK), made, fields)
    assert seen == [in_place] * (2 * N // CHUNK)


def test_a_far_row_is_read_before_it_is_written(implementation) -> None:
    """Rows that the kernels read again, for the gradient of ref_kl to the reference."""
    made = tensors(implementation.device, learned=LEARNED[2], dtype=torch.float32)
    with torch.no_grad():
        made["hidden"][::5] *= 40
        made["ref_hidden"][::7] *= 60
    assert_same(outcome(made, recompute=False), outcome(made, recompute=True))


# ---- products

COUNTS = {
    # learned, with a reference: products forward and backward, of the policy's fields and of all
    ("hidden,weight", False): (3, 3),
    ("hidden", False): (2, 2),
    ("hidden,weight", True): (4, 4),
    ("hidden", True): (3, 3),
    ("hidden,weight,ref_hidden,ref_weight", True): (4, 6),
}


def count(call: Callable) -> float:
    """How many products of N·H·V a call makes."""
    return sum(product.size for product in products(call)) / (N * H * V)


@pytest.mark.parametrize("learned, reference", COUNTS, ids=str)
def test_products(implementation, learned, reference) -> None:
    """One for each model's logits, one for each gradient; the same twice by a retained graph."""
    made = tensors(implementation.device, learned=learned)
    made = made if reference else {name: made[name] for name in ("hidden", "weight")}
    for fields, expected in zip((FIELDS[:2], FIELDS), COUNTS[learned, reference], strict=True):
        kept = []
        models = 1 + reference
        assert count(lambda kept=kept: kept.append(stats_of(made))) == models
        first, second = [], []
        run = functools.partial(backward, kept[0], made, fields, retain_graph=True)
        assert count(lambda first=first, run=run: first.extend(run())) == expected - models
        # Gradients lie where the logits were: those that are needed are computed again.
        needed = models if fields == FIELDS else 1
        assert count(lambda second=second, run=run: second.extend(run())) == (
            expected - models + needed
        )
        assert_same(second, first)


def test_chunk_size_bounds_the_products(implementation) -> None:
    """No product is for more tokens than chunk_size, with kept logits too."""
    made = tensors(implementation.device)
    call = functools.partial(outcome, made, recompute=False, chunk_size=CHUNK)
    found = products(call)
    assert max(product.size for product in found) == CHUNK * H * V
    assert sum(product.size for product in found) == 4 * N * H * V


@pytest.mark.parametrize("recompute", [True, False, None])
@pytest.mark.parametrize("mode", ["no_grad", "frozen", "sum", "penalty"])
def test_nothing_is_kept_without_need(monkeypatch, mode, recompute) -> None:
    """Not without gradient, nor where it is computed with the value."""
    kept = []
    forward = lm_head.Heads.forward
    monkeypatch.setattr(
        lm_head.Heads,
        "forward",
        lambda self, outputs, saved, keep=(): (kept.extend(keep), forward(self, outputs, saved)),
    )
    made = tensors("cpu", learned="" if mode == "frozen" else "hidden,weight")
    if mode == "no_grad":
        with torch.no_grad():
            stats_of(made, recompute=recompute)
    elif mode == "frozen":
        stats_of(made, recompute=recompute)
    elif mode == "sum":
        fastkl.linear_kl_divergence(**made, reduction="sum", recompute=recompute).backward()
    else:
        penalty = fastkl.LinearKLPenalty(0.1, recompute=recompute)
        penalty(**made).backward()
        assert ("recompute=" in repr(penalty)) == (recompute is not None)
    assert all(value is None for value in kept)


def test_two_gibibytes() -> None:
    """The bound is on the logits of all models, from shapes and types alone."""
    with torch.device("meta"):
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.empty(4, 2500, 4096, dtype=torch.bfloat16)

    def keeps(tokens: int, reference: bool, dtype=None, recompute=None) -> bool:
        states = hidden.view(-1, 4096)[:tokens]
        first = (states, weight, None, states if reference else None, None, None)
        return linear.prepare(*first, 1.0, None, None, None, dtype, None, recompute).keeps_logits()

    assert keeps(8371, False) and not keeps(8372, False)
    assert keeps(4185, True) and not keeps(4186, True)
    assert keeps(4185, False, torch.float32) and not keeps(4186, False, torch.float32)
    assert keeps(10000, True, None, False) and not keeps(1, False, None, True)


# ---- memory


@pytest.mark.parametrize("learned", ["hidden,weight", "hidden,weight,ref_hidden,ref_weight"])
@pytest.mark.parametrize("fields", [FIELDS[:4], FIELDS], ids=["kl", "ref_kl"])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(monkeypatch, logits_dtype, fields, learned) -> None:
    """Backward has no second tensor of logits: the formulas of the docstring, measured.

    On top come what the CPU holds in another type at a time and 256 bytes per token.
    """
    for name in ("forward", "backward"):
        monkeypatch.setattr(engine, name, lambda *_: None)  # in place, whatever it is
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setitem(lm_head.WORKSPACE, "cpu", 1 << 20)
    monkeypatch.setattr(lm_head, "SMALL_SUM", 0)
    made = tensors("cpu", **SMALL, learned=learned)
    n, h, v = SMALL.values()
    head = lm_head.Head(made["hidden"], made["weight"], None, logits_dtype)
    chunk = lm_head.plan(n, [head, head], None).chunk
    models, width = learned.count("hidden"), lm_head.row_width(v)
    slack = 3 * 4 * (1 << 14) + 256 * n
    kept, stats = 2 * n * width * logits_dtype.itemsize, []
    run = functools.partial(stats_of, made, recompute=False, logits_dtype=logits_dtype)
    assert kept <= peak(lambda: stats.append(run()))[0] <= kept + slack
    returned = models * 2 * (n * h + v * h)
    if logits_dtype == torch.float32:  # G·V·b, G = N at the most
        more = models * n * width * 2
    else:  # C·V·l where a far row may be read again
        more = models * chunk * width * 2 if fields == FIELDS and models == 2 else 0
    most, largest = peak(lambda: backward(stats[0], made, fields))
    assert most <= returned + more + slack
    assert logits_dtype == torch.float32 or largest == 2 * v * h
