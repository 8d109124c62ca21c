"""`overlap_param_gather` with loops: each bucket of weights is gathered once a step, whatever the loops, and nobody
reads weights that are not there yet. The parity tests (with overlap) compare losses and weights with one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.distributed.cases import VOCAB_SIZE, Case, Layout
from tests.distributed.params import layouts


def gathered(layout: Layout, case: Case) -> dict[str, Any]:
    """(gathers, bucket groups) of each of two steps and of a validation; how many weights were stale after a step."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.megatron_engine import MegatronEngine
    from tests.distributed import parity

    init_process_groups(parity._parallel(layout, Case()))
    with parity._randomized(zero_gates=False), parity._small_buckets():
        engine = MegatronEngine(parity._config(layout, case), VOCAB_SIZE)
    started: list[Any] = []
    stock = Group.start_param_sync

    def start(self: Any, force_sync: bool = False) -> None:
        started.append(self)
        stock(self, force_sync)

    found: dict[str, Any] = {"groups": len(engine._bucket_groups)}
    with mock.patch.object(Group, "start_param_sync", start):
        for step in range(2):
            engine.train_step(parity._batches(step, layout, case))
            found[f"train {step}"] = len(started), len(set(started))
            started.clear()
        before = [parameter.detach().clone() for parameter in engine.stage.parameters()]
        engine.gather_parameters()
        found["after"] = len(started)
        found["stale"] = sum(
            not bool((old == new).all()) for old, new in zip(before, engine.stage.parameters(), strict=True)
        )
        started.clear()
        for loops in (1, case.loops):
            engine.evaluate(parity._batches(9, layout, case), loops)
        found["validation"] = len(started)
        engine.train_step(parity._batches(2, layout, case))
        engine.evaluate(parity._batches(9, layout, case), 1)  # no gate is used
        engine.gather_parameters()
        found["awaited"] = all(group.param_gather_handle is None for group in engine._bucket_groups)
        found["digest"] = [float(parameter.double().sum()) for parameter in engine.stage.parameters()]
    return found


@layouts("DP2, PP2 DP2")
def test_each_bucket_is_gathered_once_a_step(run_distributed, layout):
    ranks = run_distributed(gathered, layout.world_size, layout, Case(3, "full", overlap=True), all_ranks=True)
    assert ranks[0]["groups"] > 3 * layout.pp or layout.pp > 1
    for found in ranks:
        assert found["train 0"] == found["train 1"] == (found["groups"], found["groups"])
        assert found["stale"] > 0 and found["after"] == found["groups"]
        assert found["validation"] == 0, "weights that are complete are not gathered again"
        assert found["awaited"]
    halves = [ranks[:2], ranks[2:]] if layout.pp > 1 else [ranks]  # a stage's two replicas
    assert all(one["digest"] == other["digest"] for one, other in halves)


def test_without_it_weights_are_complete_after_a_step(run_distributed):
    case = Case(2, overlap=True, parallel={"overlap_param_gather": False})
    found = run_distributed(gathered, 2, Layout(dp=2), case)
    assert found["stale"] == found["after"] == 0
