"""Wrong arguments of KLCallback are errors that name the argument and a remedy."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("transformers")

from fastkl.integrations.transformers import KLCallback  # noqa: E402


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            (0.1,),
            "controller: expected an object with beta and update, got float without beta; pass one of fastkl.rl's, such as FixedBeta",
        ),
        (
            (None, object()),
            "monitor: expected an object with update, got object without update; pass one of fastkl.rl's, such as KLMonitor",
        ),
        (
            (SimpleNamespace(beta=0.1, update=print, unit="batch"),),
            "controller: expected one whose unit is 'token' or 'sequence', got 'batch'; set",
        ),
        (
            (SimpleNamespace(beta=0.1, update=print, unit=None),),
            "controller: expected one whose unit is 'token' or 'sequence', got None; set",
        ),
    ],
)
def test_wrong_settings(arguments, words) -> None:
    """They fail when the callback is made."""
    with pytest.raises((TypeError, ValueError), match=words):
        KLCallback(*arguments)


@pytest.mark.parametrize(
    "arguments, keywords, error, words",
    [
        ((0.1,), {}, TypeError, "kl: expected a float tensor"),
        ((torch.tensor(0.1),), {}, TypeError, r"kl: .*\[\.\.\., T\]"),
        ((torch.ones(2, 3), torch.ones(2, 3)), {}, TypeError, "mask: expected a bool tensor"),
        (
            (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)),
            {},
            ValueError,
            r"mask: expected the shape of kl, \(2, 3\), .*; align",
        ),
        (
            (torch.ones(2, 3),),
            dict(entropy=torch.ones(3)),
            ValueError,
            "entropy: expected the shape of kl",
        ),
        (
            (torch.ones(2, 3),),
            dict(entropy=0.5),
            TypeError,
            "entropy: expected a float tensor shaped as kl, got float; pass token_stats",
        ),
        (
            (torch.ones(2, 3).to(torch.float8_e4m3fn),),
            {},
            TypeError,
            "kl: expected a float tensor .*float8.*; pass",
        ),
        (
            (torch.ones(2, 3).to_sparse(),),
            {},
            TypeError,
            "kl: expected a plain tensor, got Tensor of layout torch.sparse_coo; pass",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3).bool().to_sparse()),
            {},
            TypeError,
            "mask: expected a plain tensor, .*; pass",
        ),
        (
            (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),),
            {},
            TypeError,
            "kl: expected a plain tensor, .*; pass",
        ),
    ],
)
def test_wrong_records(arguments, keywords, error, words) -> None:
    """They fail where they are recorded."""
    with pytest.raises(error, match=words):
        KLCallback().record(*arguments, **keywords)


@pytest.mark.parametrize(
    "trainer",
    [None, 3, object(), SimpleNamespace(callback_handler=None)],
    ids=["None", "int", "object", "no handler"],
)
def test_attached_to_no_trainer(trainer) -> None:
    """Named in the error."""
    with pytest.raises(
        TypeError,
        match=r"^trainer: expected a transformers.Trainer, got \w+; pass the trainer after it is made",
    ):
        KLCallback().attach(trainer)
