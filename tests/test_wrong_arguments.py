"""Every argument of every public function against every kind of wrong value: one form of message.

The table follows the signatures. A new function needs right values for its required arguments in
RIGHT; a combination that is right after all stands in VALID with its reason.
"""

import fnmatch
import functools
import inspect
import itertools
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fastkl
import fastkl.rl

V, H = 7, 4
FORM = re.compile(r"(?P<argument>[\w/]+)[^:]*: expected .+, got .+; (?P<remedy>.+)")
# Methods that a tensor alone has.
METHOD = re.compile(r"with \.(bool|long|int|float|to)\(")


draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
LOGITS = ("p_logits", "q_logits", "logits", "policy_logits", "ref_logits", "teacher_logits")
TENSORS: dict[str, torch.Tensor] = {
    **dict.fromkeys(LOGITS, draw(2, 3, V)),
    **dict.fromkeys(("hidden", "ref_hidden"), draw(2, 3, H)),
    **dict.fromkeys(("weight", "ref_weight"), draw(V, H)),
    **dict.fromkeys(("bias", "ref_bias"), torch.zeros(V)),
    **dict.fromkeys(("tokens", "index", "labels"), torch.ones(2, 3, dtype=torch.long)),
    **dict.fromkeys(("logprob", "ref_logprob", "old_logprob", "kl"), -draw(2, 3).abs()),
    **dict.fromkeys(("chosen", "rejected", "ref_chosen", "ref_rejected"), torch.zeros(2)),
    **dict.fromkeys(("advantages", "scores"), torch.zeros(2)),
    "topk_logprobs": torch.full((2, 3, 2), -1.0),
    "topk_ids": torch.arange(2).repeat(2, 3, 1),
    "support": torch.arange(4).repeat(2, 3, 1),
    "mask": torch.ones(2, 3, dtype=torch.bool),
    "weights": torch.ones(2, 3),
    "cu_seqlens": torch.tensor([0, 2, 6]),
}
RIGHT = {
    **TENSORS,
    "beta": 0.1,
    "initial": 0.1,
    "target": 0.1,
    "horizon": 10,
    "max_kl": 0.01,
    "target_kl": 0.01,
    "name": None,
    "alpha": 0.5,
    "path": "text",
    "mean_kl": lambda: 0.001,
    "closure": lambda: 0.0,
    "group": None,  # the group of the one process, which the fixture sets
    "start": 0,
    "vocab_size": V,
    "width": V,
}
# Right values of one function's arguments, where they differ from the others' of that name.
OWN: dict[str, Callable[[], object]] = {
    "AdaptiveBeta.update.kl": lambda: 0.1,
    "FixedBeta.update.kl": lambda: 0.1,
    "PIDBeta.update.kl": lambda: 0.1,
    "PPOAdaptiveBeta.update.kl": lambda: 0.1,
    "SpikeDetector.update.kl": lambda: 0.1,
    "dpo_loss.beta": lambda: 0.1,
    "TrustRegion.step.optimizer": lambda: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]),
}
# Optional arguments that are given.
GIVEN = ("linear_divergence.ref_hidden", "linear_divergence.ref_weight", "token_stats.tokens")
# An argument is looked at beside these: function.argument, as patterns, the first that fits.
BESIDE = [
    ("grpo_loss.max_length", {"reduction": "dr_grpo"}),
    ("grpo_loss.kl", {"beta": 0.1, "logprob": TENSORS["kl"].clone()}),
    ("grpo_loss.beta", {"ref_logprob": TENSORS["logprob"]}),
    ("grpo_loss.ref_logprob", {"beta": 0.1}),
    ("grpo_loss.tau", {"surrogate": "sapo"}),
    ("grpo_loss.*kl*", {"beta": 0.1, "ref_logprob": TENSORS["logprob"]}),
    (
        "ppo_loss.cu_seqlens",
        {"logprob": torch.zeros(6), "old_logprob": torch.zeros(6), "reduction": "sequence_mean"},
    ),
    *(
        (f"{name}.cu_seqlens", {"logprob": torch.zeros(6), "old_logprob": torch.zeros(6)})
        for name in ("grpo_loss", "divergence_mask")
    ),
    ("shape_rewards.cu_seqlens", {"kl": torch.zeros(6)}),
    ("KLMonitor.update.cu_seqlens", {"kl": torch.zeros(6)}),
    ("*_stats.ref_weight", {"ref_hidden": TENSORS["hidden"]}),
    ("*_stats.ref_temperature", {"ref_hidden": TENSORS["hidden"]}),
    ("*_stats.ref_bias", {"ref_hidden": TENSORS["hidden"], "bias": TENSORS["bias"]}),
    ("linear_topk*.bias", {}),
    ("*linear*.bias", {"ref_bias": TENSORS["bias"]}),
    ("*linear*.ref_bias", {"bias": TENSORS["bias"]}),
    ("Linear*.bias", {"ref_bias": TENSORS["bias"]}),
    ("Linear*.ref_bias", {"bias": TENSORS["bias"]}),
    ("*.weights", {"reduction": "sum"}),
    ("grpo_loss.normalizer", {"reduction": "bnpo"}),
    ("linear_divergence.ref_logits", {"ref_hidden": None, "ref_weight": None}),
    ("linear_divergence.alpha", {"divergence": "renyi"}),
    ("linear_divergence.beta", {"divergence": "js"}),
    ("*topk_*.beta", {"direction": "js"}),
    ("*.normalizer", {"reduction": "mean"}),
    ("*DistillationLoss.divergence_alpha", {"divergence": "renyi"}),
    ("*DistillationLoss.beta", {"divergence": "js"}),
]


# ---- what is called


class Target(NamedTuple):
    name: str
    get: Callable[[], Callable]
    arguments: dict[str, inspect.Parameter]


def arguments_of(function: Callable) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_POSITIONAL
    }


def right(
    target: str, arguments: dict[str, inspect.Parameter], own: object = None
) -> dict[str, object]:
    values = {}
    for name, parameter in arguments.items():
        key = f"{target}.{name}"
        if name == "state":
            values[name] = own.state_dict()
        elif key in GIVEN or (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ):
            assert key in OWN or name in RIGHT, f"{key}: give RIGHT a value for it"
            values[name] = OWN[key]() if key in OWN else RIGHT[name]
    return values


# Functions, constructors and the public methods of both lists of public names.
def targets() -> Iterator[Target]:
    for name, value in (
        (name, getattr(module, name)) for module in (fastkl, fastkl.rl) for name in module.__all__
    ):
        of_class = isinstance(value, type)
        if isinstance(value, types.ModuleType) or value is fastkl.Explanation:
            continue
        if of_class and (issubclass(value, tuple) or getattr(value, "_is_protocol", False)):
            continue  # a result, or checked where it is used
        arguments = arguments_of(value.__init__ if of_class else value)
        yield Target(name, lambda value=value: value, arguments)
        for method, function in inspect.getmembers(value, inspect.isfunction) if of_class else ():
            public = not method.startswith("_") and function.__module__.startswith("fastkl")
            if public and arguments_of(function):
                yield Target(
                    f"{name}.{method}",
                    lambda name=name, value=value, arguments=arguments, method=method: getattr(
                        value(**right(name, arguments)), method
                    ),
                    arguments_of(function),
                )


# ---- kinds of wrong values


def packed(value: torch.Tensor) -> torch.Tensor:
    # As bitsandbytes.nn.Params4bit holds them, uint8 [n, 1].
    codes = torch.zeros(max(1, value.numel() // 2), 1, dtype=torch.uint8)
    codes.quant_state = object()
    return codes


def sharded(value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(value, init_device_mesh("cpu", (1,)), [Replicate()])


def other_type(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor | None]:
    return lambda value: None if value.dtype == dtype else value.to(dtype)


PLAIN: dict[str, object] = {
    "None": None,
    "bool": True,
    "str": "text",
    "bytes": b"text",
    "list": [0.0],
    "tuple": (1, 2, 3),
    "dict": {"a": 1},
    "set": {1},
    "complex": 1j,
    "object": object(),
    "function": lambda *_: None,
    "numpy float32": np.float32(2.5),
    "numpy int64": np.int64(2),
    "numpy bool": np.bool_(True),
    "numpy str": np.str_("text"),
    "numpy array": np.ones((2, 3), dtype=np.float32),
    "numpy array of one": np.ones(()),
    "numpy array of names": np.array(["sum", "mean"]),
    "numpy complex": np.complex64(1j),
    "numpy dtype": np.dtype("float32"),
    "huge": 10**400,
    "-huge": -(10**400),
    "huge beyond str": 10**5000,
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-1.5": -1.5,
    "dtype": torch.int64,
}
# Made of the right tensor, or of ones [2, 3] where the argument is none.
SHAPED: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "meta": lambda x: x.to("meta"),
    "one dimension more": lambda x: x[None],
    "last dimension more": lambda x: x[..., None].expand(*x.shape, 2),
    "one dimension less": lambda x: x[0],
    "scalar": lambda x: x.flatten()[0],
    "longer": lambda x: torch.cat([x, x[..., :1]], -1),
    "shorter": lambda x: x[..., :-1],
    "empty": lambda x: x[..., :0],
    "transposed": lambda x: x.T.contiguous() if x.dim() == 2 else None,
    "int64": other_type(torch.int64),
    "float32": other_type(torch.float32),
    "bool tensor": other_type(torch.bool),
    "complex64": other_type(torch.complex64),
    "float64": lambda x: x.double() if x.dtype == torch.float32 else None,
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "uint16": lambda x: x.to(torch.uint16),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr() if x.dim() == 2 else None,
    "nested": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()[:1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "DTensor": sharded,
    "ZeRO-3": lambda x: (
        torch.nn.Parameter(torch.zeros(0)) if x.is_floating_point() else x.new_zeros(0)
    ),
    "bitsandbytes": packed,
}

KINDS = [*PLAIN, *SHAPED]
# Two arguments that do not go together: the message may begin with the other one.
DIMENSIONS = "one dimension more, last dimension more, one dimension less"
ANY_SHAPE = f"{DIMENSIONS}, longer, shorter, transposed, empty"
OF_TWO = f"meta, DTensor, scalar, float64, ZeRO-3, {ANY_SHAPE}".split(", ")
NUMBERS = "numpy float32, numpy int64"
# function.argument as a pattern of re, kinds, why they are right.
VALID = [
    (r"entropy_from_logits\.logits", "DTensor", "a DTensor alone gives a DTensor"),
    (r"use_backend\.name", "None", "the default backend"),
    (
        r"(explain|entropy_from_logits)\.logits",
        f"meta, float64, {ANY_SHAPE}",
        "logits alone may have any shape and device",
    ),
    (r"(token_stats|selective_log_softmax|topk_.*)\.logits", "longer, shorter, float64", "any V"),
    (r"entropy_from_logits\.logits", f"meta, float64, {ANY_SHAPE}", "no other argument to fit"),
    (r"(linear_)?token_stats\.tokens", "None", "without log-probabilities"),
    (r"(linear_)?token_stats\.support", "last dimension more", "K ids of each row"),
    (
        r".*\.((ref_)?temperature|weights|advantages|scores|topk_logprobs)",
        "float64",
        "taken in any float type",
    ),
    (r".*token_stats\.support", "longer, shorter", "any number of ids"),
    (r"linear_token_stats\.tokens", "None", "without log-probabilities"),
    (r".*\.normalizer", "scalar", "a tensor of one number"),
    (r"selective_log_softmax\.index", "last dimension more", "K ids of each row"),
    (
        r"(AdaptiveBeta|PPOAdaptiveBeta|PIDBeta|FixedBeta|SpikeDetector|TrustRegion)\..*|"
        r"KLMonitor\.threshold|.*\.(beta|damping|dual_clip|max_kl|tolerance|label_smoothing|"
        r"tau|limit)",
        NUMBERS,
        "every real number that float() takes",
    ),
    (
        r".*Beta\.update\.(kl|n)|.*\.beta",
        "scalar",
        "a tensor of one entry",
    ),
    (
        r"SpikeDetector\.update\.kl",
        "NaN, inf, -inf, -1, -1.5",
        "whatever was measured is judged",
    ),
    (r"TrustRegion\.step\.closure", "function", "its loss is the optimizer's matter"),
    (r"KLMonitor\.jsonl|read_jsonl\.path", "str, numpy str", "a path"),
    (r"KLMonitor\.update\.kl", f"float64, ZeRO-3, {ANY_SHAPE}", "KL of any shape, without a mask"),
    (
        r"KLMonitor\.update\.(entropy|reward|beta|more)",
        f"{NUMBERS}, None, NaN, inf, -inf, -1, -1.5, scalar, int64, bool tensor, float64, ZeRO-3, "
        f"bitsandbytes, {ANY_SHAPE}",
        "any figure, a tensor's mean; None: not reported",
    ),
    (r".*Beta\.update\.kl", "-1, -1.5", "a mean of k1"),
    (r"grpo_loss\.correct_kl|.*\.(recompute|reverse)", "bool", "a bool"),
    (r"((ppo|grpo)_loss|divergence_mask)\.old_logprob", "None", "the policy as it is now"),
    (r"divergence_mask\.limit", "inf", "no limit"),
    (r"LinearDistillationLoss\.forward\.ref_weight", "None", "the student's"),
    (r"shape_rewards\.kl", "longer, shorter, empty, float64", "sequences of any length"),
]


# The fault of the answer to wrong arguments, of which the message must name one; None: no fault,
# "": they passed.
def answer(
    target: Target,
    wrong: dict[str, object],
    named: Iterable[str],
    errors: tuple[type[Exception], ...] = (TypeError, ValueError),
) -> str | None:
    call = target.get()
    arguments = right(target.name, target.arguments, getattr(call, "__self__", None))
    try:
        call(**{**arguments, **wrong})
    except Exception as error:
        form = FORM.fullmatch(str(error)) if isinstance(error, errors) else None
        if form is not None and form["argument"] in named:
            tensor = isinstance(wrong.get(form["argument"], torch.ones(())), torch.Tensor)
            if tensor or not METHOD.search(form["remedy"]):
                return None
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def outcome(target: Target, argument: str, kind: str) -> str | None:
    key = f"{target.name}.{argument}"
    if kind in PLAIN:
        value, skipped = PLAIN[kind], target.arguments[argument].default
    else:
        base = TENSORS.get(argument) if key not in OWN else None
        value, skipped = SHAPED[kind](torch.ones(2, 3) if base is None else base), None
    if value is skipped:
        return None
    beside = next((found for pattern, found in BESIDE if fnmatch.fnmatchcase(key, pattern)), {})
    beside = {name: found for name, found in beside.items() if name in target.arguments}
    named = target.arguments if kind in OF_TWO else (argument,)
    return answer(target, {**beside, argument: value}, named)


TARGETS = {target.name: target for target in targets()}


def is_valid(target: str, argument: str, kind: str) -> bool:
    return any(
        kind in kinds.split(", ") and re.fullmatch(pattern, f"{target}.{argument}")
        for pattern, kinds, _ in VALID
    )


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    RIGHT["group"] = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch, fastkl.use_backend(None):
        patch.chdir(tmp_path_factory.mktemp("wrong"))
        open("text", "w").close()
        yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_wrong_arguments(name) -> None:
    failures = [
        f"{name}.{argument}: {kind}: {fault or 'passes'}"
        for argument, kind in itertools.product(TARGETS[name].arguments, KINDS)
        if (fault := outcome(TARGETS[name], argument, kind)) is not None
        and not (fault == "" and is_valid(name, argument, kind))
    ]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", TARGETS)
def test_right_arguments_pass(name) -> None:
    assert answer(TARGETS[name], {}, ()) == ""
