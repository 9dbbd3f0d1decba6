"""The structure as a test: sizes of files, and that a public module leads to its tests.

Who may import whom, and how large a function may be, is in pyproject.toml for `make lint`.
"""

import ast
from pathlib import Path

import fastkl

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "fastkl", "benchmarks", "tests")
LONGEST = 400


def test_type_checkers_see_the_names_of_the_facade():
    tree = ast.parse((ROOT / "fastkl" / "__init__.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in first.body for alias in node.names}
    assert seen == set(fastkl.__all__)


def test_public_modules_have_tests_of_their_name():
    stems = {path.stem for path in (ROOT / "fastkl").glob("*.py") if not path.stem.startswith("_")}
    missing = [stem for stem in stems if not list((ROOT / "tests").rglob(f"test_{stem}.py"))]
    assert not missing


def test_files_are_short():
    linked, lengths = ROOT / "fastkl" / "kernels", {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if linked not in path.parents:
            lengths[str(path)] = len(path.read_text().splitlines())
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST}
