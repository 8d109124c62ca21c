"""The kinds of cases, and the processes that they share."""

from __future__ import annotations

from collections.abc import Callable

from tests.distributed.pool import WorkerPool, runner
from tests.fuzz.parity import Parity
from tests.fuzz.refusals import Refusals
from tests.fuzz.resume import Resume
from tests.fuzz.round_trip import RoundTrip
from tests.fuzz.search import Kind
from tests.fuzz.transformer_engine import Fp8, TransformerEngine
from tests.te import emulation


class Pools:
    """Pools of workers, which start when they are first used."""

    def __init__(self) -> None:
        self._pools = [WorkerPool(), WorkerPool("tests.te.emulation:enter")]
        self.cpu, self.te = map(runner, self._pools)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


def missing(name: str) -> str | None:
    """What the kind needs that is not there; None: nothing."""
    return emulation.find() if name in ("te", "fp8") else None


KINDS: dict[str, Callable[[Pools], Kind]] = {
    "parity": lambda pools: Parity(pools.cpu),
    "refusals": lambda pools: Refusals(pools.cpu),
    "resume": lambda pools: Resume(pools.cpu),
    "round_trip": lambda pools: RoundTrip(pools.cpu),
    "te": lambda pools: TransformerEngine(pools.te),
    "fp8": lambda pools: Fp8(pools.te),
}
