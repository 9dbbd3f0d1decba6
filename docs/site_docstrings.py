"""Griffe extension: convert fastkl's docstrings to Markdown for mkdocstrings."""

import inspect
import re

import griffe

WORD = "(?:Args|Returns|Raises|Gradient|Special values|Memory|Accuracy|autocast|Source)"
SECTION = re.compile(f"({WORD}):")
LABEL = re.compile(f"({WORD}(?:, {WORD})*): ")
NAMES = re.compile(r"(\w+(?:, \w+)*): ")


def markdown(docstring):
    """Turn sections into headings, arguments into a list, and indented code into code blocks."""
    lines, section = [], ""
    for line in inspect.cleandoc(docstring).splitlines():
        if heading := SECTION.fullmatch(line):
            section = heading[1]
            lines += ["", f"**{section}**", ""]
            continue
        if line and not line.startswith(" "):
            section = ""
            if label := LABEL.match(line):
                lines.append("")
                line = f"**{label[1]}**: {line[label.end() :]}"
        elif section:
            line = line[4:]
            if section == "Args" and line and not line.startswith(" "):
                if names := NAMES.match(line):
                    code = ", ".join(f"`{name}`" for name in names[1].split(", "))
                    line = f"{code}: {line[names.end() :]}"
                line = f"- {line}"
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrite each docstring."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
