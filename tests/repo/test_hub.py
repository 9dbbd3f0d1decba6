# The package for Hugging Face's Hub, as `make hub` builds it: what it holds, and that `kernels`
# loads it beside an installed fastkl.

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path) -> Path:
    subprocess.run([sys.executable, ROOT / "hub" / "build.py", tmp_path / "hub"], check=True)
    return tmp_path / "hub"


def test_what_is_built(repository) -> None:
    # A variant has the package's files but for those that need other packages.
    held = {path.relative_to(repository).parts for path in repository.rglob("*") if path.is_file()}
    top = {"LICENSE", "README.md"}
    assert {parts[0] for parts in held} == {"build", *top} and {(name,) for name in top} <= held
    package = (path.relative_to(ROOT / "fastkl") for path in (ROOT / "fastkl").rglob("*.py"))
    kernels = (Path("kernels", path.name) for path in (ROOT / "kernels").glob("*.py"))
    files = {path.parts for path in (*package, *kernels)}
    files = {parts for parts in files if parts[0] not in ("tools", "integrations")}
    for variant in ("torch-cpu", "torch-cuda"):
        got = {parts[2:] for parts in held if parts[:2] == ("build", variant)}
        assert got == files | {("metadata.json",), ("py.typed",)}


def test_an_existing_folder_is_left_alone(tmp_path) -> None:
    command = [sys.executable, ROOT / "hub" / "build.py", tmp_path]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode and "FileExistsError" in done.stderr and not [*tmp_path.iterdir()]


def test_kernels_loads_it_beside_an_installed_fastkl(repository, tmp_path) -> None:
    # `kernels` by its distribution: the name alone finds the root's folder too.
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("needs kernels; remedy: pip install kernels")
    if find_spec("triton") is None:
        pytest.skip("the kernels' modules import triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "tests" / "repo" / "hub_user.py", repository, ROOT / "hub"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
