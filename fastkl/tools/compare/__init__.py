"""The comparison of a base with versions of it: how causal language models differ on a text, and
where.

Modules in reading order: inputs (texts to tokens), windows (tokens to what a model reads), loading
(checkpoints to hidden states and heads), reference and llama_cpp (files in a base's place), measure
(the values of each token), figures (of all tokens), report and page (one candidate), candidates
(several), processes (those of torchrun), run (all of it).
"""

from .run import Comparison as Comparison
from .run import compare_models as compare_models
