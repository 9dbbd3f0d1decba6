# The package as others get it: what a wheel and an sdist hold, what importing needs, and that the
# files which say the same thing agree.

import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastkl
from fastkl.tools import cli

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
OPTIONAL = ("triton", "matplotlib", "transformers", "tokenizers", "tqdm")
SUPPORTED_PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def run(*command, cwd, **environment):
    # Run a command that must succeed, without this process's PYTHONPATH (it would let the
    # checkout stand in for what is missing); its stdout.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.check_output(list(map(str, command)), cwd=cwd, env=env, text=True)


def build_wheel(source, target):
    pip = "-m pip wheel --no-build-isolation --no-deps --disable-pip-version-check --wheel-dir"
    run(sys.executable, *pip.split(), target, source, cwd=target.parent)
    return next(target.glob("*.whl"))


def members(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


# Anything but what a checkout may hold beside its files.
UNTRACKED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "*-run")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    # Looked for, not imported: setuptools replaces distutils when imported, which fails after
    # another test has imported the original.
    if not all(map(find_spec, ("pip", "setuptools", "wheel"))):
        pytest.skip("building needs pip, setuptools and wheel; remedy: pip install 'fastkl[test]'")
    base = tmp_path_factory.mktemp("packaging")
    for part in ("fastkl", "kernels"):
        shutil.copytree(ROOT / part, base / "tree" / part, symlinks=True, ignore=UNTRACKED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, base / "tree")
    wheel = build_wheel(base / "tree", base / "wheels")
    shutil.unpack_archive(wheel, base / "site", "zip")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(base)!r})"
    run(sys.executable, "-c", code, cwd=base / "tree")
    (sdist,), (metadata,) = base.glob("*.tar.gz"), (base / "site").glob("*.dist-info")
    return SimpleNamespace(
        tree=base / "tree",
        wheel=wheel,
        site=base / "site",
        sdist=sdist,
        metadata=PathDistribution(metadata),
    )


# ---- what is built


def test_wheel_holds_every_file_of_the_package_and_nothing_else(build):
    tree = build.tree / "fastkl"
    kernels = [path for path in (tree / "kernels").iterdir() if path.suffix in {".py", ".md"}]
    others = [
        path for path in tree.rglob("*") if path.is_file() and tree / "kernels" not in path.parents
    ]
    expected = {path.relative_to(build.tree).as_posix() for path in (*kernels, *others)}
    got = {name for name in members(build.wheel) if ".dist-info/" not in name}
    assert got == expected, (sorted(expected - got), sorted(got - expected))


def test_sdist_builds_the_same_wheel(build, tmp_path):
    assert members(build_wheel(build.sdist, tmp_path / "wheels")) == members(build.wheel)


def test_wheel_works_away_from_the_checkout(build, tmp_path):
    pytest.importorskip("triton")  # importing a kernel needs it
    code = f"""
import importlib, pathlib
site = pathlib.Path({str(build.site)!r})
for name in ["fastkl", "fastkl.tools.cli", *(f"fastkl.kernels.{{stem}}" for stem in {KERNELS!r})]:
    file = pathlib.Path(importlib.import_module(name).__file__)
    assert site in file.parents, f"{{name}} came from {{file}}, not from the wheel"
print(importlib.import_module("fastkl").__version__)
"""
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(build.site))
    assert shown.strip() == build.metadata.version


def test_metadata(build):
    # Extras that a user may name, the licence, the command, and a page without dead links.
    requirements = pytest.importorskip("packaging.requirements")
    metadata = build.metadata.metadata
    needs = map(requirements.Requirement, build.metadata.requires)
    assert {need.name for need in needs if "extra" not in str(need.marker)} == {"torch", "triton"}
    extras = {"test", "bench", "bench-peers", "demo", "plots", "compare", "trl", "docs"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    assert metadata["Requires-Python"] == f">={SUPPORTED_PYTHONS[0]}"
    assert metadata["License-Expression"] and build.metadata.read_text("licenses/LICENSE")
    (script,) = build.metadata.entry_points
    assert (script.name, script.value) == ("fastkl", "fastkl.tools.cli:main")
    text = metadata.get_payload() or metadata["Description"]
    assert "```python" in text and not re.findall(r"\]\((?!https?:|#)", text)


def test_constraints_pin_every_direct_dependency(build):
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [requirements.Requirement(x) for x in lines if x.strip() and not x.startswith("#")]
    needs = map(requirements.Requirement, build.metadata.requires)
    for need, version in itertools.product(needs, SUPPORTED_PYTHONS):
        here = {"python_version": version, "platform_system": "Linux"}
        named = [pin for pin in pins if pin.name == need.name]
        (found,) = (pin for pin in named if pin.marker is None or pin.marker.evaluate(here))
        (pin,) = found.specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version), (pin, need)


# ---- what importing needs


def test_import_needs_torch_only(tmp_path):
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # import then fails as if it were not installed
import torch, fastkl
p, q = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
assert float(fastkl.kl_divergence(p, q)) > 0 and "fastkl.testing" not in sys.modules
for name in fastkl.__all__:
    getattr(fastkl, name)
fastkl.use_backend("triton")
try:
    fastkl.kl_divergence(p, q)
except RuntimeError as error:
    print(error)
"""
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "triton is not installed" in shown


def test_kernels_stand_in_the_package_by_a_link():
    # The folder is no package of its own, which would shadow the published one of its name.
    assert os.readlink(ROOT / "fastkl" / "kernels") == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---- files that say the same thing


def test_version_is_said_once(build, capsys):
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert build.metadata.version == fastkl.__version__ == newest[1]
    assert f"\nversion: {newest[1]}\n" in (ROOT / "CITATION.cff").read_text()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastkl {newest[1]}\n"
