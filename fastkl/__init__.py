"""fastkl: exact KL divergence between language models, per token, at the speed of reading the logits once."""

from .backend import Explanation, explain, use_backend
from .divergence import kl_divergence, slow_path_rows
from .penalty import KLPenalty
from .tokens import TokenStats, selective_log_softmax, token_stats

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KLPenalty",
    "TokenStats",
    "explain",
    "kl_divergence",
    "selective_log_softmax",
    "slow_path_rows",
    "token_stats",
    "use_backend",
]
