"""Parameters of tests: those that `make test` runs, and those for `make test-all` alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import Layout


def slow(*values: Any, id: str | None = None) -> Any:
    """A test's values in a case that is `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def layouts(quick: str, slow: str = "") -> pytest.MarkDecorator:
    """Parametrize a test's `layout` with several: "TP2 SP, PP2 DP2"."""
    every = [pytest.param(Layout.of(words)) for words in filter(None, quick.split(", "))]
    every += [pytest.param(Layout.of(words), marks=pytest.mark.slow) for words in filter(None, slow.split(", "))]
    return pytest.mark.parametrize("layout", every, ids=str)
