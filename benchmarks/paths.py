"""Count the tiles of logits on each path of the KL forward's loop: near, general, read twice.

    python -m benchmarks.paths [--steps 2 8 24]
    python -m benchmarks.paths --file FILE.pt

The first trains the demo's small reference, fine-tunes policies for these numbers of steps without
a penalty and samples from each on held-out prompts; it needs the packages of the demo. FILE.pt:
(policy, reference) logits [N, V] of a model of your own, by torch.save. `tile_paths` emulates
row_segment.segment_sums in float64, with the configuration for sm_90.
"""

import argparse
import math
import sys
from typing import NamedTuple

import torch

import fastkl

ARCH = "sm_90"
ROWS = 64  # at a time
LOG2E = math.log2(math.e)


class Paths(NamedTuple):
    """Whole tiles of the rows, those of them on the general path, and those read twice to
    re-anchor; the edges of segments are not among them."""

    tiles: int
    general: int
    anchored: int


def tile_paths(p_logits, q_logits, temperature=1.0, chosen=None):
    """Return the Paths of 16-bit logits [N, V]; chosen: the forward's RowConfig."""
    from fastkl.kernels import config

    vocabulary, size = p_logits.shape[-1], p_logits.element_size()
    chosen = chosen or config.select("forward", ARCH, size, vocabulary)
    length = config.segment_length(vocabulary, chosen.segment)
    found = [
        _segment(p.double(), q.double(), 1 / temperature, chosen, 16 // size)
        for rows in zip(p_logits.split(ROWS), q_logits.split(ROWS), strict=True)
        for p, q in zip(*(x.split(length, -1) for x in rows), strict=True)
    ]
    return Paths(*map(sum, zip(*found, strict=True)))


def _segment(p, q, scale, chosen, lanes):
    from fastkl.kernels.row_math import REANCHOR_GROWTH

    def shares(weights):
        # Each thread's sum over a tile; its groups are `threads` groups apart.
        return weights.view(len(p), chosen.groups, chosen.threads, -1).sum((1, 3))

    def powers(x, origin):
        return torch.exp2(x * scale * LOG2E - origin)

    outweighs, tile = REANCHOR_GROWTH.value, chosen.threads * chosen.groups * lanes
    origin = torch.full((len(p), 1), -1e30, dtype=torch.float64)
    centre, W = torch.zeros_like(origin), torch.zeros_like(origin)
    S, limit = (torch.zeros(len(p), chosen.threads, dtype=torch.float64) for _ in range(2))
    general = anchored = 0
    for start in range(0, p.shape[1] - tile + 1, tile):
        x, difference = (part[:, start : start + tile] for part in (p, q - p))
        anchors = (S + shares(powers(x, origin)) > limit).any(1, keepdim=True)
        anchored += int(anchors.sum())
        # Where rows anchor, all that row_segment.anchor changes.
        peak = torch.floor(x.amax(1, keepdim=True) * scale * LOG2E)
        moved = torch.where(anchors, torch.maximum(origin, peak), origin)
        S, W, limit = (value * torch.exp2(origin - moved) for value in (S, W, limit))
        origin, weights = moved, powers(x, moved)
        added, before = shares(weights), S.sum(1, keepdim=True)
        total = added.sum(1, keepdim=True)
        mean = (weights * difference).sum(1, keepdim=True) / total * scale
        near = centre + ((mean - centre) * total + W) / (before + total)
        new = torch.where(total > before * outweighs, mean, near)
        new = torch.where(anchors, new, centre)
        W, centre = W - (new - centre) * before, new
        allowed = (before + total) * (outweighs - 1) / chosen.threads + S + added
        limit = torch.where(anchors, allowed, limit)
        d = difference * scale - centre
        general += int((d.abs() < 1).all(1).logical_not().sum())
        S, W = S + added, W + (weights * d).sum(1, keepdim=True)
    return Paths(len(p) * (p.shape[1] // tile), general, anchored)


def held_out_logits(steps):
    """Yield (steps, policy's and reference's logits [N, V] in bfloat16, temperature) of the demo
    without a penalty, of the policy's samples on held-out prompts."""
    from fastkl.rl import FixedBeta
    from fastkl.tools.demo import Settings, choose_settings
    from fastkl.tools.demo.corpus import build_corpus, windows
    from fastkl.tools.demo.model import sample, train_reference
    from fastkl.tools.demo.training import fine_tune

    reference = None
    for count in steps:
        settings = choose_settings(quick=True, vocabulary=Settings.vocabulary, steps=count)
        if reference is None:
            corpus = build_corpus(settings)
            reference, _ = train_reference(corpus, settings)
        policy = fine_tune(reference, corpus, FixedBeta(0.0), settings, f"{count} steps").policy
        choose, draw = (torch.Generator().manual_seed(settings.seed + 1) for _ in range(2))
        shape = settings.prompt_length, settings.evaluation_samples
        with torch.no_grad():
            prompts = windows(corpus.held_out, *shape, choose, corpus.new_line)
            tokens = sample(policy, prompts, settings, draw)
            pair = [
                m.lm_head(m.response_hidden(tokens, settings.response_length)).flatten(0, 1)
                for m in (policy, reference)
            ]
        yield f"{count} steps", *(logits.bfloat16() for logits in pair), settings.temperature


def main(argv=None):
    parser = argparse.ArgumentParser("python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=(2, 8, 24), help="of fine-tuning")
    parser.add_argument("--file", metavar="FILE.pt", help="(policy, reference) logits")
    arguments = parser.parse_args(argv)
    found = held_out_logits(arguments.steps)
    if arguments.file:
        found = [(arguments.file, *(x.bfloat16() for x in torch.load(arguments.file)), 1.0)]
    for name, p, q, temperature in found:
        tiles, general, anchored = tile_paths(p, q, temperature)
        kl = fastkl.kl_divergence(p, q, temperature=temperature).mean().item()
        shares = f"{1 - general / tiles:.1%} near, {anchored / tiles:.1%} read twice"
        print(f"{name}: mean KL {kl:.4f}, {tiles} tiles, {shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
