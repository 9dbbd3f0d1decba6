# The commands of the workflows and of CONTRIBUTING.md are the repository's: targets and variables
# of the Makefile, options that the parsers take, markers and paths that exist.

import argparse
import os
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest

from fastkl.tools import cli

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
# Targets that .ci/run makes.
CHECKED = set(re.findall(r"^make .*?(\w+)$", (ROOT / ".ci" / "run").read_text(), re.M))


STEPS = [
    (path.stem, step)
    for path in WORKFLOWS
    for job in yaml.safe_load(path.read_text())["jobs"].values()
    for step in job["steps"]
]
LINES = {
    f"{workflow}: {line}": line
    for workflow, step in STEPS
    if step.get("id") != "version"
    for line in step.get("run", "").splitlines()
}
for block in re.findall(r"```sh\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S):
    LINES |= {f"contributing: {line}": line for line in block.splitlines()}


def check_make(words):
    named = dict(word.split("=", 1) for word in words if "=" in word)
    for name in named:
        assert re.search(rf"^{name} [:?]?=", MAKEFILE, re.M), f"{name}: no variable of the Makefile"
    targets = [word for word in words if "=" not in word]
    subprocess.run(["make", "-n", *targets], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    for target in set(targets) - CHECKED:
        # What .ci/run does not make is checked line by line.
        recipe = re.search(rf"^{target}:.*\n((?:\t.+\n)+)", MAKEFILE, re.M)
        assert recipe, f"{target}: no target of the Makefile"
        for line in recipe[1].splitlines():
            check(
                line.strip()
                .replace("$(VENV)", ".venv")
                .replace(" $(ARGS)", "")
                .replace("$(AT_LEAST)", "65")
            )
    check_pytest(shlex.split(named.get("ARGS", "")))


def check_pytest(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("paths", nargs="*")
    given = parser.parse_args(words)
    assert all((ROOT / path).exists() for path in given.paths), given.paths
    assert given.m is None or f'"{given.m}:' in (ROOT / "pyproject.toml").read_text(), given.m


def check_module(words):
    # pytest, or a module of the benchmarks that has tests, and options that it takes.
    module, *options = words
    if module == "pytest":
        return check_pytest(options)
    stem = module.removeprefix("benchmarks.")
    assert list(ROOT.glob(f"tests/benchmarks/test_{stem}.py")), module
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, words):
        parse(parser, words)
        raise InterruptedError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        pytest.raises(InterruptedError),
    ):
        import_module(module).main(options)


PROGRAMS = {
    "make": check_make,
    ".venv/bin/fastkl": lambda words: cli.build_parser().parse_args(words),
    ".venv/bin/python -m": check_module,
    "python -m": check_module,
    "gh api": lambda words: None,  # of the runner
}


def check(line):
    line = re.sub(r"^[A-Z_]+=\w+ ", "", line)
    program, how = next(
        ((each, how) for each, how in PROGRAMS.items() if line.startswith(each + " ")), ("", None)
    )
    assert how, f"{line}: expected one of {', '.join(PROGRAMS)}"
    how(shlex.split(line.removeprefix(program), comments=True))


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_commands_exist(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where parsers make folders for output
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "make tests",
        "make clean",
        'make test ARG="-m gpu"',
        "FASTKL_REQUIRE_GPU=1 .venv/bin/python -m pytest -m cuda",
        'make test ARGS="-m cuda"',
        'make test ARGS="tests/gone"',
        ".venv/bin/fastkl doctor --gpu",
        ".venv/bin/python -m benchmarks.fast --check",
        ".venv/bin/python -m benchmarks.speed --check --suite gone",
        "tox",
    ],
)
def test_a_command_that_is_gone_is_found(line):
    with pytest.raises((AssertionError, subprocess.CalledProcessError, SystemExit)):
        check(line)


@pytest.mark.parametrize(
    ("date", "tag", "version"),
    [("2026-11-30", "v1.1", "1.2"), ("Unreleased", "v1.1", None), ("2026-11-30", "v1.2", None)],
    ids=["to release", "not yet", "released"],
)
def test_what_is_released(date, tag, version, tmp_path):
    # A version with a date in the changelog and without a tag.
    (script,) = (step["run"] for _, step in STEPS if step.get("id") == "version")
    source = (ROOT / "fastkl" / "__init__.py").read_text()
    (tmp_path / "fastkl").mkdir()
    (tmp_path / "fastkl" / "__init__.py").write_text(
        re.sub(r"^__version__ = .*", '__version__ = "1.2"', source, flags=re.M)
    )
    (tmp_path / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## [1.2] - {date}\n\n## [1.1] - 2026-01-01\n"
    )
    author = "-c user.name=a -c user.email=a@b.c".split()
    for words in (
        ["init", "-q"],
        [*author, "commit", "-q", "--allow-empty", "-m", "x"],
        ["tag", tag],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    environment = {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(tmp_path / "output")}
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    output = tmp_path / "output"
    assert (output.read_text() if output.exists() else "") == f"version={version}\n" * bool(version)
