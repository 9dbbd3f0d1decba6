"""What this machine has: versions, GPU, driver, memory, settings, and what Triton needs beside itself."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from pathlib import Path

import torch

import fastkl

from .checks import Context, Outcome

GIB = 2**30
LITTLE_MEMORY = 2 * GIB  # of a GPU: less is a warning
LITTLE_DISK = 100 * 2**20  # of the cache folder's disk
# What a setting costs, where it is not harmless. Names of these beginnings are listed if they are set.
VARIABLES = ("TRITON_", "FASTKL_", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
             "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "DISABLE_PTXAS_OPT")
COSTS = {
    "TRITON_INTERPRET": "interprets kernels instead of compiling them, a thousand times slower",
    "TRITON_ALWAYS_COMPILE": "compiles every kernel anew in every process",
    "TRITON_DEBUG": "compiles checks into the kernels",
    "TRITON_KERNEL_OVERRIDE": "replaces kernels by those of a folder",
    "DISABLE_PTXAS_OPT": "compiles without optimising",
    "CUDA_LAUNCH_BLOCKING": "waits for every kernel",
    "NVIDIA_TF32_OVERRIDE": "changes the precision of float32 matrix products",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "changes the precision of float32 matrix products",
}
OFF = ("", "0", "off", "false", "no", "n")


# ---- versions


def check_python(context: Context) -> Outcome:
    """Python and the operating system."""
    return Outcome("ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")


def check_fastkl(context: Context) -> Outcome:
    """fastkl, and where it was imported from: a second copy is a common surprise."""
    return Outcome("ok", f"{fastkl.__version__}, {short(Path(fastkl.__file__).parent)}")


def check_torch(context: Context) -> Outcome:
    """torch and what it was built for."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "without CUDA and ROCm"
    return _not_older("torch", torch.__version__, f"{torch.__version__}, built {'for ' if torch.version.cuda or torch.version.hip else ''}{built}")


def check_triton(context: Context) -> Outcome:
    """Triton, and whether it is the one that this torch was released with."""
    if importlib.util.find_spec("triton") is None:
        return Outcome("warning" if context.on_gpu else "skipped", "not installed: without it no kernels; pip install triton")
    import triton

    wanted = _wanted_triton()
    if wanted and wanted != _public(triton.__version__):
        text = f"{triton.__version__}, but torch {torch.__version__} asks for {wanted}: if a kernel fails, install that one"
        return Outcome("warning", text, {"wanted": wanted})
    return _not_older("triton", triton.__version__, triton.__version__ + (", as this torch asks" if wanted else "; this torch asks for none"))


def _optional(distribution: str, use: str, context: Context) -> Outcome:
    try:
        return Outcome("ok", importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:  # what is on the path without being installed does not count
        return Outcome("skipped", f"not installed; only {use} needs it")


def _requirements(distribution: str) -> list[str]:
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return []


def _wanted_triton() -> str | None:
    """The Triton version that torch's own requirements pin; a CPU build has none."""
    for line in _requirements("torch"):
        found = re.match(r"(?:pytorch-)?triton(?:-\w+)?\s*\(?==\s*([\w.+-]+)", line)
        if found:
            return _public(found[1])
    return None


def _not_older(name: str, version: str, text: str) -> Outcome:
    """A warning where the version is below the least that fastkl asks for."""
    least = next((found[1] for line in _requirements("fastkl") if (found := re.match(rf"{name}>=([\d.]+)", line))), None)
    if least and _numbers(version) < _numbers(least):
        return Outcome("warning", f"{text}; fastkl needs {least} or newer")
    return Outcome("ok", text)


def _public(version: str) -> str:
    return version.partition("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", _public(version))[:2])


# ---- the GPU


def check_gpu(context: Context) -> Outcome:
    """The GPUs that torch sees, or why it sees none; what torch warns of when it looks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if context.on_gpu:
            torch.cuda.init()
    said = "; ".join(str(warning.message).split("\n")[0].strip() for warning in caught)
    if not count:
        return _why_no_gpu(said)
    index = (context.device.index or 0) if context.on_gpu else 0
    text = describe(index)
    if count > 1:
        text += f", one of {count}"
    if not context.on_gpu:
        text += "; not used, as --device asks"
    elif torch.version.cuda and torch.cuda.get_device_capability(index) < (8, 0):
        said = "Triton supports compute capability 8.0 and newer"
    return Outcome("warning" if said else "ok", "; ".join(filter(None, (text, said))), {"count": count})


def describe(index: int) -> str:
    """One GPU in a few words."""
    properties = torch.cuda.get_device_properties(index)
    kind = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"cuda:{index}, {properties.name}, {kind}, {properties.total_memory / GIB:.0f} GiB"


def _why_no_gpu(said: str) -> Outcome:
    listed = sorted({row["name"] for row in nvidia_smi()})
    built = bool(torch.version.cuda or torch.version.hip)
    reason = said or ("it finds no device" if built else "built without CUDA and ROCm")
    if "CUDA_VISIBLE_DEVICES" in os.environ and built:
        reason += f"; CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if listed:
        return Outcome("warning", f"torch sees none ({reason}), nvidia-smi lists {', '.join(listed)}"
                                  + ("" if built else ": install a torch built for CUDA, see pytorch.org"))
    return Outcome("warning" if said else "skipped", f"torch sees none, {reason}")


@functools.lru_cache(maxsize=1)
def nvidia_smi() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; empty where it does not run."""
    names = ("uuid", "name", "driver_version", "compute_mode")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _smi_row(device: torch.device) -> dict[str, str]:
    """nvidia-smi's row of a device, which may number them in another order; empty where it cannot be told."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    rows = nvidia_smi()
    return next((row for row in rows if uuid and row["uuid"].endswith(uuid)), rows[0] if len(rows) == 1 else {})


def check_driver(context: Context) -> Outcome:
    """The driver's version."""
    for row in nvidia_smi()[:1]:
        return Outcome("ok", f"NVIDIA {row['driver_version']}")
    for path, pattern in (("/proc/driver/nvidia/version", r"Module\s+(?:for \S+\s+)?([\d.]+)"), ("/sys/module/amdgpu/version", r"([\d.]+)")):
        if os.path.exists(path) and (found := re.search(pattern, Path(path).read_text())):
            return Outcome("ok", f"{'NVIDIA' if 'nvidia' in path else 'amdgpu'} {found[1]}")
    return Outcome("skipped", "no nvidia-smi, and no driver in /proc or /sys")


def check_memory(context: Context) -> Outcome:
    """What is free on the GPU."""
    if not context.on_gpu:
        return Outcome("skipped", "nothing runs on a GPU")
    free, total = torch.cuda.mem_get_info(context.device)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    figures = {"free_bytes": free, "total_bytes": total}
    return Outcome("warning", text + ": does another process hold it?", figures) if free < LITTLE_MEMORY else Outcome("ok", text, figures)


def check_compute_mode(context: Context) -> Outcome:
    """Whether several processes may use the GPU."""
    mode = _smi_row(context.device).get("compute_mode") if context.on_gpu else None
    if mode is None:
        return Outcome("skipped", "nvidia-smi does not tell" if context.on_gpu else "nothing runs on a GPU")
    limits = {"Exclusive_Process": "only one process at a time", "Prohibited": "no process at all"}
    return Outcome("warning", f"{mode}: {limits[mode]} can use this GPU") if mode in limits else Outcome("ok", mode)


def check_backend(context: Context) -> Outcome:
    """Which implementation takes logits on this device, and why."""
    explanation = fastkl.explain(torch.zeros(1, 8, device=context.device))
    return Outcome("FAIL" if explanation.problems else "ok", str(explanation), {"backend": explanation.backend})


# ---- settings, and what Triton needs


def check_variables(context: Context) -> Outcome:
    """Environment variables that change what runs."""
    found = {name: short(value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    costly = [name for name, value in found.items() if name in COSTS and (value.lower() not in OFF or "TF32" in name)]
    text = ", ".join(f"{name}={value}" + (f" ({COSTS[name]})" if name in costly else "") for name, value in found.items())
    return Outcome("warning" if costly else "ok", text or "none set that matters here", found)


def check_cache(context: Context) -> Outcome:
    """Whether Triton can write, and load, what it compiles."""
    if importlib.util.find_spec("triton") is None:
        return Outcome("skipped", "Triton is not installed")
    import triton

    folder = Path(triton.knobs.cache.dir)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        return Outcome("warning", f"{short(there)} cannot be written ({error.strerror}): set TRITON_CACHE_DIR to a folder that can")
    if hasattr(os, "ST_NOEXEC") and os.statvfs(there).f_flag & os.ST_NOEXEC:
        return Outcome("warning", f"{short(folder)} is on a disk mounted noexec, so that no launcher loads: set TRITON_CACHE_DIR to another")
    free = shutil.disk_usage(there).free
    if free < LITTLE_DISK:
        return Outcome("warning", f"{short(folder)} has {free / 2**20:.0f} MiB left: make room, or set TRITON_CACHE_DIR to another disk")
    return Outcome("ok", f"{short(folder)} can be written")


def check_compiler(context: Context) -> Outcome:
    """The C compiler and Python's headers, with which Triton builds what launches kernels."""
    if importlib.util.find_spec("triton") is None:
        return Outcome("skipped", "Triton is not installed")
    import triton

    if getattr(triton.knobs.build, "impl", None):
        return Outcome("ok", "triton.knobs.build.impl is set")
    named = os.environ.get("CC")
    compiler = shutil.which(named.split()[0]) if named and named.strip() else shutil.which("gcc") or shutil.which("clang")
    if named is not None and compiler is None:
        return _needed(context, f"CC={named!r} is not a program that can be run; unset it, or name one")
    if compiler is None:
        return _needed(context, "none (gcc, clang or CC); Debian, Ubuntu: apt install gcc")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return _needed(context, f"{short(compiler)}, but no {short(header)}; Debian, Ubuntu: apt install python3-dev")
    return Outcome("ok", f"{short(compiler)}, with Python.h")


def _needed(context: Context, text: str) -> Outcome:
    """Only what launches kernels needs it."""
    return Outcome("warning", text) if context.on_gpu else Outcome("skipped", f"{text}; Triton needs it on a GPU")


def short(path: object) -> str:
    """A path without the user's name: the text is for others to read."""
    text, home = str(path), os.path.expanduser("~")
    return "~" + text[len(home):] if len(home) > 1 and (text == home or text.startswith(home + os.sep)) else text


CHECKS = (
    ("Python", check_python), ("fastkl", check_fastkl), ("torch", check_torch), ("Triton", check_triton),
    ("transformers", functools.partial(_optional, "transformers", "fastkl compare")),
    ("TRL", functools.partial(_optional, "trl", "fastkl.integrations.trl")),
    ("GPU", check_gpu), ("driver", check_driver), ("free GPU memory", check_memory), ("compute mode", check_compute_mode),
    ("backend", check_backend), ("environment", check_variables), ("Triton's cache", check_cache), ("C compiler", check_compiler),
)
