"""The report of `fastkl doctor`: each check's line as it ends, the summary, what to paste into an issue, the JSON and the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import textwrap
import time
from pathlib import Path
from typing import TextIO

from ..files import json_text, write_whole
from .checks import STATUSES, Check, Outcome, checks_for
from .process import isolated

WIDTH = 80
RULE = "-" * WIDTH
ERASE = "\r\x1b[K"


def run_doctor(device: str, json_to: str | None = None) -> int:
    """Run all checks for a device, print the report, write it as JSON to a file or "-", and return the exit code: 1 if a check failed."""
    out = sys.stderr if json_to == "-" else sys.stdout
    checks, results, started = checks_for(device), [], time.monotonic()
    print(f"fastkl doctor: {len(checks)} checks on {device}, in about a minute at the most", file=out)
    with contextlib.closing(isolated(device, [check.key for check in checks])) as outcomes:
        for check in checks:
            if not results or results[-1][0].group != check.group:
                print(f"\n{check.group}", file=out)
            _show_running(check, out)
            results.append((check, next(outcomes)))
            print((ERASE if out.isatty() else "") + line(*results[-1]), file=out, flush=True)
    seconds = time.monotonic() - started
    issue = for_an_issue(results)
    print(f"\n{summary(results)} in {seconds:.0f} s", file=out)
    print(advice(results, issue), file=out)
    if json_to is not None:
        text = json_text(as_data(device, results, seconds, issue))
        if json_to == "-":
            print(text, end="")
        else:
            try:
                write_whole(Path(json_to), text)
            except OSError as error:
                print(f"fastkl doctor: error: {json_to!r} cannot be written ({error.strerror}); choose another file", file=sys.stderr)
                return 1
    return 1 if issue else 0


def _show_running(check: Check, out: TextIO) -> None:
    if out.isatty():
        out.write(f"  ...      {check.name}")
        out.flush()


def line(check: Check, outcome: Outcome) -> str:
    """One check in at most 80 columns: what does not fit goes on under its text."""
    head = f"  {outcome.status:<8} {check.name:<19} "
    lines = textwrap.wrap(outcome.text, WIDTH - len(head), break_on_hyphens=False) or [""]
    return head + ("\n" + " " * len(head)).join(lines)


def summary(results: list[tuple[Check, Outcome]]) -> str:
    """How many checks ended how."""
    counts = {status: sum(outcome.status == status for _, outcome in results) for status in STATUSES}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def advice(results: list[tuple[Check, Outcome]], issue: str | None) -> str:
    """What follows from the checks, in words."""
    if issue:
        return f"\nSomething is wrong. Paste this into an issue:\n\n{RULE}\n{issue}\n{RULE}"
    kernels = backend_of(results) == "triton"
    subject = "the kernels compile, run and agree" if kernels else "the reference backend agrees"
    whole = all(outcome.status == "ok" for check, outcome in results if check.group not in (results[0][0].group, "speed"))
    text = f"Nothing is wrong: {subject} with float64." if whole else "Nothing was found to be wrong, but not everything was checked: see skipped."
    if not kernels:
        text += " No kernel was run: that needs a GPU."
    if not gpus_seen(results):
        text += (" NO GPU WAS SEEN. Where there must be one, as in CI, use --device cuda: "
                 "a missing GPU is an error then.")
    return textwrap.fill(text, WIDTH)


def backend_of(results: list[tuple[Check, Outcome]]) -> object:
    """Name the backend that was compared with float64; None where that check did not run."""
    return _figure(results, "backend", "backend")


def gpus_seen(results: list[tuple[Check, Outcome]]) -> int:
    """Count the GPUs that torch saw."""
    return _figure(results, "GPU", "count") or 0


def _figure(results: list[tuple[Check, Outcome]], name: str, figure: str) -> object:
    return next((outcome.figures.get(figure) for check, outcome in results if check.name == name), None)


def for_an_issue(results: list[tuple[Check, Outcome]]) -> str | None:
    """What a maintainer needs to know, if a check failed: the machine, and every line that is a FAIL or a warning."""
    if not any(outcome.status == "FAIL" for _, outcome in results):
        return None
    machine = [f"{check.name}: {outcome.text}" for check, outcome in results
               if check.group == results[0][0].group and outcome.status in ("ok", "skipped")]
    rest = [f"{outcome.status} {check.key}: {outcome.text}" for check, outcome in results if outcome.status in ("FAIL", "warning")]
    return "\n".join("\n  ".join(textwrap.wrap(entry, WIDTH - 2, break_on_hyphens=False)) for entry in ["fastkl doctor", *machine, *rest])


def as_data(device: str, results: list[tuple[Check, Outcome]], seconds: float, issue: str | None) -> dict:
    """The report as JSON has it."""
    return {
        "device": device, "gpus_seen": gpus_seen(results), "backend": backend_of(results),
        "ok": issue is None, "seconds": round(seconds, 1),
        "checks": [{"group": check.group, "name": check.name, **dataclasses.asdict(outcome)} for check, outcome in results], "issue": issue,
    }
