"""Reports of each rank while it trains, and the analysis of which rank the others wait for in a hang.

There are two kinds of evidence. If collectives block their caller (gloo), the stacks show which ranks wait in one and
which do not. If they return at once (NCCL), no stack is ever inside one, and all ranks wait at the next value that the
host needs; then the counts show which rank has started fewer collectives than the others in a process group.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MOST_SHOWN = 8  # ranks in a message


@dataclass(frozen=True)
class Sign:
    """A rank's report, made by its watchdog thread.

    Attributes:
        count: number of this report, which reveals a frozen process without comparing clocks.
        quiet_for: seconds since the training loop last gave a sign.
        waits_in: the collective that the rank is waiting in; None if in none.
        at: position of its main thread: file, line and function.
        turn: progress of the training loop: counts every phase and step, and the first microbatch in each. It is equal
            on ranks that are equally far.
        collectives: number started so far, by process group.
    """

    rank: int
    host: str
    count: int
    step: int
    phase: str
    quiet_for: float
    waits_in: str | None
    at: str
    turn: int = 0
    collectives: dict[str, int] = field(default_factory=dict)


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
    """Return how many collectives this rank has started in each of its process groups, as torch counts them.

    Args:
        backends: backends of the groups to count; gloo also counts point-to-point messages, which ranks do not share.
    """
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
