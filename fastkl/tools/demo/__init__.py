"""`fastkl demo`: RLHF in small, on real text.

A small transformer learns the source code of Python's standard library: the reference. PPO, GRPO or DPO then raises a reward that is easy to hack,
once without and once with the exact KL penalty, from logits or (with --linear) from hidden states; `fastkl.rl.PIDBeta` moves the penalty's weight,
`fastkl.rl.KLMonitor` watches both runs. The report shows what the penalty is for.

In reading order: settings, corpus, model, sampling, pretraining, objective, algorithms, finetuning, evaluation, naive, memory, report, plot,
checkpoints, run.
"""
