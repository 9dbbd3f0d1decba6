# The structure as a test: sizes of files, that a public module leads to its tests, and that each
# fault of `make mutants` has its text.
# Who may import whom, and how large a function may be, is in pyproject.toml for `make lint`.

import ast
import importlib
from pathlib import Path

import pytest

import fastkl

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "fastkl", "benchmarks", "hub", "tests")
LONGEST = 400


def test_type_checkers_see_the_names_of_the_facade():
    tree = ast.parse((ROOT / "fastkl" / "__init__.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for node in first.body for alias in node.names} == set(fastkl.__all__)


def test_public_modules_have_tests_of_their_name():
    stems = {path.stem for path in (ROOT / "fastkl").glob("*.py") if not path.stem.startswith("_")}
    assert not [stem for stem in stems if not list((ROOT / "tests").rglob(f"test_{stem}.py"))]


def test_files_are_short():
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert not [path for path in paths if len(path.read_text().splitlines()) > LONGEST]


def test_mutants_replace_texts_of_the_source():
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    named = [name for fault in importlib.import_module("mutants").faults() for name in fault.tests]
    for path, _, test in (name.partition("::") for name in named if name.startswith("tests/")):
        assert f"def {test}" in (ROOT / path).read_text()
