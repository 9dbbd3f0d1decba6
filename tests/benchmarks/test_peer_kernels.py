# Peers' kernels: a launch is caught as Triton's launcher sees it; a misfit says so.

import json
import os
from unittest import mock

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import peer_kernels, static_costs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"
)


@triton.jit
def scale(x_ptr, y_ptr, unused_ptr, n, one, factor, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + offsets).to(tl.float32)
        tl.store(y_ptr + start + offsets, tl.exp2(x) * factor)


def call(ops, **options):
    x, y = (peer_kernels.meta(peer_kernels.N, 1024) for _ in range(2))
    scale[(1,)](x, y, None, 1024, 1, 0.5, BLOCK=1024, **options)


PEER = peer_kernels.Kernel(
    *("peer scale", "triton", __name__, "scale", call, "logit", ("x_ptr", "y_ptr"), "scales"),
    block="BLOCK",
)


def test_a_peer_is_compiled_and_counted():
    row = peer_kernels.measure(PEER)
    # 1024 entries, 128 threads: 8 each. An exponential and a product per entry, 16 bytes per load.
    figures = ("ex2_per_pair", "fp32_per_pair", "widest_load_bytes", "kernel_bytes", "dtype")
    assert [row[key] for key in figures] == [1.0, 1.0, 16, 4, "bf16"], row


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"package": "no-such-package-at-all"}, "not installed: pip install no-such-package"),
        (
            {"call": mock.Mock(side_effect=TypeError("apply() takes 3"))},
            "TypeError: apply() takes 3",
        ),
        ({"call": id}, "ValueError: expected a lau"),
        ({"block": "BLOCK_SIZE"}, "KeyError: 'BLOCK_SIZE'"),
        ({"tensors": ("x_ptr",)}, "ValueError: expected arguments as large as the logits"),
    ],
)
def test_a_peer_that_does_not_fit_says_so(changes, reason):
    row = peer_kernels.measure(PEER._replace(**changes))
    assert row["reason"].startswith(reason) and "instructions_per_pair" not in row


@pytest.mark.parametrize("kernel", peer_kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_peers_are_counted(kernel):
    row = peer_kernels.measure(kernel)
    if row["version"] is None:
        pytest.skip(row["reason"])
    assert row.get("reason") is None and row["spill_bytes"] == 0
    assert row["instructions_per_pair"] > row["fp32_per_pair"] > row["ex2_per_pair"] >= 1
    # A loss per entry is float32.
    wide = row["dtype"] == "fp32"
    sizes = [4 if wide or name == "loss_ptr" else 2 for name in kernel.tensors]
    assert row["kernel_bytes"] == sum(sizes)


def test_the_report(tmp_path, monkeypatch):
    ours = "token_stats_policy_only.backward"
    monkeypatch.setattr(peer_kernels, "KERNELS", (PEER,))
    monkeypatch.setattr(peer_kernels, "OURS", {(ours, "bf16"): "logit"})
    assert static_costs.main(["--peers", "--json", str(tmp_path / "peers.json")]) == 0
    data = json.loads((tmp_path / "peers.json").read_text())
    assert [row["kernel"] for row in data["kernels"]] == [f"fastkl {ours}", "peer scale"]
    jsd = {row["pipeline"]: row["forward"] for row in data["pipelines"]}["liger jsd, beta 0 and 1"]
    assert list(jsd.values()) == ["16 + 7L", 30, 44]
