"""The entries that the tuner writes into the table of launch configurations, and what the table then selects."""

import ast
import dataclasses
import sys
import types

import pytest

pytest.importorskip("triton")

from benchmarks import tune, tune_entry  # noqa: E402
from fastkl.kernels import config  # noqa: E402

PRESENT = config.RowConfig(128, 4, 32768, "measured before")


def times(forward, few=None):
    """The same milliseconds for both operations of forward, at 8192 rows and at 64."""
    return {operation: {64: few or forward / 100, 8192: forward} for operation in tune.WEIGHTS["forward"]}


def table_of(source):
    """The module that a source of kernels/config.py is."""
    module = sys.modules["config_with_entries"] = types.ModuleType("config_with_entries")
    exec(compile(ast.parse(source), "config.py", "exec"), module.__dict__)
    return module


def written(source, max_v, chosen, itemsize=2):
    """The source with everything that the tuner writes for sm_90."""
    everything = {**tune.hidden_by("sm_90", itemsize, max_v), max_v: chosen}
    for limit, configs in everything.items():
        source = tune_entry.with_entry(source, "sm_90", itemsize, limit, tune.entry_line("sm_90", itemsize, limit, configs))
    return source


@pytest.fixture
def without_sm_90(monkeypatch):
    """The table and its source as they are without entries for sm_90."""
    monkeypatch.setattr(config, "TABLE", tuple(entry for entry in config.TABLE if entry.arch != "sm_90"))
    source = tune_entry.TABLE_FILE.read_text(encoding="utf-8")
    for entry in table_of(source).TABLE:
        if entry.arch == "sm_90":
            source = tune_entry.with_entry(source, "sm_90", entry.itemsize, entry.max_v, "")
    assert [entry.arch for entry in table_of(source).TABLE] == [entry.arch for entry in config.TABLE]
    return source


@pytest.mark.parametrize("max_v", [None, 2048])
def test_the_entry_goes_into_the_table(max_v, without_sm_90):
    source = without_sm_90
    for number in range(2):  # the second replaces the first
        chosen = {"forward": config.RowConfig(256, 2, 8192, f"H200: run {number}", 168), "backward": config.RowConfig(128, 1, 4096, "H200: 1 ms")}
        source = tune_entry.with_entry(source, "sm_90", 2, max_v, tune.entry_line("sm_90", 2, max_v, chosen))
    assert source.count('Entry("sm_90", 2') == 1 and "run 0" not in source
    module = table_of(source)
    entry = module.TABLE[[one.arch for one in module.TABLE].index("sm_90")]
    assert (entry.itemsize, entry.max_v) == (2, max_v)
    assert dataclasses.asdict(entry.forward) == dataclasses.asdict(chosen["forward"])
    assert dataclasses.asdict(entry.backward) == dataclasses.asdict(chosen["backward"])
    assert module.select("forward", "sm_90", 2, 1000) == entry.forward
    assert module.select("forward", "sm_80", 2, 1000) != entry.forward
    assert all(line in source.splitlines() for line in without_sm_90.splitlines())


def test_small_vocabularies_keep_what_they_have(without_sm_90, monkeypatch):
    """An entry for any vocabulary comes before the defaults for small ones, so they are written too, with what they rest on, until they are tuned."""
    default = {direction: config.select(direction, "sm_90", 2, 1000) for direction in tune.DIRECTIONS}
    chosen = dict.fromkeys(tune.DIRECTIONS, config.RowConfig(256, 2, 8192, "H200: 1 ms"))
    bare = tune_entry.with_entry(without_sm_90, "sm_90", 2, None, tune.entry_line("sm_90", 2, None, chosen))
    assert table_of(bare).select("forward", "sm_90", 2, 1000).segment == 8192, "what would happen without"
    source = written(without_sm_90, None, chosen)
    module = table_of(source)
    for direction in tune.DIRECTIONS:
        assert dataclasses.asdict(module.select(direction, "sm_90", 2, 1000)) == dataclasses.asdict(default[direction])
        assert module.select(direction, "sm_90", 2, 2048).measured == default[direction].measured
        assert module.select(direction, "sm_90", 2, 2049).segment == module.select(direction, "sm_90", 2, 128256).segment == 8192
        assert module.select(direction, "sm_90", 4, 1000) == module.select(direction, "sm_80", 4, 1000), "another element size"
    # What is tuned for small ones afterwards replaces the copy, and is kept when the large ones are tuned again.
    monkeypatch.setattr(config, "TABLE", tuple(module.TABLE))
    small = dict.fromkeys(tune.DIRECTIONS, config.RowConfig(128, 1, 2048, "H200: small"))
    source = written(source, 2048, small)
    monkeypatch.setattr(config, "TABLE", tuple(table_of(source).TABLE))
    source = written(source, None, dict.fromkeys(tune.DIRECTIONS, config.RowConfig(512, 1, 16384, "H200: again")))
    module = table_of(source)
    assert module.select("forward", "sm_90", 2, 1000).measured == "H200: small" and module.select("backward", "sm_90", 2, 4096).segment == 16384
    assert source.count('Entry("sm_90", 2') == 2
    # One for up to 50000 hides the same default; one for up to 1000 hides none.
    monkeypatch.setattr(config, "TABLE", tuple(table_of(without_sm_90).TABLE))
    assert set(tune.hidden_by("sm_90", 2, 50000)) == {2048} and tune.hidden_by("sm_90", 2, 1000) == {} == tune.hidden_by("sm_90", 2, 2048)


def test_the_table_finds_the_entry_for_the_smaller_vocabulary_first(without_sm_90):
    """Whichever was tuned first; long texts make no long lines."""
    for order in ((None, 2048), (2048, None)):
        source = without_sm_90
        for max_v in order:
            chosen = dict.fromkeys(tune.DIRECTIONS, config.RowConfig(128, 1, 1024 if max_v else 8192, f"up to {max_v}, " * 20, 168))
            source = tune_entry.with_entry(source, "sm_90", 2, max_v, tune.entry_line("sm_90", 2, max_v, chosen))
        module = table_of(source)
        assert module.select("forward", "sm_90", 2, 1000).segment == 1024
        assert module.select("forward", "sm_90", 2, 128256).segment == 8192
        assert max(map(len, source.splitlines())) <= 150
    with pytest.raises(ValueError, match="add the entry by hand"):
        tune_entry.with_entry("TABLE = ()\n", "sm_90", 2, None, "an entry")


def test_what_an_entry_says_of_its_measurement():
    present, fast = tune.Trial(PRESENT, times=times(2.0)), tune.Trial(PRESENT, times=times(1.0, few=0.012345))
    assert tune.sentence(fast, present, 128256, "H200, Triton 3.6.0, 2026-01-01", "9 of 20 candidates") == (
        "H200, Triton 3.6.0, 2026-01-01: kl_divergence 0.01235 and 1 ms, token_stats 0.01235 and 1 ms at 64 and 8192 rows of 128256; "
        "90% faster than the one before; best of 9 of 20 candidates")
    assert tune.sentence(present, present, 128256, "H200", "9 of 20 candidates").endswith("; none of 9 of 20 candidates passed and was faster")
    present.refused = "wrong"
    assert tune.sentence(fast, present, 128256, "H200", "9 of 20 candidates").endswith("128256; best of 9 of 20 candidates")
