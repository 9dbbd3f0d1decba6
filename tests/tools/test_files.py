"""Files of results: whole or not at all, and JSON without NaN."""

import json
import math
import os
import stat
import threading

import pytest

from fastkl.tools.files import check_writable, json_text, write_whole


def test_whole_or_not_at_all(tmp_path):
    # A write that fails half-way leaves the old file, and nothing beside it.
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
    assert target.read_text(encoding="utf-8") == "nachher: ü" and target.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [target]


def test_json_without_nan():
    # Numbers that are not finite become null at any depth.
    text = json_text({"a": [math.inf, (math.nan, 1.5)], "b": "ü"})
    assert json.loads(text) == {"a": [None, [None, 1.5]], "b": "ü"}


def test_what_is_no_regular_file_is_written_to(tmp_path):
    # A pipe gets the text, and stays a pipe.
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe)  # without a reader: it does not wait for one
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, ["one ", b"two"])
    reader.join(10)
    assert found == [b"one two"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("name", ["folder", "missing/x", "file/x", "x" * 300])
def test_what_cannot_be_written_is_known_before(tmp_path, name):
    # The check raises what writing would.
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for attempt in (check_writable, lambda path: write_whole(path, b"")):
        with pytest.raises(OSError):
            attempt(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_keeps_its_mode_and_a_link_stays_one(tmp_path, mode):
    # The link's file is written; a private file is private from the first byte on.
    target, link, seen = tmp_path / "x.json", tmp_path / "there" / "link", []
    target.write_text("before")
    target.chmod(mode)
    link.parent.mkdir()
    link.symlink_to(target)

    def parts():
        seen.extend(mode_of(path) for path in tmp_path.glob(".*.part"))
        yield "after"

    for path in (target, link):
        check_writable(path)
        write_whole(path, parts())
        assert mode_of(target) == mode and target.read_text() == "after"
    assert seen == [0o600] * 2 and [*link.parent.iterdir()] == [link] and link.is_symlink()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, mask, mode):
    # By a link that leads to no file yet.
    target, link = tmp_path / "x", tmp_path / "link"
    link.symlink_to(target)
    before = os.umask(mask)
    try:
        write_whole(link, b"x")
    finally:
        os.umask(before)
    assert mode_of(target) == mode and link.is_symlink()
