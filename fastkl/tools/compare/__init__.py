"""The comparison of two versions of a causal language model: how they differ on a text, and where.

Modules in reading order: inputs (text to tokens), loading (checkpoints to hidden states and heads),
processes (those of torchrun), report (figures to terminal and page), measure (the values of each
token, their figures, and all of it from files to report).
"""
