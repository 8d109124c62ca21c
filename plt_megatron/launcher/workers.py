"""The processes of one node: CPU binding, start, output, signals and cleanup."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plt_megatron.runtime.local_processes import die_with_parent, query_gpus

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16
_TAIL_LINES = 40


@dataclass
class Worker:
    """One process. `tail` holds the last lines that it printed."""

    rank: int
    process: subprocess.Popen[bytes]
    partial: bytes = b""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()


class WorkerGroup:
    """The processes of one task on this node.

    Args:
        environments: environment of each process, by rank; the command is the same for all.
        cpus: CPUs that each process is bound to; None: not bound.
        on_lines: called with a rank and the complete lines that it has printed.
        on_exit: called when a process has ended, with its exit status, negative for a signal.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Mapping[int, Mapping[str, str]],
        cpus: Sequence[set[int] | None],
        on_lines: Callable[[int, list[str]], None],
        on_exit: Callable[[Worker, int], None],
    ) -> None:
        self._on_lines, self._on_exit = on_lines, on_exit
        self.workers: list[Worker] = []
        try:
            for (rank, env), own in zip(environments.items(), cpus, strict=True):
                self.workers.append(Worker(rank, _start(command, env, own)))
        except BaseException:
            self.kill()
            raise

    def listen(self, worker: Worker) -> bool:
        """Pass on what a process has printed so far; return False once it has closed its output."""
        while True:
            try:
                data = os.read(worker.fileno(), _CHUNK)
            except BlockingIOError:
                return True
            *lines, worker.partial = (worker.partial + data).split(b"\n")
            self._pass_on(worker, lines)
            if not data or len(worker.partial) >= _LONGEST_LINE:  # end of output, or an overlong line
                self._flush(worker)
            if not data:
                return False

    def _pass_on(self, worker: Worker, lines: list[bytes]) -> None:
        text = [line.decode(errors="replace").rstrip("\r") for line in lines]
        worker.tail.extend(text)
        if text:
            self._on_lines(worker.rank, text)

    def _flush(self, worker: Worker) -> None:
        """Pass on the beginning of a line."""
        self._pass_on(worker, [worker.partial] if worker.partial else [])
        worker.partial = b""

    def reap(self) -> None:
        """Report processes that have ended, after passing on their last output."""
        for worker in list(self.workers):
            returncode = worker.process.poll()
            if returncode is not None:
                self.listen(worker)
                self._flush(worker)  # children may still hold the pipe
                self.workers.remove(worker)
                self._on_exit(worker, returncode)
                _kill_group(worker)  # its remaining children
                assert worker.process.stdout is not None
                worker.process.stdout.close()

    def signal(self, number: int) -> None:
        for worker in self.workers:
            worker.process.send_signal(number)

    def kill(self) -> None:
        """Kill every process and its children. `reap` reports the ends."""
        for worker in self.workers:
            _kill_group(worker)


def _kill_group(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)


def _start(command: Sequence[str], env: Mapping[str, str], cpus: set[int] | None) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        # Safe between fork and exec, since the launcher has only one thread.
        die_with_parent(signal.SIGKILL)
        # Until the trainer handles signals, a request to stop must not kill it: the launcher repeats its signal, and
        # Slurm's reaches every process of the step.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=prepare,
        bufsize=0,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


# CPUs and threads of each process.


def share_out(cpus: set[int], count: int, near: Sequence[set[int] | None] = ()) -> list[set[int] | None]:
    """Divide the CPUs that the job may use among `count` processes.

    Args:
        near: the CPUs close to each process's device, if known; its share is then taken from these.

    Returns:
        One set per process, disjoint; None for all if there are fewer CPUs than processes.
    """
    if len(cpus) < count:
        return [None] * count
    wanted = [frozenset(close & cpus) if close and close & cpus else frozenset(cpus)
              for close in [*near, *[None] * count][:count]]  # fmt: skip
    groups = set(wanted)
    overlap = sum(map(len, groups)) > len(frozenset().union(*groups))
    if overlap or any(len(group) < wanted.count(group) for group in groups):
        wanted = [frozenset(cpus)] * count
    shares: list[set[int] | None] = []
    for process, group in enumerate(wanted):
        members = [other for other in range(count) if wanted[other] == group]
        place, ordered = members.index(process), sorted(group)
        size = len(ordered) / len(members)
        shares.append(set(ordered[round(place * size) : round((place + 1) * size)]))
    return shares


def threads(share: set[int] | None, cpus: set[int], count: int, cpus_per_process: int) -> int:
    """Return the threads of one process: one per CPU, at most as many as the job requested."""
    available = len(share) if share is not None else len(cpus) // count
    return max(1, min(available, cpus_per_process))


def cpus_near_gpus() -> list[set[int] | None]:
    """Return the CPUs on the same NUMA node as each GPU; None where unknown."""
    return [_local_cpus(row[0]) for row in query_gpus("pci.bus_id")]


def _local_cpus(bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> set[int] | None:
    # nvidia-smi writes the domain with eight digits, the kernel with four.
    domain, _, rest = bus_id.lower().partition(":")
    try:
        text = (devices / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text(encoding="ascii")
        return parse_cpu_list(text) or None
    except (OSError, ValueError):
        return None


def parse_cpu_list(text: str) -> set[int]:
    """Parse `"0-3,8"` as a set of numbers."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
