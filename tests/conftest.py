"""Settings and fixtures of all tests. Before torch is imported anywhere: one thread a process, plots in files."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Tests start several processes on few cores: more threads than one each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
gc.disable()  # until all is imported and collected, or it looks through a million objects again and again

# With `-n WORKERS` each of these stays with one worker: a pool of processes, a cluster, is paid for once, and the
# pool's jobs do not take the few cores from one another. The first that fits counts; the tests of every other file stay
# together for the sake of their fixtures.
_TOGETHER = {
    "tests/distributed/test_deepspeed": "deepspeed",
    "tests/distributed/test_memory_estimates.py": "deepspeed",
    "tests/distributed/test_run_faults.py": "whole runs",
    "tests/distributed/test_training.py": "whole runs",
    "tests/distributed/": "pool",
    "tests/fuzz/": "pool",
    "tests/te/test_te_fp8.py": "Transformer Engine: fp8",  # half of the time: on another worker than the rest
    "tests/te/test_te_fusions.py": "Transformer Engine: fp8",
    "tests/te/": "Transformer Engine",
    "tests/slurm/": "cluster",
    "tests/hostile/": "warm python",
    "tests/unit/convert/test_generate.py": "warm python",
    "tests/unit/data/test_datasets.py": "warm python",
    "tests/unit/predict/test_shipped_configs.py": "warm python",
    "tests/unit/experiments/test_diagnose_command.py": "warm python",
    "tests/unit/project/test_benchmarks.py": "warm python",
    "tests/unit/project/test_documented_commands.py": "warm python",
    "tests/unit/project/test_sweep_smoke.py": "warm python",
    "tests/unit/project/test_warm_python.py": "warm python",
}


# What takes long begins early, so that no worker is left alone with it in the end: all of these before other files. The
# second worker's first needs no warm Python, which the first worker starts meanwhile.
_FIRST = [
    *("pool", "tests/unit/model/test_against_reference.py"),
    *("whole runs", "warm python", "deepspeed", "cluster", "Transformer Engine"),
    *("tests/unit/predict/", "tests/hf/"),
]


def _scope(nodeid: str) -> str:
    """Name the group of tests that stays with one worker."""
    return next((name for folder, name in _TOGETHER.items() if nodeid.startswith(folder)), nodeid.split("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first."""
    order = lambda scope: next((at for at, name in enumerate(_FIRST) if scope.startswith(name)), len(_FIRST))  # noqa: E731
    items.sort(key=lambda item: order(_scope(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group to one worker, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False  # by the number of tests: a file of one long test would come last
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stand-in for `sys.executable` that has imported what is slow: tests/warm_python.py."""
    from tests.warm_python import WarmPython

    base = tmp_path_factory.getbasetemp()
    python = WarmPython((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm_python")
    yield str(python.executable)
    python.close()


@pytest.fixture
def warm_starts(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the package starts, such as an export's verification, have their imports too."""
    monkeypatch.setattr(sys, "executable", warm_python)


@pytest.fixture(scope="session")
def run_distributed(warm_python: str) -> Iterator[Callable[..., Any]]:
    """Run a function on several ranks, which the session's pool keeps."""
    from tests.distributed.pool import WorkerPool

    with contextlib.closing(WorkerPool(python=warm_python)) as pool:
        yield pool


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: models of tests are tiny, and other processes share the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_finish() -> None:
    """Keep later garbage collections from looking through what collection has imported, a million objects."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was compared."""
    from tests.distributed.tables import write_tables

    write_tables(terminalreporter)
