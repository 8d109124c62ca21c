"""A pool of persistent gloo processes for tests.

Importing torch and megatron-core takes seconds, so a server process pays for it once, on the CPU runtime, and forks
the workers. `run` runs a function in `world_size` of them, as the ranks of one job with a fresh default process group.

    pool = WorkerPool()
    results = pool.run(function, 4, *args, **kwargs)  # what the function returned on each rank
    result = pool(function, 4, *args, **kwargs)  # on rank 0

The function and its arguments are pickled: the function lives at the top level of a module. The first failure, death or
overrun of a rank ends the job, every worker with it, and raises `DistributedFailure`; the next job gets new workers. So
it does where a job has left many threads behind.
This file is also the server's main program. The parent needs neither torch nor megatron.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_START_TIMEOUT_S = 180.0
_GRACE_S = 1.0  # for the other ranks' own errors, once one has failed
# A process group that something still refers to when a job is over keeps three threads, which wake up a hundred times
# a second each: a dozen idle workers take half the machine. A worker without any has about ten, a new one costs a fork.
_MOST_THREADS = 30
_REPOSITORY = Path(__file__).resolve().parents[2]


class DistributedFailure(RuntimeError):
    """A rank raised, died or timed out; the message holds what is known about it."""


@dataclass
class _Job:
    number: int
    world_size: int
    call: bytes  # pickled (function, args, kwargs)
    timeout_s: float


class WorkerPool:
    """See the module's docstring. Nothing is started before the first `run`.

    Args:
        prepare: "module:function", called in the server before it imports anything else by itself.
        python: what runs the server; tests/warm_python.py's has its imports already.
    """

    def __init__(self, prepare: str | None = None, python: str = sys.executable) -> None:
        self._command = [python, __file__, *filter(None, [prepare])]
        self._server: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._log: Any = None
        self._jobs = 0

    def run(
        self, function: Callable, world_size: int, *args: Any, timeout_s: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """`function(*args, **kwargs)` on ranks 0 .. world_size - 1; results by rank.

        Raises:
            DistributedFailure: a rank raised (its traceback is in the message), died, or took over `timeout_s`.
        """
        self._start()
        assert self._connection is not None
        log_start = self._log_size()
        self._jobs += 1
        job = _Job(self._jobs, world_size, pickle.dumps((function, args, kwargs)), timeout_s)
        self._connection.send(astuple(job))
        failure, results = self._receive(timeout_s + _START_TIMEOUT_S)
        if failure is not None:
            raise DistributedFailure(f"{failure}\n{self._log_tail(log_start)}")
        return [pickle.loads(result) for result in results]

    def __call__(self, function: Callable, world_size: int, *args: Any, all_ranks: bool = False, **kwargs: Any) -> Any:
        """`run` it; return rank 0's result or, with `all_ranks`, every rank's."""
        results = self.run(function, world_size, *args, **kwargs)
        return results if all_ranks else results[0]

    def close(self) -> None:
        """End the server and its workers."""
        if self._server is None:
            return
        assert self._connection is not None
        self._connection.close()  # the server takes its workers along
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()
        self._server = self._connection = self._log = None

    def _start(self) -> None:
        if self._server is not None and self._server.poll() is None:
            return
        self.close()
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()
        self._server = subprocess.Popen(
            self._command,
            env=_environment(),
            stdin=theirs.fileno(),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()

    def _receive(self, timeout_s: float) -> Any:
        assert self._connection is not None
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
            reason = f"the pool's server did not answer within {timeout_s:g} s"
        except (EOFError, ConnectionError):
            reason = "the pool's server died"
        tail = self._log_tail(0)
        self.close()
        raise DistributedFailure(f"{reason}\n{tail}")

    def _log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def _log_tail(self, start: int, limit: int = 6000) -> str:
        start = max(start, self._log_size() - limit)
        text = os.pread(self._log.fileno(), limit, start).decode(errors="replace").strip()
        return f"--- the workers' output ---\n{text}" if text else ""


def _environment() -> dict[str, str]:
    """No GPU, one thread, loopback, this process's modules; nothing of a launcher around the tests."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "GROUP_RANK", "ROLE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    env.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    env["CUDA_VISIBLE_DEVICES"] = ""
    if "lo" in (name for _, name in socket.if_nameindex()):
        env["GLOO_SOCKET_IFNAME"] = "lo"
    env["PYTHONPATH"] = os.pathsep.join([str(_REPOSITORY), *filter(None, sys.path)])
    return env


# ---------------------------------------------------------------- the server


class _Worker:
    """One forked rank, as the server sees it."""

    def __init__(self, rank: int, port: int, inherited: list[Connection]) -> None:
        self.rank = rank
        self.connection, theirs = Pipe()
        context = get_context("fork")
        self.process = context.Process(
            target=_work, args=(rank, port, theirs, [self.connection, *inherited]), name=f"rank {rank}"
        )
        self.process.start()
        theirs.close()

    @property
    def threads(self) -> int:
        """How many it has; 0 if it is dead."""
        import psutil

        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).num_threads()
        return 0

    def kill(self) -> None:
        """The worker and what it has started."""
        for kill in (os.killpg, os.kill):  # its group exists from its first line on
            with contextlib.suppress(ProcessLookupError):
                kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self.connection.close()


class _Server:
    """Forks workers as jobs need them and watches over the jobs."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self.workers: list[_Worker] = []
        self.port = 0

    def serve(self) -> None:
        """Until the parent closes its end."""
        try:
            while True:
                job = _Job(*self.parent.recv())
                try:
                    reply: tuple[str | None, list[bytes]] = None, self._run(job)
                except DistributedFailure as failure:
                    reply = str(failure), []
                    self.kill_workers()
                self.parent.send(reply)
        except (EOFError, ConnectionError):
            pass
        finally:
            self.kill_workers()

    def kill_workers(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def _run(self, job: _Job) -> list[bytes]:
        try:
            self._grow(job.world_size)
            for worker in self.workers[: job.world_size]:
                worker.connection.send(job)
        except (EOFError, ConnectionError, TimeoutError) as error:
            raise DistributedFailure(f"a worker died between jobs: {error!r}") from error
        results = self._collect(self.workers[: job.world_size], time.monotonic() + job.timeout_s, job.timeout_s)
        if max(worker.threads for worker in self.workers) > _MOST_THREADS:
            self.kill_workers()
        return results

    def _grow(self, world_size: int) -> None:
        for rank in range(len(self.workers), world_size):
            # A fork inherits the other workers' connections and has to close them.
            inherited = [self.parent, *(worker.connection for worker in self.workers)]
            self.workers.append(_Worker(rank, self.port if rank else 0, inherited))
            if rank == 0:
                if not self.workers[0].connection.poll(_START_TIMEOUT_S):
                    raise TimeoutError("rank 0 has no store")
                self.port = self.workers[0].connection.recv()

    def _collect(self, workers: list[_Worker], deadline: float, timeout_s: float) -> list[bytes]:
        results: dict[int, bytes] = {}
        failures: list[str] = []
        pending = list(workers)
        while pending:
            left = max(0.0, deadline - time.monotonic())
            ready = wait([self.parent, *(worker.connection for worker in pending)], left)
            if self.parent in ready:
                raise EOFError("the parent is gone")
            if not ready:
                break
            for worker in [worker for worker in pending if worker.connection in ready]:
                pending.remove(worker)
                outcome = _outcome(worker)
                if isinstance(outcome, bytes):
                    results[worker.rank] = outcome
                    continue
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                # A death goes first: the other ranks' errors are its consequences.
                failures.insert(0 if outcome.startswith("died") else len(failures), f"rank {worker.rank} {outcome}")
        if failures:
            raise DistributedFailure("\n".join([f"a job of {len(workers)} ranks failed:", *failures]))
        if pending:
            _dump_stacks(pending)
            ranks = ", ".join(str(worker.rank) for worker in pending)
            raise DistributedFailure(f"ranks {ranks} of {len(workers)} did not finish within {timeout_s:g} s")
        return [results[worker.rank] for worker in workers]


def _dump_stacks(workers: list[_Worker]) -> None:
    """Have the workers write their stacks to the log, one after the other: at once, their lines would mix."""
    for worker in workers:
        begun = size = os.fstat(2).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid or 0, signal.SIGUSR1)
        for _ in range(50):  # until it has written and stands still, 5 s at most
            time.sleep(0.1)
            before, size = size, os.fstat(2).st_size
            if before == size and b"Current thread" in os.pread(2, size - begun, begun):
                break


def _outcome(worker: _Worker) -> bytes | str:
    """A worker's pickled result, or how it ended."""
    try:
        succeeded, payload = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(5)
        return f"died, exit code {worker.process.exitcode}"
    return payload if succeeded else f"raised\n{payload}"


# ---------------------------------------------------------------- a worker


def _work(rank: int, port: int, connection: Connection, inherited: list[Connection]) -> None:
    os.setpgid(0, 0)  # so that what it starts ends with it
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for other in inherited:
        other.close()
    import torch
    from torch.distributed import TCPStore

    torch.set_num_threads(1)
    _share_event_loop()
    # One store for the worker's life; each job has a prefix of its own in it.
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        connection.send(store.port)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            reply: tuple[bool, bytes | str] = True, _execute(job, rank, store)
        except BaseException:
            reply = False, traceback.format_exc()
        connection.send(reply)


def _share_event_loop() -> None:
    """Give all of the worker's process groups one event loop of gloo's: each takes up to 10 ms to end, and a job has
    up to twenty. Where torch makes groups otherwise, nothing changes."""
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    device = (
        ProcessGroupGloo.create_device(interface=interface) if interface else ProcessGroupGloo.create_default_device()
    )

    def create(asked: Any, _: Any) -> Any:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], asked.timeout
        group = ProcessGroupGloo(asked.store, asked.group_rank, asked.group_size, options)
        group.options.global_ranks_in_group, group.options.group_name = asked.global_ranks_in_group, asked.group_id
        return group

    distributed_c10d._create_gloo_process_group = create


def _execute(job: _Job, rank: int, store: Any) -> bytes:
    import torch
    import torch.distributed as dist

    from plt_megatron.runtime.process_groups import destroy_process_groups

    function, args, kwargs = pickle.loads(job.call)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK=str(rank))
    torch.manual_seed(1234)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"job {job.number}", store),
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s),
    )
    result = pickle.dumps(function(*args, **kwargs))
    if job.world_size > 1:
        dist.barrier()  # nobody leaves while another still reads from it
    destroy_process_groups()
    for _ in range(2):  # what the first one ends, such as an engine's hooks, lets go of process groups
        gc.collect()
    return result


def main() -> None:
    """The server: import what is slow once, then fork. Its standard input is the connection."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # A Python that was there before has paths of its own.
    sys.path += [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    if len(sys.argv) > 1:
        module, function = sys.argv[1].split(":")
        getattr(importlib.import_module(module), function)()
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    enter_cpu_runtime(force=True)
    import torch._dynamo  # noqa: F401  (an optimizer's first step does)

    import plt_megatron.train.megatron_engine  # noqa: F401

    gc.collect()
    gc.freeze()  # the imports' objects: not to be looked through, nor copied, by every worker's collections
    _Server(connection).serve()


if __name__ == "__main__":
    # Under its importable name, so that what is pickled on one side is known on the other.
    from tests.distributed import pool

    pool.main()
