"""Start the processes of a run on this machine and monitor them. Does not import torch.

Like torchrun on one machine, with three differences: it starts in milliseconds; the exit status of the process that
failed first is the status of the job (torchrun turns every failure into 1, and a preempted run must not look like a
broken one); and Ctrl-C or a preemption signal reaches every process once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from plt_megatron.errors import EXIT_INTERRUPTED
from plt_megatron.run_folder.attempts import PEACEFUL, describe_exit

_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def run_processes(
    command: Sequence[str],
    count: int,
    *,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 10.0,
    pass_fds: Sequence[int] = (),
) -> int:
    """Run `count` copies of `command` as one distributed job and return its exit status.

    Each gets `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` on top of
    `env` (default: this process's environment). `stop_signals` are forwarded to all of them; a second SIGINT kills them
    (status 130). When one fails, the others get SIGTERM and, after `grace_seconds`, SIGKILL.

    Files of `pass_fds` stay open, and their locks held, until the last process has ended, even if this one is killed.

    Signals that the caller has blocked are delivered once they can be forwarded; the processes start with them blocked.

    Returns 0 if all finished, 75 if some were preempted and none failed, else the status of the first to fail, which is
    128 + n if signal n killed it. Must be called from the main thread.
    """
    base = dict(os.environ if env is None else env)
    with _reserved_port() as port:
        job = _Job(grace_seconds, pass_fds)
        forwarded = stop_signals()
        with signals_handled(forwarded, job.forward):
            try:
                for rank in range(count):
                    job.start(command, base | rank_environment(rank, rank, count, count, "127.0.0.1", port))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
                return job.wait()
            finally:
                job.kill()


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to save and stop: SIGHUP, of a closed terminal, only without `nohup`."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asked, signal.SIGHUP)


@contextlib.contextmanager
def signals_handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals with `handler` while the block runs. Only in the main thread."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def threads_per_process(count: int) -> int:
    """Return this machine's usable cores divided by `count` processes, at least one each."""
    return max(1, usable_cores() // count)


def usable_cores() -> int:
    """Return the number of cores this process may use: its CPU affinity, within the container's CPU limit if any."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # not cgroups v2
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def local_gpus() -> list[str]:
    """List the GPUs that a process on this machine may use, named as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(row[0] for row in query_gpus("index"))
    names = [name.strip() for name in visible.split(",")]
    return names[: names.index("-1")] if "-1" in names else [name for name in names if name]


def query_gpus(*properties: str) -> list[list[str]]:
    """Return these properties of each NVIDIA GPU that the driver lists, as nvidia-smi names and prints them; nothing
    without a driver or a GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(properties)}", "--format=csv,noheader"]
    printed = output_of(command, seconds=60) or ""
    return [[part.strip() for part in line.split(",")] for line in printed.strip().splitlines()]


def output_of(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> str | None:
    """Return what a command prints; None if it is missing, fails or takes longer than `seconds`."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def rank_environment(rank: int, local: int, count: int, local_count: int, address: str, port: int) -> dict[str, str]:
    """Return the variables that tell a process its rank, of all and on its node, and where rank 0 is found."""
    place = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local_count}
    return {name: str(value) for name, value in (place | {"MASTER_ADDR": address, "MASTER_PORT": port}).items()}


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Reserve a free TCP port until rank 0 listens on it.

    The socket is bound but never listens: with SO_REUSEADDR, which torch's store sets too, rank 0 may bind
    the same port, while the kernel does not hand it out as a free one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class _Job:
    """The running processes; a process's rank is its index."""

    def __init__(self, grace_seconds: float, pass_fds: Sequence[int]) -> None:
        self.grace_seconds, self.pass_fds = grace_seconds, pass_fds
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: list[int] = []

    def start(self, command: Sequence[str], env: dict[str, str]) -> None:
        # In its own process group, so that the terminal's Ctrl-C reaches a process only through us, once.
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=die_with_parent,
            pass_fds=self.pass_fds,
        )
        self.processes.append(process)
        for number in self.received:  # signals that came before this process existed
            process.send_signal(number)

    def wait(self) -> int:
        """Wait until all processes are done or one has failed; return the status of the job."""
        while True:
            running = self.running()
            failed = [(r, p.returncode) for r, p in enumerate(self.processes) if p.returncode not in (None, *PEACEFUL)]
            if failed:
                interrupted = signal.SIGINT in self.received and all(code == EXIT_INTERRUPTED for _, code in failed)
                for rank, returncode in [] if interrupted else failed:
                    print(f"rank {rank} {describe_exit(returncode)}", file=sys.stderr, flush=True)
                self.stop(interrupted=interrupted)
                return _exit_status([returncode for _, returncode in failed])
            if not running:
                return max((p.returncode for p in self.processes), default=0)
            if self._killed_by_user():
                return EXIT_INTERRUPTED
            time.sleep(_POLL_SECONDS)

    def stop(self, *, interrupted: bool = False) -> None:
        """Ask the running processes to stop; `kill` kills those that do not stop in time.

        `interrupted`: the user's SIGINT has already asked them, and another signal could end them before they have
        cleaned up.
        """
        running = self.running()
        if not running:
            return
        if not interrupted:
            print(f"stopping the other {len(running)} process(es)", file=sys.stderr, flush=True)
            for process in running:
                process.terminate()
        deadline = time.monotonic() + self.grace_seconds
        while self.running() and not self._killed_by_user() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """Kill the running processes and their children."""
        for process in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._killed_by_user():
            return  # `wait` notices it, and the processes are killed
        for process in self.processes:
            process.send_signal(number)

    def _killed_by_user(self) -> bool:
        return self.received.count(signal.SIGINT) > 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when its parent dies, so that nothing is left behind.

    For a child between fork and exec (`preexec_fn`).
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def _exit_status(returncodes: Sequence[int]) -> int:
    """Return the most informative status: a 1 next to another status is often only an echo of that failure."""
    returncode = next((code for code in returncodes if code != 1), 1)
    return returncode if returncode >= 0 else 128 - returncode
