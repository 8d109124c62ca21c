"""The pool itself: results, failures that end fast and say why, recovery, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.distributed.pool import DistributedFailure, WorkerPool
from tests.running import is_gone, run, wait_until_gone


@pytest.fixture(scope="module")
def pool(warm_python):
    pool = WorkerPool(python=warm_python)
    yield pool
    pool.close()


def _sum_of_ranks(offset: int = 0):
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), int(os.environ["RANK"]), dist.get_world_size(), total.item() + offset


def _state():
    import torch

    from plt_megatron.runtime.cpu_runtime import is_cpu_runtime

    return torch.get_num_threads(), is_cpu_runtime(), os.getpid(), torch.rand(1).item()


def _leave_threads_behind(count: int) -> int:
    for _ in range(count):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def _raise_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        raise ValueError("the reason")
    _sum_of_ranks()


def _die_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    _sum_of_ranks()


def _stuck_in_this_function(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        print("a line on the way", flush=True)
        time.sleep(1000)
    _sum_of_ranks()


def _large(size: int):
    return bytes(size)


def _unpicklable():
    return lambda: None


def _child() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid


@pytest.mark.parametrize("world_size", [1, 2, 4, 1])
def test_every_rank_of_any_world_size_answers(pool, world_size):
    total = sum(range(world_size)) + 7
    expected = [(rank, rank, world_size, total) for rank in range(world_size)]
    assert pool.run(_sum_of_ranks, world_size, offset=7) == expected


def test_workers_persist_with_one_thread_and_equal_random_state(pool):
    first, second = pool.run(_state, 2), pool.run(_state, 2)
    assert [(threads, on_cpu) for threads, on_cpu, *_ in first] == [(1, True)] * 2
    assert first == second  # the same processes, each job with the same random state
    assert len({pid for _, _, pid, _ in first}) == 2
    assert len({draw for *_, draw in first}) == 1


def test_workers_with_many_threads_are_replaced(pool):
    few = pool.run(_leave_threads_behind, 2, 20)
    many = pool.run(_leave_threads_behind, 2, 300)
    assert few == many
    wait_until_gone(*many)
    assert not set(pool.run(_leave_threads_behind, 2, 0)) & set(many)


def test_large_results_come_back(pool):
    assert pool.run(_large, 2, 10_000_000) == [bytes(10_000_000)] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [(_raise_on, "rank 1 raised.*ValueError: the reason"), (_die_on, r"ranks failed:\s+rank 1 died, exit code -9")],
)
def test_a_rank_that_fails_ends_the_job_fast_and_the_pool_recovers(pool, function, message):
    pool.run(_sum_of_ranks, 2)
    begun = time.monotonic()
    with pytest.raises(DistributedFailure, match=f"(?s){message}"):
        pool.run(function, 2, 1)
    assert time.monotonic() - begun < 60, "of 120"
    assert pool.run(_sum_of_ranks, 2)[1] == (1, 1, 2, 1)


def test_a_job_that_hangs_ends_in_time_with_stacks_and_output(pool):
    with pytest.raises(DistributedFailure, match="ranks 0, 1 of 2 did not finish within 2 s") as failure:
        pool.run(_stuck_in_this_function, 2, 0, timeout_s=2)
    assert "in _stuck_in_this_function" in str(failure.value)
    assert "a line on the way" in str(failure.value)
    assert pool.run(_sum_of_ranks, 2)[0] == (0, 0, 2, 1)


def test_a_result_that_cannot_travel_is_an_error(pool):
    with pytest.raises(DistributedFailure, match="pickle"):
        pool.run(_unpicklable, 1)


@pytest.mark.slow
def test_closing_ends_every_process_and_what_they_started():
    pool = WorkerPool()
    children = pool.run(_child, 2)
    workers = [pid for _, _, pid, _ in pool.run(_state, 2)]
    server = pool._server.pid
    processes = [server, *workers, *children]
    assert not any(map(is_gone, processes))
    pool.close()
    wait_until_gone(*processes)


@pytest.mark.slow
def test_processes_end_when_the_tests_are_killed():
    script = (
        "from tests.distributed import test_pool\n"
        "pool = test_pool.WorkerPool()\n"
        "print(pool._server or [state[2] for state in pool.run(test_pool._state, 2)], pool._server.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run([sys.executable, "-c", script], status=-signal.SIGKILL)
    pids = [int(word) for word in done.stdout.replace("[", "").replace("]", "").replace(",", "").split()]
    assert len(pids) == 3
    wait_until_gone(*pids)
