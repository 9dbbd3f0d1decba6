"""fastkl: exact KL divergence between language models, per token, at the speed of reading the
logits once.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from . import rl
    from .backend import Explanation, explain, use_backend
    from .distillation import DistillationLoss, LinearDistillationLoss
    from .divergence import (
        jeffreys_divergence,
        js_divergence,
        kl_divergence,
        renyi_divergence,
        skew_kl_divergence,
        total_variation,
    )
    from .estimators import binary_divergence, estimate_kl, sampled_kl_loss
    from .linear import Head, linear_token_stats
    from .linear_divergences import linear_divergence, linear_kl_divergence
    from .parallel import VocabShard
    from .penalty import KLPenalty, LinearKLPenalty
    from .tokens import TokenStats, entropy_from_logits, selective_log_softmax, token_stats
    from .topk import TopKStats, linear_topk_kl_divergence, topk_kl_divergence, topk_stats

__version__ = "0.2.0"

__all__ = [
    "DistillationLoss",
    "Explanation",
    "Head",
    "KLPenalty",
    "LinearDistillationLoss",
    "LinearKLPenalty",
    "TokenStats",
    "TopKStats",
    "VocabShard",
    "binary_divergence",
    "entropy_from_logits",
    "estimate_kl",
    "explain",
    "jeffreys_divergence",
    "js_divergence",
    "kl_divergence",
    "linear_divergence",
    "linear_kl_divergence",
    "linear_token_stats",
    "linear_topk_kl_divergence",
    "renyi_divergence",
    "rl",
    "sampled_kl_loss",
    "selective_log_softmax",
    "skew_kl_divergence",
    "token_stats",
    "topk_kl_divergence",
    "topk_stats",
    "total_variation",
    "use_backend",
]

# Public name -> its module, imported at the name's first use: `import fastkl` alone does not import
# torch.
_HOMES = {
    "DistillationLoss": "distillation",
    "Explanation": "backend",
    "Head": "linear",
    "KLPenalty": "penalty",
    "LinearDistillationLoss": "distillation",
    "LinearKLPenalty": "penalty",
    "TokenStats": "tokens",
    "TopKStats": "topk",
    "VocabShard": "parallel",
    "binary_divergence": "estimators",
    "entropy_from_logits": "tokens",
    "estimate_kl": "estimators",
    "explain": "backend",
    "jeffreys_divergence": "divergence",
    "js_divergence": "divergence",
    "kl_divergence": "divergence",
    "linear_divergence": "linear_divergences",
    "linear_kl_divergence": "linear_divergences",
    "linear_token_stats": "linear",
    "linear_topk_kl_divergence": "topk",
    "renyi_divergence": "divergence",
    "sampled_kl_loss": "estimators",
    "selective_log_softmax": "tokens",
    "skew_kl_divergence": "divergence",
    "token_stats": "tokens",
    "topk_kl_divergence": "topk",
    "topk_stats": "topk",
    "total_variation": "divergence",
    "use_backend": "backend",
}
# Submodules that are attributes of fastkl without being imported explicitly.
_MODULES = {*_HOMES.values(), "reference", "rl"}

if not typing.TYPE_CHECKING:  # else a checker would accept any misspelt name

    def __getattr__(name: str) -> object:
        """Import a public name's module, and make the name a plain attribute of this module."""
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})
