"""Hooks of mkdocs.yml: a link to a file of the repository, also outside docs/, leads there in the built site too."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
ADDED = "repository/"  # where files from outside docs/ stand in the site


def _target(page: str, link: str) -> str:
    """Where in the site stands what a page of the site links to, by its link in the repository."""
    there = page.removeprefix(ADDED) if page.startswith(ADDED) else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(there), link))
    return path.removeprefix("docs/") if path.startswith("docs/") else ADDED + path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file that a page or the README links to, and that lies outside docs/."""
    pages = [
        (file.src_uri, Path(file.abs_src_path).read_text(encoding="utf-8")) for file in files.documentation_pages()
    ]
    pages.append((f"{ADDED}README.md", (ROOT / "README.md").read_text(encoding="utf-8")))
    for path in sorted({_target(page, link) for page, text in pages for _, link, _ in LINK.findall(text)}):
        source = ROOT / path.removeprefix(ADDED)
        if path.startswith(ADDED) and source.is_file():
            files.append(File.generated(config, path, abs_src_path=str(source), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to where the files stand in the site. What an added page links to may be missing there."""
    uri = page.file.src_uri

    def turned(found: re.Match) -> str:
        words, link, anchor = found.groups()
        target = _target(uri, link)
        if files.get_file_from_path(target) is None:
            return words if uri.startswith(ADDED) else found[0]
        moved = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{'!' * found[0].startswith('!')}[{words}]({moved}{anchor or ''})"

    return LINK.sub(turned, markdown)
