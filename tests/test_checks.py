"""Wrong arguments of the public functions by the values that they hold, alone and beside each
other, and right ones at the ends of their ranges; test_wrong_arguments.py has every argument by
every kind.
"""

import itertools
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from test_wrong_arguments import TARGETS, answer
from test_wrong_arguments import right as fitting

import fastkl
from fastkl import testing

V = 7


def right(device: str) -> SimpleNamespace:
    p, q = testing.pair("normal1", 6, V, 1.0)
    made = {
        "p": p.view(2, 3, V),
        "q": q.view(2, 3, V),
        "tokens": torch.arange(6).view(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "t": torch.ones(2, 3),
    }
    return SimpleNamespace(**{name: value.to(device) for name, value in made.items()})


CALLS = {
    "kl": lambda a, **more: (fastkl.kl_divergence(a.p, a.q, **more),),
    "stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, a.q, **more),
    "policy_stats": lambda a, **more: fastkl.token_stats(a.p, a.tokens, **more),
    "select": lambda a, **more: (fastkl.selective_log_softmax(a.p, a.tokens, **more),),
    "penalty": lambda a, **more: (fastkl.KLPenalty(0.1)(a.p, a.q, **more),),
}


ZEROS, FLAT, TWO = torch.zeros(2, 3), torch.zeros(6), torch.zeros(2)
LEARNING, META = torch.zeros(2, 3, requires_grad=True), torch.ones((), device="meta")
BOUNDS = torch.tensor([0, 2, 6])
# A pack of two sequences; PPO then gets a reduction that asks for them, as GRPO's default does.
PACKED = {"logprob": FLAT, "old_logprob": FLAT, "advantages": TWO, "cu_seqlens": BOUNDS}
OF_PPO, LINE = {**PACKED, "reduction": "sequence_mean"}, {"kl": FLAT, "cu_seqlens": BOUNDS}
SAMPLED, EXACT = {"beta": 0.1, "ref_logprob": ZEROS}, {"beta": 0.1, "kl": LEARNING}
UNPACKED, DR_GRPO = {**PACKED, "cu_seqlens": None}, {"reduction": "dr_grpo"}
PAIRS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
TARGETED = "AdaptiveBeta PPOAdaptiveBeta PIDBeta"
ONES = torch.ones(2, 3, dtype=torch.long)
OUTSIDE = ONES * V, -ONES
TOPK = "topk_kl_divergence topk_stats linear_topk_kl_divergence"
MEANS = (
    "kl_divergence js_divergence skew_kl_divergence renyi_divergence total_variation "
    "jeffreys_divergence topk_kl_divergence linear_topk_kl_divergence linear_kl_divergence "
    "linear_divergence"
)
# Functions, the argument that the message names, and its wrong values or, as a dict, wrong
# arguments that include it.
WRONG = [
    ("kl_divergence", "weights", {"weights": torch.ones(2, 3)}),
    ("kl_divergence", "reduction", "sequence_mean", "batchmean"),
    ("kl_divergence", "normalizer", 3, {"reduction": "sum", "normalizer": 3}),
    *(
        ("kl_divergence", "normalizer", {"reduction": "mean", "normalizer": value})
        for value in (0.0, 1e-300)
    ),
    *(
        (names, "normalizer", {**more, "normalizer": torch.tensor(value)})
        for value in (-3.0, math.nan, math.inf, -1)
        for names, more in (
            (MEANS, {"reduction": "mean"}),
            ("KLPenalty.forward LinearKLPenalty.forward", {}),
            ("DistillationLoss.forward LinearDistillationLoss.forward", {}),
            ("ppo_loss grpo_loss dpo_loss", {}),
        )
    ),
    ("DistillationLoss.forward LinearDistillationLoss.forward", "labels", *OUTSIDE),
    ("selective_log_softmax", "index", *OUTSIDE, ONES[..., None] * 700),
    ("token_stats linear_token_stats", "tokens", *OUTSIDE),
    ("token_stats linear_token_stats", "support", ONES, ONES[..., None, None]),
    (TOPK, "topk_ids", ONES),
    (TOPK, "beta", 0.5, 0.3, {"direction": "js", "beta": 1.1}),
    ("kl_divergence", "temperature", 0, 0.0, 2.0**-127, 2.0**126 * (1 + 2.0**-52)),
    ("js_divergence", "beta", -0.1, 1.1, math.nan, math.inf),
    ("skew_kl_divergence", "alpha", -0.1, 1.1, math.nan, math.inf),
    ("renyi_divergence", "alpha", 0, 0.0, -0.1, math.nan, math.inf),
    ("DistillationLoss", "alpha", -0.1, 1.1, math.nan),
    ("DistillationLoss LinearDistillationLoss", "temperature", 0.0, 2.0**64),
    (
        "DistillationLoss",
        "divergence_alpha",
        0.5,
        {"divergence": "skew_kl", "divergence_alpha": 1.1},
    ),
    ("DistillationLoss", "beta", 0.5, {"divergence": "js", "beta": -0.1}),
    ("DistillationLoss", "direction", "policy||reference"),
    ("sampled_kl_loss", "clamp", 0.0, 50.1),
    ("binary_divergence divergence_mask", "kind", "js", "TV"),
    ("divergence_mask", "limit", -0.1, math.nan, (0.1, -0.1)),
    ("divergence_mask", "advantages", torch.zeros(2, 1), {**PACKED, "advantages": torch.zeros(3)}),
    ("divergence_mask", "old_logprob", LEARNING),
    ("sampled_kl_loss ppo_loss grpo_loss", "old_logprob", LEARNING),
    ("shape_rewards", "beta", META, SimpleNamespace(beta=-1.0)),
    ("shape_rewards", "scores", torch.zeros(2, 1), {"kl": FLAT}),
    ("shape_rewards", "scores", {**LINE, "scores": torch.zeros(4)}),
    ("shape_rewards", "scores", {**LINE, "scores": TWO.to("meta")}),
    ("shape_rewards", "kl", {"cu_seqlens": BOUNDS}),
    ("ppo_loss grpo_loss", "clip", 1.2, (0.2, -0.1), (0.2, math.nan)),
    ("ppo_loss grpo_loss dpo_loss", "normalizer", 0, META),
    *(
        ("ppo_loss grpo_loss dpo_loss", "normalizer", {"reduction": name, "normalizer": 3})
        for name in ("sum", "none")
    ),
    ("ppo_loss grpo_loss", "logprob", {"cu_seqlens": BOUNDS}),
    ("ppo_loss grpo_loss", "advantages", torch.zeros(2, 1)),
    ("ppo_loss", "reduction", "grpo"),
    ("ppo_loss grpo_loss", "dual_clip", 1.0, 0.5),
    ("grpo_loss", "dual_clip", *({"surrogate": s, "dual_clip": 3.0} for s in ("cispo", "sapo"))),
    ("grpo_loss", "clip", {"surrogate": "sapo", "clip": 0.3}),
    (
        "grpo_loss",
        "tau",
        1.0,
        *({"surrogate": "sapo", "tau": x} for x in (0.0, (1.0, -1.0), math.inf)),
    ),
    ("grpo_loss", "surrogate", "ppo", "dapo"),
    ("ppo_loss", "cu_seqlens", {**OF_PPO, "cu_seqlens": None}),
    ("ppo_loss", "advantages", {**OF_PPO, "advantages": torch.zeros(3)}),
    ("grpo_loss", "reduction", "mean", "sequence_mean", "token_mean"),
    ("grpo_loss", "correct_kl", {**EXACT, "correct_kl": True}),
    ("grpo_loss", "kl_clamp", 0.0, 51, {**EXACT, "kl_clamp": 5.0}),
    ("grpo_loss", "max_length", 9, {**PACKED, **DR_GRPO, "max_length": 3}),
    *(("grpo_loss", "max_length", {**DR_GRPO, "max_length": value}) for value in (0, 2, 2**31)),
    ("grpo_loss", "cu_seqlens", UNPACKED, {**UNPACKED, **DR_GRPO, "max_length": 3}),
    *(
        ("grpo_loss", "cu_seqlens", {**UNPACKED, "level": "sequence", "reduction": name})
        for name in ("sum", "bnpo")
    ),
    ("grpo_loss", "advantages", {**PACKED, "advantages": torch.zeros(3)}),
    *(("grpo_loss", "kl", {"beta": beta}) for beta in (0.1, torch.tensor(0.1))),
    ("grpo_loss", "kl", {**SAMPLED, "kl": LEARNING}),
    ("grpo_loss", "kl", {"beta": 0.1, "kl": ZEROS, "logprob": LEARNING}),
    ("dpo_loss", "chosen", *(dict.fromkeys(PAIRS, value) for value in (ZEROS, TWO[0]))),
    ("dpo_loss", "beta", 0),
    ("dpo_loss", "label_smoothing", 0.5, {"loss": "ipo", "label_smoothing": 0.1}),
    ("dpo_loss", "loss", "hinge"),
    ("dpo_loss", "reduction", "token_mean"),
    ("TrustRegion", "max_kl", 0.0),
    ("TrustRegion", "shrink", 1.0, 0),
    ("TrustRegion", "tries", 2.5),
    ("FixedBeta", "beta", Fraction(10**400), -Fraction(10**400)),
    (TARGETED, "initial", 0.0, {"bounds": (0.2, 1.0)}),
    (TARGETED, "target", 0.0),
    (TARGETED, "bounds", (1.0, 0.01), (0.0, 1.0)),
    ("AdaptiveBeta", "horizon", 0),
    ("PPOAdaptiveBeta", "tolerance", 0.9),
    ("PPOAdaptiveBeta", "factor", 1.0),
    ("PIDBeta", "ki", 0.0),
    ("PIDBeta", "kd", 1e3),
    ("AdaptiveBeta.update", "kl", torch.tensor(math.nan), torch.ones(3)),
    ("AdaptiveBeta.update", "n", 500, 0),
    ("SpikeDetector", "ratio", 1.0),
    ("SpikeDetector", "limit", 0.0),
    ("SpikeDetector", "recent", 0),
    ("SpikeDetector", "window", 15),
    ("SpikeDetector", "floor", 0.0),
    ("KLMonitor.update", "cu_seqlens", {"kl": FLAT, "cu_seqlens": torch.tensor([0, 2])}),
    ("KLMonitor.update", "loss", TWO.to("meta"), 10**400),
    *(("KLMonitor.update", f"kl/{name}", 1.0) for name in ("mean", "p95", "per_sequence")),
]
OF_ANOTHER_TYPE = [
    ("DistillationLoss", "divergence_alpha", {"divergence": "renyi"}),
    ("linear_divergence", "alpha", {"divergence": "skew_kl"}),
    ("linear_divergence", "ref_hidden", None),
    ("shape_rewards", "beta", torch.tensor(1), SimpleNamespace(weight=1.0)),
    ("dpo_loss", "beta", SimpleNamespace(beta=0.1)),
    ("ppo_loss grpo_loss", "clip", (0.1, 0.2, 0.3), torch.tensor(0.2)),
    ("ppo_loss grpo_loss dpo_loss", "normalizer", torch.tensor(True)),
    ("grpo_loss", "correct_kl", 0),
    ("divergence_mask", "limit", (0.1, 0.2, 0.3), torch.tensor(0.2)),
    ("grpo_loss", "tau", {"surrogate": "sapo", "tau": (1.0, 1.0, 1.0)}),
    *(("grpo_loss", "max_length", {**DR_GRPO, "max_length": value}) for value in (None, 2.5)),
    ("SpikeDetector", "recent", 1.5),
    ("KLMonitor.update", "loss", torch.ones(3).to_sparse(), True),
]


@pytest.mark.parametrize(
    "error, name, argument, wrong",
    [
        (error, name, argument, wrong if isinstance(wrong, dict) else {argument: wrong})
        for error, rows in ((ValueError, WRONG), (TypeError, OF_ANOTHER_TYPE))
        for names, argument, *each in rows
        for name, wrong in itertools.product(names.split(), each)
    ],
)
def test_wrong_values(error, name, argument, wrong) -> None:
    assert answer(TARGETS[name], wrong, [argument], (error,)) is None


@pytest.mark.parametrize(
    "name, wrong, words",
    [
        ("linear_divergence", {"ref_hidden": None, "ref_weight": None}, "ref_logits"),
        ("linear_divergence", {"divergence": "skew_kl"}, r"in \[0, 1\], which 'skew_kl' needs"),
        ("selective_log_softmax", {"index": -ONES}, "^index: .* got -1; leave out"),
        ("DistillationLoss.forward", {"labels": OUTSIDE[0]}, "^labels: .* got 7; .* -100$"),
        ("token_stats", {"support": ONES}, r"integer ids \[..., K\]"),
        ("kl_divergence", {"temperature": [1.0]}, r"pass torch.tensor\(temperature\)$"),
        ("kl_divergence", {"mask": [True]}, r"pass torch.tensor\(mask\)$"),
        ("ppo_loss", {**PACKED, "cu_seqlens": [0, 6]}, r"pass torch.tensor\(cu_seqlens\)$"),
        (
            "ppo_loss",
            {**PACKED, "cu_seqlens": torch.tensor([0, 7, 6])},
            "do not fall, from 0 to 6, .* got 7, then 6",
        ),
        ("AdaptiveBeta.update", {"kl": TWO}, r"shape \(2,\) in place of one number"),
        ("TrustRegion.step", {"mean_kl": lambda: TWO}, r"shape \(2,\) in place of"),
        ("AdaptiveBeta.update", {"kl": META}, "without values"),
    ],
)
def test_the_message_tells_the_fault_and_its_remedy(name, wrong, words) -> None:
    target = TARGETS[name]
    call = target.get()
    given = fitting(name, target.arguments, getattr(call, "__self__", None))
    with pytest.raises((TypeError, ValueError), match=words):
        call(**{**given, **wrong})


@pytest.mark.parametrize("labels", OUTSIDE)
@pytest.mark.parametrize("name", ["DistillationLoss", "LinearDistillationLoss"])
def test_labels_count_without_a_cross_entropy_too(name, labels) -> None:
    loss = getattr(fastkl, name)(alpha=1.0)
    target = TARGETS[f"{name}.forward"]._replace(get=lambda: loss.forward)
    assert answer(target, {"labels": labels}, ["labels"]) is None
    assert answer(target, {"labels": torch.full_like(labels, -100)}, ()) == ""


@pytest.mark.parametrize("name", ["KLPenalty", "LinearKLPenalty"])
def test_a_penaltys_sum_has_no_normalizer(name) -> None:
    penalty = getattr(fastkl, name)(0.1, reduction="sum")
    target = TARGETS[f"{name}.forward"]._replace(get=lambda: penalty.forward)
    assert answer(target, {"normalizer": 3}, ["normalizer"]) is None


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, 2.0**-127, 2.0**127])
@pytest.mark.parametrize("name", ["kl", "stats", "policy_stats"])
def test_temperature_of_a_row_that_is_not_positive(implementation, name, value) -> None:
    # An error where looking costs nothing; with the kernels NaN in that row and in no other.
    arguments, given = right(implementation.device), {}
    expected = CALLS[name](arguments, temperature=arguments.t)
    given["temperature"], arguments.t[1, 2] = arguments.t, value
    if not implementation.kernels:
        with pytest.raises(ValueError, match=f"temperature: .* got {re.escape(str(value))};"):
            CALLS[name](arguments, **given)
    else:
        for field, exact in zip(CALLS[name](arguments, **given), expected, strict=True):
            if field is not None:
                assert field.flatten()[-1].isnan()
                assert torch.equal(field.flatten()[:-1], exact.flatten()[:-1])
    arguments.mask[1, 2] = False
    assert CALLS[name](arguments, **given, mask=arguments.mask) is not None


ENDS = [*(end for at in (-126, 126) for end in (2.0**at, torch.full((2,), 2.0**at)))]


@pytest.mark.parametrize("temperature", [*ENDS, torch.full((2,), 6e-8, dtype=torch.float16)])
def test_the_ends_of_the_range(temperature) -> None:
    p = torch.zeros(2, V)
    assert torch.equal(fastkl.kl_divergence(p, p, temperature=temperature), torch.zeros(2))


FORWARD_MODE = (
    r"^\w+: expected .*, got .* forward-mode .*; .*"
    r"fastkl\.reference\.row_statistics with float64 logits$"
)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_says_what_to_do(implementation, name, transform) -> None:
    arguments = right(implementation.device)

    def total(p):
        return CALLS[name](SimpleNamespace(**{**vars(arguments), "p": p}))[0].sum()

    with pytest.raises(TypeError, match=FORWARD_MODE) as raised:
        transform(total)(arguments.p)
    assert isinstance(raised.value, RuntimeError)
