"""Build the kernel repository for Hugging Face's `kernels`: `python hub/build.py FOLDER`, in a
checkout.

FOLDER becomes a kernel repository: the model card, the licence, and a variant build/torch-BACKEND
for each backend of build.toml. A variant is the package without the command line and integrations,
which need other packages. Files are copied unchanged: imports within the package are relative, and
its ops use its name as namespace.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEFT_OUT = ("tools", "integrations", "__pycache__", "*.md", ".*")


def build(out: Path) -> None:
    """Write the repository to a folder, which must not exist."""
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    out.mkdir(parents=True)
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "fastkl", variant, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (variant / "metadata.json").write_text(
            json.dumps(metadata(variant, general, backend), indent=1) + "\n", encoding="utf-8"
        )
    shutil.copy(HERE / "README.md", out)
    shutil.copy(ROOT / "LICENSE", out)


def metadata(variant: Path, general: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the loader's metadata for a variant: digests of its files, and a module name unique to
    the build.
    """
    files = {}
    for path in sorted(path for path in variant.rglob("*") if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).digest()
        files[path.relative_to(variant).as_posix()] = base64.b64encode(digest).decode()
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    return {
        "name": general["name"],
        "id": f"_{general['name']}_{backend}_{unique}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    build(Path(folder))
