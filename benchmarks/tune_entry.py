"""What benchmarks.tune writes: entries of the table in kernels/config.py, each with the measurement it rests on."""
import json
import math
import re
import sys
from dataclasses import fields

from benchmarks.record import ROOT, write_bytes

TABLE_FILE = ROOT / "kernels" / "config.py"
DIRECTIONS = ("forward", "backward")


def sentence(chosen, present, vocabulary, machine, tried):
    """What a configuration's `measured` says of two trials with times; tried: how many candidates of how many."""
    rows = " and ".join(map(str, next(iter(chosen.times.values()))))
    times = ", ".join(f"{operation} {' and '.join(f'{ms:.4g}' for ms in by_rows.values())} ms" for operation, by_rows in chosen.times.items())
    times = f"{machine}: {times} at {rows} rows of {vocabulary}"
    if chosen is present:
        return f"{times}; none of {tried} passed and was faster"
    gain = f"; {present.score / chosen.score - 1:.0%} faster than the one before" if present.score < math.inf else ""
    return f"{times}{gain}; best of {tried}"


def entry_line(arch, itemsize, max_v, configs):
    """The entry as lines of the table; configs: {"forward": RowConfig, "backward": RowConfig}."""
    parts = [f"{' ' * 10}{_literal(configs[direction])}" for direction in DIRECTIONS]
    return f'    Entry("{arch}", {itemsize}, {max_v},\n' + ",\n".join(parts) + "),\n"


def _literal(config):
    """A RowConfig as it stands in the table; fields that have their default are left out."""
    named = [f", {one.name}={getattr(config, one.name)!r}" for one in fields(config)
             if one.name not in ("threads", "groups", "segment", "measured") and getattr(config, one.name) != one.default]
    return f"RowConfig({config.threads}, {config.groups}, {config.segment},\n{' ' * 20}{_quoted(config.measured)}{''.join(named)})"


def _quoted(text):
    """A string literal, over several lines where one would be too long."""
    return f"\n{' ' * 20}".join(json.dumps(part, ensure_ascii=False) for part in re.findall(r".{1,100}(?: |$)", text))


def hidden_by(arch, itemsize, max_v):
    """{max_v: configs} of the entries for small vocabularies and any architecture that are found today and that a new entry would hide."""
    from fastkl.kernels import config

    found = {}
    for entry in config.TABLE:
        if (entry.arch, entry.itemsize) != ("*", itemsize) or entry.max_v is None or (max_v is not None and entry.max_v >= max_v):
            continue
        fitting = (one for one in config.TABLE if one.arch in (arch, "*") and one.itemsize == itemsize)
        if next(one for one in fitting if one.max_v is None or one.max_v >= entry.max_v) is entry:
            found[entry.max_v] = {direction: getattr(entry, direction) for direction in DIRECTIONS}
    return found


def with_entry(source, arch, itemsize, max_v, line):
    """The source of kernels/config.py with the entry, in place of an older one of the same key, else where `select` finds it: before the entries of
    this architecture for larger vocabularies, and before the defaults."""
    key = re.escape(f'    Entry("{arch}", {itemsize}, {max_v},')
    source = re.sub(rf"^{key}.*\n(?:^ {{10}}.*\n)*", "", source, flags=re.MULTILINE)
    limit = math.inf if max_v is None else max_v
    for found in re.finditer(r'^    Entry\("([^"]+)", (\d+), (\w+),', source, flags=re.MULTILINE):
        theirs = math.inf if found[3] == "None" else int(found[3])
        if found[1] == "*" or (found[1], int(found[2])) == (arch, itemsize) and theirs > limit:
            return source[:found.start()] + line + source[found.start():]
    raise ValueError(f'{TABLE_FILE}: expected a TABLE with defaults, Entry("*", ...), got none; add the entry by hand:\n{line}')


def write_entries(lines, arch, itemsize):
    """Puts {max_v: entry} into the table's file; the exit code."""
    try:
        source = TABLE_FILE.read_text(encoding="utf-8")
        for limit, line in lines.items():
            source = with_entry(source, arch, itemsize, limit, line)
        write_bytes(TABLE_FILE, source.encode())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {TABLE_FILE}; run the tests before it is committed")
    return 0
