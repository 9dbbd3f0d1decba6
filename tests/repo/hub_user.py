# A user of the Hub's package: `python hub_user.py REPOSITORY SOURCE`, which test_hub.py runs in a
# process of its own.

import importlib
import sys
from pathlib import Path

import torch
from kernels._rust import Backend, Build, Digest, DigestAlgorithm
from torch.utils.flop_counter import FlopCounterMode

import fastkl
from kernels import get_loaded_kernels, get_local_kernel

REPOSITORY, SOURCE = map(Path, sys.argv[1:])
P, Q = torch.randn(2, 4, 7, 96, generator=torch.Generator().manual_seed(0))


def truth(p):
    log_p, log_q = (x.double().log_softmax(-1) for x in (p, Q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def value_and_gradient(function):
    p = P.clone().requires_grad_()
    kl = function(p)
    kl.sum().backward()
    return kl.detach().float(), p.grad


def compiled(function):
    # The function, compiled without a graph break, and the names of the ops in its graphs.
    ops = set()

    def backend(graph, inputs):
        ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    return torch.compile(function, backend=backend, fullgraph=True), ops


def check(module, metadata) -> None:
    folder = Path(module.__file__).parent
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    assert module.__name__ == metadata.id and module.__version__ == fastkl.__version__
    # Every module comes from the package itself, and every public name is its own.
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        importlib.import_module(".".join([metadata.id, *(x for x in parts if x != "__init__")]))
    own = [value for name, value in sys.modules.items() if name.split(".")[0] == metadata.id]
    held = [value for each in own for value in vars(each).values()]
    homes = {str(getattr(x, "__module__", getattr(x, "__name__", ""))) for x in held}
    assert len(own) > 40 and not [home for home in homes if home.split(".")[0] == "fastkl"]
    assert not [x for x in module.__all__ if getattr(module, x) is getattr(fastkl, x)]
    # Eager, compiled and counted, each by its own ops.
    function, ops = compiled(lambda p: module.kl_divergence(p, Q))
    for run in (lambda p: module.kl_divergence(p, Q), function):
        for got, right in zip(value_and_gradient(run), value_and_gradient(truth), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7)
    assert ops >= {f"{metadata.id}.row_statistics.default"}, ops
    hidden, weight = P[0], torch.ones(5, 96)
    with FlopCounterMode(display=False) as counter:
        module.linear_kl_divergence(hidden, weight, hidden, weight)
    assert counter.get_total_flops() == 2 * 2 * hidden.numel() * 5
    penalty = module.KLPenalty(module.rl.FixedBeta(0.5))
    assert torch.equal(penalty(P, Q), fastkl.KLPenalty(0.5)(P, Q))


fastkl.kl_divergence(P, Q)
assert Build.open(SOURCE).general.backends == [Backend.CPU, Backend.CUDA]
modules = [get_local_kernel(REPOSITORY), get_local_kernel(REPOSITORY / "build" / "torch-cuda")]
assert modules[0] is not modules[1]
for module, loaded in zip(modules, get_loaded_kernels(), strict=True):
    check(module, loaded.metadata)
