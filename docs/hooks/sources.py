"""Makes the site stand alone: files of the repository that pages link to become pages, and roles become code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")
ROLE = re.compile(r":\w+:<code>[~.]*([^<]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for every file or folder outside docs/ that a page links to."""
    pages = [f.content_string for f in files.documentation_pages()]
    wanted = {path.rstrip("/") for text in pages for path in LINK.findall(text) if (ROOT / path).exists()}
    for path in sorted(wanted):
        files.append(File.generated(config, f"source/{path}.md", content=_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links to the repository's files into links to their pages."""

    def inside(match: re.Match) -> str:
        path = match[1].rstrip("/")
        here = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(f'source/{path}.md', here or '.')})" if (ROOT / path).exists() else match[0]

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(inside, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Shows Sphinx roles, which docstrings use, as the names that they hold."""
    return ROLE.sub(r"<code>\1</code>", html)


def _page(path: str) -> str:
    """A file as code, a folder as the list of what is in it."""
    target = ROOT / path
    if target.is_dir():
        names = sorted(entry.name for entry in target.iterdir() if not entry.name.startswith(("__", ".")))
        return f"# {path}\n\n" + "\n".join(f"* `{name}`" for name in names) + "\n"
    language = {".py": "python", ".toml": "toml", ".sbatch": "bash"}.get(target.suffix, "text")
    return f"# {path}\n\n````{language}\n{target.read_text()}\n````\n"
