"""Put one fault at a time into a copy of the kernels and of their definition, and run the nearest
tests, which must fail: `make mutants`, with Python 3.11 or newer.

The faults stand in mutants.toml, the results in docs/mutants.md: a table that is written whole at
the end. With --only, the rows of other faults stay as they were.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mutants.md"
# A fault may keep a loop from its end: a test that takes so many seconds has failed.
PYTEST = (
    *("pytest", "-x", "-q", "-p", "no:cacheprovider"),
    *("-o", "faulthandler_timeout=300", "-o", "faulthandler_exit_on_timeout=true"),
)


# A text of a file and its replacement; `tests` are arguments of pytest, interpreted as kernels are;
# equivalent: why no test can see it.
Fault = namedtuple(
    "Fault", "name text replacement file tests interpreted equivalent", defaults=[""]
)


# Read the faults; raise for a text that its file does not hold exactly once.
def faults() -> list[Fault]:
    found = []
    for group in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["group"]:
        rows = group.pop("faults")
        found += [Fault(*row[:3], **{**group, **dict(*row[3:])}) for row in rows]
    for fault in found:
        if (ROOT / fault.file).read_text().count(fault.text) != 1:
            raise SystemExit(
                f"{fault.name}: expected its text exactly once in {fault.file}; remedy: change the "
                f"entry in tests/mutants.toml"
            )
    return found


# Name the first test that fails in a copy of the repository; "" if all pass.
def failure(tree: Path, tests: list[str], interpreted: bool) -> str:
    # No compiled files: a replacement of equal length, written in the same second, would not
    # outdate them.
    fixed = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *PYTEST, *tests],
        cwd=tree,
        env={**os.environ, **fixed, "TRITON_INTERPRET": "01"[interpreted]},
        capture_output=True,
        text=True,
    )
    assert done.returncode < 2, f"{tests}: expected tests that run, got {done.stdout}{done.stderr}"
    named = re.search(r"^FAILED \S+?::(\w+)", done.stdout, re.MULTILINE)
    return named.group(1) if named else "a crash" * (done.returncode != 0)


# Run a fault's tests with the fault in `tree`, a copy; its row of the table.
def row_of(fault: Fault, tree: Path, commit: str) -> str:
    path, start = tree / fault.file, time.perf_counter()
    right = path.read_text()
    path.write_text(right.replace(fault.text, fault.replacement))
    failed = failure(tree, fault.tests, fault.interpreted)
    path.write_text(right)
    missed = f"equivalent: {fault.equivalent}" if fault.equivalent else "**survived**"
    found, seconds = f"`{failed}`" if failed else missed, time.perf_counter() - start
    return f"| {fault.name} | {fault.file} | {found} | {seconds:.0f} | {commit} |"


# Write the table; return the number of survivors that are no named equivalents.
def main() -> int:
    parser = argparse.ArgumentParser(description="Which faults do the tests find?")
    parser.add_argument("--only", nargs="+", default=[""], help="words of names or of files")
    words, every = parser.parse_args().only, faults()
    chosen = [one for one in every if any(word in f"{one.file} {one.name}" for word in words)]
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.check_output(describe, cwd=ROOT, text=True).strip()
    head, *old = PAGE.read_text().split("\n| ")
    rows = {row.split(" | ")[0]: f"| {row.strip()}" for row in old}
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "demo-run")
        tree = Path(shutil.copytree(ROOT, f"{folder}/tree", symlinks=True, ignore=ignored))
        for tests, interpreted in {(tuple(one.tests), one.interpreted) for one in chosen}:
            assert not failure(tree, [*tests], interpreted), f"{tests} without a fault"
        for fault in chosen:
            rows[fault.name] = row_of(fault, tree, commit)
            print(rows[fault.name], flush=True)
    lines = [head, rows["fault"], *(rows[one.name] for one in every if one.name in rows), ""]
    PAGE.write_text("\n".join(lines))
    return sum("**survived**" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
