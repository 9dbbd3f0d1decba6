# The annotations as a user's type checker reads them: mypy --strict on typed_user.py.

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Stand-in for torch: reading torch itself takes mypy ten seconds.
TORCH = {
    "__init__.pyi": """
from typing import Any
from . import nn as nn
def __getattr__(name: str) -> Any: ...
class dtype: ...
class Tensor:
    def mean(self) -> Tensor: ...
    def sum(self) -> Tensor: ...
    def __add__(self, other: Tensor) -> Tensor: ...
    def __getattr__(self, name: str) -> Any: ...
""",
    "nn.pyi": """
from typing import Any, Callable
from . import Tensor
class Parameter(Tensor): ...
class Module:
    __call__: Callable[..., Any]
    def __getattr__(self, name: str) -> Any: ...
""",
}


def test_a_typed_user(tmp_path) -> None:
    # Every line marked `# refused` is an error of its own, and no other line is.
    user = ROOT / "tests" / "repo" / "typed_user.py"
    (tmp_path / "torch").mkdir()
    for file, text in TORCH.items():
        (tmp_path / "torch" / file).write_text(text)
    # Of the package only the annotations are read here; what its own bodies say is another check's
    # affair.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n"
        f"mypy_path = {tmp_path},{ROOT}\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-site-packages", str(user)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = {int(line) for line in re.findall(r"typed_user\.py:(\d+): error", result.stdout)}
    lines = enumerate(user.read_text().splitlines(), 1)
    assert errors == {at for at, line in lines if line.endswith("# refused")}, result.stdout
