"""Functions for verl's registration points: a policy loss with a KL to the sampling policy,
kl_penalty with the correct gradient, and the top-k distillation loss.

The first two get only log-probabilities, so they are estimates, with the gradient of the KL; the
exact KL needs both models' logits, which no registration point has. The third gets the student's
logits. Every worker process must run the registration: put it into your own module,

    # my_losses.py
    from fastkl.integrations import verl

    verl.register("vanilla_kl", beta=0.05)
    verl.install_kl_penalty()
    verl.install_forward_kl_topk()

start verl with VERL_USE_EXTERNAL_MODULES=my_losses, and set
actor_rollout_ref.actor.policy_loss.loss_mode=vanilla_kl for the first, actor.use_kl_loss=True or
algorithm.use_kl_in_reward=True for the second, and the options named by install_forward_kl_topk for
the third. verl is imported at the registration, not before.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fastkl import estimate_kl, topk_stats
from fastkl._checks import expect
from fastkl.rl import FixedBeta

if TYPE_CHECKING:
    from fastkl._types import BetaController

TESTED = "0.9"
CORE, FSDP_LOSSES = "verl.trainer.ppo.core_algos", "verl.trainer.distillation.fsdp.losses"
# verl's names; a "+" suffix, which requests the gradient that is always returned here, is removed
# before.
ESTIMATORS: dict[str, Literal["k1", "k2", "k3", "abs"]] = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}

# verl's bound on the value of k3. verl also clamps d to ±20 first, beyond which k3 exceeds this
# anyway.
LARGEST_K3 = 10.0


def kl_penalty(logprob: torch.Tensor, ref_logprob: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """Estimate KL(policy‖reference) per sampled token, in place of verl's kl_penalty, with the
    gradient of that KL for every estimator.

    Equivalent to

        names = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
        estimator = names.get(kl_penalty, kl_penalty)
        value = estimate_kl(logprob, ref_logprob, estimator=estimator)
        if estimator == "k3":
            value = value.clamp(max=10.0)                               # as verl
        form = estimate_kl(logprob, ref_logprob, estimator="k2")
        return value.detach() + form - form.detach()

    The values are verl's. verl's gradients are the same if the name ends in "+"; otherwise k1's is
    0 on average, and k3's is that of the other direction, 0 for tokens whose value is clamped.

    Args:
        logprob, ref_logprob: [...], log-probabilities of tokens sampled from the current policy.
        kl_penalty: "kl", "k1", "abs", "mse", "k2", "low_var_kl" or "k3", with or without a "+".
    Returns:
        [...] float32 (float64 for float64 log-probabilities), nats.
    Gradient:
        To logprob, unbiased on-policy. verl passes no log-probabilities of the sampling policy, so
        in later mini-batches of a rollout the gradient is off by the ratio, as is verl's own.
    Raises:
        TypeError, ValueError: as fastkl.estimate_kl; "full", which needs logits:
            fastkl.kl_divergence.
    Source: Schulman, Approximating KL Divergence (2020), for the values.
    """
    name = kl_penalty.removesuffix("+") if isinstance(kl_penalty, str) else ""
    expect(
        name in ESTIMATORS,
        "kl_penalty",
        f"one of {', '.join(map(repr, ESTIMATORS))}, with or without '+'",
        repr(kl_penalty),
        "pass 'k3', for instance; 'full' needs logits, call fastkl.kl_divergence with them",
    )
    with torch.no_grad():
        value = estimate_kl(logprob, ref_logprob, estimator=ESTIMATORS[name])
    if ESTIMATORS[name] == "k3":
        value = value.clamp(max=LARGEST_K3)
    if not (logprob.requires_grad and torch.is_grad_enabled()):
        return value
    form = estimate_kl(logprob, ref_logprob.detach(), estimator="k2")
    return value + (form - form.detach())


def policy_loss(base: str = "vanilla", *, beta: "float | BetaController") -> Callable[..., Any]:
    """Return a verl policy loss plus beta times KL(old‖policy), where old is the sampling policy:
    PPO's penalty form, in addition to its clip.

    The returned function is equivalent to

        loss, metrics = verl.trainer.ppo.core_algos.get_policy_loss_fn(base)(...)
        kl = estimate_kl(old_log_prob, log_prob, estimator="k3")
        if rollout_is_weights is not None:
            kl = kl * rollout_is_weights
        total = agg_loss(kl, response_mask, loss_agg_mode, **config.global_batch_info)
        return loss + beta * total, metrics

    The tokens come from the old policy, which is fixed, so the estimate's value and gradient are
    unbiased in every mini-batch.

    Args:
        base: the name of a loss registered in verl.
        beta: a number ≥ 0, or a controller: an object with an attribute `beta`, read at every call.
    Returns:
        A function with the arguments and results of verl's policy losses; it adds the metrics
        "actor/kl_old", the mean KL per token (nats), and "actor/kl_old_coef". Like verl's losses,
        it synchronises with the device in every micro-batch, for the metrics.
    Raises:
        TypeError, ValueError: beta is not a number or controller, or is negative.
    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 8.
    """
    _weight_of(beta)

    def with_kl(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        core = _module(CORE)
        loss, metrics = core.get_policy_loss_fn(base)(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        mask, weight = response_mask.bool(), _weight_of(beta)
        # Zero tokens that do not count before the estimate: a product with the mask would keep a
        # NaN.
        kl = estimate_kl(
            *(torch.where(mask, value, 0.0) for value in (old_log_prob.detach(), log_prob)),
            estimator="k3",
        )
        measured = kl.detach().sum() / mask.sum().clamp(min=1)
        if rollout_is_weights is not None:
            kl = kl * torch.where(mask, rollout_is_weights, 0.0)
        total = core.agg_loss(
            loss_mat=kl,
            loss_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        return loss + weight * total, {
            **metrics,
            "actor/kl_old": measured.item(),
            "actor/kl_old_coef": weight,
        }

    return with_kl


def register(
    name: str = "vanilla_kl", base: str = "vanilla", *, beta: "float | BetaController"
) -> Callable[..., Any]:
    """Register policy_loss(base, beta=beta) in verl under `name`, for policy_loss.loss_mode, and
    return it.

    Raises ImportError without verl, or with one whose policy losses take other arguments;
    ValueError for a base that verl does not have or a name that it already has.
    """
    core, loss = _module(CORE), policy_loss(base, beta=beta)
    _same_arguments(core.get_policy_loss_fn(base), loss)
    expect(
        name not in core.POLICY_LOSS_REGISTRY,
        "name",
        "one that verl does not have yet",
        repr(name),
        "choose another",
    )
    return cast(Callable[..., Any], core.register_policy_loss(name)(loss))


def install_kl_penalty() -> None:
    """Replace verl's kl_penalty in this process, in core_algos and in every module that imported
    it; verl has no registry for it.

    This affects the penalty in the reward (values, which stay the same), the actor's KL loss
    (gradients) and, with loss_mode "k1", "k2", "k3", … of verl's distillation, a student's loss on
    tokens that it sampled (gradients, unless use_policy_gradient uses only the values).

    Raises ImportError without verl, or with one whose kl_penalty takes other arguments.
    """
    verls = _module(CORE).kl_penalty
    _same_arguments(verls, kl_penalty)
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and getattr(module, "kl_penalty", None) is verls:
            setattr(module, "kl_penalty", kl_penalty)  # noqa: B010


def forward_kl_topk(
    student_logits: torch.Tensor,
    teacher_topk_log_probs: torch.Tensor,
    teacher_topk_ids: torch.Tensor,
    config: Any,
    data_format: str,
) -> dict[str, torch.Tensor]:
    """Compute the forward KL from a teacher known by its top k, in place of verl's
    compute_forward_kl_topk, in one read of the student's logits.

    Equivalent to

        logprobs, ids = (x.values()[None] for x in (teacher_topk_log_probs, teacher_topk_ids))
        stats = topk_stats(student_logits, logprobs, ids)
        {"distillation_losses": stats.kl, "student_mass": …, "teacher_mass": …}

    Unlisted tokens count as one more token. verl's own loss, the listed terms alone, is often
    negative and is then set to 0, without gradient. Log-probs have no lower clamp; below verl's
    log_prob_min_clamp the student would get no gradient.

    Args:
        student_logits: [1, T, V].
        teacher_topk_log_probs, teacher_topk_ids: jagged, T rows of K.
        config: verl's DistillationConfig.
        data_format: as in verl; not read.
    Returns:
        "distillation_losses", "student_mass" and "teacher_mass" [1, T] float32; positions padded by
        verl are 0. verl's overlap metrics, which need the student's own top k, are left out.
    Gradient:
        To student_logits. With an additional policy loss (use_task_rewards, use_policy_gradient)
        they are copied: its flash-attn backward overwrites them first.
    Raises:
        ValueError: a log_prob_min_clamp; log-probs as topk_kl_divergence.
    Source: as topk_kl_divergence.
    """
    loss = config.distillation_loss
    expect(
        loss.log_prob_min_clamp is None,
        "log_prob_min_clamp",
        "None, since the divergence is finite without",
        loss.log_prob_min_clamp,
        "set distillation.distillation_loss.log_prob_min_clamp=null",
    )
    lists = [each.values()[None] for each in (teacher_topk_log_probs, teacher_topk_ids)]
    ulysses = _module("verl.utils.ulysses")
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        lists = [ulysses.slice_input_tensor(each, dim=1) for each in lists]
    if loss.use_task_rewards or loss.use_policy_gradient:
        student_logits = student_logits.clone()
    # Padding is K log-probs of 0; in a distribution at most one entry is 0.
    stats = topk_stats(student_logits, lists[0], lists[1], (lists[0] == 0).sum(-1) < 2)
    return {
        "distillation_losses": stats.kl,
        "student_mass": stats.student_mass,
        "teacher_mass": stats.teacher_mass,
    }


def install_forward_kl_topk() -> None:
    """Replace verl's compute_forward_kl_topk by forward_kl_topk in this process; verl has no
    registry for it. For distillation.distillation_loss.loss_mode=forward_kl_topk with
    log_prob_min_clamp=null and the strategies fsdp and veomni (megatron splits the vocabulary and
    keeps its own function).

    Raises ImportError without verl, or with one whose compute_forward_kl_topk takes other
    arguments.
    """
    losses: Any = _module(FSDP_LOSSES)
    _same_arguments(losses.compute_forward_kl_topk, forward_kl_topk)
    losses.compute_forward_kl_topk = forward_kl_topk


def _weight_of(beta: Any) -> float:
    """Return a number, or a controller's current beta, checked."""
    return FixedBeta(getattr(beta, "beta", beta)).beta


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"not installed: {missing.name}; remedy: pip install 'verl=={TESTED}.*'"
        ) from missing


def _same_arguments(replaced: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Check that verl's function takes the arguments of its replacement."""
    got, expected = (tuple(inspect.signature(each).parameters) for each in (replaced, replacement))
    expect(
        got == expected,
        "verl",
        f"{replaced.__name__}({', '.join(expected)}) as in version {TESTED}, which "
        f"fastkl.integrations.verl was tested with",
        f"{replaced.__name__}({', '.join(got)}) in {sys.modules['verl'].__version__}",
        f"pip install 'verl=={TESTED}.*'",
        ImportError,
    )
