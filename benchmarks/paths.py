"""Which path the tiles of real logits take through the KL forward's loop: near, general, and how
many are read twice to re-anchor.

    python -m benchmarks.paths [--steps 2,8,24]

Trains the demo's small reference, fine-tunes policies for these numbers of steps without a penalty,
samples from each on held-out prompts, and prints for each the mean KL and the paths of its bfloat16
logits with the configuration for sm_90. `tile_paths` emulates the decisions of
row_segment.segment_sums, in float64. It needs the packages of the demo.
"""

import argparse
import math
import sys
from typing import NamedTuple

import torch

ARCH = "sm_90"
# Rows at a time.
ROWS = 64
LOG2E = math.log2(math.e)


class Paths(NamedTuple):
    """Whole tiles of the rows, those of them on the general path, those read twice to re-anchor;
    the edges of segments are not among them.
    """

    tiles: int
    general: int
    anchored: int

    @property
    def near(self):
        """Share of the tiles on the near path."""
        return 1 - self.general / max(self.tiles, 1)


def tile_paths(p_logits, q_logits, temperature=1.0, chosen=None):
    """The Paths of 16-bit logits [N, V] of the policy and the reference; chosen: the forward's
    RowConfig, by default that for ARCH.
    """
    from fastkl.kernels import config

    vocabulary, size = p_logits.shape[-1], p_logits.element_size()
    chosen = chosen or config.select("forward", ARCH, size, vocabulary)
    length = config.segment_length(vocabulary, chosen.segment)
    tile = chosen.threads * chosen.groups * 16 // size
    found = [
        _segment(
            *(
                part[rows : rows + ROWS, first : first + length].double()
                for part in (p_logits, q_logits)
            ),
            1 / temperature,
            chosen,
            tile,
        )
        for rows in range(0, len(p_logits), ROWS)
        for first in range(0, vocabulary, length)
    ]
    return Paths(*map(sum, zip(*found, strict=True)))


def _segment(p, q, scale, chosen, tile):
    """The Paths of one segment of every row."""
    from fastkl.kernels.row_math import OUTWEIGHS

    outweighs = OUTWEIGHS.value
    origin = torch.full((len(p), 1), -1e30, dtype=torch.float64)
    centre, W = torch.zeros_like(origin), torch.zeros_like(origin)
    S = torch.zeros(len(p), chosen.threads, dtype=torch.float64)
    limit = torch.zeros_like(S)
    general = anchored = 0
    for number in range(p.shape[1] // tile):
        x, difference = (part[:, number * tile : (number + 1) * tile] for part in (p, q - p))
        weights = _powers(x, scale, origin)
        anchors = (S + _shares(weights, chosen) > limit).any(1, keepdim=True)
        anchored += int(anchors.sum())
        # Where rows anchor, all that row_segment.anchor changes.
        moved = torch.where(
            anchors,
            torch.maximum(origin, torch.floor(x.amax(1, keepdim=True) * scale * LOG2E)),
            origin,
        )
        shrink, weights = torch.exp2(origin - moved), _powers(x, scale, moved)
        origin, S, W, limit = moved, S * shrink, W * shrink, limit * shrink
        shares = _shares(weights, chosen)
        before, total = S.sum(1, keepdim=True), shares.sum(1, keepdim=True)
        mean = (weights * difference).sum(1, keepdim=True) / total * scale
        new = torch.where(
            total > before * outweighs,
            mean,
            centre + ((mean - centre) * total + W) / (before + total),
        )
        new = torch.where(anchors, new, centre)
        W, centre = W - (new - centre) * before, new
        limit = torch.where(
            anchors, (before + total) * (outweighs - 1) / chosen.threads + S + shares, limit
        )
        d = difference * scale - centre
        general += int((d.abs() < 1).all(1).logical_not().sum())
        S, W = S + shares, W + (weights * d).sum(1, keepdim=True)
    return Paths(len(p) * (p.shape[1] // tile), general, anchored)


def _powers(x, scale, origin):
    return torch.exp2(x * scale * LOG2E - origin)


def _shares(weights, chosen):
    """Each thread's sum over a tile [N, threads]: its groups are `threads` groups apart."""
    return weights.view(len(weights), chosen.groups, chosen.threads, -1).sum((1, 3))


def policies(steps):
    """(steps, policy, reference, corpus, settings) of the demo without a penalty, one for each
    number of steps.
    """
    from fastkl.rl import FixedBeta
    from fastkl.tools.demo import Settings, choose_settings
    from fastkl.tools.demo.corpus import build_corpus
    from fastkl.tools.demo.model import train_reference
    from fastkl.tools.demo.training import fine_tune

    for count in steps:
        settings = choose_settings(quick=True, vocabulary=Settings.vocabulary, steps=count)
        if count == steps[0]:
            corpus = build_corpus(settings)
            reference, _ = train_reference(corpus, settings)
        yield (
            count,
            fine_tune(reference, corpus, FixedBeta(0.0), settings, f"{count} steps").policy,
            reference,
            corpus,
            settings,
        )


@torch.no_grad()
def held_out_logits(policy, reference, corpus, settings):
    """bfloat16 logits [N, V] of policy and reference, of the policy's samples on held-out prompts."""
    from fastkl.tools.demo.corpus import windows
    from fastkl.tools.demo.model import sample

    choose, draw = (torch.Generator().manual_seed(settings.seed + 1) for _ in range(2))
    prompts = windows(
        corpus.held_out,
        settings.prompt_length,
        settings.evaluation_samples,
        choose,
        corpus.new_line,
    )
    tokens = sample(policy, prompts, settings, draw)
    hidden = (
        model.response_hidden(tokens, settings.response_length) for model in (policy, reference)
    )
    return [
        model.lm_head(states).flatten(0, 1).bfloat16()
        for model, states in zip((policy, reference), hidden, strict=True)
    ]


def main(argv=None):
    """The command line; returns the exit code."""
    import fastkl

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paths", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--steps",
        default="2,8,24",
        help="numbers of steps of fine-tuning, separated by commas (default: %(default)s)",
    )
    steps = [int(number) for number in parser.parse_args(argv).steps.split(",")]
    print(f"{'steps':>5} {'mean KL':>9} {'tiles':>8} {'near':>7} {'general':>8} {'anchored':>9}")
    for count, policy, reference, corpus, settings in policies(steps):
        p, q = held_out_logits(policy, reference, corpus, settings)
        kl = fastkl.kl_divergence(p, q, temperature=settings.temperature).mean().item()
        paths = tile_paths(p, q, settings.temperature)
        print(
            f"{count:5} {kl:9.4f} {paths.tiles:8} {paths.near:7.1%} {1 - paths.near:8.1%} "
            f"{paths.anchored / paths.tiles:9.1%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
