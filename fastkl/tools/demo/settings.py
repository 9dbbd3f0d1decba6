"""Every number that a run of the demo depends on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and rates of one run. The defaults are the full size: three to four minutes on a CPU."""

    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    # On a CPU. One gives the same numbers on any number of cores; and where other programs keep the cores busy, threads that wait for each other
    # after every small operation are ten times slower than one.
    threads: int = 1
    # Corpus. The vocabulary is the large dimension, as in the models that the kernels are for.
    corpus_characters: int = 6_000_000
    vocabulary: int = 16_384
    # Model.
    width: int = 128
    layers: int = 3
    heads: int = 4
    # Training of the reference.
    context: int = 64
    reference_steps: int = 400
    reference_batch: int = 16
    reference_rate: float = 3e-3
    # Fine-tuning of the policy. One temperature for sampling, log-probabilities and the penalty.
    steps: int = 36
    samples: int = 24
    prompt_length: int = 16
    response_length: int = 32
    temperature: float = 0.7
    policy_rate: float = 3e-4
    discount: float = 0.8
    # The weight of the penalty: `beta` throughout, or, where that is None, from initial_beta on what a controller makes of it to hold target_kl,
    # nats per token.
    beta: float | None = None
    initial_beta: float = 0.5
    target_kl: float = 0.12
    # Gains. The KL goes on growing for many steps whatever beta is by then: kd, which looks ahead, keeps it from overshooting.
    kp: float = 0.4
    ki: float = 0.03
    kd: float = 1.5
    # The alarm. Below about alarm_floor, nats per token, a KL may grow as it likes: every run starts at 0. It is silent for alarm_recent + 16 steps.
    alarm_ratio: float = 2.0
    alarm_recent: int = 5
    alarm_floor: float = 0.5
    # linear: the training step from hidden states, chunk_size tokens at a time, instead of through the logits of all. The tokens of one step are so
    # few here that they would fit into one chunk of the default size.
    linear: bool = False
    chunk_size: int = 128
    # Evaluation, on prompts from files that training never saw.
    evaluation_samples: int = 64


QUICK = dict(quick=True, corpus_characters=2_000_000, vocabulary=4_096, reference_steps=80, steps=34, samples=16, policy_rate=2.6e-4,
             evaluation_samples=32)


def choose_settings(*, quick: bool, seed: int, device: str, steps: int | None = None, beta: float | None = None,
                    linear: bool = False) -> Settings:
    """The settings of the full or the quick size, with what the command line overrides."""
    chosen = {name: value for name, value in (("steps", steps), ("beta", beta)) if value is not None}
    return Settings(**{**(QUICK if quick else {}), "seed": seed, "device": device, "linear": linear, **chosen})
