"""The losses of distillation, from logits and from hidden states, against the sum of both terms in
float64 by torch's own cross-entropy and the textbook's divergence.
"""

import copy
import math
import pickle

import family
import pytest
import torch
import torch.nn.functional as F
from cases import waits

import fastkl
from fastkl import testing

V, CAP = 17, 3.0
LABELS = torch.tensor([[3, -100, 16], [-100, -100, -100], [0, 5, 5]])
MEMBERS = {"kl": family.Member(fastkl.kl_divergence, "kl"), **family.KINDS}
DIRECTIONS = ("teacher||student", "student||teacher")
KINDS = fastkl.DistillationLoss, fastkl.LinearDistillationLoss
each_weight = pytest.mark.parametrize(
    "alpha, temperature", [(0.3, 1.0), (0.3, 2.5), (0.0, 2.5), (1.0, 1.0)]
)


# Hidden states, weight and bias of the student, and the teacher's; logits of size 1.
def models(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator, leading = torch.Generator().manual_seed(0), LABELS.shape
    sizes = {(*leading, 8): 1.0, (V, 8): 0.35, (V,): 0.5, (*leading, 12): 1.0, (V, 12): 0.3}
    made = [torch.randn(shape, generator=generator).double() * x for shape, x in sizes.items()]
    return [each.to(device, dtype).requires_grad_() for each in made]


# What both kinds take: the student's lm_head has a bias, the teacher's a soft cap.
def inputs_of(hidden, weight, bias, ref_hidden, ref_weight) -> tuple[tuple, tuple]:
    capped = CAP * torch.tanh(F.linear(ref_hidden, ref_weight) / CAP)
    heads = fastkl.Head(weight, bias), fastkl.Head(ref_weight, softcap=CAP)
    return (F.linear(hidden, weight, bias), capped), (hidden, heads[0], ref_hidden, heads[1])


# Float64 to its rounding; float32 as every divergence and gradient.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
@each_weight
@pytest.mark.parametrize("name", MEMBERS)
def test_against_fp64(
    implementation, name, alpha, temperature, direction, dtype, tolerance
) -> None:
    if implementation.kernels and (dtype == torch.float64 or name not in ("kl", "renyi 0.3")):
        pytest.skip("each divergence has its tests on kernels, which take no float64")
    made, labels = models(dtype, implementation.device), LABELS.to(implementation.device)
    exact = [testing.leaf(each.detach().double().cpu()) for each in made]
    (logits, teacher_logits), _ = inputs_of(*exact)
    member, mask = MEMBERS[name], LABELS != -100
    logs = [(each / temperature).log_softmax(-1) for each in (teacher_logits, logits)]
    logs = logs if direction == DIRECTIONS[0] else logs[::-1]
    divergence = family.textbook(*logs, member.kind, member.share)[mask].sum()
    cross_entropy = F.cross_entropy(logits[mask], LABELS[mask], reduction="sum")
    expected = ((1 - alpha) * cross_entropy + alpha * temperature**2 * divergence) / 11
    used = [*zip(made, exact, strict=True)][: 5 if alpha else 3]
    rights = torch.autograd.grad(expected, [right for _, right in used])
    options = {{"alpha": "divergence_alpha"}.get(k, k): x for k, x in member.options.items()}
    for kind, arguments in zip(KINDS, inputs_of(*made), strict=True):
        loss = kind(member.kind, alpha, temperature, direction=direction, **options)
        value = loss(*arguments, labels, normalizer=11)
        means = {"cross_entropy": cross_entropy / 5, "divergence": divergence / 5}
        means = {term: means[term] for term in loss.last if term in means}
        assert len(means) == (1 if alpha in (0, 1) else 2)
        for term, right in {"loss": expected, "tokens": torch.tensor(5), **means}.items():
            testing.assert_near(loss.last[term], right, tolerance, 0.0, term)
        assert torch.equal(loss.last["loss"], value) and not loss.last["loss"].requires_grad
        grads = torch.autograd.grad(value, [given for given, _ in used])
        for grad, right in zip(grads, rights, strict=True):
            assert float((grad.cpu() - right).norm()) <= tolerance * float(right.norm())


# No token counts, or a normalizer counted none.
@each_weight
@pytest.mark.parametrize("which", [0, 1])
def test_no_tokens(implementation, which, alpha, temperature) -> None:
    loss, labels = KINDS[which]("kl", alpha, temperature), LABELS.to(implementation.device)
    made = models(torch.float32, implementation.device)
    none = labels.clone().fill_(-100)
    for counted, normalizer in ((none, None), (labels, labels.new_zeros(()))):
        value = loss(*inputs_of(*made)[which], counted, normalizer=normalizer)
        grads = torch.autograd.grad(value, made[:2])
        assert float(value.detach()) == 0.0 and not any(bool(each.any()) for each in grads)


# A term of weight 0 may be infinite: the cross-entropy with a label that a pruned student lacks, or
# its KL.
@pytest.mark.parametrize("alpha, expected", [(0.0, 0.0), (1.0, math.log(2))])
def test_a_weight_of_0_leaves_an_infinite_term_out(alpha, expected) -> None:
    bias, teacher, labels = torch.tensor([0.0, -math.inf]), torch.zeros(2, 2), torch.tensor([0, 1])
    given = dict(alpha=alpha, direction=DIRECTIONS[int(alpha)])
    heads = fastkl.Head(torch.eye(2), bias), fastkl.Head(torch.eye(2))
    labels = labels * int(alpha)
    losses = (
        fastkl.DistillationLoss(**given)(teacher + bias, teacher, labels),
        fastkl.LinearDistillationLoss(**given)(teacher, heads[0], teacher, heads[1], labels),
    )
    assert [float(each) for each in losses] == pytest.approx([expected] * 2, abs=1e-7)


@pytest.mark.parametrize("name, temperature", [("kl", 1.0), ("js", 2.0)])
def test_copies_and_a_compiled_step(name, temperature) -> None:
    student, teacher = (each.detach() for each in inputs_of(*models(torch.float32, "cpu"))[0])
    loss, leaves = fastkl.DistillationLoss(name, 0.5, temperature), []
    before, value = copy.deepcopy(loss), loss(student, teacher, LABELS)
    after = pickle.loads(pickle.dumps(loss))
    assert before.last == {} and torch.equal(after.last["loss"], value) and not loss.state_dict()
    assert repr(loss) == (
        f"DistillationLoss(divergence={name!r}, alpha=0.5, temperature={temperature}, "
        "direction='teacher||student')"
    )
    for each in (torch.compile(before, fullgraph=True, backend="aot_eager"), after):
        leaves.append(testing.leaf(student))
        each(leaves[-1], teacher, LABELS).backward()
    torch.testing.assert_close(before.last, after.last)
    torch.testing.assert_close(*(leaf.grad for leaf in leaves), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@each_weight
def test_no_synchronisation(implementation, alpha, temperature) -> None:
    made, labels = models(torch.float32, implementation.device), LABELS.to(implementation.device)
    loss = fastkl.DistillationLoss("kl", alpha, temperature)
    assert waits(lambda: loss(*inputs_of(*made)[0], labels, normalizer=5).backward()) == 0
