"""Settings of `fastkl demo`: RLHF in small, on real text.

A small transformer learns the source code of Python's standard library: the reference. PPO, GRPO or
DPO then raises a reward that is easy to hack, once without and once with the exact KL penalty, from
logits or (with --linear) from hidden states; `fastkl.rl.PIDBeta` moves the penalty's weight,
`fastkl.rl.KLMonitor` watches both runs. The report shows what the penalty is for.

In reading order: this file, corpus, model, training, report.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and rates of one run; the defaults are PPO in the full size, minutes on a CPU."""

    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    # One CPU thread gives the same numbers on any number of cores; on a busy machine, threads that
    # wait for each other after every small operation are ten times slower.
    threads: int = 1
    # The vocabulary is the large dimension, as in the models that the kernels are for.
    corpus_characters: int = 6_000_000
    vocabulary: int = 16_384
    width: int = 128
    layers: int = 3
    heads: int = 4
    # Training of the reference.
    context: int = 64
    reference_steps: int = 400
    reference_batch: int = 16
    reference_rate: float = 3e-3
    # Fine-tuning: `group` of a step's samples answer the same prompt, and the samples serve
    # `epochs` updates, from the second of which on ratios and their clips count. max_kl: nats per
    # token between the policies before and after an update; None: no trust region.
    algorithm: str = "ppo"
    steps: int = 38
    epochs: int = 1
    max_kl: float | None = None
    samples: int = 24
    group: int = 1
    prompt_length: int = 16
    response_length: int = 32
    temperature: float = 0.7
    # The rate falls linearly from policy_rate to last_rate times it.
    policy_rate: float = 3e-4
    last_rate: float = 1.0
    discount: float = 0.5
    # The penalty's weight is `beta`, or, where that is None, a controller's that holds target_kl,
    # nats per token; gains: its kp, ki and kd. The KL goes on growing for many steps whatever
    # beta is by then: kd, which looks ahead, keeps it from overshooting.
    beta: float | None = None
    initial_beta: float = 0.5
    target_kl: float = 0.12
    gains: tuple[float, float, float] = (0.4, 0.03, 1.5)
    # SpikeDetector's ratio, recent and floor: below about the floor, nats per token, a KL may grow
    # without alarm, for every run starts at 0. The first recent + 16 steps are silent.
    alarm: tuple[float, int, float] = (2.0, 5, 0.5)
    # Train from hidden states, chunk_size tokens at a time: fewer than by default, because a step's
    # tokens are so few here that all would fit into one chunk.
    linear: bool = False
    chunk_size: int = 128
    save_models: bool = False
    # Evaluate on prompts from files that training never saw.
    evaluation_samples: int = 64


QUICK: dict[str, Any] = dict(
    quick=True,
    corpus_characters=800_000,
    vocabulary=2_048,
    width=64,
    layers=2,
    reference_steps=40,
    reference_batch=8,
    steps=36,
    samples=12,
    alarm=(1.5, 5, 0.05),
    evaluation_samples=16,
)
# The quick reference is narrower and harder to move.
QUICK_RATE = 2.5
# GRPO and DPO learn from whole responses, which say less about each token: their KL answers to beta
# later and less exactly. DPO needs more samples, and a policy further away, for beta and not noise
# to decide.
TUNED: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": dict(
        group=8,
        samples=24,
        policy_rate=5.5e-4,
        initial_beta=1.0,
        gains=(0.8, 0.08, 2.0),
    ),
    "dpo": dict(
        group=2,
        samples=32,
        policy_rate=1e-3,
        last_rate=0.2,
        initial_beta=1.0,
        target_kl=0.3,
        gains=(0.8, 0.05, 3.0),
    ),
}


def choose_settings(*, quick: bool, algorithm: str = "ppo", **given: Any) -> Settings:
    """Combine the size's and the algorithm's settings with given ones; None keeps a default."""
    chosen = {"algorithm": algorithm, **(QUICK if quick else {}), **TUNED[algorithm]}
    if quick:
        chosen["policy_rate"] = QUICK_RATE * chosen.get("policy_rate", Settings.policy_rate)
    chosen.update((name, value) for name, value in given.items() if value is not None)
    return Settings(**chosen)
