"""MkDocs hooks that adapt pages written for GitHub to the site.

Some files outside docs/ are pages of the site too (`PAGES`), among them the notebooks with their
outputs. A relative link to a page or picture becomes a link inside the site. A link to any other
file of the repository leads to the repository, if the site knows its address, and becomes plain
text otherwise. A link to a file that does not exist stays as it is, so that a strict build reports
it. Formulas in GitHub's notation (a block ```math, or $`...`$ in a line) become MathML, which
browsers draw without a script.
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # path in the repository: path in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/measured.md": "benchmark_tables.md",
    "notebooks/accelerate_normflows.ipynb": "notebooks/accelerate_normflows.md",
    "notebooks/fused_step_and_manifold.ipynb": "notebooks/fused_step_and_manifold.md",
}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"```math\s(.+?)\s+```|\$`([^`]+)`\$", re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for path, uri in PAGES.items():
        if path.endswith(".ipynb"):
            pictures: list[bytes] = []
            text = "\n\n".join(_cells(path, pictures))
            for number, picture in enumerate(pictures):
                name = f"{uri.removesuffix('.md')}-{number}.png"
                files.append(File.generated(config, name, content=picture))
        else:
            text = (ROOT / path).read_text()
        files.append(File.generated(config, uri, content=text))
    return files


def _cells(path: str, pictures: list[bytes]) -> Iterator[str]:
    """Yield a notebook's cells and outputs as Markdown, and collect its pictures."""
    for cell in json.loads((ROOT / path).read_text())["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                yield f"![the figure of the cell above]({Path(path).stem}-{len(pictures)}.png)"
                pictures.append(base64.b64decode(data["image/png"]))
            else:
                yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Rewrite the page's relative links and its formulas."""
    uri = page.file.src_uri
    origin = {site: path for path, site in PAGES.items()}.get(uri, f"docs/{uri}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        site = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if site and files.get_file_from_path(site):
            return f"[{text}]({posixpath.relpath(site, posixpath.dirname(uri) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return link[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/main/{path})" if config.repo_url else text

    return FORMULA.sub(_math, LINK.sub(rewritten, markdown))


def _math(formula: re.Match[str]) -> str:
    block, inline = formula.groups()
    mathml = convert(block or inline, display="block" if block else "inline")
    mathml = mathml.replace("<mi>;</mi>", '<mo separator="true">;</mo>')
    return re.sub(r"<mi>log</mi>(?!<mo)", r'\g<0><mspace width="0.167em" />', mathml)
