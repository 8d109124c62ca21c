"""The kinds of cases, and the processes that they share."""

from __future__ import annotations

from tests.distributed.pool import WorkerPool
from tests.fuzz.branch import Branch
from tests.fuzz.parity import Parity
from tests.fuzz.refusals import Refusals
from tests.fuzz.rehearsal import Rehearsal
from tests.fuzz.resume import Resume
from tests.fuzz.round_trip import RoundTrip
from tests.fuzz.search import Kind
from tests.fuzz.te_layers import Fp8, TransformerEngine
from tests.te import emulation


class Pools:
    """Pools of workers, which start when they are first used."""

    def __init__(self) -> None:
        self.cpu, self.te = WorkerPool(), WorkerPool("tests.te.emulation:enter")

    def close(self) -> None:
        self.cpu.close()
        self.te.close()


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Parity, Refusals, Resume, RoundTrip, Branch, Rehearsal, TransformerEngine, Fp8)
}


def missing(name: str) -> str | None:
    """Say what the kind needs that is not there; None: nothing."""
    return emulation.find() if issubclass(KINDS[name], TransformerEngine) else None


def make(name: str, pools: Pools) -> Kind:
    """The kind, with the pool that it needs."""
    return KINDS[name](pools.te if issubclass(KINDS[name], TransformerEngine) else pools.cpu)
