"""A hook of mkdocs: files outside docs/ that its pages link to are part of the site, so every link works on the site as
it does in the repository.

README.md is the site's first page. Pages of docs/ are at the top of the site, all others where they are in the
repository; a link to a folder leads to its README.md.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIRST = "README.md"
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#|/)([^)\s#]+)((?:#[^)\s]*)?\))")
"""A relative link or picture in Markdown: what is before its path, the path, and what is behind it."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the first page and the notebook, and then whatever pages link to, until nothing new is found."""
    waiting = [FIRST, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if not source.startswith("docs/"):
            files.append(File.generated(config, _in_site(source), abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            found = {_target(source, match[2]) for match in LINK.finditer(text)}
            new = {target for target in found if not target.startswith("docs/") and (ROOT / target).is_file()} - seen
            seen |= new
            waiting += sorted(new)
    files.append(File.generated(config, "notebook.md", content=notebook_page()))
    return files


def notebook_page() -> str:
    """The notebook as a page: its text and its code, without outputs."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    shown = [text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts]
    return "\n\n".join([*shown, "[This page as a notebook](notebook.ipynb)"]) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from where the page is in the repository become links from where it is in the site."""
    source = _in_repository(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.relpath(_in_site(_target(source, match[2])), here or ".")
        return f"{match[1]}{target}{match[3]}"

    return LINK.sub(moved, markdown)


def _target(source: str, link: str) -> str:
    """The path in the repository that a link in `source` leads to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def _in_site(path: str) -> str:
    return "index.md" if path == FIRST else path.removeprefix("docs/")


def _in_repository(path: str) -> str:
    if path == "index.md":
        return FIRST
    if path == "notebook.md":
        return "docs/notebook.ipynb"
    return f"docs/{path}" if (ROOT / "docs" / path).exists() else path
