"""The processes of one node: started, read from, signalled and cleaned up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from plt_megatron.runtime.local_processes import die_with_parent

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16
_TAIL_LINES = 40


@dataclass
class Worker:
    """One process. `tail` are the last lines that it printed."""

    rank: int
    process: subprocess.Popen[bytes]
    partial: bytearray = field(default_factory=bytearray)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()


class WorkerGroup:
    """The processes of one task on this node.

    Args:
        command: the same for all.
        environments: of each, by rank.
        cpus: that each is bound to; None: not bound.
        on_lines: told the whole lines that a rank has printed.
        on_exit: told each process's end, with its exit status, negative for a signal.
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
        """Pass on what a process has printed by now; False when it has closed its output."""
        while True:
            try:
                data = os.read(worker.fileno(), _CHUNK)
            except BlockingIOError:
                return True
            worker.partial += data
            if data and b"\n" not in worker.partial and len(worker.partial) < _LONGEST_LINE:
                continue
            whole, newline, rest = worker.partial.rpartition(b"\n")
            if not data or len(rest) >= _LONGEST_LINE:  # the end, or a line without one
                whole, rest = whole + newline + rest, bytearray()
            worker.partial = bytearray(rest)
            lines = [line.decode(errors="replace").rstrip("\r") for line in whole.split(b"\n")] if whole else []
            lines = lines[:-1] if lines and not lines[-1] else lines
            if lines:
                worker.tail.extend(lines)
                self._on_lines(worker.rank, lines)
            if not data:
                return False

    def reap(self) -> None:
        """Find processes that have ended; their last output is passed on first."""
        for worker in list(self.workers):
            returncode = worker.process.poll()
            if returncode is not None:
                self.listen(worker)
                if worker.partial:  # without a newline; its children may still hold the pipe
                    line = worker.partial.decode(errors="replace")
                    worker.tail.append(line)
                    self._on_lines(worker.rank, [line])
                self.workers.remove(worker)
                self._on_exit(worker, returncode)
                _kill_group(worker)  # its remaining children
                assert worker.process.stdout is not None
                worker.process.stdout.close()

    def signal(self, number: int) -> None:
        """Send a signal to every process that runs."""
        for worker in self.workers:
            worker.process.send_signal(number)

    def kill(self) -> None:
        """End every process at once, with its children. `reap` reports them."""
        for worker in self.workers:
            _kill_group(worker)


def _kill_group(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)


def _start(command: Sequence[str], env: Mapping[str, str], cpus: set[int] | None) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        # The launcher has one thread only, so that this is safe between fork and exec.
        die_with_parent(signal.SIGKILL)
        # Until the trainer listens, a request to stop must not kill it: the launcher repeats its own, and Slurm's
        # reaches every process of the step.
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
