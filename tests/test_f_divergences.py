"""The definition of the divergences beside the KL: f_divergences.py against 60 digits, the
textbook's formulas and autograd's numerical derivatives.
"""

import math

import pytest
import torch
from family import MEMBERS, plain_gradients

import fastkl
from fastkl import f_divergences, testing

SIZES = (1e-6, 1e-4, 1e-2, 1.0, 30.0)
SHARES = {
    "js": (0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
    "skew_kl": (0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
    "renyi": (0.3, 0.5, 0.999, 1.001, 2.0, 10.0),
    "total_variation": (0.0,),
    "jeffreys": (0.0,),
}
CASES = [(kind, share) for kind, shares in SHARES.items() for share in shares]
V = 13


ROWS = (*SIZES, 1.0, 1.0, 1.0, 1.0)


# Rows of each size, and others with entries that P, Q or both do not have; the last one's models
# have no entry in common.
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    p, q = testing.sizes_pair("normal3", ROWS, (0.0, 50.0), V, torch.float64)
    p[5:, :3] = q[5:, :3] = p[8, :8] = q[8, 8:] = -math.inf
    p[6, 4] = p[7, 4] = q[5, 6] = q[7, 6] = -math.inf
    return p, q


# A divergence of two lists of logits, by its definition.
def defined(mp, x: list[float], y: list[float], kind: str, share: float):
    def softmax(logits):
        powers = [mp.exp(mp.mpf(value)) if value != -math.inf else mp.mpf(0) for value in logits]
        return [power / mp.fsum(powers) for power in powers]

    def relative(p, m):
        if p == 0:
            return mp.mpf(0)
        return p * mp.log(p / m) if m else mp.inf

    def term(p, q):
        m = share * p + (1 - share) * q
        if kind == "js":
            return sum(w * relative(x, m) for w, x in ((share, p), (1 - share, q)) if w)
        if kind == "skew_kl":
            return relative(p, m)
        if kind == "total_variation":
            return abs(p - q) / 2
        if kind == "jeffreys":
            return relative(p, q) + relative(q, p)
        if p == 0 or q == 0:
            return mp.inf if q == 0 < p and share > 1 else mp.mpf(0)
        return p**share * q ** (1 - share)

    share = mp.mpf(share)
    terms = [term(p, q) for p, q in zip(softmax(x), softmax(y), strict=True)]
    total = mp.inf if mp.inf in terms else mp.fsum(terms)
    return mp.log(total) / (share - 1) if kind == "renyi" else total


# Of a logit of 30 rounded to 2e-15, and of a difference of 1e-6 so rounded, 2e-9 are left.
@pytest.mark.parametrize("kind, share", CASES)
def test_high_precision(kind, share) -> None:
    mp, (p, q) = pytest.importorskip("mpmath").mp, rows()
    results = f_divergences.divergence(p.log_softmax(-1), q.log_softmax(-1), kind, share)
    with mp.workdps(60):
        exact = [
            defined(mp, *pair, kind, share) for pair in zip(p.tolist(), q.tolist(), strict=True)
        ]
        exact = torch.tensor([float(value) for value in exact], dtype=torch.float64)
    for row, size in enumerate(ROWS):
        relative = 1e-11 + 1e-14 / size
        testing.assert_near(results[row], exact[row], relative, 0.0, f"size {size}, row {row}")
    assert bool(((results == math.inf) == (exact == math.inf)).all())


@pytest.mark.parametrize("kind, share", CASES)
def test_gradients_are_finite_where_the_value_is(kind, share) -> None:
    logs = [side.log_softmax(-1) for side in rows()]
    finite = f_divergences.divergence(*logs, kind, share) < math.inf
    for log_probability, grad in zip(
        logs, f_divergences.gradients(*logs, kind, share), strict=True
    ):
        assert bool(grad[finite].isfinite().all())
        assert not bool(grad[finite][log_probability[finite] == -math.inf].any())


# The textbook's formulas have an absolute error, that of probabilities and logarithms near 1.
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("kind", ["normal3", "zipf"])
def test_gradients_of_the_textbooks_formula(name, kind) -> None:
    member, sizes = MEMBERS[name], (0.3, 1.0, 3.0, 30.0)
    p, q = testing.sizes_pair(kind, sizes, (0.0, 3.0), 23, torch.float64)
    q[-1, 3] = -1e18 if name == "renyi 2.0" else q[-1, 3]
    upstream = testing.upstream_for(p[:, 0])
    expected = plain_gradients(member, p, q, upstream)
    results = member.exact_gradients(p, q, upstream)
    for result, value, side in zip(results, expected, "pq", strict=True):
        error, norm = (result - value).norm(dim=-1), value.norm(dim=-1)
        assert bool((error <= 1e-9 * norm + 1e-15).all()), f"{side}: {error}, {norm}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_gradcheck(name, masked) -> None:
    p, q = testing.sizes_pair("normal1", (0.3, 1.0, 3.0), (0.0, 3.0), 7, torch.float64)
    temperature = torch.tensor([0.5, 1.0, 2.0]) if masked else 0.8
    mask = [torch.tensor([True, False, True])] if masked else []

    def function(p, q):
        return MEMBERS[name](p, q, *mask, temperature=temperature)

    with fastkl.use_backend("reference"):
        assert function(p, q).dtype == torch.float64
        assert torch.autograd.gradcheck(function, (p.requires_grad_(), q.requires_grad_()))
