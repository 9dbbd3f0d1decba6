"""Settings of `fastkl demo`: small-scale RLHF on real text.

A small transformer, the reference, is trained on the source code of Python's standard library. PPO
then maximises a reward that is easy to hack, once without and once with the exact KL penalty;
`fastkl.rl.PIDBeta` adapts the penalty's weight, `fastkl.rl.KLMonitor` monitors both runs. The
report shows the effect of the penalty. With `--algorithm distill` the reference is instead the
teacher of a smaller model, with three divergences compared.

In reading order: this file, corpus, model, training, distill, report.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and rates of one run; the defaults are full-size PPO, which takes minutes on a CPU.

    Distillation reads only the sizes of corpus, reference and evaluation, and the steps.
    """

    algorithm: str = "ppo"
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    # The vocabulary is the largest dimension, as in the kernels' target models.
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
    steps: int = 38
    samples: int = 24
    prompt_length: int = 16
    response_length: int = 32
    temperature: float = 0.7
    policy_rate: float = 3e-4
    discount: float = 0.5
    # Weight of the penalty; None: a controller tracks target_kl, nats per token.
    beta: float | None = None
    initial_beta: float = 0.5
    target_kl: float = 0.12
    # SpikeDetector's ratio, recent and floor. Every run starts at a KL of 0, so there is no alarm
    # up to about the floor, nats per token. The first recent + 16 steps are silent.
    alarm: tuple[float, int, float] = (2.0, 5, 0.5)
    save_models: bool = False
    # Evaluate on prompts from held-out files.
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
    policy_rate=7.5e-4,  # a narrower reference is harder to move
    alarm=(1.5, 5, 0.05),
    evaluation_samples=16,
)

# Smaller vocabulary: a CPU computes the JSD in float64.
DISTILL: dict[str, Any] = dict(
    corpus_characters=3_000_000,
    vocabulary=4_096,
    reference_steps=300,
    steps=100,
    evaluation_samples=24,
)


def choose_settings(*, quick: bool, **given: Any) -> Settings:
    """Combine the settings of algorithm and size with the given ones; None keeps a default."""
    chosen = QUICK if quick else DISTILL if given.get("algorithm") == "distill" else {}
    return Settings(**chosen | {name: x for name, x in given.items() if x is not None})
