"""Ends a job whose rank hangs or is gone, within a bounded time, and says which rank it is.

A rank that stops keeps all others waiting in a collective, where they can say nothing. So each process has a thread
that notes in the job's store how far its rank is and where it stands. Rank 0's watches all of them, the others rank
0's, and that the store answers. Until the first step is done a rank may be quiet for `distributed_timeout_minutes`, as
it may while it reads or writes checkpoints; after that for `distributed_timeout_seconds_after_init`, or five times its
longest pause so far if that is longer: a slow machine is no hung one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

SLOW_PHASES = ("starting", "loading", "saving")  # limits of their own apply there: the long one
_PAUSES = 5  # times the longest pause so far is no hang
_MISSED = 4  # intervals without a sign make a process frozen, if the job hangs
_EXIT_FAILED = 1


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True)
class Sign:
    """What a rank's thread notes of it.

    Attributes:
        count: of the notes, so that a frozen process shows without comparing clocks.
        quiet_for: seconds since the training loop last gave a sign.
        waits_in: the collective that the rank is waiting in; None outside of one.
        at: where its main thread stands: file, line and function.
    """

    rank: int
    host: str
    count: int
    step: int
    phase: str
    quiet_for: float
    waits_in: str | None
    at: str


class Watchdog:
    """One rank's.

    Args:
        folder: the run's; what every rank was doing goes to `incidents/` in it when the job is ended.
        store: this rank's own connection to the job's store; None for a job of one process.
        patience: seconds a rank may be quiet once the first step is done.
        slow_patience: seconds before that, and in the slow phases.
        interval: seconds between two looks.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        folder: Path,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        patience: float,
        slow_patience: float,
        interval: float | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._folder, self._store, self._rank, self._world_size = folder, store, rank, world_size
        self._patience, self._slow_patience = patience, max(patience, slow_patience)
        self._interval = min(5.0, patience / 4) if interval is None else interval
        self._end = end
        self._main_thread = threading.get_ident()
        self._seconds = 0.0  # awake, by its own count: a process that was suspended has not been quiet
        self._last_beat, self._longest_pause = 0.0, 0.0
        self._phase, self._step, self._first_step = "starting", 0, 0
        self._count = 0
        self._heard: dict[int, tuple[int, float]] = {}
        self._verdict: str | None = None
        self._answered = 0.0
        self._stalled_looks = 0
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:  # a thread of its own: a store on a frozen host blocks its callers for good
            self._threads.append(threading.Thread(target=self._talk, name="watchdog's messenger", daemon=True))

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def beat(self, phase: str, step: int) -> None:
        """The training loop is alive: called by the main thread at every turn, microbatches included."""
        now = self._seconds
        if self._phase == "starting":
            self._first_step = step
        elif self._phase not in SLOW_PHASES and self._settled():
            self._longest_pause = max(self._longest_pause, now - self._last_beat)
        self._last_beat, self._phase, self._step = now, phase, step

    def close(self) -> None:
        """Stop watching: the run is over."""
        self._closed.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._interval + 1)

    def _settled(self) -> bool:
        return self._step > self._first_step

    def limit(self) -> float:
        """Seconds this rank may be quiet where it stands now."""
        if self._phase in SLOW_PHASES or not self._settled():
            return self._slow_patience
        return max(self._patience, _PAUSES * self._longest_pause)

    # The threads.

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._seconds += self._interval
            if self._store is None:
                sign = self._sign()
                self._verdict = self._judge([sign]) if sign.quiet_for > self.limit() else None
            elif self._seconds - self._answered > self.limit() + _MISSED * self._interval:
                self._verdict = "rank 0, which holds the job's store, does not answer"
            if self._verdict is not None:
                self._end_job(self._verdict)
                return

    def _talk(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                verdict = self._look()
            except RuntimeError as error:  # what torch's stores raise
                verdict = f"rank 0, which holds the job's store, does not answer ({_first_line(error)})"
            self._answered = self._seconds
            if verdict is not None:
                if not self._closed.is_set():
                    self._verdict = verdict
                return

    def _look(self) -> str | None:
        """Note this rank's sign and look at the others'; what is wrong, in words, or None."""
        assert self._store is not None
        sign = self._sign()
        self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(sign)))
        if self._rank > 0:
            if self._store.check(["watchdog/verdict"]):
                return self._store.get("watchdog/verdict").decode()
            silent = self._silent([0], self.limit())
            return f"rank 0 has given no sign for {silent[0]:.0f} s" if silent else None
        others = range(1, self._world_size)
        gone = self._silent(others, self.limit())
        self._stalled_looks = self._stalled_looks + 1 if sign.quiet_for > self.limit() else 0
        if not gone and self._stalled_looks < _MISSED + 2:  # until then a living rank has given another sign
            return None
        # A frozen process stalls the others at once: told from a stuck one by its thread's silence.
        verdict = self._judge(self._signs(), self._silent(others, _MISSED * self._interval))
        self._store.set("watchdog/verdict", verdict)
        return verdict

    def _sign(self) -> Sign:
        self._count += 1
        frame = sys._current_frames().get(self._main_thread)
        stack = list(traceback.extract_stack(frame)) if frame is not None else []
        quiet_for = self._seconds - self._last_beat
        where = (collective(stack), position(stack))
        return Sign(self._rank, socket.gethostname(), self._count, self._step, self._phase, quiet_for, *where)

    def _signs(self) -> list[Sign]:
        assert self._store is not None
        keys = [f"watchdog/{rank}" for rank in range(self._world_size)]
        return [Sign(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]

    def _silent(self, ranks: Iterable[int], seconds: float) -> dict[int, float]:
        """The ranks whose threads have given no new sign for longer than that, and for how long."""
        assert self._store is not None
        silent, now = {}, self._seconds
        for rank in ranks:
            key = f"watchdog/{rank}"
            count = json.loads(self._store.get(key))["count"] if self._store.check([key]) else 0
            known, since = self._heard.setdefault(rank, (count, now))
            if count != known:
                self._heard[rank] = (count, now)
            elif now - since > seconds:
                silent[rank] = now - since
        return silent

    def _judge(self, signs: list[Sign], silent: dict[int, float] | None = None) -> str:
        if silent:
            hosts = {sign.rank: f" on {sign.host}" for sign in signs}
            named = ", ".join(f"rank {rank}{hosts.get(rank, '')} ({silent[rank]:.0f} s)" for rank in sorted(silent))
            return f"no sign of life from {named}: dead, stopped, or cut off"
        return describe_hang(signs)

    def _end_job(self, verdict: str) -> None:
        folder = self._folder / "incidents"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"hang_rank_{self._rank:04d}.txt").open("w") as file:
                file.write(f"{verdict}\n\n{self._sign()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what hangs; the job must end all the same
            print(f"error: {folder}: {error}", file=sys.stderr)
        if self._rank == 0 or "rank 0" in verdict:
            print(f"error: rank {self._rank}: {verdict}; stacks in {folder}", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(2 * self._interval)  # the store lives here: let the others read the verdict
        self._end(_EXIT_FAILED)


def describe_hang(signs: list[Sign]) -> str:
    """Which rank the others wait for, as well as it can be told from where each stands."""
    outside = [sign for sign in signs if sign.waits_in is None]
    waited = f"step {max(sign.step for sign in signs) + 1} has not moved for {max(s.quiet_for for s in signs):.0f} s"
    if outside and len(outside) < len(signs):
        named = "; ".join(f"rank {s.rank} on {s.host}, {s.phase}, at {s.at}" for s in outside[:4])
        return f"{waited}: the others wait for {named}"
    if len(signs) == 1 or len(outside) == len(signs):
        return f"{waited}: " + "; ".join(f"rank {s.rank} on {s.host}, {s.phase}, at {s.at}" for s in signs[:4])
    named = "; ".join(f"rank {s.rank} on {s.host} in {s.waits_in} at {s.at}" for s in signs[:8])
    return f"{waited}: all ranks wait in collectives, which do not match or lost a message: {named}"


def collective(stack: list[traceback.FrameSummary]) -> str | None:
    """The name of torch's collective that a stack is waiting in."""
    for frame in stack:
        if frame.filename.endswith("distributed_c10d.py") and not frame.name.startswith("_"):
            if frame.name not in ("wrapper", "init_process_group", "new_group"):
                return frame.name
    last = stack[-1] if stack else None
    # A collective's handle is waited for in C++, straight from the caller's line.
    return "wait" if last is not None and ".wait(" in (last.line or "") else None


def position(stack: list[traceback.FrameSummary]) -> str:
    """The innermost line of this package in a stack, and the function it called if that is another's."""
    ours = [frame for frame in stack if f"{os.sep}plt_megatron{os.sep}" in frame.filename]
    frame = ours[-1] if ours else (stack[-1] if stack else None)
    if frame is None:
        return "an unknown place"
    inner = "" if not stack or stack[-1] is frame else f" (in {stack[-1].name})"
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}{inner}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def connect_watchdog(folder: Path, *, patience: float, slow_patience: float) -> Watchdog:
    """The watchdog of this process in the job that its environment describes."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = None
    if world_size > 1:
        from datetime import timedelta

        from torch.distributed import TCPStore

        # A connection of its own: the job's other one may be blocked in a call.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(patience, 5.0)),
        )
    return Watchdog(folder, store, rank, world_size, patience=patience, slow_patience=slow_patience)
