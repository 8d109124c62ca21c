"""One thread: the models are tiny, and other processes share the machine."""

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For all tests of this folder."""
