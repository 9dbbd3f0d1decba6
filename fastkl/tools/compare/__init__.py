"""The comparison of a base with versions of it: how causal language models differ on a text, and
where.

Modules in reading order: inputs (texts to tokens), windows (tokens to what a model reads), loading
(checkpoints to hidden states and heads), reference and llama_cpp (files in a base's place), measure
(the values of each token), figures (of all tokens), report and page (one candidate), candidates
(several), processes (those of torchrun), run (all of it).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Comparison as Comparison
    from .run import compare_models as compare_models

__all__ = ["Comparison", "compare_models"]


def __getattr__(name: str) -> Any:
    # The command line names the extra that is missing before it imports a module that needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import run

    return getattr(run, name)
