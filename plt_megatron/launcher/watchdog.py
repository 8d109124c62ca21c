"""Watchdog that ends a job within a bounded time if a rank hangs or is gone, and names the rank.

A rank that stops keeps all others waiting in a collective, where they can report nothing. So each process has a thread
that writes its rank's progress and position to the job's store. Rank 0's thread watches all ranks; the others watch
rank 0, and whether the store answers. Until the first step is done, and while it reads or writes checkpoints, a rank
may be quiet for `distributed_timeout_minutes`; otherwise for `distributed_timeout_seconds_after_init`, or five times
its longest pause so far if that is longer: a slow machine is not a hung one.

There are two kinds of evidence. If collectives block their caller (gloo), the stacks show which ranks wait in one and
which do not. If they return at once (NCCL), no stack is ever inside one, and all ranks wait at the next value that the
host needs; then the counts show which rank has started fewer collectives than the others in a process group.
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
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_megatron.errors import first_line
from plt_megatron.run_folder.attempts import ExitStatus

if TYPE_CHECKING:
    from torch.distributed import Store


_MOST_SHOWN = 8  # ranks in a message


@dataclass(frozen=True)
class Sign:
    """A rank's report, made by its watchdog thread."""

    rank: int
    host: str
    count: int  # number of this report, which reveals a frozen process without comparing clocks
    step: int
    phase: str
    quiet_for: float  # seconds since the training loop last gave a sign
    waits_in: str | None  # the collective that the rank is waiting in; None if in none
    at: str  # position of its main thread: file, line and function
    # Progress of the training loop: counts every phase and step, and the first microbatch in each. It is equal on ranks
    # that are equally far.
    turn: int = 0
    collectives: dict[str, int] = field(default_factory=dict)  # number started so far, by process group


def describe_hang(signs: list[Sign]) -> str:
    """Describe which ranks the others wait for, as far as their positions show it."""
    moved = f"step {max(sign.step for sign in signs) + 1} has not moved for {max(s.quiet_for for s in signs):.0f} s"
    behind, outside = ranks_behind(signs), [sign for sign in signs if sign.waits_in is None]
    named = [sign for sign in behind if sign in outside] or outside or behind
    if 0 < len(named) < len(signs):
        return f"{moved}: the others wait for {_stands(named)}"
    if not named:
        return f"{moved}: all ranks wait in collectives, which do not match or lost a message: {_stands(signs)}"
    return f"{moved}: " + ("no rank is behind the others: " if len(signs) > 1 else "") + _stands(signs)


def describe_silence(signs: list[Sign], silent: dict[int, float]) -> str:
    """Name the ranks whose threads have given no sign, with `silent` seconds each."""
    hosts = {sign.rank: f" on {sign.host}" for sign in signs}
    named = ", ".join(f"rank {rank}{hosts.get(rank, '')} ({silent[rank]:.0f} s)" for rank in sorted(silent))
    return f"no sign of life from {named}: dead, stopped, or cut off"


def ranks_behind(signs: list[Sign]) -> list[Sign]:
    """Return the ranks that are behind others and do not themselves wait for one further behind.

    A rank waits if it has started a collective that another rank of its process group has not.
    """
    turns = {sign.rank: sign.turn for sign in signs}
    groups: dict[str, dict[int, int]] = defaultdict(dict)
    for sign in signs:
        for group, started in sign.collectives.items():
            groups[group][sign.rank] = started
    behind = {rank for counts in (turns, *groups.values()) for rank in counts if counts[rank] < max(counts.values())}
    waiting = {rank for counts in groups.values() for rank in counts if counts[rank] > min(counts.values())}
    return [sign for sign in signs if sign.rank in behind - waiting]


def _stands(signs: list[Sign]) -> str:
    shown = [
        f"rank {sign.rank} on {sign.host}, {sign.phase}, {f'in {sign.waits_in} ' if sign.waits_in else ''}at {sign.at}"
        for sign in signs[:_MOST_SHOWN]
    ]
    more = [f"and {len(signs) - _MOST_SHOWN} more"] if len(signs) > _MOST_SHOWN else []
    return "; ".join(shown + more)


def collectives_started(backends: Collection[str] = ("nccl",)) -> dict[str, int]:
    """Return how many collectives this rank has started in each of its process groups of these backends, as torch
    counts them; gloo also counts point-to-point messages, which ranks do not share."""
    from torch.distributed.distributed_c10d import _world

    groups: list[tuple[Any, str]] = list(_world.pg_names.items())  # a copy: the main thread may be adding a group
    return {
        name: group._get_sequence_number_for_group() for group, name in groups if _world.pg_map[group][0] in backends
    }


def collective(stack: list[traceback.FrameSummary]) -> str | None:
    """Return the name of the torch collective that a stack is waiting in; None if in none."""
    for frame in stack:
        if frame.filename.endswith("distributed_c10d.py") and not frame.name.startswith("_"):
            if frame.name not in ("wrapper", "init_process_group", "new_group"):
                return frame.name
    last = stack[-1] if stack else None
    # Waiting for a collective's handle happens in C++, called directly from the caller's line.
    return "wait" if last is not None and ".wait(" in (last.line or "") else None


def position(stack: list[traceback.FrameSummary]) -> str:
    """Return the innermost line of this package in a stack, and the function outside the package it is in, if any."""
    ours = [frame for frame in stack if f"{os.sep}plt_megatron{os.sep}" in frame.filename]
    frame = ours[-1] if ours else (stack[-1] if stack else None)
    if frame is None:
        return "an unknown place"
    inner = "" if not stack or stack[-1] is frame else f" (in {stack[-1].name})"
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}{inner}"


_NO_STORE = "rank 0, which holds the job's store, does not answer"
_VERDICT = "watchdog/verdict"
SLOW_PHASES = ("starting", "indexing", "loading", "saving")  # phases with the longer limit
_PAUSES = 5  # up to this multiple of the longest pause so far, a pause is not a hang
_MISSED = 4  # if the job hangs, a process without a sign for this many intervals is frozen


class Watchdog:
    """One rank's watchdog.

    Args:
        folder: the run's folder; when the job is ended, every rank writes what it was doing to `incidents/` in it.
        store: this rank's own connection to the job's store.
        patience: seconds a rank may be quiet once the first step is done.
        slow_patience: seconds before that, and in the slow phases, such as reading or writing checkpoints.
        index_patience: seconds while rank 0 builds the sample index, for which the others wait; at least the former.
        interval: seconds between two checks.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        rank: int,
        world_size: int,
        *,
        patience: float,
        slow_patience: float,
        index_patience: float = 0.0,
        interval: float | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._folder, self._store, self._rank, self._world_size = folder, store, rank, world_size
        self._patience, self._slow_patience = patience, max(patience, slow_patience)
        self._index_patience = max(self._slow_patience, index_patience)
        self._interval = min(5.0, patience / 4) if interval is None else interval
        self._end = end
        self._main_thread = threading.get_ident()
        self._seconds = 0.0  # counted only while awake: time in suspension is not quiet time
        self._last_beat, self._longest_pause = 0.0, 0.0
        self._phase, self._step, self._first_step = "starting", 0, 0
        self._turn = 0
        self._count = 0
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: count of its last sign, and when that was new
        self._verdict: str | None = None
        self._answered = 0.0
        self._closed = threading.Event()
        # Two threads, since a store on a frozen host blocks its callers forever.
        self._threads = [
            threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._watch, self._talk)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def beat(self, phase: str, step: int) -> None:
        """Report that the training loop is alive; the main thread calls this at every phase (starting, indexing,
        loading, training, validating, saving), step and microbatch."""
        now = self._seconds
        if self._phase in ("starting", "indexing", "loading"):
            self._first_step = step
        elif self._phase not in SLOW_PHASES and self._settled():
            self._longest_pause = max(self._longest_pause, now - self._last_beat)
        # Even: a step's phase has started; odd: its first microbatch too. Further ones do not count, since their
        # order differs between pipeline stages.
        same = (phase, step) == (self._phase, self._step)
        self._turn = self._turn | 1 if same else (self._turn | 1) + 1
        self._last_beat, self._phase, self._step = now, phase, step

    def close(self) -> None:
        """Stop watching, since the run is over."""
        self._closed.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._interval + 1)

    def _settled(self) -> bool:
        return self._step > self._first_step

    def limit(self) -> float:
        """Return the seconds that this rank may be quiet in its current phase."""
        if self._phase == "indexing":
            return self._index_patience
        if self._phase in SLOW_PHASES or not self._settled():
            return self._slow_patience
        return max(self._patience, _PAUSES * self._longest_pause)

    # The threads.

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._seconds += self._interval
            if self._seconds - self._answered > self.limit() + _MISSED * self._interval:
                self._verdict = self._verdict or _NO_STORE
            if self._verdict is not None:
                self._end_job(self._verdict)
                return

    def _talk(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                verdict = self._look()
            except RuntimeError as error:  # what torch's stores raise
                verdict = f"{_NO_STORE} ({first_line(error)[:200]})"
            self._answered = self._seconds
            if verdict is not None:
                if not self._closed.is_set():
                    self._verdict = verdict
                return

    def _look(self) -> str | None:
        """Report this rank's sign and check the others'; return what is wrong, or None."""
        sign = self._sign()
        self._store.set(_key(self._rank), json.dumps(asdict(sign)))
        return self._look_at_all(sign) if self._rank == 0 else self._look_at_rank_0()

    def _look_at_rank_0(self) -> str | None:
        if self._store.check([_VERDICT]):
            return self._store.get(_VERDICT).decode()
        silent = self._silent_for(0)
        return f"rank 0 has given no sign for {silent:.0f} s" if silent > self.limit() else None

    def _look_at_all(self, own: Sign) -> str | None:
        silent = {rank: self._silent_for(rank) for rank in range(1, self._world_size)}
        # A frozen process stalls the others immediately. Unlike with a stuck one, its thread is silent too, which shows
        # once a living rank has had time for another sign.
        stalled = own.quiet_for > self.limit() + (_MISSED + 2) * self._interval
        if not stalled and max(silent.values(), default=0.0) <= self.limit():
            return None
        frozen = [rank for rank in silent if silent[rank] > _MISSED * self._interval]
        signs = [sign for rank in range(self._world_size) if (sign := self._read(rank)) is not None]
        verdict = describe_silence(signs, {rank: silent[rank] for rank in frozen}) if frozen else describe_hang(signs)
        self._store.set(_VERDICT, verdict)
        return verdict

    def _sign(self) -> Sign:
        self._count += 1
        frame = sys._current_frames().get(self._main_thread)
        stack = list(traceback.extract_stack(frame)) if frame is not None else []
        return Sign(
            rank=self._rank,
            host=socket.gethostname(),
            count=self._count,
            step=self._step,
            phase=self._phase,
            quiet_for=self._seconds - self._last_beat,
            waits_in=collective(stack),
            at=position(stack),
            turn=self._turn,
            collectives=collectives_started(),
        )

    def _read(self, rank: int) -> Sign | None:
        """Return the last sign of a rank; None if it has not given one."""
        return Sign(**json.loads(self._store.get(_key(rank)))) if self._store.check([_key(rank)]) else None

    def _silent_for(self, rank: int) -> float:
        """Return the seconds since a rank's thread gave a new sign, or since the first look for one."""
        sign = self._read(rank)
        count, (known, since) = sign.count if sign else 0, self._heard.get(rank, (-1, 0.0))
        if count != known:
            since = self._seconds
        self._heard[rank] = (count, since)
        return self._seconds - since

    def _end_job(self, verdict: str) -> None:
        folder = self._folder / "incidents"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"hang_rank_{self._rank:04d}.txt").open("w") as file:
                file.write(f"{verdict}\n\n{self._sign()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what hangs; the job must end anyway
            print(f"error: {folder}: {error}", file=sys.stderr)
        if self._rank == 0 or verdict.startswith("rank 0"):  # rank 0 reports everything but its own silence
            print(f"error: rank {self._rank}: {verdict}; stacks in {folder}", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(2 * self._interval)  # the store lives in this process: let the others read the verdict
        self._end(ExitStatus.FAILED)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def start_watchdog(folder: Path, *, patience: float, slow_patience: float, index_patience: float = 0.0) -> Watchdog:
    """Start this rank's watchdog, which ends the process with status 1 if any rank of the job hangs or is gone.

    The trainer calls `beat` and `close` on it. The arguments are those of `Watchdog`.
    """
    from torch.distributed import HashStore, TCPStore

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store: Store = HashStore()
    if world_size > 1:
        # A separate connection, since the job's other one may be blocked in a call.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(patience, 5.0)),
        )
    watchdog = Watchdog(
        folder, store, rank, world_size, patience=patience, slow_patience=slow_patience, index_patience=index_patience
    )
    watchdog.start()
    return watchdog
