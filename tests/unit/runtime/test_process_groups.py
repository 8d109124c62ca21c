"""The layout's groups are megatron-core's: compared with `parallel_state` on each rank of a world that never talks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ParallelConfig
from plt_megatron.errors import UserError
from plt_megatron.launcher.watchdog import Watchdog
from plt_megatron.runtime import process_groups
from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime
from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

enter_cpu_runtime()
WORLD_SIZE = 8
LAYOUTS = [
    ParallelLayout(data=8),
    ParallelLayout(tensor=8),
    ParallelLayout(pipeline=8),
    ParallelLayout(context=8, expert=4),
    ParallelLayout(data=8, expert=8),
    ParallelLayout(tensor=2, pipeline=2, data=2, expert=2),
    ParallelLayout(tensor=2, context=2, data=2, expert=4),
    ParallelLayout(tensor=2, context=2, pipeline=2, expert=4),
    ParallelLayout(context=2, pipeline=2, data=2, expert=2),
    ParallelLayout(tensor=4, data=2, expert=8),
]
# Dimensions of the layout -> megatron-core's. Its data-parallel groups of experts are those of our `edp`.
DIMENSIONS = {
    "tp": "tensor_model_parallel",
    "cp": "context_parallel",
    "dp": "data_parallel",
    "pp": "pipeline_model_parallel",
    "ep": "expert_model_parallel",
    "edp": "expert_data_parallel",
}
GROUPS = {(dimension,): name for dimension, name in DIMENSIONS.items()} | {
    ("tp", "cp"): "tensor_and_context_parallel",
    ("tp", "pp"): "model_parallel",
    ("tp", "dp"): "tensor_and_data_parallel",
    ("ep", "pp"): "expert_tensor_model_pipeline_parallel",
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of one of eight ranks, with groups that connect nobody."""
    from megatron.core import parallel_state

    create = parallel_state.create_group

    def create_group(*arguments: Any, backend: str | None = None, **rest: Any) -> Any:
        assert backend != "gloo", "a second set of groups, which nothing uses"
        return create(*arguments, backend=backend, **rest)

    monkeypatch.setattr(parallel_state, "create_group", create_group)
    monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZE))
    yield monkeypatch
    destroy_process_groups()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_and_coordinates_are_those_of_megatron_core(world, layout):
    from megatron.core import parallel_state

    for rank in range(WORLD_SIZE):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
        init_process_groups(ParallelConfig(**layout.sizes))
        for dimensions, name in GROUPS.items():
            (own,) = [group for group in layout.groups(*dimensions) if rank in group]
            assert dist.get_process_group_ranks(getattr(parallel_state, f"get_{name}_group")()) == own, name
        with_context = parallel_state.get_data_parallel_group(with_context_parallel=True)
        assert [group for group in layout.groups("dp", "cp") if rank in group] == [
            dist.get_process_group_ranks(with_context)
        ]
        ranks = {own: getattr(parallel_state, f"get_{name}_rank")() for own, name in DIMENSIONS.items()}
        assert layout.coordinates(rank) == ranks
        destroy_process_groups()


def test_a_world_of_another_size_is_refused(world):
    with pytest.raises(UserError, match="parallel: 8 processes: tensor 3 x pipeline 1 parallel needs a multiple of 3"):
        init_process_groups(ParallelConfig(tensor_model_parallel_size=3))


@pytest.mark.parametrize(
    ("environment", "alone"), [({}, True), ({"MASTER_ADDR": "node1"}, True), ({"MASTER_ADDR": "a", "RANK": "0"}, False)]
)
def test_a_process_that_no_launcher_gave_a_rank_is_a_job_of_its_own(environment, alone, monkeypatch):
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(dist, "init_process_group", joined := Mock())
    process_groups._init_torch_distributed(1, timedelta(seconds=1))
    assert ("store" in joined.call_args.kwargs) == alone


@pytest.mark.parametrize(("minutes", "seconds"), [(1.9, 1000.0), (10.0, 300.0), (0.01, 2.0)])
def test_the_watchdog_ends_a_hung_job_before_its_collectives_do(tmp_path, monkeypatch, minutes, seconds):
    from megatron.core import parallel_state

    joined, grouped = Mock(), Mock()
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", grouped)
    limits = {"distributed_timeout_minutes": minutes, "distributed_timeout_seconds_after_init": seconds}
    init_process_groups(ParallelConfig(**limits))
    watchdog = Watchdog(tmp_path, Mock(), 0, 1, patience=seconds, slow_patience=60 * minutes)
    last = watchdog.limit() + 8 * watchdog._interval  # rank 0's, with the time that it leaves to the others
    assert joined.call_args.kwargs["timeout"].total_seconds() > last
    assert 60 * grouped.call_args.kwargs["distributed_timeout_minutes"] > last
