"""Files of results: whole or not at all, and JSON without NaN."""

import json
import math

import pytest

from fastkl.tools.files import json_text, write_whole


def test_whole_or_not_at_all(tmp_path):
    """What fails half-way leaves the old file, and nothing beside it."""
    target = tmp_path / "x.html"
    write_whole(target, b"before")

    def parts():
        yield "half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(target, parts())
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]
    before = target.stat().st_ino
    write_whole(target, ["nach", "her: ü"])
    assert target.read_text(encoding="utf-8") == "nachher: ü" and target.stat().st_ino != before and list(tmp_path.iterdir()) == [target]


def test_json_without_nan():
    """Numbers that are not finite become null at any depth."""
    assert json.loads(json_text({"a": [math.inf, (math.nan, 1.5)], "b": "ü"})) == {"a": [None, [None, 1.5]], "b": "ü"}
