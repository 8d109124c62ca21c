"""The check of devices and links before training: `python -m plt_megatron.launcher.probe`, one per device.

Each process tests its device; then all run an all-reduce and a ring of point-to-point messages, and compare the
contents. Each prints its results as a line `probe {json}` after every stage, so that one that hangs has shown how far
it came: 1 the device works, 2 all are connected, 3 the all-reduce, 4 the ring.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

MARK = "probe "
_CPU_BYTES, _GPU_BYTES = 4 << 20, 256 << 20


def main() -> int:
    """Check; the exit status is 0 if all is well."""
    import torch

    result: dict[str, Any] = {"rank": int(os.environ["RANK"]), "stage": 0, "error": None, "versions": _versions(torch)}
    try:
        device = _work_device(torch)
    except (RuntimeError, AssertionError) as error:
        result["error"] = f"its device {os.environ['LOCAL_RANK']} fails: {str(error).splitlines()[0]}"
        return _say(result, 1)
    _say(result | {"stage": 1})
    try:
        _check_links(torch, device, result)
    except (RuntimeError, AssertionError) as error:
        print(f"the check of links failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def _say(result: dict[str, Any], status: int = 0) -> int:
    print(MARK + json.dumps(result), flush=True)
    return status


def _versions(torch: Any) -> dict[str, str]:
    versions = {"cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _work_device(torch: Any) -> Any:
    """Have the device compute something with a known result."""
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
    data = torch.full((elements,), float(rank + 1), device=device)
    seconds = _time(torch, device, lambda: dist.all_reduce(data.copy_(torch.full_like(data, rank + 1.0))))
    assert bool((data == world * (world + 1) / 2).all()), "an all-reduce has a wrong sum"
    result["all_reduce"] = 2 * (world - 1) / world * 4 * elements / seconds / 1e9
    _say(result | {"stage": 3})
    outgoing, incoming = torch.full_like(data, rank), torch.empty_like(data)
    seconds = _time(torch, device, lambda: _ring(dist, outgoing, incoming))
    before = (rank - 1) % world
    assert bool((incoming == before).all()), f"the message of process {before} arrived changed"
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


def _time(torch: Any, device: Any, run: Any) -> float:
    """Seconds of the second run: the first makes the connections."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return max(time.perf_counter() - started, 1e-9)


if __name__ == "__main__":
    sys.exit(main())
