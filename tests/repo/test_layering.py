"""The architecture as a test: how large a piece of code may be, and that a public name leads to its words and its tests.

Who may import whom is in pyproject.toml, for `make lint`.

Everything is read from the source with `ast`; nothing is imported, so this runs without torch.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# ---- the rules

# Sizes that fit on a screen or a reading. A docstring's lines are not counted in a function: explaining more must not cost more.
LIMITS = {"lines in a file": 400, "lines in a function": 60, "lines in a kernel": 100, "run-time parameters of a kernel": 24}
# "path" or "path::function" -> why splitting it would hurt the reader.
TOO_LARGE_FOR_A_REASON: dict[str, str] = {}

# "stem" -> "test_x.py": public modules that need no tests/test_<stem>.py of their own, and where they are tested instead.
TESTED_ELSEWHERE: dict[str, str] = {}


# ---- reading the source


def module_name(path):
    """fastkl/x.py -> fastkl.x; kernels/x.py -> fastkl.kernels.x; a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastkl", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(*folders):
    """Not through the symlink fastkl/kernels: those files are kernels/."""
    linked = ROOT / "fastkl" / "kernels"
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if linked not in path.parents)


FILES = {module_name(path): path for path in python_files("kernels", "fastkl")}


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_kernel(function):
    return any(ast.unparse(decorator).partition("(")[0] in {"triton.jit", "jit"} for decorator in function.decorator_list)


def run_time_parameters(function):
    """Those that are not tl.constexpr: a constexpr is no argument of the compiled kernel."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [item.arg for item in arguments if item.annotation is None or not ast.unparse(item.annotation).endswith("constexpr")]


def lines_of(function):
    """From `def` to the end, without the docstring."""
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        total -= function.body[0].end_lineno - function.body[0].lineno + 1
    return total


def sizes():
    """(what, kind of limit, got) of everything that has a limit."""
    for path in [*python_files("kernels", "fastkl", "benchmarks", "tests"), ROOT / "setup.py"]:
        name = path.relative_to(ROOT).as_posix()
        yield name, "lines in a file", len(path.read_text().splitlines())
        for function in functions(path):
            full = f"{name}::{function.name}"
            if is_kernel(function):
                yield full, "lines in a kernel", lines_of(function)
                yield full, "run-time parameters of a kernel", len(run_time_parameters(function))
            else:
                yield full, "lines in a function", lines_of(function)


# ---- the tests


def test_facade_has_no_logic():
    """Imports for checkers, one table, and the two functions that read it; all three name the same
    things from the same modules."""
    tree = ast.parse(FILES["fastkl"].read_text())
    plain = (ast.Import, ast.Assign, ast.Expr)
    branches = [node for node in tree.body if not isinstance(node, plain)]
    assert [ast.unparse(node.test) for node in branches] == ["typing.TYPE_CHECKING", "not typing.TYPE_CHECKING"]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    assert set(values) == {"__all__", "__version__", "_HOMES", "_MODULES"}
    assert {node.name for node in branches[1].body} == {"__getattr__", "__dir__"}
    imported = [(alias.name, alias.asname, node.module) for node in branches[0].body for alias in node.names]
    assert all(name == seen for name, seen, _ in imported), "re-exports for checkers need `as`"
    assert {name: home for name, _, home in imported if home} == values["_HOMES"]
    modules = [name for name, _, home in imported if not home]
    assert sorted([*values["_HOMES"], *modules]) == values["__all__"]
    assert {*values["_HOMES"].values(), *modules} <= set(values["_MODULES"])


def test_public_names_have_docstrings():
    missing = []
    for path in FILES.values():
        tree = ast.parse(path.read_text())
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")
                  and "overload" not in map(ast.unparse, node.decorator_list)]
        missing += [f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}" for node in [tree, *public] if not ast.get_docstring(node)]
    assert not missing, "without a docstring:\n" + "\n".join(missing)


def test_public_modules_have_tests_of_their_name():
    stems = {path.stem for path in (ROOT / "fastkl").glob("*.py")}
    expected = {stem for stem in stems if not stem.startswith("_")}
    missing = sorted(stem for stem in expected - set(TESTED_ELSEWHERE) if not (ROOT / "tests" / f"test_{stem}.py").exists())
    assert not missing, f"expected tests/test_<stem>.py for every public module fastkl/<stem>.py, got none for {', '.join(missing)}"
    gone = [name for name in TESTED_ELSEWHERE.values() if not (ROOT / "tests" / name).exists()]
    assert not gone, f"TESTED_ELSEWHERE names files that do not exist: {gone}"


def test_sizes():
    measured = list(sizes())
    over = [(what, kind, got) for what, kind, got in measured if got > LIMITS[kind]]
    unexcused = [f"{what}: {got} {kind}, expected at most {LIMITS[kind]}" for what, kind, got in over if what not in TOO_LARGE_FOR_A_REASON]
    assert not unexcused, "\n" + "\n".join(unexcused)
    stale = set(TOO_LARGE_FOR_A_REASON) - {what for what, _, _ in over}
    assert not stale, f"TOO_LARGE_FOR_A_REASON excuses what is within the limits: {sorted(stale)}"
    assert any(kind == "lines in a kernel" for _, kind, _ in measured), "no triton.jit function was found: is_kernel() no longer recognises them"
