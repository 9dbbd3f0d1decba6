"""What `fastkl doctor` says of a machine, on machines made up for it: GPUs, versions, settings, and the speed by a clock of our own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastkl
from fastkl.tools.doctor import checks, machine, speed
from fastkl.tools.doctor.checks import Context, Outcome

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON = importlib.util.find_spec("triton") is not None


def context(device="cpu"):
    return Context(torch.device(device), time.monotonic() + 100)


# ---- the machine


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, as torch and nvidia-smi describe it; what a test changes in it is seen by the checks."""
    described = SimpleNamespace(free=100 * 2**30, capability=(9, 0), row={"uuid": "GPU-1-2", "name": "NVIDIA H200", "driver_version": "570.1",
                                                                        "compute_mode": "Default"})
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30, uuid="1-2")
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "init": lambda: None, "empty_cache": lambda: None,
                        "get_device_properties": lambda index: properties, "get_device_capability": lambda index: described.capability,
                        "mem_get_info": lambda device: (described.free, 140 * 2**30)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [{**described.row, "uuid": "GPU-0-0", "compute_mode": "Prohibited"}, described.row])
    return described


def test_a_gpu_is_described(gpu):
    on_gpu = context("cuda:1")
    assert machine.check_gpu(on_gpu) == Outcome("ok", "cuda:1, NVIDIA H200, sm_90, 140 GiB, one of 2", {"count": 2})
    assert "not used" in machine.check_gpu(context()).text
    assert machine.check_driver(on_gpu).text == "NVIDIA 570.1"
    assert (machine.check_memory(on_gpu).status, machine.check_memory(on_gpu).text) == ("ok", "100.0 of 140.0 GiB free")
    assert machine.check_compute_mode(on_gpu) == Outcome("ok", "Default")
    gpu.free, gpu.capability, gpu.row["compute_mode"] = 2**30, (7, 5), "Exclusive_Process"
    assert [check(on_gpu).status for check in (machine.check_memory, machine.check_gpu, machine.check_compute_mode)] == ["warning"] * 3


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [])
    assert machine.check_gpu(context()).status == "skipped"
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [{"name": "NVIDIA H200"}])
    monkeypatch.setattr(torch.version, "cuda", None)
    outcome = machine.check_gpu(context())
    assert outcome.status == "warning" and "nvidia-smi lists NVIDIA H200: install a torch built for CUDA" in outcome.text


def test_what_nvidia_smi_prints(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU-5, NVIDIA H200, 570.1, Default'\necho garbage\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia_smi.__wrapped__() == [{"uuid": "GPU-5", "name": "NVIDIA H200", "driver_version": "570.1", "compute_mode": "Default"}]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.nvidia_smi.__wrapped__() == []


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_versions_that_do_not_go_together(monkeypatch):
    monkeypatch.setattr(machine, "_requirements", {"torch": ["filelock", 'triton==3.0.1+git5; platform_system == "Linux"'], "fastkl": []}.get)
    outcome = machine.check_triton(context())
    assert outcome.status == "warning" and "asks for 3.0.1" in outcome.text
    monkeypatch.setattr(machine, "_requirements", {"torch": [], "fastkl": ["torch>=99.1", "triton>=3.5; extra"]}.get)
    assert machine.check_triton(context()).status == "ok"
    assert machine.check_torch(context()).status == "warning" and "99.1" in machine.check_torch(context()).text
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert [machine.check_triton(context(device)).status for device in ("cpu", "cuda")] == ["skipped", "warning"]
    assert not any("compiled for" in check.group for check in checks.checks_for("cpu"))


def test_variables_that_cost(monkeypatch):
    for name in [name for name in os.environ if name.startswith(machine.VARIABLES)]:
        monkeypatch.delenv(name)
    assert machine.check_variables(context()).status == "ok"
    monkeypatch.setenv("FASTKL_X", str(Path.home() / "x"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert machine.check_variables(context()) == Outcome("ok", "FASTKL_X=~/x, TRITON_INTERPRET=0", {"FASTKL_X": "~/x", "TRITON_INTERPRET": "0"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = machine.check_variables(context())
    assert outcome.status == "warning" and "TRITON_INTERPRET=1 (interprets" in outcome.text


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_what_triton_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert machine.check_cache(context()).status == "ok" and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "LITTLE_DISK", 2**70)
    assert "MiB left" in machine.check_cache(context()).text
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert "noexec" in machine.check_cache(context()).text
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert machine.check_cache(context()).status == "warning" and "cannot be written" in machine.check_cache(context()).text
    monkeypatch.setenv("CC", "no-such-compiler")
    assert machine.check_compiler(context("cuda")).status == "warning" and "no-such-compiler" in machine.check_compiler(context()).text
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [machine.check_compiler(context(device)).status for device in ("cpu", "cuda")] == ["skipped", "warning"]


# ---- speed


class FakeEvent:
    """A CUDA event on a clock that the work below moves on."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeEvent.clock

    def elapsed_time(self, end):
        return end.time - self.time


@pytest.fixture
def clock(monkeypatch):
    """CUDA's timing on a clock of our own: each function that `takes` milliseconds moves it on."""
    for name, value in {"Event": FakeEvent, "synchronize": lambda: None, "_sleep": lambda cycles: None}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def takes(milliseconds, owner, name):
        function = getattr(owner, name)

        def timed(*args, **options):
            FakeEvent.clock += milliseconds
            return function(*args, **options)
        monkeypatch.setattr(owner, name, timed)
    return takes


def test_percent_of_a_copy(monkeypatch, clock):
    """Forward moves the bytes of a copy, backward half as many more."""
    monkeypatch.setattr(speed, "VOCABULARY", 64)
    monkeypatch.setattr(fastkl, "kl_divergence", lambda p, q: (p.float() - q.float()).square().sum(-1))  # without a copy_ of its own
    clock(2.0, torch.Tensor, "copy_")
    clock(2.5, fastkl, "kl_divergence")
    clock(5.0, torch.autograd, "grad")
    figures = speed.measure(10, torch.device("cpu"))
    assert figures["copy_gb_per_s"] == pytest.approx(2 * 10 * 64 * 2 / 2e-3 / 1e9)
    assert figures["forward_percent_of_copy"] == pytest.approx(80) and figures["backward_percent_of_copy"] == pytest.approx(60)
    assert (figures["forward_ms"], figures["backward_ms"], figures["rows"]) == (2.5, 5.0, 10)


@pytest.mark.skipif(not TRITON or INTERPRETING, reason="needs Triton")
def test_speed_is_an_outcome(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    figures = {"rows": 8192, "forward_percent_of_copy": 93.2, "backward_percent_of_copy": 91.0, "copy_gb_per_s": 4301.0}
    monkeypatch.setattr(speed, "measure", lambda rows, device: {**figures, "rows": rows})
    outcome = speed.check_speed(context("cuda"))
    assert outcome.status == "ok" and outcome.text == "forward 93 %, backward 91 % of a copy's 4301 GB/s (8192 x 128256 bfloat16)"
    figures["backward_percent_of_copy"] = 40.0
    assert speed.check_speed(context("cuda")).status == "warning"
    gpu.free = 2**30
    assert (speed.check_speed(context("cuda")).status, speed.check_speed(context()).status) == ("skipped", "skipped")
    assert "1.0 GiB are free" in speed.check_speed(context("cuda")).text and "no GPU" in speed.check_speed(context()).text
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in speed.check_speed(context("cuda")).text


def test_rows_fit_the_free_memory():
    row = speed.VOCABULARY * 2 * speed.TENSORS
    for free in (0, 2**30, 5 * 2**30, 2**33, 2**37):
        rows = speed.rows_for(free)
        assert rows == 0 or speed.FEWEST <= rows <= speed.MOST and rows * row <= 0.8 * free
    assert speed.rows_for(2**37) == speed.MOST and 0 < speed.rows_for(2**33) < speed.MOST and speed.rows_for(2**30) == 0
