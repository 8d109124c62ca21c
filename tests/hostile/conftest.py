"""One folder for all: nothing that is refused changes it."""

from __future__ import annotations

import pytest

from tests.hostile.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> World:
    made = World(tmp_path_factory.mktemp("hostile"), warm_python)
    made.make()
    return made
