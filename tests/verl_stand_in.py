"""A stand-in for the modules of verl 0.9 that fastkl.integrations.verl uses, written from their
interface, for where verl is not installed.
"""

from types import ModuleType, SimpleNamespace

CORE, LOSSES = "verl.trainer.ppo.core_algos", "verl.workers.utils.losses"


def stand_in() -> dict[str, ModuleType]:
    """Make modules with the part of verl 0.9 that is used, and a policy loss without clips."""
    modules = {
        name: ModuleType(name)
        for name in (
            "verl",
            "verl.trainer",
            "verl.trainer.ppo",
            CORE,
            "verl.workers",
            "verl.workers.utils",
            LOSSES,
        )
    }
    core = modules[CORE]

    def agg_loss(
        loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None
    ):
        rows, counts = (loss_mat * loss_mask).sum(-1), loss_mask.sum(-1)
        if loss_agg_mode == "token-mean":
            return rows.sum() / (batch_num_tokens or counts.sum()) * dp_size
        rows = rows / (counts + 1e-8) if loss_agg_mode == "seq-mean-token-mean" else rows
        return rows.sum() / (global_batch_size or (counts > 0).sum()) * dp_size

    def vanilla(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        weights = 1.0 if rollout_is_weights is None else rollout_is_weights
        losses = -weights * advantages * (log_prob - old_log_prob).exp()
        info = config.global_batch_info
        return agg_loss(losses, response_mask, loss_agg_mode, **info), {"actor/pg_clipfrac": 0.0}

    def register(name: str):
        return lambda function: core.POLICY_LOSS_REGISTRY.setdefault(name, function)

    vars(core).update(
        POLICY_LOSS_REGISTRY={"vanilla": vanilla},
        agg_loss=agg_loss,
        kl_penalty=lambda logprob, ref_logprob, kl_penalty: logprob - ref_logprob,
        register_policy_loss=register,
        get_policy_loss_fn=lambda name: core.POLICY_LOSS_REGISTRY[name],
    )
    modules[LOSSES].kl_penalty = core.kl_penalty
    modules["verl"].__version__ = "0.9.stand-in"
    return modules


def fsdp_losses() -> SimpleNamespace:
    """Make verl's module of distillation losses for fsdp, whose function nothing calls."""

    def verls(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format): ...

    return SimpleNamespace(compute_forward_kl_topk=verls)
