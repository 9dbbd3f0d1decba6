"""The package as others get it: what a wheel and an sdist hold, what importing needs, and that the
files which say the same thing agree.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
OPTIONAL = ("triton", "matplotlib", "transformers", "tokenizers", "tqdm")
MAX_FACADE_NAMES = 30
SUPPORTED_PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def run(*command, cwd, **environment):
    """Run a command that must succeed, without this process's PYTHONPATH (it would let the checkout
    stand in for what is missing); its stdout.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}: exit status "
        f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def python(code, *, cwd, **environment):
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def copy_checkout(target):
    """What a commit of the working tree would hold: tracked files and untracked ones that git does
    not ignore.
    """
    git = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    except (
        OSError,
        subprocess.CalledProcessError,
    ):  # not a clone, or no git: leave out what .gitignore would
        leftovers = shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__", "demo-run"
        )
        shutil.copytree(ROOT, target, symlinks=True, ignore=leftovers)
        return
    for name in filter(None, listed):
        source = ROOT / name
        if source.is_symlink() or source.is_file():  # not one that is tracked but deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def build_wheel(source, target):
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--disable-pip-version-check",
        "--wheel-dir",
        target,
    )
    run(*pip, source, cwd=target.parent)
    (wheel,) = target.glob("*.whl")
    return wheel


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@dataclass(frozen=True)
class Build:
    tree: Path  # the copy of the checkout
    wheel: Path
    site: Path  # the unpacked wheel
    sdist: Path
    metadata: PathDistribution


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    # Looked for, not imported: setuptools replaces distutils when imported, which fails after
    # another test has imported the original.
    absent = [tool for tool in ("pip", "setuptools", "wheel") if find_spec(tool) is None]
    if absent:
        pytest.skip(f"building needs {', '.join(absent)}; remedy: pip install 'fastkl[test]'")
    base = tmp_path_factory.mktemp("packaging")
    copy_checkout(base / "tree")
    wheel = build_wheel(base / "tree", base / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(base / "site")
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(base)!r})",
        cwd=base / "tree",
    )
    (sdist,) = base.glob("*.tar.gz")
    (metadata,) = (base / "site").glob("*.dist-info")
    return Build(base / "tree", wheel, base / "site", sdist, PathDistribution(metadata))


def version_in_source():
    return re.search(
        r'^__version__ = "([^"]+)"$', (ROOT / "fastkl" / "__init__.py").read_text(), re.MULTILINE
    ).group(1)


# ---- what is built


def test_wheel_holds_every_file_of_the_package_and_nothing_else(build):
    tree = build.tree / "fastkl"
    expected = {
        path.relative_to(build.tree).as_posix()
        for path in tree.rglob("*")
        if path.is_file() and (tree / "kernels") not in path.parents
    }
    expected |= {
        f"fastkl/kernels/{path.name}"
        for path in (build.tree / "kernels").iterdir()
        if path.suffix in {".py", ".md"}
    }
    got = {name for name in members(build.wheel) if ".dist-info/" not in name}
    expected.discard("fastkl/kernels")  # the symlink: in a wheel, a folder
    assert got == expected, (
        f"missing from the wheel: {sorted(expected - got)}; unexpected in it: "
        f"{sorted(got - expected)}"
    )
    assert {f"fastkl/kernels/{stem}.py" for stem in KERNELS} <= got and KERNELS
    assert {"fastkl/tools/cli.py", "fastkl/py.typed"} <= got


def test_sdist_builds_the_same_wheel(build, tmp_path):
    with tarfile.open(build.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "fastkl/__init__.py",
        *(f"kernels/{stem}.py" for stem in KERNELS),
    } <= names
    assert members(build_wheel(build.sdist, tmp_path / "wheels")) == members(build.wheel)


def test_wheel_works_away_from_the_checkout(build, tmp_path):
    pytest.importorskip(
        "triton"
    )  # which importing a kernel needs; the next test is for machines without
    code = f"""
import importlib, pathlib
site = pathlib.Path({str(build.site)!r})
for name in ["fastkl", "fastkl.tools.cli", *(f"fastkl.kernels.{{stem}}" for stem in {KERNELS!r})]:
    file = pathlib.Path(importlib.import_module(name).__file__)
    assert site in file.parents, f"{{name}} came from {{file}}, not from the wheel"
print(importlib.import_module("fastkl").__version__)
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(build.site)).strip() == build.metadata.version


def test_metadata(build):
    requirements = pytest.importorskip("packaging.requirements")
    metadata, needs = (
        build.metadata,
        [requirements.Requirement(line) for line in build.metadata.requires],
    )
    run_time = {need.name: need for need in needs if "extra" not in str(need.marker)}
    assert set(run_time) == {"torch", "triton"}
    assert (
        run_time["torch"].marker is None
        and str(run_time["triton"].marker) == 'platform_system == "Linux"'
    )
    assert set(metadata.metadata.get_all("Provides-Extra")) == {
        "test",
        "bench",
        "bench-peers",
        "demo",
        "plots",
        "compare",
        "trl",
    }
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    # An SPDX expression, with its file, and nothing of the older forms beside it, which the
    # standard forbids.
    assert (
        metadata.metadata["License-Expression"] == "Apache-2.0"
        and metadata.metadata["License"] is None
    )
    assert metadata.metadata.get_all("License-File") == ["LICENSE"] and metadata.read_text(
        "licenses/LICENSE"
    )
    assert not [
        line for line in metadata.metadata.get_all("Classifier") if line.startswith("License ::")
    ]
    assert metadata.metadata["Author"] and metadata.metadata["Summary"]
    assert {(script.name, script.value) for script in metadata.entry_points} == {
        ("fastkl", "fastkl.tools.cli:main")
    }


def test_the_description_stands_alone(build):
    """An index shows the README without the repository: no picture or link to a file of it, all
    else as it is."""
    metadata = build.metadata.metadata
    text, readme = (
        metadata.get_payload() or metadata["Description"],
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https?:|#)", readme) and not re.findall(r"\]\((?!https?:|#)", text)
    assert text.startswith("# fastkl\n") and re.findall(
        r"```.*?```", readme, re.DOTALL
    ) == re.findall(r"```.*?```", text, re.DOTALL)
    assert len(text) > 0.97 * len(readme)


def test_constraints_pin_every_direct_dependency(build):
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [
        requirements.Requirement(line)
        for line in lines
        if line.strip() and not line.startswith("#")
    ]
    for need in map(requirements.Requirement, build.metadata.requires):
        for version in SUPPORTED_PYTHONS:
            environment = {"python_version": version, "platform_system": "Linux"}
            found = [
                pin
                for pin in pins
                if pin.name == need.name
                and (pin.marker is None or pin.marker.evaluate(environment))
            ]
            assert len(found) == 1, (
                f"constraints.txt: expected one pin of {need.name} for Python {version}, got "
                f"{[str(pin) for pin in found]}"
            )
            (pin,) = found[0].specifier
            assert pin.operator == "==" and need.specifier.contains(pin.version), (
                f"constraints.txt: {pin} is no pin within setup.py's {need}"
            )


# ---- what importing needs


def test_import_needs_torch_only(tmp_path):
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # import then fails as if it were not installed
import torch, fastkl
for name in fastkl.__all__:
    getattr(fastkl, name)
assert float(fastkl.kl_divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))) == 0
"""
    python(code, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_facade_re_exports_few_names():
    import fastkl

    assert len(fastkl.__all__) == len(set(fastkl.__all__)) <= MAX_FACADE_NAMES
    visible = {
        name
        for name, value in vars(fastkl).items()
        if not name.startswith("_") and not isinstance(value, type(os))
    }
    assert visible <= set(fastkl.__all__), (
        f"fastkl/__init__.py binds public names that __all__ lacks: "
        f"{sorted(visible - set(fastkl.__all__))}"
    )


# ---- the kernels' two paths


def test_kernels_is_no_package_of_its_own():
    # With an __init__.py the folder would be a regular package `kernels`, and shadow the published
    # one wherever the root is on sys.path.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_symlink_is_relative():
    link = ROOT / "fastkl" / "kernels"
    assert link.is_symlink() and os.readlink(link) == os.path.join("..", "kernels")
    assert link.resolve() == ROOT / "kernels"


# ---- files that say the same thing


def test_version_is_said_once(build):
    import fastkl

    assert build.metadata.version == fastkl.__version__ == version_in_source()
    newest = re.search(
        r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ).group(1)
    assert newest == version_in_source(), (
        "CHANGELOG.md: its newest version is not fastkl.__version__"
    )
    literal = re.compile(rf"(?<![\d.]){re.escape(version_in_source())}(?![\d.]\d)")
    assert not literal.search(
        (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    ), "the version is written out a second time"


def test_the_command_says_its_version(capsys):
    from fastkl.tools import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"fastkl {version_in_source()}\n"


def test_python_version_is_the_same_everywhere(build):
    oldest = build.metadata.metadata["Requires-Python"].removeprefix(">=")
    major, minor = oldest.split(".")
    assert SUPPORTED_PYTHONS[0] == oldest
    assert f'target-version = "py{major}{minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert os.access(script, os.X_OK) and lines[0] == "set -euo pipefail"
    assert re.fullmatch(r"make( --\S+)* test", lines[-1]), (
        ".ci/run: expected its last command to be make test, so that CI runs what developers run"
    )


def test_make_has_the_documented_targets():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = set(phony.split())
    assert targets == {"demo", "test", "bench", "lint", "clean"}
    assert targets <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert "-c constraints.txt" in makefile
    # Where packages come from is the machine's setting, never the project's.
    assert not re.search(
        r"--(extra-)?index-url|--find-links|--trusted-host|\s-[if]\s+\S*//", makefile
    )
