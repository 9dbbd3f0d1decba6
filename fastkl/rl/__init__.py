"""Training with a KL penalty: beta controllers, rewards, losses, trust region and monitor, over
per-token KLs and log-probabilities.
"""

from .beta import AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta
from .dpo import DPOLoss, dpo_loss
from .losses import grpo_loss, ppo_loss
from .monitor import KLMonitor, read_jsonl
from .natural_gradient import conjugate_gradient, fisher_vector_product, natural_gradient
from .rewards import shape_rewards
from .spikes import SpikeDetector
from .trust_region import EarlyStop, StepResult, TrustRegion

__all__ = [
    "AdaptiveBeta",
    "DPOLoss",
    "EarlyStop",
    "FixedBeta",
    "KLMonitor",
    "PIDBeta",
    "PPOAdaptiveBeta",
    "SpikeDetector",
    "StepResult",
    "TrustRegion",
    "conjugate_gradient",
    "dpo_loss",
    "fisher_vector_product",
    "grpo_loss",
    "natural_gradient",
    "ppo_loss",
    "read_jsonl",
    "shape_rewards",
]
