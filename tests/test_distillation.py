"""The losses of distillation, from logits and from hidden states, against the sum of both terms in
float64 by torch's own cross-entropy and the textbook's divergence.
"""

import copy
import itertools
import math
import pickle

import family
import pytest
import torch
import torch.nn.functional as F
from cases import waits

import fastkl
from fastkl import testing

V, H, H_REF, CAP = 17, 8, 12, 3.0
LABELS = torch.tensor([[3, -100, 16], [-100, -100, -100], [0, 5, 5]])
MEMBERS = {"kl": family.Member(fastkl.kl_divergence, "kl"), **family.KINDS}
DIRECTIONS = ("teacher||student", "student||teacher")


# Student and teacher, as hidden states and what a Head has; V·H weights make logits of size 1.
def models(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*LABELS.shape, H), (V, H), (*LABELS.shape, H_REF), (V, H_REF), (V,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sizes = (1.0, H**-0.5, 1.0, H_REF**-0.5, 0.5)
    return [
        (x * size).to(device, dtype).requires_grad_() for x, size in zip(made, sizes, strict=True)
    ]


# The student's lm_head has a bias, the teacher's a soft cap.
def logits_of(hidden, weight, ref_hidden, ref_weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(hidden, weight, bias), CAP * torch.tanh(F.linear(ref_hidden, ref_weight) / CAP)


# The loss and its two means, without weights.
def truth(logits, teacher_logits, loss, member, normalizer=None) -> list[torch.Tensor]:
    mask = LABELS != -100
    logs = [(x / loss.temperature).log_softmax(-1) for x in (teacher_logits, logits)]
    logs = logs if loss.direction == DIRECTIONS[0] else logs[::-1]
    divergence = family.textbook(*logs, member.kind, member.share)[mask].sum()
    cross_entropy = F.cross_entropy(logits[mask], LABELS[mask], reduction="sum")
    scaled = loss.alpha * loss.temperature**2 * divergence
    total = (1 - loss.alpha) * cross_entropy + scaled
    means = [cross_entropy / mask.sum(), divergence / mask.sum()]
    return [total / (mask.sum() if normalizer is None else normalizer), *means]


def settings(member, alpha: float, temperature: float, direction: str) -> dict[str, object]:
    own = {"alpha": "divergence_alpha"}
    options = {own.get(name, name): value for name, value in member.options.items()}
    given = {"alpha": alpha, "temperature": temperature, "direction": direction}
    return {"divergence": member.kind, **given, **options}


WEIGHTS = [(0.3, 1.0), (0.3, 2.5), (0.0, 2.5), (1.0, 1.0)]


# Float64 to its rounding; float32 as every divergence and gradient.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha, temperature", WEIGHTS)
@pytest.mark.parametrize("name", MEMBERS)
def test_against_fp64(implementation, name, alpha, temperature, direction, dtype) -> None:
    if implementation.kernels and (dtype == torch.float64 or name not in ("kl", "renyi 0.3")):
        pytest.skip("the terms have tests of their own on kernels, which take no float64")
    device, member = implementation.device, MEMBERS[name]
    given, labels = settings(member, alpha, temperature, direction), LABELS.to(device)
    made = models(dtype, device)
    hidden, weight, ref_hidden, ref_weight, bias = made
    exact = [testing.leaf(x.detach().double().cpu()) for x in made]
    losses = fastkl.DistillationLoss(**given), fastkl.LinearDistillationLoss(**given, chunk_size=2)
    heads = fastkl.Head(weight, bias), fastkl.Head(ref_weight, softcap=CAP)
    for loss, arguments in zip(
        losses, (logits_of(*made), (hidden, heads[0], ref_hidden, heads[1])), strict=True
    ):
        value = loss(*arguments, labels, normalizer=11)
        expected, *means = truth(*logits_of(*exact), loss, member, 11)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        testing.assert_near(value, expected, tolerance, 0.0, "loss")
        assert torch.equal(loss.last["loss"], value) and not loss.last["loss"].requires_grad
        assert float(loss.last["tokens"]) == 5 and loss.last["tokens"].dtype == value.dtype
        computed = {"cross_entropy": alpha < 1, "divergence": alpha > 0}
        for (term, kept), mean in zip(computed.items(), means, strict=True):
            assert (term in loss.last) == kept
            testing.assert_near(loss.last.get(term, mean), mean, tolerance, 0.0, term)
        leaves, copies = (side if alpha else [*side[:2], side[4]] for side in (made, exact))
        grads = torch.autograd.grad(value, leaves, retain_graph=True)
        for grad, right in zip(grads, torch.autograd.grad(expected, copies), strict=True):
            testing.assert_gradient(
                grad.flatten(0, -2) if grad.dim() > 1 else grad[None],
                right.flatten(0, -2) if right.dim() > 1 else right[None],
                "gradient",
                1e-10 if dtype == torch.float64 else 1e-4,
            )


# Without a token that counts, and with a normalizer that counted none.
@pytest.mark.parametrize("alpha, temperature", WEIGHTS)
def test_no_tokens(implementation, alpha, temperature) -> None:
    made = models(torch.float32, implementation.device)
    hidden, weight, ref_hidden, ref_weight, _ = made
    pairs = logits_of(*made), (hidden, weight, ref_hidden, ref_weight)
    labels = LABELS.to(implementation.device)
    for kind, pair in zip(
        (fastkl.DistillationLoss, fastkl.LinearDistillationLoss), pairs, strict=True
    ):
        loss = kind("kl", alpha, temperature)
        for counted, normalizer in (
            (torch.full_like(labels, -100), None),
            (labels, labels.new_zeros(())),
        ):
            value = loss(*pair, counted, normalizer=normalizer)
            grads = torch.autograd.grad(value, made[:2], retain_graph=True)
            assert float(value.detach()) == 0.0 and not any(bool(x.any()) for x in grads)


# A term of weight 0 may be infinite: the KL of a pruned student, the cross-entropy of its labels.
def test_a_weight_of_0_leaves_an_infinite_term_out() -> None:
    student, teacher = torch.zeros(2, 2), torch.zeros(2, 2)
    student[:, 1] = -math.inf
    labels = torch.tensor([0, 1])
    for alpha, label, expected in ((0.0, labels[[0, 0]], 0.0), (1.0, labels, math.log(2))):
        loss = fastkl.DistillationLoss("kl", alpha, direction=DIRECTIONS[int(alpha)])
        assert float(loss(student, teacher, label)) == pytest.approx(expected, abs=1e-7)
        linear = fastkl.LinearDistillationLoss("kl", alpha, direction=DIRECTIONS[int(alpha)])
        heads = fastkl.Head(torch.eye(2), student[0]), fastkl.Head(torch.eye(2))
        value = linear(teacher, heads[0], teacher, heads[1], label)
        assert float(value) == pytest.approx(expected, abs=1e-7)


# ---- as a module


def test_the_default_is_the_docstrings_code() -> None:
    logits, teacher_logits = (x.detach() for x in logits_of(*models(torch.float64, "cpu")))
    mask = LABELS != -100
    kl = fastkl.kl_divergence(teacher_logits, logits, mask)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    expected = 0.5 * cross_entropy + 0.5 * kl.sum() / mask.sum()
    loss = fastkl.DistillationLoss()
    torch.testing.assert_close(loss(logits, teacher_logits, LABELS), expected, rtol=1e-12, atol=0)
    assert repr(loss) == (
        "DistillationLoss(divergence='kl', alpha=0.5, temperature=1.0, "
        "direction='teacher||student')"
    )
    linear = fastkl.LinearDistillationLoss("js", beta=0.3, chunk_size=7)
    assert "beta=0.3" in repr(linear) and "chunk_size=7" in repr(linear)


def test_copies_and_a_compiled_step() -> None:
    logits, teacher_logits = (x.detach() for x in logits_of(*models(torch.float32, "cpu")))
    for given in itertools.product(["kl", "js"], [0.5], [1.0, 2.0]):
        loss = fastkl.DistillationLoss(*given)
        before, value = copy.deepcopy(loss), loss(logits, teacher_logits, LABELS)
        after = pickle.loads(pickle.dumps(loss))
        assert before.last == {} and torch.equal(after.last["loss"], value)
        assert not loss.state_dict() and not list(loss.parameters())
        step = torch.compile(before, fullgraph=True, backend="aot_eager")
        leaves = testing.leaf(logits), testing.leaf(logits)
        values = step(leaves[0], teacher_logits, LABELS), after(leaves[1], teacher_logits, LABELS)
        torch.testing.assert_close(*values)
        grads = [torch.autograd.grad(x, leaf)[0] for x, leaf in zip(values, leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("alpha, temperature", WEIGHTS)
def test_no_synchronisation(implementation, alpha, temperature) -> None:
    made, labels = models(torch.float32, implementation.device), LABELS.to(implementation.device)
    loss = fastkl.DistillationLoss("kl", alpha, temperature)
    assert waits(lambda: loss(*logits_of(*made), labels, normalizer=5).backward()) == 0
