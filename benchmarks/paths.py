"""Count the tiles on each path of the KL forward's loop: near, general, read twice.

    python -m benchmarks.paths [--steps 2 8 24]
    python -m benchmarks.paths --file FILE.pt

The first form trains the demo's small reference, fine-tunes policies for these numbers of steps
without a penalty and samples from each on held-out prompts; it needs the packages of the demo.
FILE.pt: (policy, reference) logits [N, V] of your own model, from torch.save. The kernel runs in
Triton's interpreter with the configuration for sm_90, on ROWS evenly spaced rows.
"""

import argparse
import pickle
import sys
from collections import Counter
from unittest import mock

import torch

import fastkl
from benchmarks.processes import INTERPRETER

ARCH = "sm_90"
ROWS = 256  # at most: the interpreter takes two seconds per row at a vocabulary of 128256


def count_paths(pickled):
    """Count (whole tiles, tiles on the general path, tiles read twice), without the edges of
    segments, and compute the mean KL.
    """
    from fastkl.kernels import config, row_segment

    p, q, temperature = pickle.loads(pickled)
    chosen = config.select("forward", ARCH, p.element_size(), p.shape[-1])
    paths, path_of = Counter(), row_segment.path_of

    def counted(sums, weights, part, want):
        path = path_of(sums, weights, part, want)
        paths[path.handle.data.item()] += len(weights.e) == chosen.groups  # an edge has 1
        return path

    with (
        mock.patch.object(row_segment, "path_of", counted),
        fastkl.use_backend("triton"),
        config.override(forward=chosen),
    ):
        kl = fastkl.kl_divergence(p, q, temperature=temperature).mean().item()
    return paths[0] + paths[1], paths[1], paths[2], kl


def held_out_logits(steps):
    """Yield (steps, policy's and reference's logits [N, V], temperature) on samples for held-out
    prompts, from the demo's policy without a penalty.
    """
    from fastkl.rl import FixedBeta
    from fastkl.tools.demo import Settings, choose_settings
    from fastkl.tools.demo.corpus import build_corpus, windows
    from fastkl.tools.demo.model import sample, train_reference
    from fastkl.tools.demo.training import fine_tune

    settings = choose_settings(quick=True, vocabulary=Settings.vocabulary)
    corpus = build_corpus(settings)
    reference, _ = train_reference(corpus, settings)
    for count in steps:
        settings = choose_settings(quick=True, vocabulary=Settings.vocabulary, steps=count)
        policy, *_ = fine_tune(reference, corpus, FixedBeta(0.0), settings, f"{count} steps")
        choose, draw = (torch.Generator().manual_seed(settings.seed + 1) for _ in range(2))
        with torch.no_grad():
            prompts = windows(
                corpus.held_out,
                settings.prompt_length,
                settings.evaluation_samples,
                choose,
                corpus.new_line,
            )
            tokens = sample(policy, prompts, settings, draw)
            pair = [
                m.lm_head(m.response_hidden(tokens, settings.response_length)).flatten(0, 1)
                for m in (policy, reference)
            ]
        yield f"{count} steps", *pair, settings.temperature


def main(argv=None):
    parser = argparse.ArgumentParser("python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=(2, 8, 24), help="of fine-tuning")
    parser.add_argument("--file", metavar="FILE.pt", help="(policy, reference) logits")
    arguments = parser.parse_args(argv)
    found = held_out_logits(arguments.steps)
    if arguments.file:
        found = [(arguments.file, *torch.load(arguments.file), 1.0)]
    for name, p, q, temperature in found:
        pair = [x[:: -(-len(p) // ROWS)].bfloat16() for x in (p, q)]
        pickled = pickle.dumps((*pair, temperature))
        tiles, general, anchored, kl = INTERPRETER.submit(count_paths, pickled).result()
        shares = f"{1 - general / tiles:.1%} near, {anchored / tiles:.1%} read twice"
        print(f"{name}: mean KL {kl:.4f}, {tiles} tiles, {shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
