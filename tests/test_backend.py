"""Which implementation runs: the defaults, use_backend, explain, and that there is never a silent
fallback.
"""

import dataclasses

import cases
import pytest
import torch

import fastkl
from fastkl import testing


@pytest.fixture(autouse=True)
def unchanged_choice():
    with fastkl.use_backend(None):
        yield


def logits(device: str, rows: int = 2) -> list[torch.Tensor]:
    return [*map(testing.leaf, testing.pair("normal1", rows, 11, 1.0, device=device))]


# ---- what runs


@pytest.mark.parametrize(
    "device, name, why",
    [
        ("cpu", "reference", "the logits are on cpu"),
        pytest.param("cuda", "triton", "the logits are on a GPU", marks=pytest.mark.gpu),
    ],
)
def test_defaults(ran, device, name, why) -> None:
    p, q = logits(device)
    fastkl.kl_divergence(p, q).sum().backward()
    assert ran == [f"{name} forward", f"{name} backward"]
    assert fastkl.explain(p, q) == fastkl.Explanation(name, why, ())


CALLS = {
    "kl": lambda p, q, tokens: fastkl.kl_divergence(p, q),
    "stats": lambda p, q, tokens: sum(fastkl.token_stats(p, tokens, q)),
    "select": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens),
    "select 3": lambda p, q, tokens: fastkl.selective_log_softmax(p, tokens[:, None].expand(2, 3)),
    "penalty": lambda p, q, tokens: fastkl.KLPenalty(0.1)(p, q),
}


# On no other backend, backward too, whatever is chosen by then, as explain() says.
@pytest.mark.parametrize("afterwards", [None, "reference", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_the_chosen_one_runs(implementation, ran, name, afterwards) -> None:
    (p, q), backend = logits(implementation.device), implementation.backend
    with fastkl.use_backend(backend):
        explained = fastkl.explain(p, q)
        result = CALLS[name](p, q, torch.zeros(2, dtype=torch.long, device=p.device)).sum()
    with fastkl.use_backend(afterwards):
        result.backward()
    assert explained.problems == () and explained.backend == backend
    assert ran == [f"{backend} forward", f"{backend} backward"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_on_a_gpu(ran, dtype) -> None:
    p, q = (value.to(dtype) for value in logits("cpu", 4))
    tokens, temperatures, mask = torch.tensor([[0, -100, 3, 10], [1, 2, 4, 2], [1, 0, 1, 1]])
    rows = cases.Rows(p, q, tokens, mask.bool(), temperatures / 2)
    with fastkl.use_backend("reference"):
        found = [cases.outcome(rows, device) for device in ("cpu", "cuda")]
    assert set(ran) == {"reference forward", "reference backward"}
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (1e-12, 1e-14)
    assert all(value.device.type == "cuda" and value.dtype == dtype for value in found[1])
    torch.testing.assert_close(*found, rtol=rtol, atol=atol, check_device=False)


# ---- use_backend


def chosen() -> tuple[str, str]:
    return dataclasses.astuple(fastkl.explain(torch.zeros(1, 3)))[:2]


def test_use_backend_as_a_setter_and_as_a_context() -> None:
    assert chosen()[0] == "reference"
    fastkl.use_backend("triton")
    assert chosen() == ("triton", "use_backend('triton')")
    with pytest.raises(KeyError, match="mine"), fastkl.use_backend("reference"):
        with fastkl.use_backend("triton"), fastkl.use_backend(None):
            assert chosen()[0] == "reference"
        assert chosen() == ("reference", "use_backend('reference')")
        raise KeyError("mine")
    with pytest.raises(ValueError, match="name: expected one of 'triton', 'reference', got"):
        fastkl.use_backend("Triton")
    assert chosen()[0] == "triton"


# ---- what cannot run


def test_every_reason_at_once(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p, q = torch.randn(5, 4, dtype=torch.float64).t(), torch.randn(4, 5, dtype=torch.float64)
    assert fastkl.explain(p, q).problems == ()
    with fastkl.use_backend("triton"):
        explained = fastkl.explain(p, q)
        with pytest.raises(RuntimeError) as raised:
            fastkl.kl_divergence(p, q)
    for reason, words in zip(
        explained.problems, ("TRITON_INTERPRET=1", "torch.float64", "stride 4"), strict=True
    ):
        assert words in reason and reason in str(raised.value) and reason in str(explained)


WRONG = {
    "float64": (lambda x: x.double(), ("torch.float64",)),
    "transposed": (lambda x: x.t(), ("stride",)),
    "both": (lambda x: x.double().t(), ("torch.float64", "stride")),
    "stepped": (lambda x: x[:, ::2], ("stride 2",)),
    "expanded": (lambda x: x[:, :1].expand(-1, 3), ("stride 0",)),
    "one column": (lambda x: x[:, 2:3], ()),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wrong, reasons", WRONG.values(), ids=WRONG)
def test_no_silent_fallback(implementation, ran, wrong, reasons, turned) -> None:
    x = wrong(torch.randn(4, 6, device=implementation.device))
    pair = (x, torch.zeros(x.shape).to(x))[:: -1 if turned else 1]
    with fastkl.use_backend(implementation.backend):
        if not (implementation.kernels and reasons):
            assert bool(fastkl.kl_divergence(*pair).isfinite().all())
            return
        with pytest.raises(RuntimeError) as raised:
            fastkl.kl_divergence(*pair)
    assert ran == [] and all(reason in str(raised.value) for reason in reasons)
