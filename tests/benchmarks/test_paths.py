"""The paths that benchmarks.paths prints are those that the kernel takes."""

import re

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import paths


def test_rows_near_and_far(tmp_path, capsys):
    """At a KL of 0.02 nats nearly all tiles are near; where |d| is often above 1 none is, and of
    rising logits many tiles are read twice."""
    p, noise = torch.randn(2, 1, 16384, generator=torch.Generator().manual_seed(0)).unbind()
    found = []
    for logits, size in ((p, 0.2), (p, 2.0), (p.sort().values, 0.2)):
        torch.save((3 * logits, 3 * logits + size * noise), tmp_path / "logits.pt")
        assert paths.main(["--file", str(tmp_path / "logits.pt")]) == 0
        shown = re.search(
            r"KL ([\d.]+), (\d+) tiles, ([\d.]+)% near, ([\d.]+)%", capsys.readouterr().out
        )
        found.append([float(number) for number in shown.groups()])
    (kl, tiles, near, again), (_, _, far, _), (*_, rising) = found
    assert tiles == 32 and near > 90 and far < 5 and 0.01 < kl < 0.04
    assert 0 < again < rising
