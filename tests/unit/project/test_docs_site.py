"""`make docs`: the site is built without a warning, holds every page, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, run

pytest.importorskip("mkdocs", reason="pip install 'plt-megatron[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: dead links and anchors, pages that no menu lists and unknown names of the API are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return folder


def test_every_page_is_found_by_the_search(site):
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    found = {entry["location"].split("#")[0] for entry in json.loads(index.removeprefix("var __index = "))["docs"]}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {f"{name}.html" for name in pages | {"index", "configuration", "results", "contributing"}} <= found


def test_results_are_pages_with_their_figures_and_reports(site):
    """Links lead somewhere; what no page publishes, such as a configuration, is text."""
    names = sorted(path.parent.name for path in ROOT.glob("results/*/README.md"))
    overview = (site / "results.html").read_text(encoding="utf-8")
    assert len(names) > 5 and all(f'href="results_{name}.html"' in overview for name in names)
    for name in names:
        page = (site / f"results_{name}.html").read_text(encoding="utf-8")
        for target in re.findall(r'(?:src|href)="(results/[^"#]+)"', page):
            assert (site / target).is_file(), target
    ablation = (site / "results_recommended_ablation.html").read_text(encoding="utf-8")
    assert "results/recommended_ablation/report/index.html" in ablation and "report/loss_tokens.png" in ablation


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
    for page in site.glob("*.html"):
        assert not loaded.findall(page.read_text(encoding="utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_what_the_api_page_promises_is_there_and_its_example_runs():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    light = [name for name in names if ".hf." not in name and ".train." not in name]
    program = f"""{example}
import importlib, sys
for name in {light!r}:
    module, _, attribute = name.rpartition(".")
    assert attribute == "schema" or hasattr(importlib.import_module(module), attribute), name
assert "torch" not in sys.modules
"""
    assert "GPU hours" in run([sys.executable, "-c", program]).stdout
