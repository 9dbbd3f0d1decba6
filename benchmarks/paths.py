"""Count the tiles of logits on each path of the KL forward's loop: near, general, read twice.

    python -m benchmarks.paths --file FILE.pt

FILE.pt: (policy, reference) logits [N, V] of a model, by torch.save. The kernel itself takes the
paths, in Triton's interpreter with the configuration for sm_90, for ROWS rows spread evenly.
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
ROWS = 256  # at most: of a vocabulary of 128256 the interpreter takes two seconds for each


def count_paths(pickled):
    """Count (whole tiles, those on the general path, those read twice) and compute the mean KL;
    the edges of segments are not among the tiles."""
    from fastkl.kernels import config, row_segment

    p, q = pickle.loads(pickled)
    chosen = config.select("forward", ARCH, p.element_size(), p.shape[-1])
    paths, path_of = Counter(), row_segment.path_of

    def counted(s, weights, groups, want):
        path = path_of(s, weights, groups, want)
        paths[path.handle.data.item()] += groups == chosen.groups  # an edge is read in groups of 1
        return path

    with (
        mock.patch.object(row_segment, "path_of", counted),
        fastkl.use_backend("triton"),
        config.override(forward=chosen),
    ):
        kl = fastkl.kl_divergence(p, q).mean().item()
    return paths[0] + paths[1], paths[1], paths[2], kl


def main(argv=None):
    parser = argparse.ArgumentParser("python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--file", metavar="FILE.pt", required=True, help="(policy, reference)")
    pair = [x[:: -(-len(x) // ROWS)].bfloat16() for x in torch.load(parser.parse_args(argv).file)]
    found = INTERPRETER.submit(count_paths, pickle.dumps(pair)).result()
    tiles, general, anchored, kl = found
    shares = f"{1 - general / tiles:.1%} near, {anchored / tiles:.1%} read twice"
    print(f"mean KL {kl:.4f}, {tiles} tiles, {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
