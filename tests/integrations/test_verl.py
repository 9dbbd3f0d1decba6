"""The functions for verl: values and gradients by their definition, verl's own beside them.

verl itself is used where it can be imported, elsewhere a stand-in for its core_algos: without verl,
arguments and results are tested.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import call_sites
import pytest
import torch
from verl_stand_in import CORE, LOSSES, fsdp_losses, stand_in

from fastkl import testing
from fastkl.integrations import verl as integration
from fastkl.rl import FixedBeta

EPS = torch.finfo(torch.float32).eps
# Float32 operations between log-probs and a loss of fifteen tokens: one for each addition, ten for
# a term, each of which rounds by eps/2: 1.5e-6.
ROUNDING = (15 + 10) * EPS / 2


try:
    from verl.trainer.ppo import core_algos as real_core
except ImportError:
    real_core = None


@pytest.fixture
def core(monkeypatch) -> ModuleType:
    # verl's core_algos or the stand-in's, without a trace of other tests.
    for name, module in (stand_in() if real_core is None else {}).items():
        monkeypatch.setitem(sys.modules, name, module)
    core = sys.modules[CORE]
    registry = {**core.POLICY_LOSS_REGISTRY, "none": lambda **keywords: (torch.zeros(()), {})}
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", registry)
    for module in [module for name, module in sys.modules.items() if name.startswith("verl.")]:
        if getattr(module, "kl_penalty", None) is core.kl_penalty:
            monkeypatch.setattr(module, "kl_penalty", core.kl_penalty)
    return core


def config_of(**options) -> object:
    options = dict(clip_ratio_low=0.2, clip_ratio_high=0.3, global_batch_info={}) | options
    if real_core is None:
        return SimpleNamespace(**options)
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def batch() -> dict[str, torch.Tensor]:
    old, moves, advantages = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    return {
        "old_log_prob": old - 2,
        "log_prob": (old - 2 + 0.4 * moves).requires_grad_(),
        "advantages": advantages,
        "response_mask": torch.arange(5) < torch.tensor([[5], [2], [0]]),
    }


def assert_loss(loss, expected, inputs) -> None:
    testing.assert_near(loss, expected, ROUNDING, 0.0, "value")
    got, exact = (torch.autograd.grad(each, inputs["log_prob"])[0] for each in (loss, expected))
    # The parts of an entry may cancel, those of another are of the size of the largest.
    testing.assert_near(got, exact, ROUNDING, ROUNDING * float(exact.abs().max()), "gradient")


# ---- the policy loss


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 1.5, 15).reshape(3, 5)])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_policy_loss_is_the_base_plus_the_kl(core, mode, weights) -> None:
    # verl's sums over a global batch apply to both parts.
    inputs = batch()
    config = config_of(global_batch_info=dict(dp_size=2, batch_num_tokens=11, global_batch_size=5))
    arguments = dict(**inputs, loss_agg_mode=mode, config=config, rollout_is_weights=weights)
    loss, metrics = integration.policy_loss(beta=0.3)(**arguments)
    base, base_metrics = core.get_policy_loss_fn("vanilla")(**arguments)
    mask, d = inputs["response_mask"], (inputs["log_prob"] - inputs["old_log_prob"]).double()
    kl = torch.expm1(d) - d
    terms = torch.where(mask, kl * (1.0 if weights is None else weights.double()), 0.0)
    rows = (
        terms / mask.sum(-1, keepdim=True).clamp(min=1) if mode == "seq-mean-token-mean" else terms
    )
    assert_loss(loss, base + 0.3 * 2 * (rows.sum() / (11 if mode == "token-mean" else 5)), inputs)
    assert metrics.items() >= base_metrics.items() and metrics["actor/kl_old_coef"] == 0.3
    assert metrics["actor/kl_old"] == pytest.approx(float(kl[mask].mean().detach()), rel=ROUNDING)


def test_policy_loss_leaves_out_what_does_not_count(core) -> None:
    function, results, inputs = integration.policy_loss("none", beta=1.0), [], batch()
    mask = inputs["response_mask"]
    for fill in (-1.0, math.nan, -math.inf):
        log_prob = torch.where(mask, inputs["log_prob"].detach(), fill).requires_grad_()
        old = torch.where(mask, inputs["old_log_prob"], -fill)
        arguments = (old, log_prob, inputs["advantages"], mask.float())
        loss, metrics = function(*arguments, config=config_of())
        (gradient,) = torch.autograd.grad(loss, log_prob)
        results.append((float(loss.detach()), metrics["actor/kl_old"], gradient.tolist()))
    assert results[0] == results[1] == results[2] and any(map(any, results[0][2]))


def test_register(core) -> None:
    # A controller's beta is read at each call; 0 leaves the base alone.
    controller = FixedBeta(0.2)
    function = integration.register("vanilla_kl", beta=controller)
    assert core.get_policy_loss_fn("vanilla_kl") is function
    # As verl passes them.
    arguments = dict(
        **batch(), loss_agg_mode="token-mean", rollout_is_weights=None, config=config_of()
    )
    plain = core.get_policy_loss_fn("vanilla")
    for beta, same in ((0.0, plain), (0.4, integration.policy_loss(beta=0.4))):
        controller._beta = beta
        loss, metrics = function(**arguments)
        assert loss.equal(same(**arguments)[0]) and metrics["actor/kl_old_coef"] == beta
    with pytest.raises(ValueError, match="name: expected one that verl does not .*'vanilla_kl'"):
        integration.register("vanilla_kl", beta=0.1)
    with pytest.raises((ValueError, KeyError), match="no such loss|Unsupported loss mode"):
        integration.register("another", "no such loss", beta=0.1)


# ---- kl_penalty


def value_of(name: str, d: torch.Tensor) -> torch.Tensor:
    """Compute an estimate as verl does, which bounds d by ±20 and k3 by 10, or by verl itself."""
    if real_core is not None:
        return real_core.kl_penalty(d, torch.zeros_like(d), name)
    x = (-d).clamp(-20, 20)
    values = {"k1": d, "abs": d.abs(), "k2": d * d / 2, "k3": (torch.expm1(x) - x).clamp(max=10)}
    name = name.removesuffix("+")
    return values[{"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)]


@pytest.mark.parametrize(
    "name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "low_var_kl+"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_penalty(name, dtype) -> None:
    # Every token keeps its gradient d towards the reference, whose expectation is that of
    # KL(policy‖reference); the reference gets none.
    d = torch.tensor([-80, -21, -4, -2.5, -2, 0.5, 3, 10.5, 12, 90], dtype=dtype)
    logprob = torch.where(d < 0, d, 0.0).requires_grad_()
    ref = torch.where(d < 0, 0.0, -d).requires_grad_()
    estimate = integration.kl_penalty(logprob, ref, name)
    estimate.sum().backward()
    exact = value_of(name, d.double())
    testing.assert_near(estimate, exact, 4 * torch.finfo(dtype).eps, 0.0, "value")
    assert torch.equal(logprob.grad, d) and ref.grad is None
    with torch.no_grad():
        assert torch.equal(integration.kl_penalty(logprob, ref, name), estimate)


def test_install_kl_penalty(core) -> None:
    losses = sys.modules[LOSSES]
    assert losses.kl_penalty is core.kl_penalty is not integration.kl_penalty
    for _ in range(2):
        integration.install_kl_penalty()
        assert losses.kl_penalty is core.kl_penalty is integration.kl_penalty
    keywords = dict(logprob=torch.tensor([-1.0]), ref_logprob=torch.tensor([-3.0]))
    assert float(losses.kl_penalty(**keywords, kl_penalty="k1")) == 2.0


# ---- the top-k loss of distillation


@pytest.fixture
def losses(core, monkeypatch) -> SimpleNamespace:
    # Stand-ins for verl's module and for its sequence parallelism: of two processes the first.
    parallel = SimpleNamespace(
        get_ulysses_sequence_parallel_world_size=lambda: 2,
        slice_input_tensor=lambda x, dim: x.chunk(2, dim)[0],
    )
    module = fsdp_losses()
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", parallel)
    monkeypatch.setitem(sys.modules, integration.FSDP_LOSSES, module)
    return module


def distillation(clamp: float | None, rewards: bool) -> SimpleNamespace:
    names = ("log_prob_min_clamp", "use_task_rewards", "use_policy_gradient")
    return SimpleNamespace(
        distillation_loss=SimpleNamespace(**dict(zip(names, (clamp, rewards, False), strict=True)))
    )


@pytest.mark.parametrize("rewards", [False, True])
def test_forward_kl_topk(losses, rewards) -> None:
    # Two jagged sequences, whose last rows verl pads; this process has the first. Where there are
    # log-probs flash-attn's backward overwrites the logits.
    integration.install_forward_kl_topk(), integration.install_forward_kl_topk()
    given, offsets = call_sites.names(), torch.tensor([0, 3, 6])
    student = given["logits"].detach()[:1].clone().requires_grad_()
    lists = [
        given[name].flatten(0, 1).index_fill(0, offsets[1:] - 1, 0)
        for name in ("topk_logprobs", "topk_ids")
    ]
    jagged = [torch.nested.nested_tensor_from_jagged(each, offsets) for each in lists]
    got = losses.compute_forward_kl_topk(student, *jagged, distillation(None, rewards), "thd")
    pair = lists[0][:2], student[0, :2].log_softmax(-1).gather(-1, lists[1][:2])
    kl, masses = call_sites.kl(*map(call_sites.with_rest, pair)), [x.exp().sum(-1) for x in pair]
    expected = {"distillation_losses": kl, "teacher_mass": masses[0], "student_mass": masses[1]}
    for name, value in expected.items():
        right = torch.cat([value, torch.zeros(1)])[None]
        torch.testing.assert_close(got[name], right, rtol=1e-10, atol=1e-12)
    (exact,) = torch.autograd.grad(kl.sum(), student)
    if rewards:
        student.data.zero_()
    (gradient,) = torch.autograd.grad(got["distillation_losses"].sum(), student)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


# ---- what is refused


ZEROS = torch.zeros(2)


@pytest.mark.parametrize(
    "call, arguments, words",
    [
        (
            integration.forward_kl_topk,
            dict.fromkeys(
                ("student_logits", "teacher_topk_log_probs", "teacher_topk_ids", "data_format"),
                ZEROS,
            )
            | dict(config=distillation(-10.0, True)),
            "log_prob_min_clamp: expected None, .* got -10.0; set",
        ),
        *(
            (integration.policy_loss, dict(beta=beta), "beta: expected ")
            for beta in [
                -0.1,
                math.nan,
                math.inf,
                "0.1",
                None,
                torch.tensor(0.1),
                True,
                10**400,
                -(10**400),
            ]
        ),
        *(
            (
                integration.kl_penalty,
                dict(zip(("logprob", "ref_logprob", "kl_penalty"), given, strict=True)),
                words,
            )
            for given, words in [
                *(
                    ((ZEROS, ZEROS, name), "kl_penalty: expected one of 'kl'")
                    for name in ("k4", "k1++", 3)
                ),
                ((ZEROS, ZEROS, "full"), "kl_penalty: .*'full'.* call fastkl.kl_divergence"),
                (([0.0], ZEROS, "k1"), "logprob: expected .*, got list"),
                ((ZEROS, 0.0, "k1"), "ref_logprob: expected .*, got float"),
                ((ZEROS, ZEROS.long(), "k1"), "ref_logprob: expected float32.*, got torch.int64"),
            ]
        ),
    ],
)
def test_wrong_arguments(core, call, arguments, words) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        call(**arguments)


def test_without_verl(monkeypatch) -> None:
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    installs = integration.install_kl_penalty, integration.install_forward_kl_topk
    for call in (lambda: integration.register(beta=0.1), *installs):
        with pytest.raises(
            ImportError, match=r"not installed: verl.*; remedy: pip install 'verl=="
        ):
            call()
    integration.kl_penalty(ZEROS, ZEROS, "k3")


def test_another_verl(core, losses, monkeypatch) -> None:
    losses.compute_forward_kl_topk = lambda student_logits, config: None
    with pytest.raises(ImportError, match=r"verl: expected .*data_format\) as .* config\) in 0\.9"):
        integration.install_forward_kl_topk()
    core.POLICY_LOSS_REGISTRY["newer"] = lambda old_log_prob, log_prob, batch: None
    with pytest.raises(
        ImportError, match=r"verl: expected .*old_log_prob, .* got .*batch\) in 0\.9"
    ):
        integration.register("vanilla_kl", "newer", beta=0.1)
    assert "vanilla_kl" not in core.POLICY_LOSS_REGISTRY
    monkeypatch.setattr(core, "kl_penalty", lambda logprob, ref_logprob, kl_penalty, mask: None)
    with pytest.raises(
        ImportError, match=r"verl: expected .*\(logprob, ref_logprob, kl_penalty\) as"
    ):
        integration.install_kl_penalty()
