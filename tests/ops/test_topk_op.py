"""The ops of top-k divergences: schemas, fake results, and one graph for a compiler."""

import pytest
import torch
from cases import assert_same
from test_topk import PER_ROW, each_direction, each_tail, example

import fastkl
from fastkl import testing


@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(implementation, per_row) -> None:
    student, _, ids = (x.to(implementation.device) for x in example(vocabulary=19))
    ids, mask = ids.sort(-1).values, torch.ones_like(ids[:, 0], dtype=torch.bool)
    temperatures = PER_ROW.to(student) if per_row else None
    options = (mask, temperatures, 0.7, implementation.backend)
    ops = torch.ops.fastkl
    torch.library.opcheck(ops.cells.default, (testing.leaf(student), ids, *options))
    listed, rest, saved = ops.cells(student, ids, *options)
    upstream = (torch.ones_like(listed), torch.ones_like(rest))
    given = (student, ids, *options[:2], rest, saved, *upstream, *options[2:])
    torch.library.opcheck(ops.cell_gradients.default, given)


@each_tail
@each_direction
def test_compile_equals_eager(implementation, direction, tail) -> None:
    if implementation.interpreted and (direction, tail) != ("js", "bucket"):
        pytest.skip("the interpreter's time goes to one of them")

    def function(logits, logprobs, ids):
        return fastkl.topk_kl_divergence(logits, logprobs, ids, direction=direction, tail=tail)

    student, *teacher = (x.to(implementation.device) for x in example())
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = testing.leaf(student)
        value = run(leaf, *teacher)
        results.append([value, *torch.autograd.grad(value.sum(), leaf)])
    assert_same(*results)
