"""CPUs and number of threads of each process of a node."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

_PCI_DEVICES = Path("/sys/bus/pci/devices")


def share_out(cpus: set[int], count: int, near: Sequence[set[int] | None] = ()) -> list[set[int] | None]:
    """The CPUs of each of `count` processes, from those that the job may use.

    Args:
        near: the CPUs close to each process's device, if known; its share then comes from those.

    Returns:
        One set per process, disjoint; or None for all if there are fewer CPUs than processes.
    """
    if len(cpus) < count:
        return [None] * count
    wanted = [frozenset(close & cpus) if close and close & cpus else frozenset(cpus)
              for close in [*near, *[None] * count][:count]]  # fmt: skip
    if any(len(group) < wanted.count(group) for group in wanted) or _overlap(set(wanted)):
        wanted = [frozenset(cpus)] * count
    shares: list[set[int] | None] = []
    for process, group in enumerate(wanted):
        members = [other for other in range(count) if wanted[other] == group]
        place, ordered = members.index(process), sorted(group)
        size = len(ordered) / len(members)
        shares.append(set(ordered[round(place * size) : round((place + 1) * size)]))
    return shares


def _overlap(groups: set[frozenset[int]]) -> bool:
    return sum(map(len, groups)) > len(frozenset().union(*groups))


def threads(share: set[int] | None, cpus: set[int], count: int, cpus_per_process: int) -> int:
    """Threads of one process: one per CPU, at most as many as the job requested."""
    available = len(share) if share is not None else len(cpus) // count
    return max(1, min(available, cpus_per_process))


def cpus_near_gpus(count: int, devices: Path = _PCI_DEVICES) -> list[set[int] | None]:
    """The CPUs on the same NUMA node as each of the first `count` GPUs; None where the system does not tell."""
    command = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return [None] * count
    return [_local_cpus(devices, bus_id) for bus_id in [*lines, *[""] * count][:count]]


def _local_cpus(devices: Path, bus_id: str) -> set[int] | None:
    # nvidia-smi writes the domain with eight digits, the kernel with four.
    domain, _, rest = bus_id.lower().partition(":")
    try:
        text = (devices / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text(encoding="ascii")
        return parse_cpu_list(text) or None
    except (OSError, ValueError):
        return None


def parse_cpu_list(text: str) -> set[int]:
    """`"0-3,8"` as numbers."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
