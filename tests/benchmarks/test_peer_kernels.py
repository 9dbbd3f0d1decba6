"""The adapters of benchmarks/peer_kernels.py: what they catch is what Triton would compile, and a
peer that no longer fits says so.
"""

import dataclasses
import json
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import peer_kernels, record, static_costs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

INSTALLED = [
    kernel for kernel in peer_kernels.KERNELS if kernel.launch and record.version(kernel.package)
]


@triton.jit
def scale(
    x_ptr, y_ptr, mask_ptr, unused_ptr, n, one, large, odd, factor, flag, BLOCK: tl.constexpr
):
    offsets = tl.arange(0, BLOCK)
    for start in range(0, n, BLOCK):
        tl.store(
            y_ptr + start + offsets,
            tl.exp2(tl.load(x_ptr + start + offsets).to(tl.float32)) * factor,
        )


def launch_scale(x=None, **options):
    """A peer's public function."""
    x = peer_kernels.meta(peer_kernels.N, 1024) if x is None else x
    y, mask = peer_kernels.meta(peer_kernels.N, 1024), peer_kernels.meta(8, dtype=torch.bool)
    scale[(1,)](x, y, mask, None, 1024, 1, 2**40, 24, 0.5, True, BLOCK=1024, **options)


def peer(**changes):
    """A Kernel around it."""
    kernel = peer_kernels.Kernel(
        "peer scale",
        "triton",
        lambda: peer_kernels.catch_launch(scale, launch_scale),
        "logit",
        "BLOCK",
        ("x_ptr",),
        ("y_ptr",),
        "scales",
    )
    return dataclasses.replace(kernel, **changes)


def test_a_launch_is_caught_as_it_is():
    launch = peer_kernels.catch_launch(scale, lambda: launch_scale(num_warps=8))
    assert launch.options == {"num_warps": 8}
    assert launch.arguments["n"] == 1024 and launch.arguments["BLOCK"] == 1024
    assert "run" not in vars(scale), "the kernel has to be as before"
    signature, constexprs, attrs = peer_kernels.specialize(launch)
    assert signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*bf16",
        "mask_ptr": "*u1",
        "unused_ptr": "constexpr",
        "n": "i32",
        "one": "constexpr",
        "large": "i64",
        "odd": "i32",
        "factor": "fp32",
        "flag": "u1",
        "BLOCK": "constexpr",
    }
    assert constexprs == {"unused_ptr": None, "one": 1, "BLOCK": 1024}
    assert set(attrs) == {(0,), (1,), (2,), (4,), (6,)}
    misaligned = peer_kernels.meta(2, peer_kernels.N, 1024).flatten()[1:]
    assert (0,) not in peer_kernels.specialize(
        peer_kernels.catch_launch(scale, lambda: launch_scale(misaligned))
    )[2]


@pytest.mark.parametrize("kernel", [peer(), *INSTALLED], ids=lambda kernel: kernel.name)
def test_the_specialization_is_the_one_of_tritons_launcher(kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    launch = kernel.launch()
    jit = launch.kernel
    if not hasattr(jit, "_pack_args"):
        pytest.skip("this Triton packs arguments in another way")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bound, specialization, options = create_function_from_signature(
        jit.signature, jit.params, backend
    )(**launch.arguments, **launch.options)
    _, signature, constexprs, attrs = jit._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    ours = peer_kernels.specialize(launch)
    assert ours[0] == signature
    assert ours[1] == {jit.params[path[0]].name: value for path, value in constexprs.items()}
    assert ours[2] == {path: attribute for path, attribute in attrs.items() if attribute}


def test_a_peer_is_compiled_and_counted():
    row = peer_kernels.measure(peer())
    assert "reason" not in row, row
    # 1024 entries, 128 threads: 8 each. An exponential and a product per entry, 16 bytes per load,
    # bf16 in and out.
    assert (
        row["ex2_per_pair"],
        row["fp32_per_pair"],
        row["widest_load_bytes"],
        row["kernel_bytes"],
    ) == (1.0, 1.0, 16, 4)
    assert (
        row["upper_bound_of_peak_bandwidth"]["percent"] <= 100
        and row["dtype"] == "bf16"
        and row["arch"] == "sm_90"
    )


def no_longer_that_function():
    raise TypeError("apply() takes 3 positional arguments but 4 were given")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"package": "no-such-package-at-all"},
            "not installed: pip install no-such-package-at-all",
        ),
        ({"launch": None}, "scales"),
        ({"launch": no_longer_that_function}, "TypeError: apply() takes 3"),
        (
            {"launch": lambda: peer_kernels.catch_launch(scale, lambda: None)},
            "PeerError: expected a launch of scale, got none",
        ),
        (
            {"launch": lambda: peer_kernels.catch_launch(scale, lambda: scale[(1,)](1, n=2, z=3))},
            "TypeError: ",
        ),
        ({"block": "BLOCK_SIZE"}, "PeerError: expected a constant BLOCK_SIZE"),
        (
            {"reads": ("logits_ptr",)},
            "PeerError: expected ['logits_ptr', 'y_ptr'] to be the arguments as large as the "
            "logits, got ['x_ptr', 'y_ptr']",
        ),
        ({"writes": ()}, "PeerError: expected ['x_ptr']"),
        (
            {"loop_free": True},
            "StaticCostError: peer scale for sm_90, bf16, aligned: expected a kernel without a "
            "loop",
        ),
    ],
)
def test_a_peer_that_does_not_fit_says_so(changes, reason):
    row = peer_kernels.measure(peer(**changes))
    assert row["reason"].startswith(reason)
    assert "instructions_per_pair" not in row
    assert row["reason"] in peer_kernels.kernel_table([row])


@pytest.mark.parametrize(
    "kernel",
    [kernel for kernel in INSTALLED if kernel.package == "trl"],
    ids=lambda kernel: kernel.name,
)
def test_trl_is_counted(kernel):
    row = peer_kernels.measure(kernel)
    assert "reason" not in row, row["reason"]
    assert row["version"] == record.version("trl")
    assert (
        row["spill_bytes"] == 0
        and row["instructions_per_pair"] > row["fp32_per_pair"] > row["ex2_per_pair"] >= 1
    )
    assert row["kernel_bytes"] == (4 if row["dtype"] == "fp32" else 2) * (
        len(kernel.reads) + len(kernel.writes)
    )


@pytest.mark.skipif(record.version("liger-kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_steps_of_pipelines_are_what_the_kernels_move(dtype):
    by_name = {
        kernel.name.removeprefix("liger "): kernel
        for kernel in peer_kernels.KERNELS
        if kernel.package == "liger-kernel"
    }
    steps = {
        step.name: step
        for pipeline in peer_kernels.PIPELINES
        for step in (*pipeline.forward, *pipeline.backward)
    }
    for step, name, launch in (
        (
            "_kldiv_kernel_forward",
            "_kldiv_kernel_forward",
            peer_kernels.liger_kl_div("forward", dtype),
        ),
        (
            "_kldiv_kernel_backward",
            "_kldiv_kernel_backward",
            peer_kernels.liger_kl_div("backward", dtype),
        ),
        ("_jsd_kernel", "_jsd_kernel beta=1", peer_kernels.liger_jsd(1.0, dtype)),
        ("_grpo_loss_fwd_kernel", "_grpo_loss_fwd_kernel", peer_kernels.liger_grpo("forward")),
        ("_grpo_loss_bwd_kernel", "_grpo_loss_bwd_kernel", peer_kernels.liger_grpo("backward")),
    ):
        assert steps[step].bytes(dtype.itemsize) == peer_kernels.kernel_bytes(
            by_name[name], launch
        ), step


def test_pipelines_add_up():
    rows = {row["pipeline"]: row for row in peer_kernels.pipelines()}
    ours = rows["fastkl kl_divergence, token_stats"]
    assert (ours["forward"]["bytes_bf16_log_probs"], ours["backward"]["bytes_fp32_log_probs"]) == (
        4,
        6,
    )
    jsd = rows["liger jsd, beta 0 and 1"]["forward"]
    # log_softmax 2 (2 + L); clone 2L; zeros 4; kernel 2L in, 4 + L out; sum 4.
    assert (jsd["formula"], jsd["bytes_bf16_log_probs"], jsd["bytes_fp32_log_probs"]) == (
        "16 + 7L",
        30,
        44,
    )
    kl = rows["liger kl_div"]
    assert [kl[side]["formula"] for side in ("forward", "backward")] == ["4 + 4L", "2 + 4L"]


def test_the_report_names_what_is_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_kernels, "KERNELS", (peer(launch=None), peer()))
    monkeypatch.setattr(
        peer_kernels, "OURS", (("token_stats_policy_only.backward", "bf16", "logit"),)
    )
    file = tmp_path / "peers.json"
    assert static_costs.main(["--peers", "--json", str(file)]) == 0
    out, data = capsys.readouterr().out, json.loads(file.read_text())
    assert out.count("not a measurement") == 2
    assert [row["kernel"] for row in data["kernels"]] == [
        "fastkl token_stats_policy_only.backward",
        "peer scale",
        "peer scale",
    ]
    assert data["kernels"][0]["kernel_bytes"] == 4 and data["command"].startswith(
        "python -m benchmarks.static_costs --peers"
    )
    monkeypatch.setattr(peer_kernels, "OURS", (("novelty.forward", "bf16", "logit"),))
    assert static_costs.main(["--peers"]) == 1
    assert "error: " in capsys.readouterr().err
