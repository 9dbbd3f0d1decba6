"""`fastkl demo`: RLHF in small, on real text.

A small transformer learns the source code of Python's standard library: the reference. Policy-gradient fine-tuning then raises a reward that is
easy to hack, once without and once with `fastkl.KLPenalty` (with --linear: `fastkl.LinearKLPenalty`), its weight moved by `fastkl.rl.PIDBeta`;
`fastkl.rl.KLMonitor` watches both. The report shows what the penalty is for.

In reading order: settings, corpus, model, sampling, pretraining, objective, finetuning, evaluation, naive, memory, report, plot, run.
"""
