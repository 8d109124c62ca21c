"""Hooks of mkdocs.yml: pages from outside of docs/, and links that work in the repository as on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository -> on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "configs/README.md": "configuration.md",
    "results/README.md": "results.md",
    "serving/README.md": "serving.md",
}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)(#[^)\s]+)?\)")
_WITH_PAGES = (".png", ".html")  # published where a page of results links to them


def _resolve(page: str, target: str) -> str:
    """The file of the repository that a page links to; of a sweep's report the HTML."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    html = path.removesuffix("report.md") + "index.html"
    return html if path.endswith("/report/report.md") and (ROOT / html).is_file() else path


for _readme in sorted(ROOT.glob("results/*/README.md")):
    _page = _readme.relative_to(ROOT).as_posix()
    PAGES[_page] = f"results_{_readme.parent.name}.md"
    _linked = (_resolve(_page, link[2]) for link in _LINK.finditer(_readme.read_text(encoding="utf-8")))
    PAGES |= {path: path for path in _linked if path.endswith(_WITH_PAGES) and (ROOT / path).is_file()}
_REPOSITORY_PATHS = {site: path for path, site in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    for path, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages; a link to any other file becomes text."""
    own = _REPOSITORY_PATHS.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        path = _resolve(own, target)
        page_path = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"[{text}]({page_path}{anchor})" if page_path else text

    return _LINK.sub(replace, markdown)
