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
    # Fine-tuning of the policy. One temperature for sampling, log-probabilities and the penalty. The samples of a step serve `epochs` updates, from
    # the second of which on ratios and their clips count; `group` of them answer the same prompt in GRPO. max_kl: nats per token between the policies
    # before and after an update; None: no trust region.
    algorithm: str = "ppo"
    steps: int = 38
    epochs: int = 1
    max_kl: float | None = None
    samples: int = 24
    group: int = 8
    prompt_length: int = 16
    response_length: int = 32
    temperature: float = 0.7
    policy_rate: float = 3e-4
    # The rate at the end, as a share of that; in between it falls linearly.
    last_rate: float = 1.0
    discount: float = 0.5
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
    # Write reference and policies as Hugging Face checkpoints.
    save_models: bool = False
    # Evaluation, on prompts from files that training never saw.
    evaluation_samples: int = 64


QUICK = dict(quick=True, corpus_characters=2_000_000, vocabulary=4_096, reference_steps=80, steps=36, samples=16, evaluation_samples=32)
# What differs between the algorithms. GRPO and DPO learn from whole responses, which says less about each token: their KL answers to beta later and
# less exactly, and DPO needs more samples, and lets the policy further away, for it to be beta and not noise that decides.
TUNED = {
    "ppo": {},
    "grpo": dict(policy_rate=5.5e-4, initial_beta=1.0, kp=0.8, ki=0.08, kd=2.0),
    "dpo": dict(policy_rate=1e-3, last_rate=0.2, initial_beta=1.0, kp=0.8, ki=0.05, kd=3.0, samples=32, target_kl=0.3),
}
# The quick reference is less sure of itself and easier to move.
QUICK_RATE = 0.8


def choose_settings(*, quick: bool, algorithm: str = "ppo", **given) -> Settings:
    """The settings of the full or the quick size and of the algorithm, with what the command line gives: what is None there keeps its default."""
    given = {name: value for name, value in given.items() if value is not None}
    chosen = Settings(**{**(QUICK if quick else {}), **TUNED[algorithm], "algorithm": algorithm, **given})
    return dataclasses.replace(chosen, policy_rate=QUICK_RATE * chosen.policy_rate) if quick and "policy_rate" not in given else chosen
