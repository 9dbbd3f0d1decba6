"""`fastkl compare`: how two versions of a causal language model differ on a text, and where.

In reading order: settings, errors, store, inputs, text, adapters, loading, measure, summary, report, html, run. The text goes through in pieces,
the models in windows, the per-token values onto disk: nothing but the models themselves grows with what is compared.
"""
