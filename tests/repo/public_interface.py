# The public surface of fastkl as data: names, signatures with defaults, fields, methods and the
# options of the command line. public_interface.json is that of the last release;
#   python tests/repo/public_interface.py --write
# makes it anew, in the commit that dates a version in CHANGELOG.md.

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

SNAPSHOT = Path(__file__).with_suffix(".json")
INTEGRATIONS = tuple(
    f"fastkl.integrations.{name}" for name in ("gkd", "megatron", "transformers", "trl", "verl")
)
MODULES = ("fastkl", "fastkl.rl", "fastkl.testing", "fastkl.tools.compare", *INTEGRATIONS)


def ours(thing):
    return (getattr(thing, "__module__", None) or "").startswith("fastkl")


def signature(function):
    # Without annotations, whose text differs between Pythons; a default by its name, if it has one.
    parameters = [
        each.replace(annotation=each.empty, default=getattr(each.default, "__name__", each.default))
        if each.default is not each.empty
        else each.replace(annotation=each.empty)
        for each in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def described(thing):
    # [how it is called, its public methods and properties]; constants are names alone.
    if not inspect.isclass(thing):
        return [signature(thing)] if callable(thing) else []
    maker = next(c for c in thing.__mro__ if {"__init__", "__new__"} & vars(c).keys())
    members = {}
    for base in filter(ours, reversed(thing.__mro__)):
        for name, member in vars(base).items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) or isinstance(member, property):
                members[name] = "" if isinstance(member, property) else signature(function)
    public = sorted(name + how for name, how in members.items() if not name.startswith("_"))
    return [signature(thing) if ours(maker) else "(...)", *public]


def options():
    # Each option of each sub-command: its choices, count and default.
    from fastkl.tools import cli

    (commands,) = (x for x in cli.build_parser()._actions if hasattr(x.choices, "items"))
    for command, parser in commands.choices.items():
        for each in parser._actions[1:]:  # after --help
            name = each.option_strings[-1] if each.option_strings else each.metavar
            facts = {key: getattr(each, key) for key in ("choices", "nargs", "default", "required")}
            yield f"fastkl {command} {name}", [f"{key}={x}" for key, x in facts.items() if x]


def surface():
    found = dict(options())
    for name in MODULES:
        module = importlib.import_module(name)
        home = "" if name in INTEGRATIONS else name  # whose constants are their own affair
        defined = [n for n, x in vars(module).items() if getattr(x, "__module__", home) == name]
        for public in getattr(module, "__all__", defined):
            thing = getattr(module, public)
            if not (public.startswith("_") or inspect.ismodule(thing)):
                found[f"{name}.{public}"] = described(thing)
    import fastkl

    return {"version": fastkl.__version__, "names": dict(sorted(found.items()))}


def complaints(old, new, changelog):
    # Complaints about a changed surface: no higher version, no words in the changelog.
    before, after = old["names"], new["names"]
    broken = sorted(name for name in before if after.get(name) != before[name])
    changed = broken + sorted(after.keys() - before.keys())
    step, parts = ("a minor", 2) if broken else ("a", 3)
    had, got = (re.findall(r"\d+", each["version"])[:parts] for each in (old, new))
    if changed and [*map(int, got)] <= [*map(int, had)]:
        yield (
            f"__version__: expected {step} version above {old['version']}, because these changed: "
            f"{', '.join(broken or changed)}; got {new['version']}; remedy: raise it in "
            f"fastkl/__init__.py, and give CHANGELOG.md a section of that version"
        )
    sections = re.findall(
        rf"^## \[(?:Unreleased|{re.escape(new['version'])})\].*((?:\n(?!## ).*)*)", changelog, re.M
    )
    said = {word for code in re.findall(r"`([^`]+)`", "".join(sections)) for word in words(code)}
    known = {name.rpartition(".")[0] for name in before}
    # A new module is said by its own name.
    named = {name if (home := name.rpartition(".")[0]) in known else home for name in changed}
    if unsaid := [name for name in sorted(named) if words(name)[-1] not in said]:
        yield (
            f"CHANGELOG.md: expected each changed name in backticks under [{new['version']}] or "
            f"[Unreleased], got none of {', '.join(unsaid)}; remedy: say there what changed"
        )


def words(text):
    return re.findall(r"--[\w-]+|\w+", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("arguments: expected --write, got none or others; remedy: give --write")
    SNAPSHOT.write_text(json.dumps(surface(), indent=1) + "\n")
