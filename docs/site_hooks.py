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
    "results/paper_ablation/README.md": "paper_ablation.md",
    "results/from_public_model/README.md": "from_public_model.md",
    "results/paper_ablation/report/index.html": "paper_ablation_report.html",
}
_REPOSITORY_PATHS = {site: path for path, site in PAGES.items()}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)(#[^)\s]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    for path, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages; a link to any other file becomes text."""
    folder = posixpath.dirname(_REPOSITORY_PATHS.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        page_path = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"[{text}]({page_path}{anchor})" if page_path else text

    return _LINK.sub(replace, markdown)
