"""Preflight checks: examine every node before training, and find the odd one out.

The launcher asks each node for its facts. Then `python -m plt_megatron.launcher.preflight` runs once per device: each
process tests its device; then all run an all-reduce and a ring of point-to-point messages, and check the contents.
Only these processes import torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from plt_megatron.errors import first_line
from plt_megatron.runtime.local_processes import query_gpus

_DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "nvidia-nccl-cu12",
                  "nvidia-nccl-cu13")  # fmt: skip
_LEAST_SHARED_MEMORY = 64 << 20  # used by NCCL and the data loader's workers
_LEAST_TEMPORARY = 256 << 20
LEAST_RUN_FOLDER = 1 << 30  # plt submit requires it, too
_LARGEST_SKEW = 5.0  # seconds
_SILENT = 0.05  # of the nodes; if more report nothing, the fault is not theirs
_SLOW = 0.5  # warn about a link below this share of the median bandwidth
MARK = "probe "  # prefix of a line with results of the check of devices and links
_CPU_BYTES, _GPU_BYTES = 4 << 20, 256 << 20

Facts = dict[str, Any]


def gather_facts(run: Path) -> Facts:
    """Describe this node: devices, versions, free space in bytes (None for a missing folder).

    Also writes a file to the run's folder and removes it.
    """
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    with contextlib.suppress(OSError):  # reported as missing
        temporary.mkdir(parents=True, exist_ok=True)
    found = query_gpus("name", "driver_version", "memory.total")
    return {
        "devices": [{"name": row[0], "driver": row[1], "memory": row[2]} for row in found if len(row) == 3],
        "versions": _versions(),
        "space": {"/dev/shm": _free(Path("/dev/shm")), "temporary": _free(temporary), "run": _free(run)},
        "temporary": str(temporary),
        "run_error": _write_error(run),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _write_error(run: Path) -> str | None:
    path = run / f".write-test-{platform.node()}-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except OSError as error:
        return f"{run}: cannot be written to ({error.strerror})"
    return None


# Judging.


def judge(facts: Mapping[str, Facts], gpus_per_node: int) -> dict[str, str]:
    """Find bad nodes: return node -> what is wrong with it, by itself or compared with the others.

    Args:
        facts: facts by node, the first node first; with `skew`, the seconds its clock is ahead of the first node's.
    """
    skews = [own.get("skew", 0.0) for own in facts.values()]
    usual = min(statistics.median_low(skews), statistics.median_high(skews), key=abs)  # of two nodes, the first's
    problems = {node: list(_own_problems(facts[node], gpus_per_node, usual)) for node in facts}
    if gpus_per_node:
        kinds = {node: _kinds(facts[node]["devices"][:gpus_per_node]) for node in facts}
        for node, text in _odd_ones(kinds, "devices").items():
            problems[node].append(text)
    for node, text in odd_versions({node: facts[node]["versions"] for node in facts}):
        problems[node].append(text)
    return {node: "; ".join(found) for node, found in problems.items() if found}


def _own_problems(facts: Facts, gpus_per_node: int, usual_skew: float) -> list[str]:
    found = []
    if len(facts["devices"]) < gpus_per_node:
        found.append(f"{len(facts['devices'])} GPUs respond instead of {gpus_per_node}")
    for name, free, least in (
        ("/dev/shm", facts["space"]["/dev/shm"], _LEAST_SHARED_MEMORY),
        (facts["temporary"], facts["space"]["temporary"], _LEAST_TEMPORARY),
    ):
        if free is None or free < least:
            there = "missing" if free is None else f"{free >> 20} MiB free"
            found.append(f"{name}: {there}, {least >> 20} MiB needed")
    skew = facts.get("skew", 0.0) - usual_skew
    if abs(skew) > _LARGEST_SKEW:
        found.append(f"its clock is {skew:+.1f} s off the others'")
    if facts.get("run_error"):
        found.append(facts["run_error"])
    return found


def _kinds(devices: list[dict[str, str]]) -> str:
    counts = Counter(f"{device['name']}, {device['memory']}, driver {device['driver']}" for device in devices)
    return " and ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())) or "none"


def odd_versions(versions: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield node and description for each version (by node and name) that differs from the majority's."""
    for name in sorted({name for own in versions.values() for name in own}):
        yield from _odd_ones({node: own.get(name, "none") for node, own in versions.items()}, name).items()


def _odd_ones(values: Mapping[str, str], what: str) -> dict[str, str]:
    """Return the nodes whose value differs from the majority's; in a tie the first node's value counts."""
    counts = Counter(values.values())
    first = next(iter(values.values()))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    return {node: f"{what} {value} instead of {usual}" for node, value in values.items() if value != usual}


def shared_problem(facts: Facts) -> str | None:
    """Return what is wrong with shared resources, for which other nodes would not help; None if nothing is."""
    free = facts["space"]["run"]
    if free is not None and free < LEAST_RUN_FOLDER:
        return f"the run's folder: {free >> 20} MiB free, {LEAST_RUN_FOLDER >> 20} MiB needed"
    return None


def blame(results: Mapping[int, Facts], node_of: Mapping[int, str]) -> dict[str, str]:
    """Find the nodes at fault for a failed check of devices and links.

    Args:
        results: the last report of each rank of the check: the last `stage` it reached, and the `error` of its device,
            if any. Ranks without a report are absent.
        node_of: the node of each rank.

    Returns:
        node -> why; empty if it could be any node, or if several nodes have not reported at all: importing torch from a
        file system that all of them read at once may take longer than the check waits.
    """
    own = {node_of[rank]: result["error"] for rank, result in results.items() if result.get("error")}
    if own:
        return own
    stages = {rank: int(results[rank]["stage"]) if rank in results else -1 for rank in node_of}
    furthest = max(stages.values())
    behind = {node_of[rank] for rank, stage in stages.items() if stage < furthest}
    silent, nodes = {node_of[rank] for rank in node_of.keys() - results.keys()}, len(set(node_of.values()))
    if not behind or 2 * len(behind) >= nodes + 1 or len(silent) > max(1, _SILENT * nodes):
        return {}
    why = "its processes fell behind the others' in the check of devices and links"
    return dict.fromkeys(sorted(behind), why)


def describe_links(results: Mapping[int, Facts], node_of: Mapping[int, str]) -> list[str]:
    """Format the measurements of the check of links as lines, with bandwidths in GB/s."""
    lines = []
    collective = [result["all_reduce"] for result in results.values() if result.get("all_reduce")]
    if collective:
        lines.append(f"all-reduce over {len(results)} processes: {min(collective):.2f} GB/s per process")
    links = {rank: result["receive"] for rank, result in sorted(results.items()) if result.get("receive")}
    if links:
        median = statistics.median(links.values())
        slowest = min(links, key=lambda rank: links[rank])
        before = (slowest - 1) % len(node_of)
        lines.append(
            f"point to point, in a ring: {median:.2f} GB/s, the slowest {links[slowest]:.2f} GB/s "
            f"from {node_of[before]} to {node_of[slowest]}"
        )
        if len(links) > 2 and links[slowest] < _SLOW * median:
            lines.append(f"warning: the link from {node_of[before]} to {node_of[slowest]} is slow")
    return lines


# The processes of the check.


def main() -> int:
    """Check this process's device and links; return exit status 0 if all is well.

    Prints its results as a line `probe {json}` after every stage, so that a process that hangs has shown how far it
    got: 1 the device works, 2 all are connected, 3 the all-reduce, 4 the ring.
    """
    import torch

    result: dict[str, Any] = {"rank": int(os.environ["RANK"]), "stage": 0, "error": None, "versions": _cuda(torch)}
    try:
        device = _work_device(torch)
    except (RuntimeError, AssertionError) as error:
        result["error"] = f"its device {os.environ['LOCAL_RANK']} fails: {first_line(error)}"
        _say(result)
        return 1
    _say(result | {"stage": 1})
    try:
        _check_links(torch, device, result)
    except (RuntimeError, AssertionError) as error:
        print(f"the check of links failed: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _say(result: dict[str, Any]) -> None:
    print(MARK + json.dumps(result), flush=True)


def _cuda(torch: Any) -> dict[str, str]:
    versions = {"cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _work_device(torch: Any) -> Any:
    """Compute something with a known result on the process's device, and return the device."""
    device = torch.device("cpu")
    if int(os.environ["GPUS_PER_NODE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    left = torch.ones(1024, 1024, device=device)
    assert bool(((left @ left) == 1024).all()), "a matrix product is wrong"
    return device


def _check_links(torch: Any, device: Any, result: dict[str, Any]) -> None:
    dist = torch.distributed
    timeout = timedelta(seconds=float(os.environ["PROBE_SECONDS"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    _say(result | {"stage": 2})
    elements = (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4
    data = torch.empty(elements, device=device)
    seconds = _time(torch, device, lambda: dist.all_reduce(data), lambda: data.fill_(rank + 1.0))
    assert bool((data == world * (world + 1) / 2).all()), "an all-reduce has a wrong sum"
    result["all_reduce"] = 2 * (world - 1) / world * 4 * elements / seconds / 1e9
    _say(result | {"stage": 3})
    outgoing, incoming = torch.full_like(data, rank), torch.empty_like(data)
    seconds = _time(torch, device, lambda: _ring(dist, outgoing, incoming))
    before = (rank - 1) % world
    assert bool((incoming == before).all()), f"the message from process {before} arrived corrupted"
    result["receive"] = 4 * elements / seconds / 1e9
    _say(result | {"stage": 4})
    dist.destroy_process_group()


def _ring(dist: Any, outgoing: Any, incoming: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    operations = [
        dist.P2POp(dist.isend, outgoing, (rank + 1) % world),
        dist.P2POp(dist.irecv, incoming, (rank - 1) % world),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _time(torch: Any, device: Any, run: Any, prepare: Any = lambda: None) -> float:
    """Return the seconds of the second run; the first one sets up the connections. `prepare` is not timed."""
    for _ in range(2):
        prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return max(time.perf_counter() - started, 1e-9)


if __name__ == "__main__":
    sys.exit(main())
