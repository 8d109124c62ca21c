"""What a rehearsed rank hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plt_megatron.predict.rehearsal.communication import Call

# A part of a tensor and the rank that writes it: offset and shape, global.
Box = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass
class Saving:
    """What the ranks of a pipeline stage write of a checkpoint's tensors.

    Attributes:
        tensors: by their keys: the whole tensor's shape, and what is written of it.
        written: bytes by global rank.
    """

    tensors: dict[str, tuple[tuple[int, ...], list[Box]]] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)


@dataclass
class RankRecord:
    """What one rank did, from its first measured step on.

    Attributes:
        rank: global.
        place: its coordinates, as `ParallelLayout.coordinates` names them.
        calls: its communication; `wait` entries say at which position the awaited message is.
        groups: the ranks of each group in `calls`, by `Call.ranks`.
        groups_made: process groups that every rank makes at the start, by megatron-core's description.
        memory: bytes at the peak by what holds them; `peak_phase`: when that is.
        flops: of matrix products, by kind (`Observer`), in the step.
        waits: how often the host waits for the GPU, by phase and place.
        shapes: of what enters and leaves this rank's layers.
        saving: what this rank's stage writes of a checkpoint; None: another rank's record has it.
        microbatches: as many as were run.
        seconds: the rehearsal took.
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
