"""The losses of distillation, from logits and from hidden states, against the sum of both terms in
float64 by torch's own cross-entropy and the textbook's divergence.
"""

import math

import family
import pytest
import torch
import torch.nn.functional as F

import fastkl
from fastkl import testing

V, CAP = 17, 3.0
LABELS = torch.tensor([[3, -100, 16], [-100, -100, -100], [0, 5, 5]])
MEMBERS = {"kl": family.Member(fastkl.kl_divergence, "kl"), **family.KINDS}
DIRECTIONS = ("teacher||student", "student||teacher")
KINDS = fastkl.DistillationLoss, fastkl.LinearDistillationLoss


# Hidden states, weight and bias of the student, and the teacher's; logits of size 1.
def models(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator, leading = torch.Generator().manual_seed(0), LABELS.shape
    sizes = {(*leading, 8): 1.0, (V, 8): 0.35, (V,): 0.5, (*leading, 12): 1.0, (V, 12): 0.3}
    made = [torch.randn(shape, generator=generator).double() * x for shape, x in sizes.items()]
    return [each.to(device, dtype).requires_grad_() for each in made]


# Arguments of both kinds: the student's lm_head has a bias, the teacher's a soft cap.
def inputs_of(hidden, weight, bias, ref_hidden, ref_weight) -> tuple[tuple, tuple]:
    capped = CAP * torch.tanh(F.linear(ref_hidden, ref_weight) / CAP)
    heads = fastkl.Head(weight, bias), fastkl.Head(ref_weight, softcap=CAP)
    return (F.linear(hidden, weight, bias), capped), (hidden, heads[0], ref_hidden, heads[1])


# Float64 to its rounding; float32 as every divergence and gradient.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha, temperature", [(0.3, 1.0), (0.3, 2.5), (0.0, 2.5), (1.0, 1.0)])
@pytest.mark.parametrize("name", MEMBERS)
def test_against_fp64(
    implementation, name, alpha, temperature, direction, dtype, tolerance
) -> None:
    if implementation.kernels and (dtype == torch.float64 or name != "kl"):
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
    last = {"loss": expected, "tokens": torch.tensor(5)}
    last |= {"cross_entropy": cross_entropy / 5} if alpha < 1 else {}
    last |= {"divergence": divergence / 5} if alpha > 0 else {}
    used = [*zip(made, exact, strict=True)][: 5 if alpha else 3]
    rights = torch.autograd.grad(expected, [right for _, right in used])
    options = {{"alpha": "divergence_alpha"}.get(k, k): x for k, x in member.options.items()}
    for kind, arguments in zip(KINDS, inputs_of(*made), strict=True):
        loss = kind(member.kind, alpha, temperature, direction=direction, **options)
        value = loss(*arguments, labels, normalizer=11)
        assert loss.last.keys() == last.keys()
        for term, right in last.items():
            testing.assert_near(loss.last[term], right, tolerance, 0.0, term)
        assert torch.equal(loss.last["loss"], value) and not loss.last["loss"].requires_grad
        grads = torch.autograd.grad(value, [given for given, _ in used])
        for grad, right in zip(grads, rights, strict=True):
            assert float((grad.cpu() - right).norm()) <= tolerance * float(right.norm())
        # No token counts, or a normalizer counted none.
        assert float(loss(*arguments, torch.full_like(labels, -100))) == 0.0
        assert float(loss(*arguments, labels, normalizer=labels.new_zeros(()))) == 0.0


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
def test_a_compiled_step(name, temperature) -> None:
    student, teacher = (each.detach() for each in inputs_of(*models(torch.float32, "cpu"))[0])
    losses, leaves = [fastkl.DistillationLoss(name, 0.5, temperature) for _ in range(2)], []
    assert repr(losses[0]) == (
        f"DistillationLoss(divergence={name!r}, alpha=0.5, temperature={temperature}, "
        "direction='teacher||student')"
    )
    for each in (torch.compile(losses[0], fullgraph=True, backend="aot_eager"), losses[1]):
        leaves.append(testing.leaf(student))
        each(leaves[-1], teacher, LABELS).backward()
    torch.testing.assert_close(losses[0].last, losses[1].last)
    torch.testing.assert_close(*(leaf.grad for leaf in leaves), rtol=1e-5, atol=1e-7)
