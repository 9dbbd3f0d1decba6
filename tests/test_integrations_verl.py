"""The functions for verl: expectations by enumeration, verl's own functions beside them, and its registry and losses calling them.

verl itself is used where it can be imported, with a stand-in for its core_algos elsewhere: written here from verl's interface, so that what is
tested without verl are the arguments and results.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastkl import testing
from fastkl.integrations import verl as integration
from fastkl.rl import FixedBeta

NAMES = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos", "verl.workers", "verl.workers.utils",
         "verl.workers.utils.losses")
EPS = torch.finfo(torch.float32).eps
# The float32 operations between log-probs and a loss of fifteen tokens: one for each addition, ten for a term, each of which rounds by eps/2: 1.5e-6.
ROUNDING = (15 + 10) * EPS / 2
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def stand_in() -> dict[str, ModuleType]:
    """Modules with the part of verl 0.9 that is used: the registry, a PPO loss without dual clip, aggregation, and kl_penalty in two modules."""
    modules = {name: ModuleType(name) for name in NAMES}
    for name in NAMES[1:]:
        setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], modules[name])
    core, registry = modules["verl.trainer.ppo.core_algos"], {}

    def agg_loss(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
        mask = loss_mask.to(loss_mat.dtype)
        if loss_agg_mode == "token-mean":
            return (loss_mat * mask).sum() / (mask.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
        per_sequence = (loss_mat * mask).sum(-1)
        if loss_agg_mode == "seq-mean-token-mean":
            per_sequence = per_sequence / (mask.sum(-1) + 1e-8)
        return per_sequence.sum() / ((mask.sum(-1) > 0).sum() if global_batch_size is None else global_batch_size) * dp_size

    def vanilla(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None):
        ratio = (log_prob - old_log_prob).exp()
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high))
        losses = losses if rollout_is_weights is None else losses * rollout_is_weights
        return agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), {"actor/pg_clipfrac": 0.0}

    def kl_penalty(logprob, ref_logprob, kl_penalty):
        return logprob - ref_logprob

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    def get_policy_loss_fn(name):
        if name not in registry:
            raise ValueError(f"Unsupported loss mode: {name}")
        return registry[name]

    registry["vanilla"] = vanilla
    for function in (agg_loss, kl_penalty, register_policy_loss, get_policy_loss_fn):
        setattr(core, function.__name__, function)
    core.POLICY_LOSS_REGISTRY = registry
    modules["verl.workers.utils.losses"].kl_penalty = kl_penalty
    modules["verl"].__version__ = "0.9.stand-in"
    return modules


try:
    import verl.workers.utils.losses as real_losses
    from verl.trainer.ppo import core_algos as real_core
except ImportError:
    real_core = real_losses = None


@pytest.fixture
def core(monkeypatch) -> ModuleType:
    """verl's core_algos, or the stand-in's; what a test registers or replaces is undone."""
    if real_core is None:
        modules = stand_in()
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return modules["verl.trainer.ppo.core_algos"]
    monkeypatch.setattr(real_core, "POLICY_LOSS_REGISTRY", dict(real_core.POLICY_LOSS_REGISTRY))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("verl.") and getattr(module, "kl_penalty", None) is real_core.kl_penalty:
            monkeypatch.setattr(module, "kl_penalty", real_core.kl_penalty)
    return real_core


def config_of(**global_batch_info) -> object:
    """An actor's settings."""
    if real_core is None:
        return SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.3, global_batch_info=global_batch_info)
    from verl.workers.config import ActorConfig
    return ActorConfig(strategy="fsdp", rollout_n=1, clip_ratio_low=0.2, clip_ratio_high=0.3, ppo_micro_batch_size_per_gpu=1,
                       global_batch_info=global_batch_info)


def batch() -> dict[str, torch.Tensor]:
    """Log-probs of three sequences, one without a token that counts; NaN where a token does not."""
    generator = torch.Generator().manual_seed(0)
    old = -2 + torch.randn(3, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    log_prob = old + 0.4 * torch.randn(3, 5, generator=generator)
    advantages = torch.randn(3, 5, generator=generator)
    return {"old_log_prob": old, "log_prob": log_prob.requires_grad_(), "advantages": advantages, "response_mask": mask}


# ---- the policy loss


@pytest.mark.parametrize("weighted", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_is_the_base_plus_the_kl(core, mode, weighted) -> None:
    """Value and gradient against the formula; verl's sums over a global batch apply to both parts."""
    inputs, config = batch(), config_of(dp_size=2, batch_num_tokens=11, global_batch_size=5)
    weights = torch.linspace(0.5, 1.5, 15).reshape(3, 5) if weighted else None
    loss, metrics = integration.policy_loss(beta=0.3)(**inputs, loss_agg_mode=mode, config=config, rollout_is_weights=weights)
    base, base_metrics = core.get_policy_loss_fn("vanilla")(**inputs, loss_agg_mode=mode, config=config, rollout_is_weights=weights)
    mask, d = inputs["response_mask"], (inputs["log_prob"] - inputs["old_log_prob"]).double()
    kl = torch.expm1(d) - d
    terms = torch.where(mask, kl * (1.0 if weights is None else weights.double()), 0.0)
    total = {"token-mean": terms.sum() / 11, "seq-mean-token-sum": terms.sum() / 5,
             "seq-mean-token-mean": (terms.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / 5}[mode] * 2
    expected = base + 0.3 * total
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    got, exact = (torch.autograd.grad(value, inputs["log_prob"])[0] for value in (loss, expected))
    # The parts of an entry may cancel, those of another are of the size of the largest.
    testing.assert_near(got, exact, ROUNDING, ROUNDING * float(exact.abs().max()), "gradient")
    assert metrics.items() >= base_metrics.items() and metrics["actor/kl_old_coef"] == 0.3
    assert metrics["actor/kl_old"] == pytest.approx(float(kl[mask].mean().detach()), rel=ROUNDING)


def test_policy_loss_leaves_out_what_does_not_count(core) -> None:
    """NaN and inf in log-probs of padding change neither the KL nor its gradient."""
    inputs = batch()
    core.POLICY_LOSS_REGISTRY["none"] = lambda **keywords: (torch.zeros(()), {})
    function, results = integration.policy_loss("none", beta=1.0), []
    for fill in (-1.0, math.nan, -math.inf):
        log_prob = torch.where(inputs["response_mask"], inputs["log_prob"].detach(), fill).requires_grad_()
        old = torch.where(inputs["response_mask"], inputs["old_log_prob"], -fill)
        loss, metrics = function(old, log_prob, inputs["advantages"], torch.where(inputs["response_mask"], 1.0, 0.0), config=config_of())
        loss.backward()
        results.append((float(loss.detach()), metrics["actor/kl_old"], log_prob.grad))
    for loss, kl, gradient in results[1:]:
        assert (loss, kl) == results[0][:2] and torch.equal(gradient, results[0][2]) and bool(gradient.any())


def test_policy_loss_is_unbiased(core) -> None:
    """Enumerated over a vocabulary, weighted by the old policy: the expected value and gradient are those of KL(old‖policy)."""
    old, logits = (torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    logits.requires_grad_()
    core.POLICY_LOSS_REGISTRY["none"] = lambda **keywords: (torch.zeros(()), {})
    log_old, log_p = old.log_softmax(-1), logits.log_softmax(-1)
    everything = torch.ones(7, 1, dtype=torch.bool)
    loss, _ = integration.policy_loss("none", beta=1.0)(log_old[:, None], log_p[:, None], torch.zeros(7, 1), everything, "token-mean", config_of(),
                                                        rollout_is_weights=7 * log_old.exp()[:, None])
    expected = (log_old.exp() * (log_old - log_p)).sum()
    testing.assert_near(loss, expected, 1e-12, 0.0, "value")
    got, exact = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    testing.assert_near(got, exact, 1e-10, 1e-14, "gradient")


def test_register(core) -> None:
    """verl finds the loss under its name; a controller's beta is read at each call."""
    controller = FixedBeta(0.2)
    function = integration.register("vanilla_kl", beta=controller)
    assert core.get_policy_loss_fn("vanilla_kl") is function
    inputs, config, losses = batch(), config_of(), []
    for beta in (0.0, 0.2, 0.4):
        controller._beta = beta
        loss, metrics = function(**inputs, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
        losses.append(float(loss.detach()))
        assert metrics["actor/kl_old_coef"] == beta
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4) and losses[1] > losses[0]
    base, _ = core.get_policy_loss_fn("vanilla")(**inputs, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
    assert losses[0] == float(base.detach())
    with pytest.raises(ValueError, match="name: expected one that verl does not have yet, got 'vanilla_kl'"):
        integration.register("vanilla_kl", beta=0.1)
    with pytest.raises(ValueError, match="Unsupported loss mode"):
        integration.register("another", "no such loss", beta=0.1)


@pytest.mark.parametrize("beta, error", [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (None, TypeError),
                                         (torch.tensor(0.1), TypeError), (True, TypeError), (10**400, ValueError), (-(10**400), ValueError)])
def test_wrong_beta(core, beta, error) -> None:
    """Fails when the loss is made, not in the workers."""
    with pytest.raises(error, match="beta: expected"):
        integration.policy_loss(beta=beta)


# ---- kl_penalty


def log_probs() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a policy over a vocabulary, with gradient, and of a reference."""
    logits, ref = (torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    return logits.requires_grad_(), ref.log_softmax(-1)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "low_var_kl+"])
def test_kl_penalty_values_and_expected_gradient(name) -> None:
    """The value is the estimator's; the gradient, enumerated over the vocabulary with the policy's weights, is that of KL(policy‖reference)."""
    logits, ref = log_probs()
    logprob = logits.log_softmax(-1)
    estimate = integration.kl_penalty(logprob, ref, name)
    d = logprob.detach() - ref
    value = {"k1": d, "kl": d, "abs": d.abs(), "k2": d * d / 2, "mse": d * d / 2}.get(name.removesuffix("+"), (torch.expm1(-d) + d).clamp(max=10))
    testing.assert_near(estimate, value, 1e-12, 1e-14, "value")
    got, = torch.autograd.grad((logprob.detach().exp() * estimate).sum(), logits, retain_graph=True)
    exact, = torch.autograd.grad((logprob.exp() * (logprob - ref)).sum(), logits)
    testing.assert_near(got, exact, 1e-10, 1e-14, "expected gradient")
    with torch.no_grad():
        assert torch.equal(integration.kl_penalty(logprob, ref, name), estimate)


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3"])
def test_kl_penalty_of_a_token_far_off(name) -> None:
    """The worst token keeps its value, in k3 alone bounded, and a gradient towards the reference; the reference gets none."""
    logprob, ref = torch.tensor([-80.0, -1.0], requires_grad=True), torch.tensor([-0.1, -90.0], requires_grad=True)
    estimate = integration.kl_penalty(logprob, ref, name)
    estimate.sum().backward()
    d = (logprob - ref).detach()
    testing.assert_near(estimate, {"k1": d, "abs": d.abs(), "k2": d * d / 2}.get(name, torch.full((2,), 10.0)), EPS, 0.0, "value")
    assert logprob.grad[0] < -10 and logprob.grad[1] > 10 and ref.grad is None


@pytest.mark.parametrize("name", ["low_var_kl", "k3", "k3+"])
def test_k3_is_bounded_as_verls(name) -> None:
    """Its value at tokens far off is verl's, with the bounds of ±20 and 10 that verl takes it in; the gradient is d all the same."""
    d = torch.tensor([-60.0, -21.0, -4.0, -2.5, -2.0, 0.5, 3.0, 10.5, 12.0, 60.0])
    x = (-d).clamp(-20, 20)
    verls = (x.exp() - x - 1).clamp(-10, 10)
    logprob = torch.where(d < 0, d, 0.0).requires_grad_()
    estimate = integration.kl_penalty(logprob, torch.where(d < 0, 0.0, -d), name)
    assert verls[[0, 1, 2, -1]].tolist() == [10.0] * 4 and bool((verls[3:8] < 10).all())
    testing.assert_near(estimate, verls, 4 * EPS, 0.0, "value")
    assert torch.equal(torch.autograd.grad(estimate.sum(), logprob)[0], d)


@pytest.mark.skipif(real_core is None, reason="needs verl")
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+"])
def test_kl_penalty_values_are_verls(name) -> None:
    """And the gradients are those of its straight-through forms."""
    logits, ref = log_probs()
    logprob = logits.log_softmax(-1)
    testing.assert_near(integration.kl_penalty(logprob, ref, name), real_core.kl_penalty(logprob, ref, name), 1e-12, 1e-14, "value")
    straight = real_core.kl_penalty(logprob, ref, name.removesuffix("+") + "+")
    for one, other in ((integration.kl_penalty(logprob, ref, name), straight),):
        got, exact = (torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (one, other))
        if name != "abs":
            testing.assert_near(got, exact, 1e-10, 1e-14, "gradient")


def test_install_kl_penalty(core) -> None:
    """In core_algos and where it was imported by name; twice is once; verl's caller gives it its arguments."""
    losses = sys.modules["verl.workers.utils.losses"]
    assert losses.kl_penalty is core.kl_penalty is not integration.kl_penalty
    for _ in range(2):
        integration.install_kl_penalty()
        assert losses.kl_penalty is core.kl_penalty is integration.kl_penalty
    assert float(losses.kl_penalty(logprob=torch.tensor([-1.0]), ref_logprob=torch.tensor([-3.0]), kl_penalty="k1")) == 2.0


@pytest.mark.parametrize("name, words", [("full", "needs the logits of both models; call fastkl.kl_divergence"), ("k4", "expected one of 'kl'"),
                                         ("+", "expected one of"), ("k1++", "expected one of")])
def test_wrong_estimators(name, words) -> None:
    """Named in the error."""
    with pytest.raises(ValueError, match=f"kl_penalty: .*{words}"):
        integration.kl_penalty(torch.zeros(2), torch.zeros(2), name)


@pytest.mark.parametrize("arguments, words", [
    ((torch.zeros(2), torch.zeros(2), 3), "kl_penalty: expected the name of an estimator, got int; pass 'k3'"),
    ((torch.zeros(2), torch.zeros(2), None), "kl_penalty: expected the name of an estimator, got NoneType; pass"),
    (([0.0], torch.zeros(2), "k1"), r"logprob: expected a tensor of log-probabilities \[...\], got list; token_stats"),
    ((torch.zeros(2), 0.0, "k1"), r"ref_logprob: expected a tensor of .*, got float; token_stats"),
    ((torch.zeros(2), torch.zeros(2).long(), "k1"), "ref_logprob: expected float32.*, got torch.int64; pass"),
])
def test_wrong_arguments_of_kl_penalty(arguments, words) -> None:
    """Named in the error."""
    with pytest.raises(TypeError, match=f"^{words}"):
        integration.kl_penalty(*arguments)


@pytest.mark.parametrize("name, value, words", [
    ("log_prob", None, r"expected a tensor \[batch, length\], got NoneType; let verl"),
    ("old_log_prob", [0.0], "expected a tensor .*, got list; let"),
    ("response_mask", None, "expected a tensor .*; let"), ("rollout_is_weights", 1.0, "expected a tensor .*, got float; let"),
    ("config", None, "expected the actor's config of verl, which has global_batch_info, got NoneType; let verl call this"),
])
def test_wrong_arguments_of_the_policy_loss(core, name, value, words) -> None:
    """Named in the error, before verl's own loss is called."""
    arguments = {**batch(), "loss_agg_mode": "token-mean", "config": config_of(), "rollout_is_weights": None, name: value}
    with pytest.raises(TypeError, match=f"^{name}: {words}"):
        integration.policy_loss(beta=0.1)(**arguments)


@pytest.mark.parametrize("wrong", [None, 5, ["vanilla"]], ids=repr)
def test_wrong_names(core, wrong) -> None:
    """Of a loss of verl's, and of the new one."""
    words = r"expected the name of a policy loss of verl, got \w+; pass 'vanilla', for instance"
    for argument, call in (("base", lambda: integration.policy_loss(wrong, beta=0.1)), ("base", lambda: integration.register("a", wrong, beta=0.1)),
                           ("name", lambda: integration.register(wrong, beta=0.1))):
        with pytest.raises(TypeError, match=f"^{argument}: {words}"):
            call()


# ---- verl itself


@pytest.mark.skipif(real_core is None, reason="needs verl")
def test_in_verls_ppo_loss(core) -> None:
    """The actor's loss function with both in it: the policy loss by its mode's name, kl_penalty by use_kl_loss; metrics come through."""
    from tensordict import TensorDict
    from verl.workers.config import ActorConfig, PolicyLossConfig

    integration.register("vanilla_kl", beta=0.5)
    integration.install_kl_penalty()
    inputs = batch()
    mask, ref = inputs["response_mask"], inputs["old_log_prob"] - 0.3
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_kl_loss=True, kl_loss_coef=0.7, kl_loss_type="k1",
                         policy_loss=PolicyLossConfig(loss_mode="vanilla_kl"))
    data = TensorDict({"response_mask": mask, "old_log_probs": inputs["old_log_prob"], "advantages": inputs["advantages"], "ref_log_prob": ref},
                      batch_size=3)
    for name, value in (("dp_size", 1), ("batch_num_tokens", 7), ("global_batch_size", 3)):
        data.set_non_tensor(name, value)
    real_padding = real_losses.no_padding_2_padding
    try:
        real_losses.no_padding_2_padding = lambda value, data: value
        loss, metrics = real_losses.ppo_loss(config, {"log_probs": inputs["log_prob"]}, data)
    finally:
        real_losses.no_padding_2_padding = real_padding
    base, _ = core.get_policy_loss_fn("vanilla")(**inputs, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
    d, old = (inputs["log_prob"] - ref)[mask], (inputs["log_prob"] - inputs["old_log_prob"])[mask]
    expected = base + 0.5 * (torch.expm1(old) - old).sum() / 7 + 0.7 * ((d * d / 2).sum() - (d * d / 2).sum().detach() + d.sum().detach()) / 7
    testing.assert_near(loss, expected, ROUNDING, 0.0, "loss")
    got, exact = (torch.autograd.grad(value, inputs["log_prob"])[0] for value in (loss, expected))
    # The parts of an entry may cancel, those of another are of the size of the largest.
    testing.assert_near(got, exact, ROUNDING, ROUNDING * float(exact.abs().max()), "gradient")
    assert {"actor/kl_old", "actor/kl_old_coef", "kl_loss"} <= metrics.keys()


def test_without_verl(monkeypatch) -> None:
    """The module imports; what needs verl says how to get it; kl_penalty does not."""
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    for call in (lambda: integration.register(beta=0.1), integration.install_kl_penalty):
        with pytest.raises(ImportError, match=r"not installed: verl.*; remedy: pip install 'verl==0\.9\.\*'"):
            call()
    integration.kl_penalty(torch.zeros(2), torch.zeros(2), "k3")


def test_another_verl(core, monkeypatch) -> None:
    """One whose functions take other arguments: an error that names the version tested, before anything is registered."""
    core.POLICY_LOSS_REGISTRY["newer"] = lambda old_log_prob, log_prob, batch: None
    with pytest.raises(ImportError, match=r"verl: expected .*old_log_prob, log_prob, advantages.* as in version 0\.9, .* got .*batch\) in 0\.9"):
        integration.register("vanilla_kl", "newer", beta=0.1)
    assert "vanilla_kl" not in core.POLICY_LOSS_REGISTRY
    monkeypatch.setattr(core, "kl_penalty", lambda logprob, ref_logprob, kl_penalty, mask: None)
    with pytest.raises(ImportError, match=r"verl: expected .*\(logprob, ref_logprob, kl_penalty\) as in version 0\.9"):
        integration.install_kl_penalty()
