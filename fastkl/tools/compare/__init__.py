"""`fastkl compare`: how two versions of a causal language model differ on a text, and where.

Modules in reading order: settings (the request and its errors), inputs (text to tokens), loading
(checkpoints to hidden states and heads), measure (the values of each token, and their figures),
report (figures to terminal and page), run (all of it: load, measure, summarise, report).

The text is read in pieces, the models run in windows, and the values of tokens are kept on disk:
memory holds the models and one block of logits, however long the text.
"""
