"""TrustRegion on parameters that FSDP2 has sharded, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastkl

FSDP2 = """
import sys
import torch
from torch.distributed.fsdp import fully_shard
from fastkl import kl_divergence
from fastkl.rl.trust_region import TrustRegion

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

def run(way):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 5)
    if way:
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)), reshard_after_forward=way == "resharded")
    optimizer, old = torch.optim.Adam(module.parameters(), lr=1.0), module(batch).detach()
    module(batch).square().sum().backward()

    def mean_kl():
        kl = kl_divergence(old, module(batch)).mean()
        if way == "by hand":
            module.reshard()
        return kl

    results = [TrustRegion(bound, tries=6).step(optimizer, mean_kl) for bound in (0.01, 1e-12)]
    return results, [value.full_tensor() if way else value for value in module.parameters()]

results, values = run(None)
assert [result.accepted for result in results] == ["shrunk", "undone"], results
for way in ("resharded", "by hand"):
    sharded_results, sharded_values = run(way)
    assert sharded_results == results, (way, sharded_results, results)
    assert all(torch.equal(*pair) for pair in zip(sharded_values, values)), way
torch.distributed.destroy_process_group()
"""


def test_fsdp2(tmp_path) -> None:
    """Sharded parameters take the step that whole ones take, in both of the ways that the docstring names."""
    run = subprocess.run([sys.executable, "-c", FSDP2, str(tmp_path / "store")], cwd=Path(fastkl.__file__).parents[1], capture_output=True,
                         text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
