"""Match the records of several ranks: whether their calls fit together, and which rank waits for which.

Ranks are replayed like processes: each arrives at a collective and waits there until all rehearsed ranks of its group
are at a call of the same kind and size. Messages are matched in order, per pair of ranks and group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.predict.rehearsal.record import BESIDE_STEP, POINT_TO_POINT, Call, RankRecord

# Dimensions of megatron-core's groups, as `ParallelLayout.groups` names them.
_DIMENSIONS = {
    "tensor model parallel": ("tp",),
    "pipeline model parallel": ("pp",),
    "context parallel": ("cp",),
    "data parallel": ("dp",),
    "data parallel group with cp": ("dp", "cp"),
    "tensor and context parallel": ("tp", "cp"),
    "tensor and data parallel group with cp": ("tp", "cp", "dp"),
    "expert model parallel": ("ep",),
    "expert tensor and model parallel": ("ep",),  # experts are never split over tensor-parallel ranks
    "expert data parallel": ("edp",),
    "intra distributed optimizer instance": ("tp", "cp", "dp", "pp"),
}


@dataclass
class Waiting:
    """Result of replaying the ranks together.

    Attributes:
        problems: one line each; empty if the ranks' calls fit together.
        matched: number of collectives and messages replayed.
        idle: time of the step that a rank waits for another, in FLOPs, by (waiting, awaited) rank.
        work: FLOPs of each rank in the step.
    """

    problems: list[str] = field(default_factory=list)
    matched: int = 0
    idle: Counter[tuple[int, int]] = field(default_factory=Counter)
    work: dict[int, int] = field(default_factory=dict)


def group_problems(records: Sequence[RankRecord], layout: ParallelLayout) -> list[str]:
    """List the groups that differ from the layout's, in the rank numbering of `config.layout`."""
    problems = []
    for record in records:
        for call in record.calls:
            expected = group_of(record.rank, layout, call.group)
            if expected is not None and record.groups[call.ranks] != expected:
                given, wanted = _some(record.groups[call.ranks]), _some(expected)
                problems.append(f"wrong group: rank {record.rank}'s {call} has ranks {given}, the layout {wanted}")
                break
    return problems


def group_of(rank: int, layout: ParallelLayout, description: str) -> tuple[int, ...] | None:
    """Return the ranks of a rank's group in the layout's numbering; None if the group is unknown."""
    dimensions = _DIMENSIONS.get(description)
    return None if dimensions is None else _groups(layout, dimensions)[rank]


@cache
def _groups(layout: ParallelLayout, dimensions: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
    return {member: tuple(group) for group in layout.groups(*dimensions) for member in group}


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return f"{shown} ... ({len(ranks)})" if len(ranks) > 4 else shown


def play(records: Sequence[RankRecord]) -> Waiting:
    """Replay the records together until all are done or none can go on."""
    return _Play(records).run()


class _Play:
    def __init__(self, records: Sequence[RankRecord]) -> None:
        self.records = {record.rank: record for record in records}
        self.at = dict.fromkeys(self.records, 0)
        self.clock = dict.fromkeys(self.records, 0)
        self.result = Waiting(work={rank: _work(record) for rank, record in self.records.items()})
        # Messages in flight, and when they were sent.
        self.sent: dict[tuple, list[tuple[Call, int]]] = defaultdict(list)
        self.expected: dict[tuple, list[int]] = defaultdict(list)
        self.received: dict[int, dict[int, int]] = {rank: {} for rank in self.records}

    def run(self) -> Waiting:
        while not self.result.problems and any(self._advance(rank) for rank in self.records):
            pass
        if not self.result.problems:
            self._report_stuck()
            self._report_unreceived()
        return self.result

    def _advance(self, rank: int) -> bool:
        """Advance a rank as far as it can go alone; return whether it moved."""
        moved = False
        while not self.result.problems and (call := self._next(rank)) is not None and self._step(rank, call):
            moved = True
        return moved

    def _next(self, rank: int) -> Call | None:
        calls, at = self.records[rank].calls, self.at[rank]
        return calls[at] if at < len(calls) else None

    def _step(self, rank: int, call: Call) -> bool:
        if call.operation in POINT_TO_POINT:
            if call.peer in self.records:
                self._message(rank, call)
            self._done(rank, call)
            return True
        if call.operation == "wait":
            awaited = self.records[rank].calls[call.peer]
            if awaited.operation == "recv" and awaited.peer in self.records:
                if call.peer not in self.received[rank]:
                    return False
                self._wait_until(rank, self.received[rank][call.peer], awaited.peer)
            self._done(rank, call)
            return True
        return self._collective(rank, call)

    def _message(self, rank: int, call: Call) -> None:
        sends = call.operation == "send"
        ends = (rank, call.peer) if sends else (call.peer, rank)
        channel = (*ends, call.ranks, call.group)
        if sends:
            self.sent[channel].append((call, self._now(rank, call)))
        else:
            self.expected[channel].append(self.at[rank])
        while self.sent[channel] and self.expected[channel]:
            message, when = self.sent[channel].pop(0)
            position = self.expected[channel].pop(0)
            receiver = channel[1]
            wanted = self.records[receiver].calls[position]
            if (message.dtype, message.elements) != (wanted.dtype, wanted.elements):
                self.result.problems.append(
                    f"mismatched message: rank {channel[0]}'s {message} meets rank {receiver}'s {wanted}"
                )
            self.received[receiver][position] = when
            self.result.matched += 1

    def _collective(self, rank: int, call: Call) -> bool:
        members = [each for each in self.records[rank].groups[call.ranks] if each in self.records]
        if rank not in members:
            self.result.problems.append(f"wrong group: rank {rank} is not in the group of its {call}")
            return False
        there = {}
        for member in members:
            other = self._next(member)
            if other is None or other.ranks != call.ranks or other.operation in (*POINT_TO_POINT, "wait"):
                return False
            there[member] = other
        for member, other in there.items():
            if not call.same_as(other):
                mine, theirs = f"rank {rank}'s {call}", f"rank {member}'s {other}"
                self.result.problems.append(f"mismatched collective: {mine} meets {theirs}")
                return False
        times = {member: self._now(member, other) for member, other in there.items()}
        last = max(times, key=lambda member: times[member])
        for member, other in there.items():
            self._wait_until(member, times[last], last)
            self._done(member, other)
        self.result.matched += 1
        return True

    # Time is counted in FLOPs.

    def _now(self, rank: int, call: Call) -> int:
        calls, at = self.records[rank].calls, self.at[rank]
        return self.clock[rank] + call.work - (calls[at - 1].work if at else 0)

    def _wait_until(self, rank: int, when: int, awaited: int) -> None:
        call = self._next(rank)
        assert call is not None
        now = self._now(rank, call)
        if when > now:
            if call.phase not in BESIDE_STEP:
                self.result.idle[rank, awaited] += when - now
            self.clock[rank] += when - now

    def _done(self, rank: int, call: Call) -> None:
        self.clock[rank] = self._now(rank, call)
        self.at[rank] += 1

    # Calls and messages that are left over.

    def _report_stuck(self) -> None:
        stuck = {rank: call for rank in self.records if (call := self._next(rank)) is not None}
        for rank, call in stuck.items():
            if call.operation == "wait":
                awaited = self.records[rank].calls[call.peer]
                who = [awaited.peer]
                what = str(awaited)
            else:
                members = (each for each in self.records[rank].groups[call.ranks] if each in self.records)
                who = [each for each in members if (other := self._next(each)) is None or other.ranks != call.ranks]
                what = str(call)
            others = "; ".join(f"rank {each} {self._state(each)}" for each in who[:2])
            self.result.problems.append(f"waits forever: rank {rank} in {what}; {others}")

    def _state(self, rank: int) -> str:
        call = self._next(rank)
        return "has finished" if call is None else f"is at {call}"

    def _report_unreceived(self) -> None:
        for (sender, receiver, *_), messages in self.sent.items():
            if messages:
                mine = f"rank {sender}'s {messages[0][0]}"
                self.result.problems.append(f"never received: {mine} (rank {receiver} has no receive for it)")


def _work(record: RankRecord) -> int:
    return max((call.work for call in record.calls if call.phase not in BESIDE_STEP), default=0)
