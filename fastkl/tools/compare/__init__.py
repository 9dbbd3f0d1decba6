"""Compare a base causal language model with versions of it: how much they differ on a text, and
where.

Modules in reading order: inputs (texts to tokens), windows (tokens to model inputs), loading
(checkpoints to hidden states and heads), reference and llama_cpp (files in place of a base model),
measure (values per token), figures (statistics over tokens), report and page (one candidate),
candidates (several), processes (torchrun), run (the whole comparison).
"""

from .run import Comparison as Comparison
from .run import compare_models as compare_models
