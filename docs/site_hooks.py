"""MkDocs hooks: links that are valid on GitHub also become valid on the site.

Some Markdown files outside docs/ are pages of the site too (`PAGES`). A relative link to a page or
picture becomes a link inside the site. A link to any other file of the repository becomes plain
text, because the site does not contain that file. A link to a file that does not exist stays as it
is, so that a strict build reports it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # path in the repository: path in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/measured.md": "benchmark_tables.md",
}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Rewrite the page's relative links."""
    uri = page.file.src_uri
    origin = {site: path for path, site in PAGES.items()}.get(uri, f"docs/{uri}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        site = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if site and files.get_file_from_path(site):
            return f"[{text}]({posixpath.relpath(site, posixpath.dirname(uri) or '.')}{anchor})"
        return text if (ROOT / path).exists() else link[0]

    return LINK.sub(rewritten, markdown)
