"""MkDocs hooks: pages from the README files of the repository, and links between all of them.

The same Markdown works in the repository and on the site. A link to a file that the site lacks becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"{folder}/README.md": f"{folder}.md" for folder in ("benchmarks", "engines", "export", "training")},
}
"""Pages of the site by their file in the repository; all others are in docs/."""
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert the links of a page."""
    uri = page.file.src_uri
    source = next((file for file, at in PAGES.items() if at == uri), f"docs/{uri}")
    return convert_links(markdown, source, {file.src_uri for file in files})


def convert_links(markdown: str, source: str, site: set[str]) -> str:
    """Return the Markdown of a file in the repository with links that work on the site.

    Args:
        markdown: content of the file.
        source: its path in the repository.
        site: paths of the site's files, relative to docs/.
    """
    page = PAGES.get(source, source.removeprefix("docs/"))

    def converted(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = f"{path}/README.md" if (ROOT / path).is_dir() else path
        at = PAGES.get(path, path.removeprefix("docs/"))
        if at not in site:
            return link["text"]
        target = posixpath.relpath(at, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")
        return f"{link['image']}[{link['text']}]({target})"

    return _LINK.sub(converted, markdown)
