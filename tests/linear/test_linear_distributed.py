"""The linear functions inside DDP and FSDP2: two gloo processes on CPU tensors
(distributed_worker.py) against one process on the whole batch.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import distributed_worker
import pytest
import torch
from distributed_worker import LOSSES, STEPS, TRAINED, WORLD

WORKER = pathlib.Path(distributed_worker.__file__)
TIMEOUT = 180  # seconds for all scenarios, which take about 15 on two idle cores
ENVIRONMENT = {
    **os.environ,
    "WORLD_SIZE": str(WORLD),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(
        [str(WORKER.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
NOT_GATHERED = "fsdp: sharded lm_head, not gathered"

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Results of each rank, by scenario, beside "output", its terminal output."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [(folder / f"rank{rank}.log").open("w+", encoding="utf-8") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env={**ENVIRONMENT, "RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    found = []
    try:
        for process in processes:
            process.wait(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pass  # the scenario that did not end is missing from the results
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for rank, log in enumerate(logs):
            log.seek(0)
            written = folder / f"rank{rank}.json"
            found.append(
                (json.loads(written.read_text(encoding="utf-8")) if written.exists() else {})
                | {"output": log.read()[-4000:]}
            )
            log.close()
    return found


def of_each_rank(results: list[dict], scenario: str) -> list[dict]:
    """The ranks' findings in one scenario; a failure there shows what was raised and printed."""
    for rank, found in enumerate(results):
        assert scenario in found, (
            f"rank {rank} did not come to the end of {scenario!r}:\n{found['output']}"
        )
        assert "raised" not in found[scenario], (
            f"rank {rank}:\n{found[scenario]['raised']}\n{found['output']}"
        )
    return [found[scenario] for found in results]


@needs_gloo
@pytest.mark.parametrize("scenario", TRAINED)
def test_ranks_train_as_one_process(results, scenario) -> None:
    """Loss and gradients of every parameter are those of one process on the whole batch, to 1e-6 in
    norm, before and after a step of SGD.
    """
    for found in of_each_rank(results, scenario):
        assert found["alone"] > 0.1, (
            "one rank's own gradient is already the whole batch's: no reduction is tested"
        )
        assert len(found["losses"]) == STEPS and found["losses"][0] != found["losses"][1]
        for loss, expected in found["losses"]:
            assert expected > 1e-2 and abs(loss - expected) <= 1e-6 * expected, (
                f"loss {loss}, in one process {expected}"
            )
        frozen = ["lm_head.weight"] if "frozen" in scenario else []
        assert found["frozen"] == STEPS * frozen
        assert len(found["gradients"]) == STEPS * (5 - len(frozen))
        for name, error, norm in found["gradients"]:
            assert norm > 1e-3, f"{name}: gradient {norm}: nothing was compared"
            assert error <= 1e-6, f"{name}: the gradient is {error:.3g} off in relative L2 norm"
        # lm_head.unshard() keeps the weight until the end of backward.
        assert found["sharded"] == STEPS * ["fsdp" in scenario and "unshard" not in scenario]


@needs_gloo
@pytest.mark.parametrize("scenario", [f"normalizer: {name}" for name in LOSSES])
def test_normalizer_over_micro_batches_and_ranks(results, scenario) -> None:
    """Accumulated over micro-batches of different lengths and averaged by DDP, gradients are those
    of one process on the whole batch.
    """
    for found in of_each_rank(results, scenario):
        assert len(found["normalizer"]) == 5 and max(found["normalizer"]) <= 1e-6, found
        assert min(found["default"]) > 0.1, (
            "the mean of means is that of the whole batch: nothing was tested"
        )


@needs_gloo
def test_sharded_weight_is_refused(results) -> None:
    """A DTensor says which argument it is, what it is, and what to do."""
    for found in of_each_rank(results, NOT_GATHERED):
        assert re.match(
            r"weight: expected a plain tensor\b.*, got a DTensor\b.*; .*\bforward\b", found["error"]
        ), found["error"]
        # Its gradient would be each rank's own: full_tensor reduces nothing unless told to with
        # grad_placements.
        assert "full_tensor()" not in found["error"], found["error"]


WITHOUT = """
import sys, torch
torch.distributed.is_available = lambda: False
loaded = [name for name in sys.modules if name.startswith("torch.distributed.")]
for name in [*loaded, "torch.distributed.tensor"]:
    sys.modules[name] = None
import distributed_worker as worker
loss = worker.seeded()(*worker.batch())
loss.backward()
print(loss.item())
"""


def test_without_torch_distributed() -> None:
    """Where torch is built without it, the same model has the same loss."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=WORKER.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout) == distributed_worker.seeded()(*distributed_worker.batch()).item()
