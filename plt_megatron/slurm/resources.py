"""A job's share of each node, checked against the partition."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from plt_megatron.errors import UserError
from plt_megatron.launcher.job import JobSize
from plt_megatron.predict.cards import card_names
from plt_megatron.run_folder.text import plural
from plt_megatron.slurm.client import NodeGroup, Partition, time_option
from plt_megatron.slurm.profile import ClusterProfile

_ASSUMED_GPUS = 8  # if neither option, profile nor Slurm gives a number; only with --dry-run
_ASSUMED_CPUS = 8  # per process, likewise
_DEFAULT_CARD = "h100"
_SLICE = re.compile(r"\d+g\.\d+gb")  # of a GPU (MIG)


@dataclass(frozen=True, kw_only=True)
class Resources(JobSize):
    """A job's share of the cluster."""

    partition: str | None
    gpu_type: str | None
    card: str  # the name that estimates use for a process's device
    node_memory_bytes: int | None  # of the smallest suitable node; None: unknown
    notes: list[str] = field(default_factory=list)  # assumptions made
    guessed: bool = False  # whether the number of processes is unknown or too large, so that no layout can be checked


def parse_gpus(text: str) -> tuple[str | None, int]:
    """Parse `8` as (None, 8), and `h100:8` as ("h100", 8). Raises `UserError` if `text` has neither form."""
    match = re.fullmatch(r"(?:(\w[\w.-]*):)?(\d{1,4})", text, re.ASCII)
    if match is None:
        raise UserError(f"--gpus-per-node {text}: expected a number, or a type and a number as in h100:8")
    return match[1], int(match[2])


def resolve(
    profile: ClusterProfile,
    available: Sequence[Partition] | None,
    *,
    nodes: int,
    seconds: int,
    gpus: tuple[str | None, int] | None,
) -> tuple[Resources, list[str]]:
    """Fill in what options and profile leave open, and check the result against the partition.

    Args:
        profile: the profile, with options applied.
        available: the cluster's partitions; None: there is no Slurm to ask.
        seconds: time limit.
        gpus: type and number per node, from the options; None: the profile's, else all GPUs of the partition's nodes.

    Returns:
        The resources, and one line per problem.
    """
    chosen, problems = _choose(profile.partition, available)
    gpu_type, gpu_count = gpus or (None, profile.gpus_per_node)
    notes: list[str] = []
    guessed = False
    if gpu_count is None:
        gpu_count, assumed = _gpus_per_node(profile, chosen, notes)
        guessed = assumed and available is not None
    processes = gpu_count or profile.processes_per_node or 0
    if not processes:
        processes, guessed = 1, True
        if not problems:
            where = f"partition {chosen.name} has no GPUs" if chosen else "no GPUs are requested"
            problems.append(f"{where}: for a CPU run choose a --cluster whose profile sets processes_per_node")
    there = chosen.groups if chosen else ()
    groups = [each for each in there if each.gpus >= gpu_count and gpu_type in (None, *each.gpu_types)]
    cpus = profile.cpus_per_process or _share_of_cpus(groups, processes, gpu_count)
    types = [gpu_type] if gpu_type else sorted({kind for group in groups for kind in group.gpu_types})
    if gpu_count > 1 and types and all(map(_SLICE.search, types)):
        problems.append(f"{gpu_count} GPUs per node: CUDA shows a process one slice of a GPU; ask for {types[0]}:1")
    if chosen is not None:
        too_large = _size_problems(chosen, groups, nodes, gpu_count, gpu_type)
        guessed = guessed or bool(too_large)
        problems += too_large + _other_problems(chosen, groups, seconds, processes, cpus)
        if chosen.available == "down":
            notes.append(f"partition {chosen.name} is down: the job waits until it is up again")
    resources = Resources(
        nodes=nodes,
        processes_per_node=processes,
        cpus_per_process=cpus,
        gpus_per_node=gpu_count,
        partition=profile.partition,
        gpu_type=gpu_type,
        card=card(profile, gpu_count, types, notes),
        node_memory_bytes=min((group.memory_mib for group in groups), default=0) << 20 or None,
        notes=notes,
        guessed=guessed,
    )
    return resources, problems


def _gpus_per_node(profile: ClusterProfile, partition: Partition | None, notes: list[str]) -> tuple[int, bool]:
    """Return the GPUs per node if neither options nor profile set them, and whether the number is only assumed."""
    if profile.processes_per_node:
        return 0, False
    if partition is not None:
        notes.append(f"{partition.gpus} GPUs per node, from partition {partition.name}")
        return partition.gpus, False
    notes.append(f"{_ASSUMED_GPUS} GPUs per node, assumed: neither --gpus-per-node nor a profile sets it")
    return _ASSUMED_GPUS, True


def _choose(name: str | None, available: Sequence[Partition] | None) -> tuple[Partition | None, list[str]]:
    """Return the partition the job will run in, None if unknown, and the problems with it."""
    if available is None:
        return None, []
    for partition in available:
        if partition.name == name or (name is None and partition.default):
            return partition, []
    names = [partition.name for partition in available]
    there = f"there are: {', '.join(names) or 'none'}"
    if name is None:
        return None, [f"the cluster has no default partition: give --partition; {there}"]
    if "," in name:  # several: Slurm uses the one that starts first
        missing = [part for part in name.split(",") if part not in names]
        several = [partition for partition in available if partition.name in name.split(",")]
        return _union(name, several) if not missing else None, [
            f"--partition {part}: no such partition; {there}" for part in missing
        ]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return None, [f"--partition {name}: no such partition; {hint}{there}"]


def _union(name: str, partitions: Sequence[Partition]) -> Partition:
    """Merge several partitions into one for this check: roughly, a job fits if it fits one of them."""
    limits = [partition.time_limit_seconds for partition in partitions]
    states = [partition.available for partition in partitions]
    return Partition(
        name=name,
        default=False,
        available=next((state for state in ("up", "down") if state in states), states[0]),
        time_limit_seconds=None if None in limits else max(limit for limit in limits if limit is not None),
        groups=tuple(group for partition in partitions for group in partition.groups),
    )


def _size_problems(
    partition: Partition, suitable: Sequence[NodeGroup], nodes: int, gpus: int, gpu_type: str | None
) -> list[str]:
    """List why a job of this size does not fit the partition."""
    name = f"partition {partition.name}"
    if gpus > partition.gpus:
        return [f"--gpus-per-node {gpus}: the nodes of {name} have {partition.gpus or 'no'} GPUs"]
    if gpu_type and not suitable:
        types = sorted({kind for group in partition.groups for kind in group.gpu_types})
        there = ", ".join(types) or "without a type"
        return [f"--gpus-per-node {gpu_type}:{gpus}: {name} has no such nodes; its GPUs: {there}"]
    count = sum(group.count for group in suitable)
    if nodes > count:
        kind = f" with {gpus} GPUs" if gpus and count < partition.nodes else ""
        return [f"--nodes {nodes}: {name} has {plural(count, 'node')}{kind}"]
    return []


def _other_problems(
    partition: Partition, suitable: Sequence[NodeGroup], seconds: int, processes: int, cpus: int
) -> list[str]:
    """List why no job of whatever number of nodes can start in this partition."""
    problems = []
    name = f"partition {partition.name}"
    if partition.available not in ("up", "down"):
        problems.append(f"{name} is {partition.available}: it accepts no jobs")
    limit = partition.time_limit_seconds
    if limit is not None and seconds > limit:
        problems.append(
            f"--time {time_option(seconds)}: {name} allows {time_option(limit)}; "
            "use that limit, with --chain N or --requeue for a longer run"
        )
    most = max((group.cpus for group in suitable), default=0)
    if suitable and processes * cpus > most:
        problems.append(
            f"{plural(processes, 'process')} of {plural(cpus, 'CPU')} each: {processes * cpus} CPUs per node, the "
            f"nodes of {name} have {most}"
        )
    return problems


def _share_of_cpus(groups: Sequence[NodeGroup], processes: int, gpus: int) -> int:
    """Return a process's fair share of a node's CPUs: CPUs per GPU, which leaves other jobs' GPUs their share; without
    GPUs, all of them."""
    if not groups:
        return _ASSUMED_CPUS
    return max(1, min(group.cpus // max(group.gpus if gpus else 0, processes) for group in groups))


def card(profile: ClusterProfile, gpus: int, types: Sequence[str], notes: list[str]) -> str:
    """Return the name that estimates use for a process's device; an assumption is noted."""
    if gpus == 0:
        return "cpu"
    if profile.gpu is not None:
        return profile.gpu
    for kind in types:
        for name in sorted(card_names(), key=len, reverse=True):
            if _names(kind, name):
                return name
    notes.append(f"assuming {_DEFAULT_CARD.upper()} GPUs: set gpu in the cluster's profile")
    return _DEFAULT_CARD


def _names(kind: str, card: str) -> bool:
    """Whether Slurm's type, as `a100_40` or `nvidia_a100-sxm4-40gb`, names this card, and no slice of it."""
    words, (family, *variant) = re.split("[_-]", kind.lower()), card.split("-")
    is_family = any(re.match(rf"{family}(?!\d)", word) for word in words)
    return is_family and set(variant) <= {*words, *(f"{word}gb" for word in words)} and not _SLICE.search(kind)
