"""The annotations of fastkl.rl as a type checker reads them: mypy --strict on typed_rl_user.py."""

from __future__ import annotations

import re
import subprocess
import sys

from test_typing import ROOT, TORCH

USER = ROOT / "tests" / "typed_rl_user.py"


def test_a_typed_user(tmp_path) -> None:
    """Every line marked `# refused` is an error of its own, and no other line is."""
    stubs = tmp_path / "torch"
    stubs.mkdir()
    for name, text in TORCH.items():
        (stubs / name).write_text(text)
    (stubs / "nn.pyi").write_text(
        TORCH["nn.pyi"] + "from . import Tensor\nclass Parameter(Tensor): ...\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n"
        f"mypy_path = {tmp_path},{ROOT}\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-site-packages", str(USER)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "error" in result.stdout, result.stdout + result.stderr
    errors = {int(line) for line in re.findall(r"typed_rl_user\.py:(\d+): error", result.stdout)}
    refused = {
        number
        for number, line in enumerate(USER.read_text().splitlines(), 1)
        if line.endswith("# refused")
    }
    assert errors == refused, result.stdout
