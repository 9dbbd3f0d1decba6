"""The architecture as a test: who may import whom, how large a piece of code may be, and that a public name leads to its words and its tests.

Everything is read from the source with `ast`; nothing is imported, so this runs without torch.
"""

import ast
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# ---- the rules

KERNELS = ("fastkl.kernels*",)
REFERENCE = ("fastkl.reference",)
SHARED = ("fastkl._*", "fastkl.backend")
OPS = tuple(f"fastkl.{stem}" for stem in ("divergence", "tokens", "linear", "topk", "estimators"))
PENALTY = ("fastkl.penalty",)
RL = ("fastkl.rl", "fastkl.rl.*")
# What tools and integrations use is what users use: a thing they need and cannot reach from here is missing from the interface.
PUBLIC = ("fastkl", "fastkl.reference", "fastkl.rl", "fastkl.testing")
ANY = ("*",)


@dataclass(frozen=True)
class Layer:
    """Modules, the modules of fastkl they may import, and the packages they may import beside the standard library, as patterns."""

    members: tuple[str, ...]
    internal: tuple[str, ...]
    external: tuple[str, ...] = ("torch",)


# A module belongs to the first layer that names it. Imports run downwards in this table, except that PUBLIC is the facade's own name.
LAYERS = {
    "kernels": Layer(KERNELS, KERNELS, ("torch", "triton")),
    "reference": Layer(REFERENCE, ()),
    # Right and wrong must not depend on the code under test.
    "testing": Layer(("fastkl.testing",), ()),
    "command line": Layer(("fastkl.__main__",), ("fastkl.tools.cli",)),
    "shared": Layer(SHARED, SHARED + REFERENCE + KERNELS, ("torch", "triton")),
    # It returns what the functions on logits return.
    "linear": Layer(("fastkl.linear",), SHARED + ("fastkl.tokens",)),
    "ops": Layer(OPS, SHARED + REFERENCE + KERNELS),
    "parallel": Layer(("fastkl.parallel",), SHARED + REFERENCE + KERNELS + OPS),
    "penalty": Layer(PENALTY, SHARED + OPS),
    "rl": Layer(RL, SHARED + OPS + PENALTY + RL),
    "facade": Layer(("fastkl",), SHARED + REFERENCE + OPS + PENALTY + ("fastkl.parallel", "fastkl.rl"), ()),
    # Switches row_fused on.
    "doctor": Layer(("fastkl.tools.doctor",), PUBLIC + ("fastkl.tools.files", "fastkl.kernels.config"), ANY),
    "tools": Layer(("fastkl.tools", "fastkl.tools.*"), PUBLIC + ("fastkl.tools", "fastkl.tools.*"), ANY),
    "integrations": Layer(("fastkl.integrations", "fastkl.integrations.*"), PUBLIC + ("fastkl.integrations", "fastkl.integrations.*"), ANY),
}

# Sizes that fit on a screen or a reading. A docstring's lines are not counted in a function: explaining more must not cost more.
LIMITS = {"lines in a file": 400, "lines in a function": 60, "lines in a kernel": 100, "run-time parameters of a kernel": 24}
# "path" or "path::function" -> why splitting it would hurt the reader.
TOO_LARGE_FOR_A_REASON: dict[str, str] = {}

# "stem" -> "test_x.py": public modules that need no tests/test_<stem>.py of their own, and where they are tested instead.
TESTED_ELSEWHERE: dict[str, str] = {}


# ---- reading the source


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; `lazy` if inside a function, `typing` if under `if TYPE_CHECKING`."""

    target: str
    line: int
    lazy: bool
    typing: bool


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


class ImportReader(ast.NodeVisitor):
    """Collects the imports of one module: statements, and importlib.import_module with a literal name."""

    def __init__(self, module, is_package, known):
        self.package = module if is_package else module.rpartition(".")[0]
        self.known = known
        self.found, self.functions, self.typing = [], 0, 0

    def add(self, target, node):
        self.found.append(Import(target, node.lineno, self.functions > 0, self.typing > 0))

    def visit_Import(self, node):  # noqa: N802 - ast calls these by the node's name
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node):  # noqa: N802
        base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:  # `from package import name`: the name may be a module
            full = f"{source}.{alias.name}"
            self.add(full if full in self.known else source, node)

    def visit_Call(self, node):  # noqa: N802
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
            self.add(str(node.args[0].value), node)
        self.generic_visit(node)

    def visit_If(self, node):  # noqa: N802
        guard = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        self.typing += guard
        for child in node.body:
            self.visit(child)
        self.typing -= guard
        for child in [node.test, *node.orelse]:
            self.visit(child)

    def visit_FunctionDef(self, node):  # noqa: N802
        self.functions += 1
        self.generic_visit(node)
        self.functions -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815


def imports_of(source, module, *, is_package=False, known=frozenset()):
    reader = ImportReader(module, is_package, known)
    reader.visit(ast.parse(source))
    return reader.found


def layer_of(module):
    for name, layer in LAYERS.items():
        if any(fnmatchcase(module, pattern) for pattern in layer.members):
            return name, layer
    return None


def import_faults(source, module, *, is_package=False, known=frozenset()):
    """What is wrong with a module's imports, one sentence each."""
    found = layer_of(module)
    if found is None:
        return [f"{module}: expected a module of a layer, got one in none; remedy: add it to LAYERS in tests/test_layering.py"]
    name, layer = found
    faults = []
    for item in imports_of(source, module, is_package=is_package, known=known):
        where, top = f"{module}, line {item.line}", item.target.partition(".")[0]
        if top == "kernels":
            faults.append(f"{where}: imports {item.target}; remedy: fastkl.{item.target}, because `kernels` alone may be another package")
        elif top == "fastkl":
            if not any(fnmatchcase(item.target, pattern) for pattern in layer.internal):
                faults.append(f"{where}: {name} may import {', '.join(layer.internal) or 'nothing'} of fastkl, got {item.target}")
        elif top not in sys.stdlib_module_names and not any(fnmatchcase(top, pattern) for pattern in layer.external):
            faults.append(f"{where}: {name} may import {', '.join(layer.external) or 'nothing'} beside the standard library, got {item.target}")
        needs_triton = top == "triton" or item.target.startswith("fastkl.kernels")
        if needs_triton and name != "kernels" and not (item.lazy or item.typing):
            faults.append(f"{where}: imports {item.target} at module level; remedy: inside the function that uses it, for users without Triton")
    return faults


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


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    path = FILES[module]
    faults = import_faults(path.read_text(), module, is_package=path.name == "__init__.py", known={*FILES, "fastkl.kernels"})
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "module, source, fault",
    [
        ("fastkl.kernels.row", "import numpy", "got numpy"),
        ("fastkl.kernels.row", "from .. import reference", "got fastkl.reference"),
        ("fastkl.kernels.row", "from .math import merge\nimport math, torch, triton.language as tl", None),
        ("fastkl.reference", "from . import _checks", "got fastkl._checks"),
        ("fastkl.divergence", "import triton", "remedy: inside the function"),
        ("fastkl.divergence", "from .kernels.row import launch", "remedy: inside the function"),
        ("fastkl.divergence", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .kernels.row import Config", None),
        ("fastkl.divergence", "def f():\n    from .kernels import row", None),
        ("fastkl.divergence", "def f():\n    from kernels import row", "remedy: fastkl.kernels"),
        ("fastkl.divergence", "import importlib\ndef f():\n    importlib.import_module('fastkl.rl')", "got fastkl.rl"),
        ("fastkl.divergence", "from .penalty import KLPenalty", "got fastkl.penalty"),
        ("fastkl.penalty", "from .rl import AdaptiveBeta", "got fastkl.rl"),
        ("fastkl.rl.losses", "from ..divergence import kl_divergence\nfrom .beta import FixedBeta", None),
        ("fastkl.tools.compare", "from fastkl import kl_divergence, rl\nimport matplotlib.pyplot", None),
        ("fastkl.tools.compare", "from fastkl import _checks", "got fastkl._checks"),
        ("fastkl.integrations.trl", "def f():\n    from ..kernels import row", "got fastkl.kernels.row"),
        ("fastkl.novelty", "", "in none"),
    ],
)
def test_the_import_rules_bite(module, source, fault):
    known = {"fastkl._checks", "fastkl.reference", "fastkl.rl", "fastkl.kernels", "fastkl.kernels.row"}
    faults = import_faults(source, module, known=known)
    assert (faults == []) if fault is None else any(fault in sentence for sentence in faults), faults


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
