"""The launcher of one node: `in_job.py node RUN`, which srun starts once per node.

It connects to the first node's launcher, which also coordinates (`coordinator`), and follows its commands: it starts,
monitors and ends the node's processes and logs their output. It has one thread, which never blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from plt_megatron.errors import print_error
from plt_megatron.launcher import coordinator, preflight, workers
from plt_megatron.launcher.hub import BEAT_SECONDS, Channel, Every, Hub, awake
from plt_megatron.launcher.job import COPY, Allocation, JobSettings, load_settings, read_allocation
from plt_megatron.launcher.preflight import MARK
from plt_megatron.launcher.records import LogFile, stamp
from plt_megatron.launcher.workers import Worker, WorkerGroup
from plt_megatron.run_folder import attempts
from plt_megatron.run_folder.attempts import ExitStatus, describe_exit
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.runtime.local_processes import rank_environment, signals_handled
from plt_megatron.slurm.client import job_at_work

_TICK_SECONDS = 0.1
_REPEAT_SECONDS = 2.0  # between repeats of the signal, since processes may not have handled signals yet
_CONNECT_SECONDS = 5.0
_FLUSH_SECONDS = 5.0


def check_no_other_job(run: Path) -> int:
    """Return `ExitStatus.RUN_BUSY` if another job trains the run, else 0. Asks Slurm, so not in a container.

    Two jobs would overwrite each other's work. Jobs of one script run one at a time; those of an array do not.
    """
    other = job_at_work(attempts.unended_jobs(RunFolder(run).attempts(), but=read_allocation().scheduler_id))
    if other is None:
        return 0
    print_error(f"job {other} is training {run}: wait until it has ended, or scancel {other}")
    return ExitStatus.RUN_BUSY


def launch_node(run: Path) -> int:
    """Start the run's processes on one node, and monitor them until all nodes are done; return the `ExitStatus`, which
    is the same on every node.

    Each process is `python -m plt_megatron.train.main RUN/config.yaml`. SIGUSR1, SIGTERM and SIGINT make all of them
    save and exit. Raises `UserError` if this is not a Slurm job, or if plt submit did not make the run's folder.
    """
    settings, allocation = load_settings(run), read_allocation()
    for name in [name for name in os.environ if name.startswith(COPY)]:
        os.environ[name.removeprefix(COPY)] = os.environ[name]
    launcher = NodeLauncher(run, settings, allocation)
    # SIGUSR1 comes before the time limit, SIGTERM on preemption and requeue.
    with signals_handled((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT), launcher.ask_to_stop):
        return launcher.launch()


class NodeLauncher:
    """One node's launcher."""

    def __init__(self, run: Path, settings: JobSettings, allocation: Allocation) -> None:
        self._run, self._settings, self._allocation = run, settings, allocation
        self._selector = selectors.DefaultSelector()
        self._hub: Hub | None = None
        self._channel: Channel | None = None
        self._group = WorkerGroup([], {}, [], self._on_lines, self._on_exit)
        self._task, self._attempt = "", 0
        self._logs: dict[int, LogFile] = {}
        self._asked_to_stop = self._told_to_stop = False
        self._preempting = self._stopping = False
        self._beat, self._repeat = Every(BEAT_SECONDS), Every(_REPEAT_SECONDS)
        self._status: int | None = None
        self._threads = RunFolder(run).config().training.threads_per_process

    def ask_to_stop(self, *_: object) -> None:
        """Have all processes save and exit. Handles signals."""
        self._asked_to_stop = True

    def launch(self) -> int:
        """Run until the job is over and return the exit status."""
        allocation = self._allocation
        try:
            if allocation.node_index == 0:
                self._hub = Hub(self._run, self._settings, allocation, self._selector)
            facts = preflight.gather_facts(self._run)
            self._cpus = os.sched_getaffinity(0)
            count = self._settings.processes_per_node
            near = workers.cpus_near_gpus() if self._settings.gpus_per_node else []
            self._shares = workers.share_out(self._cpus, count, near)
            if self._connect():
                us = {"node": allocation.node, "job_id": allocation.job_id, "restart_count": allocation.restart_count}
                self._send({"type": "hello", "facts": facts, **us})
            while self._status is None:
                self._turn()
            return self._leave()
        finally:
            self._group.kill()

    def _connect(self) -> bool:
        """Connect to the first node's launcher, which may not be up yet; return whether it worked."""
        address = (self._allocation.first_node, self._allocation.launcher_port)
        deadline = time.monotonic() + coordinator.JOIN_SECONDS
        while not self._asked_to_stop or self._hub is not None:
            try:
                connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
            except OSError as error:
                if time.monotonic() > deadline:
                    self._lose(f"{address[0]}, port {address[1]} cannot be reached: {error.strerror or error}")
                    return False
                self._turn()
                continue
            self._channel = Channel(connection)
            self._selector.register(self._channel, selectors.EVENT_READ, self._receive)
            return True
        self._status = ExitStatus.PREEMPTED
        return False

    def _turn(self) -> None:
        """Run one iteration of the loop: messages, ended processes, and everything that is due."""
        for key, _ in self._selector.select(_TICK_SECONDS):
            key.data()
        self._tend_processes()
        self._tend_channel()
        if self._hub is not None:
            self._hub.turn()

    def _tend_processes(self) -> None:
        self._group.reap()
        if self._preempting and self._repeat.due():
            self._group.signal(signal.SIGUSR1)
        if self._stopping and not self._group.workers:
            self._stopping = False
            self._send({"type": "stopped"})

    def _tend_channel(self) -> None:
        channel = self._channel
        if channel is None:  # the first node does not answer yet
            return
        if self._beat.due():
            channel.send({"type": "beat"})
        if self._asked_to_stop and not self._told_to_stop:
            self._told_to_stop = True
            channel.send({"type": "preempt"})
        channel.flush()
        silent = awake() - channel.heard > coordinator.SILENCE_SECONDS
        if self._status is None and (channel.closed or silent):
            self._lose(f"the coordinating node {self._allocation.first_node} is gone")

    def _lose(self, why: str) -> None:
        print(stamp(self._attempt, f"launcher {self._allocation.node}", why), file=sys.stderr, flush=True)
        self._status = ExitStatus.NODE_LOST

    def _send(self, message: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.send(message)

    # Commands of the coordinator.

    def _receive(self) -> None:
        assert self._channel is not None
        for message in self._channel.receive():
            kind = message["type"]
            if kind == "start":
                self._start(message["task"], int(message["attempt"]), int(message["port"]))
            elif kind == "clock":
                self._send({"type": "clock", "sent": message["sent"], "time": time.time()})
            elif kind == "preempt":
                self._preempting = True
            elif kind == "stop":
                self._stopping, self._preempting = True, False
                self._group.kill()
            elif kind == "quit":
                self._status = int(message["status"])
        if self._channel.closed or self._status is not None:
            self._selector.unregister(self._channel)

    def _start(self, task: str, attempt: int, port: int) -> None:
        self._task, self._attempt = task, attempt
        per_node = self._settings.processes_per_node if task == "train" else self._settings.probes_per_node
        # -P: import the package from the run's snapshot, which contains this file, even if the job runs in a checkout.
        command = [self._settings.python, "-P", "-m", "plt_megatron.launcher.preflight"]
        if task == "train":
            command = [*command[:-1], "plt_megatron.train.main", str(RunFolder(self._run).config_file)]
        first = self._allocation.node_index * per_node
        environments = {
            first + local: self._environment(first + local, local, per_node, port) for local in range(per_node)
        }
        shares = self._shares if per_node == len(self._shares) else [None] * per_node
        self._group = WorkerGroup(command, environments, shares, self._on_lines, self._on_exit)
        for worker, cpus in zip(self._group.workers, shares, strict=True):
            self._selector.register(worker, selectors.EVENT_READ, lambda worker=worker: self._listen(worker))
            if task == "train":
                where = f"{self._allocation.node}, process {worker.process.pid}, CPUs {sorted(cpus) if cpus else 'any'}"
                threads = environments[worker.rank]["OMP_NUM_THREADS"]
                self._on_lines(worker.rank, [f"started on {where}, {threads} threads"])

    def _environment(self, rank: int, local: int, per_node: int, port: int) -> dict[str, str]:
        settings, own = self._settings, self._shares[local] if local < len(self._shares) else None
        count, most = settings.processes_per_node, settings.cpus_per_process
        chosen = os.environ.get("OMP_NUM_THREADS") if "OMP_NUM_THREADS" in settings.environment else None
        threads = self._threads or chosen or workers.threads(own, self._cpus, count, most)
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        address = self._allocation.first_node
        place = rank_environment(rank, local, per_node * settings.nodes, per_node, address, port)
        others = {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "GPUS_PER_NODE": str(settings.gpus_per_node),
            "PROBE_SECONDS": str(coordinator.PROBE_SECONDS),
        }
        return os.environ | place | others

    # Output and exits of the processes.

    def _listen(self, worker: Worker) -> None:
        if not self._group.listen(worker):
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker)

    def _on_lines(self, rank: int, lines: list[str]) -> None:
        if self._task == "probe":
            for line in lines:
                if line.startswith(MARK):
                    result = json.loads(line.removeprefix(MARK))
                    self._send({"type": "probe", "attempt": self._attempt, "result": result})
            lines = [line for line in lines if not line.startswith(MARK)]
        who = f"rank {rank}" if self._task == "train" else f"preflight {self._allocation.node} process {rank}"
        stamped = [stamp(self._attempt, who, line) for line in lines]
        if self._task == "train":
            log = LogFile(RunFolder(self._run).logs / f"rank-{rank:04d}.log")
            self._logs.setdefault(rank, log).write(stamped)
        if stamped:
            self._send({"type": "log", "lines": stamped})

    def _on_exit(self, worker: Worker, code: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker)
        if self._task == "train":
            ended = "ended by its launcher" if self._stopping and code == -signal.SIGKILL else describe_exit(code)
            self._on_lines(worker.rank, [ended])
        end = {"rank": worker.rank, "code": code, "lines": list(worker.tail)}
        self._send({"type": "exited", "task": self._task, "attempt": self._attempt, **end})

    def _leave(self) -> int:
        assert self._status is not None
        if self._channel is not None:
            self._channel.close()
        if self._hub is not None:
            deadline = time.monotonic() + _FLUSH_SECONDS
            while self._hub.pending and time.monotonic() < deadline:
                self._turn()
            self._hub.close()
        return self._status
