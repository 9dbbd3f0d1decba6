"""The comparison of two versions of a causal language model: how they differ on a text, and where.

Modules in reading order: inputs (text to tokens), loading (checkpoints to hidden states and heads),
measure (the values of each token, and their figures), report (figures to terminal and page), run
(all of it: load, measure, summarise, report).
"""
