"""fastkl: exact KL divergence between language models, per token, at the speed of reading the logits once."""

from . import rl
from .backend import Explanation, explain, use_backend
from .divergence import kl_divergence, slow_path_rows
from .estimators import estimate_kl, sampled_kl_loss
from .linear import Head, linear_kl_divergence, linear_token_stats
from .penalty import KLPenalty, LinearKLPenalty
from .tokens import TokenStats, selective_log_softmax, token_stats

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Head",
    "KLPenalty",
    "LinearKLPenalty",
    "TokenStats",
    "estimate_kl",
    "explain",
    "kl_divergence",
    "linear_kl_divergence",
    "linear_token_stats",
    "rl",
    "sampled_kl_loss",
    "selective_log_softmax",
    "slow_path_rows",
    "token_stats",
    "use_backend",
]
