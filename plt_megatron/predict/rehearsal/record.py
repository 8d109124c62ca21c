"""Record of a rehearsed rank: what it communicated, held and computed.

Communication, every collective and message in order, is recorded from torch's operations, so that a rehearsed rank and
a real one yield the same record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

# By torch's operation: its name here, the argument positions of its process group and of the tensors whose bytes count
# (the whole tensor, if a collective joins or divides one).
_OPERATIONS = {
    "allreduce_": ("all_reduce", 1, 0),
    "allreduce_coalesced_": ("all_reduce", 1, 0),
    "_allgather_base_": ("all_gather", 2, 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 2, 0),
    "allgather_": ("all_gather", 2, 0),
    "_reduce_scatter_base_": ("reduce_scatter", 2, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 2, 1),
    "reduce_scatter_": ("reduce_scatter", 2, 1),
    "alltoall_base_": ("all_to_all", 2, 1),
    "alltoall_": ("all_to_all", 2, 1),
    "broadcast_": ("broadcast", 1, 0),
    "reduce_": ("reduce", 1, 0),
    "gather_": ("gather", 2, 1),
    "scatter_": ("scatter", 2, 0),
    "barrier": ("barrier", 1, 0),
    "send": ("send", 1, 0),
    "recv_": ("recv", 1, 0),
}
POINT_TO_POINT = ("send", "recv")
BESIDE_STEP = ("validation", "checkpoint")  # phases that are not part of a training step


@dataclass(frozen=True)
class Call:
    """A collective or a message of one rank.

    Attributes:
        operation: a name in `_OPERATIONS`, an exchange of Python objects, or `wait` for a message.
        group: megatron-core's description of the process group.
        ranks: the group's first rank, its number of ranks, and a hash of all; identifies the group.
        peer: global rank at the other end of a message; for `wait`, the position of the message waited for.
        dtype, elements: of all tensors together; an all-gather's whole result, a reduce-scatter's whole input.
        size: in bytes.
        phase: phase of the step; in forward and backward with the loop, as in `backward 2`.
        work: FLOPs that the rank had done before the call.
        splits: of an all-to-all, rows to and from each rank of the group; `place`: this rank's place in the group.
    """

    operation: str
    group: str
    ranks: tuple[int, int, int] = (0, 0, 0)
    peer: int = -1
    dtype: str = ""
    elements: int = 0
    size: int = 0
    phase: str = ""
    work: int = 0
    splits: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    place: int = 0

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends, assuming ring algorithms."""
        n = self.ranks[1]
        if self.operation in ("recv", "wait", "barrier"):
            return 0.0
        if self.operation == "all_to_all" and any(self.splits[0]):
            rows = sum(self.splits[0])
            return self.size * (rows - self.splits[0][self.place]) / rows
        if self.operation in ("all_gather", "reduce_scatter", "all_to_all"):
            return self.size * (n - 1) / n
        if self.operation == "all_reduce":
            return 2 * self.size * (n - 1) / n
        return float(self.size)

    def same_as(self, other: Call) -> bool:
        """Check whether two ranks of a group may make these calls together."""
        if self.operation == other.operation == "all_to_all" and self.splits[0] and other.splits[0]:
            fits = self.splits[0][other.place] == other.splits[1][self.place]
            fits = fits and other.splits[0][self.place] == self.splits[1][other.place]
            return fits and (self.ranks, self.dtype) == (other.ranks, other.dtype)
        mine, theirs = ((each.operation, each.ranks, each.group, each.dtype, each.elements) for each in (self, other))
        return mine == theirs

    def __str__(self) -> str:
        if self.operation == "wait":
            return f"wait for message {self.peer}"
        to = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}"}.get(self.operation, "")
        where = f"{self.group}, {self.ranks[1]} ranks from {self.ranks[0]}"
        return f"{self.operation}{to} of {self.elements:,} {self.dtype} ({where}) in {self.phase}"


@dataclass
class Log:
    """The calls of one rank.

    Attributes:
        calls: in order.
        phase, work: recorded with the next call.
        groups: every group's ranks, by `Call.ranks`.
    """

    calls: list[Call] = field(default_factory=list)
    phase: str = "start"
    work: int = 0
    groups: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    _keys: dict[Any, tuple[int, int, int]] = field(default_factory=dict)

    def key_of(self, group: dist.ProcessGroup) -> tuple[int, int, int]:
        """Return the group's key, as in `Call.ranks`."""
        if group not in self._keys:
            ranks = tuple(dist.get_process_group_ranks(group))
            self._keys[group] = (ranks[0], len(ranks), hash(ranks))
            self.groups[self._keys[group]] = ranks
        return self._keys[group]

    def add_objects(self, operation: str, group: dist.ProcessGroup | None) -> None:
        group = group or dist.group.WORLD
        assert group is not None
        self.calls.append(Call(operation, described(group), self.key_of(group), phase=self.phase, work=self.work))

    def add_wait(self, message: int) -> None:
        """Record that the rank waits for the message at position `message` in `calls`."""
        call = self.calls[message]
        self.calls.append(Call("wait", call.group, call.ranks, message, phase=self.phase, work=self.work))

    def add(self, func: Any, args: Sequence[Any]) -> None:
        """Record an operation of torch's `c10d` namespace."""
        name = func._schema.name.split("::")[1]
        operation, group_at, tensors_at = _OPERATIONS[name]
        group = dist.ProcessGroup.unbox(args[group_at])
        tensors = [leaf for leaf in tree_leaves(args[tensors_at]) if isinstance(leaf, Tensor)]
        peer = -1
        if operation in POINT_TO_POINT:
            peer = dist.get_process_group_ranks(group)[args[2]]
        call = Call(
            operation,
            described(group),
            self.key_of(group),
            peer,
            dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
            elements=sum(tensor.numel() for tensor in tensors),
            size=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            phase=self.phase,
            work=self.work,
            splits=(tuple(args[4]), tuple(args[3])) if name == "alltoall_base_" else ((), ()),
            place=group.rank(),
        )
        self.calls.append(call)


def described(group: dist.ProcessGroup) -> str:
    """Return megatron-core's description of a group: `TENSOR_MODEL_PARALLEL_GROUP` as `tensor model parallel`."""
    name = group.group_desc.removesuffix("_GROUP").replace("_", " ").lower()
    return "all ranks" if name in ("undefined", "default pg") else name


# A part of a tensor and the global rank that writes it: (global offset, shape, rank).
Box = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass
class Saving:
    """Parts of a checkpoint's tensors that the ranks of a pipeline stage write.

    Attributes:
        tensors: the whole tensor's shape and the parts written of it, by the tensor's key.
        written: bytes by global rank.
    """

    tensors: dict[str, tuple[tuple[int, ...], list[Box]]] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)


@dataclass
class RankRecord:
    """Record of one rank, from its first measured step on.

    Attributes:
        place: the rank's coordinates, as `ParallelLayout.coordinates` names them.
        calls: its communication; `wait` entries refer to the position of the awaited message.
        groups: the ranks of each group in `calls`, by `Call.ranks`.
        groups_made: number of process groups that every rank creates at start, by megatron-core's description.
        memory: bytes at the peak by what holds them; `peak_phase`: when the peak occurs.
        flops: FLOPs of matrix products in the step, by kind (see `Observer`).
        waits: how often the host waits for the GPU, by phase and place.
        shapes: output shapes of this rank's loops.
        saving: what this rank's stage writes of a checkpoint; None: another rank's record has it, or none is written.
        microbatches: number that were run; `seconds`: duration of the rehearsal.
    """

    rank: int
    place: dict[str, int]
    calls: list[Call] = field(default_factory=list)
    groups: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    groups_made: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    flops: dict[str, int] = field(default_factory=dict)
    waits: dict[tuple[str, str], int] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    saving: Saving | None = None
    microbatches: int = 0
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Total bytes at the peak."""
        return sum(self.memory.values())
