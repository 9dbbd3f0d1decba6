"""A demo of a second, for tests."""

from fastkl.tools.demo.settings import Settings

# 128 tokens a step, so that the logits of one are larger than any other tensor of the run; the chunks do not divide them.
TINY = Settings(corpus_characters=200_000, vocabulary=800, width=16, layers=1, heads=2, reference_steps=2, reference_batch=2, steps=4, samples=8,
                group=4, prompt_length=8, response_length=16, evaluation_samples=8, chunk_size=24)
