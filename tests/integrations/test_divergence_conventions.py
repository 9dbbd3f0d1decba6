"""The divergences beside the KL in the terms of other libraries: where conventions differ, the test
says how.
"""

import math
import re
from pathlib import Path

import call_sites
import pytest
import torch
from torch.nn import functional

import fastkl
from fastkl import testing


def logits(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = testing.pair("normal3", 6, 61, 1.0, dtype=dtype)
    return student.view(2, 3, -1), teacher.view(2, 3, -1)


def assert_equal(results, expected) -> None:
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-14)


# TRL has the student first, fastkl the teacher; beta is the teacher's share in both. At 0 and 1 TRL
# takes the KLs, where the divergence of this definition is 0. TRL's "batchmean" with labels, like
# its sum over num_items_in_batch, divides by tokens: fastkl's mean.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl(beta) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = logits()
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    leaf = testing.leaf(student)
    loss = gkd.GKDTrainer.generalized_jsd_loss(leaf, teacher, labels, beta=beta, temperature=0.7)
    more = dict(temperature=0.7, reduction="mean")
    if beta == 0.0:
        own = fastkl.kl_divergence(teacher, leaf, labels != -100, **more)
    elif beta == 1.0:
        own = fastkl.kl_divergence(leaf, teacher, labels != -100, **more)
    else:
        own = fastkl.js_divergence(teacher, leaf, labels != -100, beta=beta, **more)
    grads = (torch.autograd.grad(value, leaf)[0] for value in (own, loss))
    # TRL's own beta is a float32.
    testing.assert_near(own, loss, 1e-6, 0.0, "loss")
    testing.assert_gradient(*(grad.flatten(0, 1) for grad in grads), "gradient", 1e-6)


# Liger-Kernel takes log-probabilities, the student's first, and beta is the teacher's share:
# beta·KL(teacher‖M) + (1 - beta)·KL(student‖M), summed over a row's entries and divided by rows.
# At 0 it takes KL(teacher‖student) and at 1 KL(student‖teacher). Its kernel needs a GPU.
@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_liger_kernel(beta) -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    student, teacher = (side.flatten(0, 1).cuda() for side in logits(torch.float32))
    leaf = testing.leaf(student)
    loss = liger.LigerJSD(beta=beta)(leaf.log_softmax(-1), teacher.log_softmax(-1))
    own = fastkl.js_divergence(teacher, leaf, beta=beta, reduction="mean")
    testing.assert_near(own, loss, 1e-5, 0.0, "loss")
    grads = (torch.autograd.grad(value, leaf)[0] for value in (own, loss))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


# functional.kl_div(input, target) is KL(target‖input), of log-probabilities; "batchmean" divides by
# the first dimension alone, "mean" by all entries.
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
def test_torch_kl_div(alpha) -> None:
    student, teacher = logits()
    leaves = testing.leaf(teacher), testing.leaf(student)
    log_p, log_q = (leaf.log_softmax(-1) for leaf in leaves)
    mixture = torch.logsumexp(
        torch.stack([log_p + math.log(alpha or 1e-300), log_q + math.log1p(-alpha)]), 0
    )
    theirs = functional.kl_div(mixture, log_p, reduction="batchmean", log_target=True)
    own = fastkl.skew_kl_divergence(*leaves, alpha=alpha, reduction="mean")
    assert_equal([own * 3], [theirs])
    assert_equal(
        torch.autograd.grad(own * 3, leaves),
        torch.autograd.grad(theirs, leaves),
    )


# scipy's is the square root of the JSD of equal shares.
def test_scipy() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = logits()
    theirs = distance.jensenshannon(p.softmax(-1).numpy(), q.softmax(-1).numpy(), axis=-1)
    assert_equal([fastkl.js_divergence(p, q).sqrt()], [torch.from_numpy(theirs)])


# The lines of docs/trainers beside the formulas of the trainers whose lines they replace.
def test_call_sites() -> None:
    scope = call_sites.names()
    expected = call_sites.formulas(scope)
    folder = Path(__file__).resolve().parents[2] / "docs" / "trainers"
    words = "\n".join(page.read_text() for page in folder.glob("*.md"))
    for block in re.findall(r"```python\n(.*?)```", words, flags=re.S):
        if any(f"\n{name} = " in block for name in expected):
            exec(block, scope)
    for name, value in expected.items():
        grads = [
            torch.autograd.grad(result.sum(), scope["logits"], retain_graph=True)[0]
            for result in (scope[name], value)
        ]
        assert_equal([scope[name], grads[0]], [value, grads[1]])
