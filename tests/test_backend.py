"""Which implementation runs: the defaults, use_backend, explain, and that there is never a silent
fallback.
"""

import importlib.util
import itertools
import pathlib
import subprocess
import sys

import pytest
import torch

import fastkl
from fastkl.ops import reference_rows

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unchanged_choice():
    with fastkl.use_backend(None):
        yield


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    modules, calls = {"reference": reference_rows}, []
    if importlib.util.find_spec("triton"):
        modules["triton"] = importlib.import_module("fastkl.kernels.launch")

    def spy(label: str, original):
        return lambda *args, **keywords: (calls.append(label), original(*args, **keywords))[1]

    for (name, module), step in itertools.product(modules.items(), ("forward", "backward")):
        monkeypatch.setattr(module, step, spy(f"{name} {step}", getattr(module, step)))
    return calls


def logits(device: str, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(rows, 11, generator=generator).to(device).requires_grad_() for _ in "pq"
    )


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


def test_the_chosen_one_runs(implementation, ran) -> None:
    p, q = logits(implementation.device)
    tokens = torch.zeros(2, dtype=torch.long, device=implementation.device)
    name = implementation.backend
    with fastkl.use_backend(name):
        explained = fastkl.explain(p, q)
        for call in (
            lambda: fastkl.kl_divergence(p, q),
            lambda: sum(fastkl.token_stats(p, tokens, q)),
            lambda: fastkl.selective_log_softmax(p, tokens),
            lambda: fastkl.KLPenalty(0.1)(p, q),
        ):
            call().sum().backward()
    assert explained.problems == () and explained.backend == name
    assert ran == [f"{name} forward", f"{name} backward"] * 4
    with fastkl.use_backend("reference"):
        expected = fastkl.kl_divergence(p.cpu(), q.cpu())
    with fastkl.use_backend(name):
        result = fastkl.kl_divergence(p, q)
    torch.testing.assert_close(result, expected.to(result), rtol=2e-5, atol=0)


def test_backward_runs_where_forward_ran(implementation, ran) -> None:
    p, q = logits(implementation.device)
    for other in (None, "reference", "triton"):
        ran.clear()
        with fastkl.use_backend(implementation.backend):
            result = fastkl.kl_divergence(p, q)
        with fastkl.use_backend(other):
            result.sum().backward()
        assert ran == [f"{implementation.backend} forward", f"{implementation.backend} backward"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_on_a_gpu(ran, dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        p, q = (value.detach().to(dtype).requires_grad_() for value in logits(device, 4))
        mask = torch.tensor([True, False, True, True], device=device)
        tokens = torch.tensor([0, -100, 3, 10], device=device)
        temperatures = torch.tensor([0.5, 1.0, 2.0, 1.0], device=device)
        with fastkl.use_backend("reference"):
            fields = fastkl.token_stats(p, tokens, q, temperature=temperatures, mask=mask)
        assert all(value.device.type == device and value.dtype == dtype for value in fields)
        grads = torch.autograd.grad(sum(fields).sum(), (p, q))
        found.append([value.cpu() for value in (*fields, *grads)])
    assert set(ran) == {"reference forward", "reference backward"}
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (1e-12, 1e-14)
    torch.testing.assert_close(*found, rtol=rtol, atol=atol)


# ---- use_backend


def chosen() -> tuple[str, str]:
    explained = fastkl.explain(torch.zeros(1, 3))
    return explained.backend, explained.why


DEFAULT = ("reference", "the logits are on cpu")


def test_use_backend_as_a_setter_and_as_a_context() -> None:
    assert chosen() == DEFAULT
    fastkl.use_backend("triton")
    assert chosen() == ("triton", "use_backend('triton')")
    with pytest.raises(KeyError, match="mine"), fastkl.use_backend("reference"):
        assert chosen() == ("reference", "use_backend('reference')")
        with fastkl.use_backend("triton"):
            assert chosen()[0] == "triton"
            with fastkl.use_backend(None):
                assert chosen() == DEFAULT
            assert chosen()[0] == "triton"
        assert chosen()[0] == "reference"
        raise KeyError("mine")
    assert chosen()[0] == "triton"
    fastkl.use_backend(None)
    assert chosen() == DEFAULT


@pytest.mark.parametrize("name", ["cuda", "", "Triton", 3, True])
def test_unknown_backend(name) -> None:
    fastkl.use_backend("triton")
    with pytest.raises(ValueError, match="name: expected one of 'triton', 'reference', got"):
        fastkl.use_backend(name)
    assert chosen()[0] == "triton"


# ---- what cannot run


def test_every_reason_at_once(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p, q = torch.randn(5, 4, dtype=torch.float64).t(), torch.randn(4, 5, dtype=torch.float64)
    assert str(fastkl.explain(p, q)) == "reference (the logits are on cpu): runs"
    with fastkl.use_backend("triton"):
        explained = fastkl.explain(p, q)
        with pytest.raises(RuntimeError) as raised:
            fastkl.kl_divergence(p, q)
    assert str(explained).startswith("triton (use_backend('triton')): cannot run: ")
    remedies = ("on cpu", "TRITON_INTERPRET=1"), ("torch.float64", "'reference'")
    remedies += (("stride 4", ".contiguous()"),)
    for reason, words in zip(explained.problems, remedies, strict=True):
        assert reason in str(raised.value) and reason in str(explained)
        assert all(word in reason for word in words), reason


WRONG = {
    "float64": (lambda x: x.double(), ("torch.float64",)),
    "transposed": (lambda x: x.t(), ("stride",)),
    "both": (lambda x: x.double().t(), ("torch.float64", "stride")),
    "stepped": (lambda x: x[:, ::2], ("stride 2",)),
    "expanded": (lambda x: x[:, :1].expand(-1, 3), ("stride 0",)),
}


@pytest.mark.parametrize("wrong, reasons", WRONG.values(), ids=WRONG)
def test_no_silent_fallback(implementation, ran, wrong, reasons) -> None:
    x = wrong(torch.randn(4, 6, device=implementation.device))
    ok = torch.randn(x.shape, device=implementation.device).to(x.dtype)
    with fastkl.use_backend(implementation.backend):
        for p, q in ((x, ok), (ok, x)):
            if not implementation.kernels:
                assert bool(fastkl.kl_divergence(p, q).isfinite().all())
                assert ran.pop() == "reference forward"
                continue
            if x.dtype != torch.float64 and q is x:
                assert fastkl.explain(p).problems == ()
            with pytest.raises(RuntimeError) as raised:
                fastkl.kl_divergence(p, q)
            assert all(reason in str(raised.value) for reason in reasons)
    assert ran == []


def test_one_column_may_have_any_stride(implementation) -> None:
    x = torch.randn(4, 6, device=implementation.device)[:, 2:3]
    with fastkl.use_backend(implementation.backend):
        assert not fastkl.kl_divergence(x, x + 1).any()


WRONG_LOGITS = [
    ([1.0], TypeError),
    (torch.zeros(2, dtype=torch.long), TypeError),
    (torch.zeros(()), ValueError),
    (torch.zeros(2, 4), ValueError),
]


@pytest.mark.parametrize("wrong, error", WRONG_LOGITS, ids=str)
def test_explain_checks_its_argument(wrong, error) -> None:
    with pytest.raises(error, match="^ref_logits: expected"):
        fastkl.explain(torch.zeros(2, 3), wrong)


def test_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, fastkl
x = torch.randn(2, 5)
assert bool((fastkl.kl_divergence(x, x + torch.randn(2, 5)) > 0).all())
fastkl.use_backend("triton")
try: fastkl.kl_divergence(x, x)
except RuntimeError as error: print(error)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "triton is not installed: pip install triton" in run.stdout
