# `import fastkl` loads a name at its first use: free of torch until then, and a plain attribute
# after.

import pickle
import sys

import pytest
import torch

import fastkl


def test_every_way_to_a_name():
    # Attribute, from-import, star, submodule and pickle give one object; dir() lists all.
    scope: dict[str, object] = {}
    exec("from fastkl import *", scope)
    assert set(fastkl.__all__) <= set(dir(fastkl))
    for name in fastkl.__all__:
        value = getattr(fastkl, name)
        assert value is scope[name] and vars(fastkl)[name] is value
        assert name == "rl" or pickle.loads(pickle.dumps(value)) is value
    assert fastkl.rl is sys.modules["fastkl.rl"]
    assert fastkl.reference is sys.modules["fastkl.reference"]


def from_import(p, q):
    from fastkl import token_stats

    return token_stats(p, q.argmax(-1), q).kl


def module(p, q):
    logprob = p.log_softmax(-1)[..., 0]
    return fastkl.rl.ppo_loss(logprob, logprob.detach(), q[..., 1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [lambda p, q: fastkl.kl_divergence(p, q), from_import, module])
def test_a_name_first_used_inside_a_compiled_function(function, backend, monkeypatch):
    # Taken out of the facade first, as in a process that has not used it yet.
    for name in ("kl_divergence", "token_stats", "rl"):
        getattr(fastkl, name)
        monkeypatch.delitem(vars(fastkl), name)
    p, q = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16)
    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(p, q)
    result.sum().backward()
    assert torch.equal(result, function(p, q)) and p.grad.abs().max() > 0
