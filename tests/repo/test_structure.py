"""The structure as a test: sizes of files, and that a public module leads to its tests.

Who may import whom, and how large a function may be, is in pyproject.toml for `make lint`.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "fastkl", "benchmarks", "tests")
LONGEST = 400
BEING_SPLIT = {
    "tests/linear/distributed_worker.py",
    "tests/linear/linear_cases.py",
    "tests/linear/test_linear.py",
    "tests/linear/test_linear_costs.py",
    "tests/linear/test_linear_heads.py",
    "tests/linear/test_linear_ops.py",
    "tests/linear/test_linear_torch.py",
    "tests/ops/test_dispatch.py",
    "tests/ops/test_torch.py",
}


def test_facade_has_no_logic():
    """Imports for checkers, one table, and the two functions that read it; all three name the same
    things from the same modules."""
    tree = ast.parse((ROOT / "fastkl" / "__init__.py").read_text())
    plain = (ast.Import, ast.Assign, ast.Expr)
    branches = [node for node in tree.body if not isinstance(node, plain)]
    assert [ast.unparse(node.test) for node in branches] == [
        "typing.TYPE_CHECKING",
        "not typing.TYPE_CHECKING",
    ]
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    assert set(values) == {"__all__", "__version__", "_HOMES", "_MODULES"}
    assert {node.name for node in branches[1].body} == {"__getattr__", "__dir__"}
    imported = [
        (alias.name, alias.asname, node.module) for node in branches[0].body for alias in node.names
    ]
    assert all(name == seen for name, seen, _ in imported), "re-exports for checkers need `as`"
    assert {name: home for name, _, home in imported if home} == values["_HOMES"]
    modules = [name for name, _, home in imported if not home]
    assert sorted([*values["_HOMES"], *modules]) == values["__all__"]
    assert {*values["_HOMES"].values(), *modules} <= set(values["_MODULES"])


def test_public_modules_have_tests_of_their_name():
    stems = {path.stem for path in (ROOT / "fastkl").glob("*.py") if not path.stem.startswith("_")}
    missing = [stem for stem in stems if not list((ROOT / "tests").rglob(f"test_{stem}.py"))]
    assert not missing


def test_files_are_short():
    linked = ROOT / "fastkl" / "kernels"
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    lengths = {
        path: len(path.read_text().splitlines()) for path in paths if linked not in path.parents
    }
    over = {
        str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST
    }
    assert not {name: lines for name, lines in over.items() if name not in BEING_SPLIT}
