"""Extension of griffe: the form of fastkl's docstrings as Markdown, for mkdocstrings."""

import inspect
import re

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Gradient|Special values|Memory|Accuracy):")
LABEL = re.compile(r"(Source|Raises|Special values|autocast)(?=: )")
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
            if LABEL.match(line):
                line = LABEL.sub(r"**\1**", line, count=1)
                lines.append("")
        elif section:
            line = line[4:]
            if section == "Args" and line and not line.startswith(" "):
                line = "- " + NAMES.sub(lambda names: f"{code(names[1])}: ", line, count=1)
        lines.append(line)
    return "\n".join(lines)


def code(names):
    """Mark up names as code."""
    return ", ".join(f"`{name}`" for name in names.split(", "))


class Docstrings(griffe.Extension):
    """Rewrites each docstring that is read."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
