"""Files of results: written whole or not at all, in JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, content: bytes | Iterable[bytes | str]) -> None:
    """Write a file, text in UTF-8, so that it is either there in full or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            for piece in [content] if isinstance(content, (bytes, str)) else content:
                file.write(piece.encode() if isinstance(piece, str) else piece)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def json_text(data: object) -> str:
    """JSON in the order given, one line at the end; a number that is not finite becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
