"""Which implementation runs: the defaults, use_backend, explain, and that there is never a silent
fallback.
"""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import pytest
import torch

import fastkl
from fastkl import backend
from fastkl.ops import reference_rows

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unchanged_choice():
    """Every test starts from the default and leaves the choice as it found it."""
    with fastkl.use_backend(None):
        yield


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What really ran, in order: "triton forward", "reference backward", …: both implementations
    are spied on below the ops.
    """
    launch = (
        pytest.importorskip("fastkl.kernels.launch", reason="needs triton")
        if importlib.util.find_spec("triton")
        else None
    )
    calls: list[str] = []

    def spy(module, attribute: str, label: str) -> None:
        original = getattr(module, attribute)

        def recorded(*args, **keywords):
            calls.append(label)
            return original(*args, **keywords)

        monkeypatch.setattr(module, attribute, recorded)

    for step in ("forward", "backward"):
        spy(reference_rows, step, f"reference {step}")
        if launch is not None:
            spy(launch, step, f"triton {step}")
    return calls


def logits(device: str, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of logits that require grad."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(rows, 11, generator=generator).to(device).requires_grad_() for _ in "pq"
    )


# ---- what runs


def test_default_on_cpu_is_the_reference(ran) -> None:
    """CPU tensors run on the reference, whether or not the kernels could be interpreted."""
    p, q = logits("cpu")
    fastkl.kl_divergence(p, q).sum().backward()
    assert ran == ["reference forward", "reference backward"]
    assert fastkl.explain(p, q) == fastkl.Explanation("reference", "the logits are on cpu", ())


@pytest.mark.gpu
def test_default_on_a_gpu_is_triton(ran) -> None:
    """CUDA tensors run on the kernels."""
    p, q = logits("cuda")
    fastkl.kl_divergence(p, q).sum().backward()
    assert ran == ["triton forward", "triton backward"]
    assert fastkl.explain(p, q) == fastkl.Explanation("triton", "the logits are on a GPU", ())


def test_the_chosen_one_runs(implementation, ran) -> None:
    """Each public function runs on the chosen backend and on no other, forward and backward."""
    p, q = logits(implementation.device)
    tokens = torch.zeros(2, dtype=torch.long, device=implementation.device)
    with fastkl.use_backend(implementation.backend):
        for call in (
            lambda: fastkl.kl_divergence(p, q),
            lambda: sum(fastkl.token_stats(p, tokens, q)),
            lambda: fastkl.selective_log_softmax(p, tokens),
            lambda: fastkl.KLPenalty(0.1)(p, q),
        ):
            call().sum().backward()
    assert ran == [f"{implementation.backend} forward", f"{implementation.backend} backward"] * 4


def test_the_kernels_agree_with_the_reference(implementation) -> None:
    """What the choice changes is the implementation, not the result."""
    p, q = logits(implementation.device)
    with fastkl.use_backend(implementation.backend):
        result = fastkl.kl_divergence(p, q)
    with fastkl.use_backend("reference"):
        expected = fastkl.kl_divergence(p.cpu(), q.cpu())
    torch.testing.assert_close(result, expected.to(result), rtol=2e-5, atol=0)


def test_backward_runs_where_forward_ran(implementation, ran) -> None:
    """A backward pass after the context, or within another one, stays on its forward pass's
    backend.
    """
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
    """use_backend('reference') takes CUDA tensors, float64 too, with mask, tokens and a temperature
    per row, and gives what it gives on CPU.
    """
    found = []
    for device in ("cpu", "cuda"):
        p, q = (value.detach().to(dtype).requires_grad_() for value in logits(device, 4))
        mask = torch.tensor([True, False, True, True], device=device)
        tokens, temperatures = (
            torch.tensor([0, -100, 3, 10], device=device),
            torch.tensor([0.5, 1.0, 2.0, 1.0], device=device),
        )
        with fastkl.use_backend("reference"):
            fields = fastkl.token_stats(p, tokens, q, temperature=temperatures, mask=mask)
        assert all(value.device.type == device and value.dtype == dtype for value in fields)
        found.append(
            [value.cpu() for value in (*fields, *torch.autograd.grad(sum(fields).sum(), (p, q)))]
        )
    assert set(ran) == {"reference forward", "reference backward"}
    torch.testing.assert_close(
        found[0],
        found[1],
        rtol=1e-4 if dtype == torch.float32 else 1e-12,
        atol=1e-6 if dtype == torch.float32 else 1e-14,
    )


# ---- use_backend


def test_use_backend_as_a_setter_and_as_a_context() -> None:
    """A call sets the choice from then on; a with block, nested too, gives back what was before it."""
    x = torch.zeros(1, 3)

    def chosen() -> tuple[str, str]:
        explained = fastkl.explain(x)
        return explained.backend, explained.why

    default = ("reference", "the logits are on cpu")
    assert chosen() == default
    fastkl.use_backend("triton")
    assert chosen() == ("triton", "use_backend('triton')")
    with fastkl.use_backend("reference"):
        assert chosen() == ("reference", "use_backend('reference')")
        with fastkl.use_backend("triton"):
            assert chosen()[0] == "triton"
            with fastkl.use_backend(None):
                assert chosen() == default
            assert chosen()[0] == "triton"
        assert chosen()[0] == "reference"
    assert chosen()[0] == "triton"
    fastkl.use_backend(None)
    assert chosen() == default


def test_use_backend_after_an_exception() -> None:
    """The with block gives the choice back when it is left by an exception, which it lets through."""
    with pytest.raises(KeyError, match="mine"), fastkl.use_backend("triton"):
        raise KeyError("mine")
    assert backend._forced is None


@pytest.mark.parametrize("name", ["cuda", "", "Triton", 3, True])
def test_unknown_backend(name) -> None:
    """Another name is a ValueError that lists the names, and changes nothing."""
    fastkl.use_backend("reference")
    with pytest.raises(ValueError, match="name: expected one of 'triton', 'reference', got"):
        fastkl.use_backend(name)
    assert backend._forced == "reference"


# ---- what cannot run


def test_every_reason_at_once(monkeypatch) -> None:
    """float64 and strided logits on CPU without the interpreter: three reasons, each with its
    remedy, in the error and in explain().
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p, q = torch.randn(5, 4, dtype=torch.float64).t(), torch.randn(4, 5, dtype=torch.float64)
    with fastkl.use_backend("triton"):
        explained = fastkl.explain(p, q)
        with pytest.raises(RuntimeError) as raised:
            fastkl.kl_divergence(p, q)
    assert explained.backend == "triton" and len(explained.problems) == 3
    for reason, words in zip(
        explained.problems,
        (
            ("on cpu", "TRITON_INTERPRET=1"),
            ("torch.float64", "'reference'"),
            ("stride 4", ".contiguous()"),
        ),
        strict=True,
    ):
        assert reason in str(raised.value) and reason in str(explained)
        assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    "wrong, reasons",
    [
        (lambda x: x.double(), ("torch.float64",)),
        (lambda x: x.t(), ("stride",)),
        (lambda x: x.double().t(), ("torch.float64", "stride")),
        (lambda x: x[:, ::2], ("stride 2",)),
        (lambda x: x[:, :1].expand(-1, 3), ("stride 0",)),
    ],
    ids=["float64", "transposed", "both", "stepped", "expanded"],
)
def test_no_silent_fallback(implementation, ran, wrong, reasons) -> None:
    """What the kernels cannot take, as either argument, is an error where they were chosen, and
    nothing runs; the reference takes it all.
    """
    x = wrong(torch.randn(4, 6, device=implementation.device))
    ok = torch.randn(x.shape, device=implementation.device).to(x.dtype)
    with fastkl.use_backend(implementation.backend):
        for p, q in ((x, ok), (ok, x)):
            if not implementation.kernels:
                assert (
                    bool(fastkl.kl_divergence(p, q).isfinite().all())
                    and ran.pop() == "reference forward"
                )
                continue
            if x.dtype != torch.float64 and q is x:
                assert fastkl.explain(p).problems == ()
            with pytest.raises(RuntimeError) as raised:
                fastkl.kl_divergence(p, q)
            assert all(reason in str(raised.value) for reason in reasons)
    assert ran == []


def test_one_column_may_have_any_stride(implementation) -> None:
    """With V = 1 the stride along the vocabulary means nothing."""
    x = torch.randn(4, 6, device=implementation.device)[:, 2:3]
    with fastkl.use_backend(implementation.backend):
        assert torch.equal(
            fastkl.kl_divergence(x, x + 1), torch.zeros(4, device=implementation.device)
        )


# ---- explain


def test_explanation_reads_as_a_line(monkeypatch) -> None:
    """str() says the backend, why, and whether it runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 3)
    assert str(fastkl.explain(x)) == "reference (the logits are on cpu): runs"
    with fastkl.use_backend("triton"):
        assert str(fastkl.explain(x)).startswith("triton (use_backend('triton')): cannot run: ")
        assert "TRITON_INTERPRET=1" in str(fastkl.explain(x))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if importlib.util.find_spec("triton"):
            assert str(fastkl.explain(x)) == "triton (use_backend('triton')): runs"


@pytest.mark.parametrize(
    "wrong, error",
    [
        ([1.0], TypeError),
        (torch.zeros(2, dtype=torch.long), TypeError),
        (torch.zeros(()), ValueError),
    ],
    ids=str,
)
def test_explain_checks_its_argument(wrong, error) -> None:
    """explain() words a wrong argument as the functions do."""
    with pytest.raises(error, match="^logits: expected"):
        fastkl.explain(wrong)
    with pytest.raises(error, match="ref_logits: expected"):
        fastkl.explain(torch.zeros(2, 3), wrong)
    with pytest.raises(
        ValueError, match=r"ref_logits: expected the shape of logits, \(2, 3\), got \(2, 4\)"
    ):
        fastkl.explain(torch.zeros(2, 3), torch.zeros(2, 4))


def test_explain_agrees_with_what_happens(implementation, ran) -> None:
    """The backend that explain() names is the one that runs, and no problems means that it does
    run.
    """
    p, q = logits(implementation.device)
    with fastkl.use_backend(implementation.backend):
        explained = fastkl.explain(p, q)
        fastkl.kl_divergence(p, q)
    assert explained.problems == () and ran == [f"{explained.backend} forward"]


# ---- without Triton


def test_without_triton() -> None:
    """fastkl imports and computes on CPU where triton is not installed; choosing it says so, first
    of all reasons.
    """
    program = "\n".join(
        [
            "import sys",
            "sys.modules['triton'] = None",
            "import torch, fastkl",
            "x = torch.randn(2, 5)",
            "assert bool((fastkl.kl_divergence(x, x + torch.randn(2, 5)) > 0).all())",
            "fastkl.use_backend('triton')",
            "try: fastkl.kl_divergence(x, x)",
            "except RuntimeError as error: print(error)",
        ]
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "triton is not installed: pip install triton" in run.stdout
