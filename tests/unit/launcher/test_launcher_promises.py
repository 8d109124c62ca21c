"""docs/launcher.md: each promise names tests that are there."""

from __future__ import annotations

import re

from tests.running import ROOT


def test_the_tests_that_hold_a_promise_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "launcher.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert {name for name in named if not re.search(rf"^def {name}\(", sources, re.MULTILINE)} == set()


def test_every_file_of_the_package_is_explained():
    page = (ROOT / "docs" / "launcher.md").read_text()
    for path in (ROOT / "plt_megatron" / "launcher").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in page, path.name
