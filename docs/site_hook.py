"""MkDocs hook. Add repository files outside docs/ that a page links to, with working links, and
turn notebooks into pages.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()[\w./-]+(?=[)#])")
# Copied unchanged; other files that are not Markdown become a page of their source.
ASSETS = (".png", ".svg", ".json")
# Source file in the repository of each file of the site.
SOURCES: dict[str, str] = {}


def in_site(path):
    """Return the site path of a repository file."""
    if path.endswith(".ipynb"):
        path = path.removesuffix(".ipynb") + ".md"
    if not path.endswith((".md", *ASSETS)):
        return f"repo/{path}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repo/{path}"


def targets(path, text):
    """Map the links in a file to repository files."""
    links = {x: posixpath.normpath(posixpath.join(path, "..", x)) for x in LINK.findall(text)}
    return {link: target for link, target in links.items() if (ROOT / target).is_file()}


def page(path):
    """Return a repository file as Markdown."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(map(cell, json.loads(text)["cells"]))
    return f"# {path}\n\n````{'python' if path.endswith('.py') else 'text'}\n{text}\n````\n"


def cell(one):
    """Return a notebook cell as Markdown, with the text and pictures of its output."""
    source = "".join(one["source"])
    if one["cell_type"] != "code":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in one["outputs"]:
        data = output.get("data") or {"text/plain": output["text"]}
        if "image/png" in data:
            encoded = "".join(data["image/png"]).replace("\n", "")
            parts.append(f"![Figure](data:image/png;base64,{encoded})")
        else:
            parts.append(f"```{{.text .output}}\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)


def on_files(files, config):
    """Add notebooks, files linked from pages, and files linked from those."""
    SOURCES.clear()
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    others = (*ROOT.glob("docs/**/*.ipynb"), *ROOT.glob("*.md"))
    waiting += [path.relative_to(ROOT).as_posix() for path in others]
    while waiting:
        path = waiting.pop()
        uri = in_site(path)
        if uri in SOURCES:
            continue
        SOURCES[uri] = path
        if uri not in files.src_uris:
            asset = path.endswith(ASSETS)
            source = {"abs_src_path": str(ROOT / path)} if asset else {"content": page(path)}
            files.append(File.generated(config, uri, **source))
        if path.endswith((".md", ".ipynb")):
            waiting += targets(path, page(path)).values()
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between repository files into links between pages."""
    uri = page.file.src_uri
    if uri.startswith("repo/"):
        page.meta["search"] = {"boost": 0.2}  # rank below user pages
    to = targets(SOURCES[uri], markdown)
    return LINK.sub(
        lambda link: (
            posixpath.relpath(in_site(to[link[0]]), posixpath.dirname(uri) or ".")
            if link[0] in to
            else link[0]
        ),
        markdown,
    )
