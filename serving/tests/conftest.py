"""Tests of the plugin with vLLM's CPU build. Where vLLM is not installed they are skipped, and say so."""

import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The engine runs in the test's own process, so that it starts in seconds and can be inspected.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
# The reference, which is the modeling file that travels with exports; server.py; helpers.
sys.path[:0] = [str(ROOT), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

MISSING = None if find_spec("vllm") else "vLLM is not installed: `make test-serving` makes an environment that has it"


def pytest_collection_modifyitems(items):
    if MISSING:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """vLLM's caches of this run."""
    folder = tmp_path_factory.mktemp("vllm_cache")
    os.environ["VLLM_CACHE_ROOT"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def kernels_replaced_once():
    """vLLM 0.32's CPU build replaces kernels whenever an engine starts, looks at every module's attributes for it, and
    fails at one of llvmlite's, which drafting by n-grams has imported. The first time in a process is enough."""
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
    """A function of a variant's name and changes that writes a small random model once and returns it."""
    from helpers import Exports

    return Exports(tmp_path_factory.mktemp("exports"))
