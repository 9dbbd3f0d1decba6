"""Training with a KL penalty: beta controllers, rewards, losses, a trust region and a monitor, on
per-token KLs and log-probabilities.
"""

from .beta import AdaptiveBeta, FixedBeta, PIDBeta, PPOAdaptiveBeta
from .dpo import DPOLoss, dpo_loss
from .dppo import divergence_mask
from .losses import grpo_loss, ppo_loss
from .monitor import KLMonitor, read_jsonl
from .rewards import shape_rewards
from .spikes import SpikeDetector
from .trust_region import StepResult, TrustRegion

__all__ = [
    "AdaptiveBeta",
    "DPOLoss",
    "FixedBeta",
    "KLMonitor",
    "PIDBeta",
    "PPOAdaptiveBeta",
    "SpikeDetector",
    "StepResult",
    "TrustRegion",
    "divergence_mask",
    "dpo_loss",
    "grpo_loss",
    "ppo_loss",
    "read_jsonl",
    "shape_rewards",
]
