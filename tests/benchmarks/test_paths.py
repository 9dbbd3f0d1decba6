"""The paths that benchmarks.paths counts are those that the kernel takes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import paths
from benchmarks.record import ROOT

COUNTED = """
import dataclasses, json, sys, torch
import fastkl
from benchmarks import paths
from fastkl.kernels import config, row_segment

chosen = dataclasses.replace(config.select("forward", "sm_90", 2, 128256), segment=4096)
counts = {}
absorb, anchor = row_segment.absorb, row_segment.anchor
def counted(function, name):
    def call(*arguments):
        groups, last = arguments[-3] if name == "anchor" else arguments[2], arguments[-1]
        if groups == chosen.groups:  # an edge is read one group at a time
            key = name if name == "anchor" else "near" if last else "general"
            counts[key] = counts.get(key, 0) + 1
        return function(*arguments)
    return call
row_segment.absorb, row_segment.anchor = counted(absorb, "absorb"), counted(anchor, "anchor")
torch.manual_seed(0)
x, noise = torch.randn(6000) * 3, torch.randn(6000)
late = x.clone()
late[5000] += 25
results = []
rising = x.sort().values
for p, size in ((x, 0.05), (x, 1.0), (late, 0.2), (rising, 0.3)):
    q = p + size * noise
    p, q = p[None].bfloat16(), q[None].bfloat16()
    counts.clear()
    with fastkl.use_backend("triton"), config.override(forward=chosen):
        fastkl.kl_divergence(p, q, temperature=0.7)
    results.append([paths.tile_paths(p, q, 0.7, chosen), dict(counts)])
print(json.dumps(results))
"""


def test_the_emulation_takes_the_kernel_s_paths():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for (tiles, general, anchored), counts in results:
        assert tiles == 10 and [tiles - general, general, anchored] == [
            counts.get(name, 0) for name in ("near", "general", "anchor")
        ]
    assert (
        results[0][0][1] == 0
        and results[1][0][1] > 0
        and len({anchored for (_, _, anchored), _ in results}) > 1
    )


def test_the_command(tmp_path, capsys):
    """At a vocabulary of today and a KL of 0.02 nats nearly all tiles are near."""
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(2, 128256, generator=generator) for _ in range(2))
    torch.save((3 * p, 3 * p + 0.2 * noise), tmp_path / "logits.pt")
    assert paths.main(["--file", str(tmp_path / "logits.pt")]) == 0
    tiles, near = re.search(r"(\d+) tiles, ([\d.]+)% near", capsys.readouterr().out).groups()
    assert int(tiles) == 2 * 8 * 31 and float(near) > 95
