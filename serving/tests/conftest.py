"""Fixtures for tests of the plugin with vLLM's CPU build; the tests are skipped if vLLM is not installed."""

import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The engine runs in the test's process, so that it starts in seconds and can be inspected.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
# For the reference (the modeling file that exports include), server.py, and helpers.
sys.path[:0] = [str(ROOT), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

MISSING = None if find_spec("vllm") else "vLLM is not installed: `make test-serving` makes an environment that has it"


def pytest_collection_modifyitems(items):
    if MISSING:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Give this run a vLLM cache folder of its own."""
    folder = tmp_path_factory.mktemp("vllm_cache")
    os.environ["VLLM_CACHE_ROOT"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def kernels_replaced_once():
    """Let vLLM replace kernels only once per process.

    vLLM 0.32's CPU build does it at every engine start, inspects every module's attributes for it, and fails on one of
    llvmlite's, which n-gram drafting imports.
    """
    if MISSING:
        yield
        return
    from vllm.platforms import current_platform

    platform, name = type(current_platform), "register_triton_kernel_overrides"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, name, staticmethod(functools.cache(getattr(platform, name))))
        yield


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Return a function that writes a small random model, given a variant and changes to it, once, and returns it."""
    from helpers import Exports

    return Exports(tmp_path_factory.mktemp("exports"))
