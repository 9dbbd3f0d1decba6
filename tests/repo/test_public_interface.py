# The names, signatures and options of the last release change with a higher version and a word in
# the changelog only.

import copy
import json
import re

import public_interface
import pytest

OLD = json.loads(public_interface.SNAPSHOT.read_text())
SIGNATURE = OLD["names"]["fastkl.kl_divergence"]


def test_changes_since_the_last_release():
    pytest.importorskip("trl")  # else its trainers look removed
    changelog = (public_interface.SNAPSHOT.parents[2] / "CHANGELOG.md").read_text()
    assert not list(public_interface.complaints(OLD, public_interface.surface(), changelog))
    # Of an older snapshot each name in the sections since could change once more, unsaid.
    dated = re.search(r"^## \[([\d.]+)\] - \d{4}-", changelog, flags=re.M)[1]
    assert dated == OLD["version"], "run python tests/repo/public_interface.py --write"


@pytest.mark.parametrize(
    ("name", "value", "version", "said", "complaint"),
    [
        ("fastkl.rl.new_loss", ["(x)"], "9.1.1", "`new_loss(x)`", None),
        ("fastkl.rl.new_loss", ["(x)"], "9.1.0", "`new_loss`", "a version above 9.1.0"),
        ("fastkl.rl.new_loss", ["(x)"], "9.1.1", "new_loss", "got none of fastkl.rl.new_loss"),
        ("fastkl.new.loss", ["(x)"], "9.1.1", "`fastkl.new`", None),
        ("fastkl.new.loss", ["(x)"], "9.1.1", "`fastkl.rl`", "got none of fastkl.new;"),
        ("fastkl.kl_divergence", None, "9.2.0", "`kl_divergence`", None),
        ("fastkl.kl_divergence", None, "9.1.1", "`kl_divergence`", "a minor version above 9.1.0"),
        ("fastkl.kl_divergence", None, "9.2.0", "`js_divergence`", "none of fastkl.kl_divergence;"),
        ("fastkl.kl_divergence", ["(p, q)"], "9.1.1", "`kl_divergence`", "a minor version"),
        ("fastkl compare --text", None, "10.0.0", "`--text FILE`", None),
        ("fastkl compare --text", None, "10.0.0", "`text`", "none of fastkl compare --text;"),
        ("fastkl.kl_divergence", SIGNATURE, "9.1.0", "nothing", None),
    ],
)
def test_the_guard(name, value, version, said, complaint):
    old, new = copy.deepcopy(OLD) | {"version": "9.1.0"}, copy.deepcopy(OLD) | {"version": version}
    new["names"] |= {name: value}
    if value is None:
        del new["names"][name]
    changelog = f"# Changelog\n\n## [Unreleased]\n\n## [{version}] - Unreleased\n\n{said}\n"
    changelog += "\n## [0.9.0]\n\n`kl_divergence`, `new_loss`, `--text`\n"
    found = list(public_interface.complaints(old, new, changelog))
    assert len(found) == (complaint is not None), found
    assert not complaint or complaint in found[0] and "; remedy: " in found[0]


def test_what_the_surface_shows():
    # Defaults, fields, methods, properties and options, without annotations.
    class Fields:
        __module__ = "fastkl.made"

        def __init__(self, beta: float, *, kind=int) -> None: ...
        def update(self, kl, n: int = 1): ...
        def _hidden(self): ...
        @property
        def rate(self): ...

    shown = ["(beta, *, kind='int')", "rate", "update(self, kl, n=1)"]
    assert public_interface.described(Fields) == shown
    assert public_interface.described(0.5) == []
    options = dict(public_interface.options())
    assert options["fastkl compare --by"] == ["choices=('document', 'line')", "default=document"]
    assert options["fastkl plot RUN.jsonl"] == ["nargs=+", "required=True"]
