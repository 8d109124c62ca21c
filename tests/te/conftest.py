"""The `te` group: Transformer Engine's own Python under megatron-core, on a CPU. Skipped where it is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import Case, Layout
from tests.distributed.pool import WorkerPool
from tests.te import emulation
from tests.te import te_jobs as jobs

HERE = Path(__file__).parent
# `make test` runs these, a minute of CPU time in all, where Transformer Engine's Python is; `make test-te` runs all.
QUICK = {
    "test_te_extension.py": {""},
    "test_te_kernels.py": {""},
    "test_te_overhead.py": {"test_one_wait_few_choices_and_no_copy_that_a_kernel_does_not_need[packed documents]"},
    "test_te_parity.py": {"test_packed_documents_under_context_parallelism[2]"},
    "test_te_fp8.py": {
        "test_every_recipe_of_hopper_is_close_to_bf16[delayed]",
        "test_experts_in_fp8_are_close_to_bf16[experts-tensorwise]",
        "test_weights_are_quantized_once_a_step_whatever_loops_and_microbatches[TP1 PP1 DP1-3-delayed]",
        "test_global_attention_in_fp8_and_the_window_in_bf16_in_one_layer",
        "test_what_the_card_has_no_kernel_for_is_refused_before_the_first_step",
        "test_only_steps_that_update_the_weights_change_scales_and_histories[skipped]",
    },
    "test_te_fusions.py": {
        "test_autograd_keeps_no_copy_of_the_gradients_of_loops",
        "test_what_is_on_where_nothing_is_set",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests that are not quick as slow."""
    for item in items:
        if item.path.parent == HERE and not item.name.startswith(tuple(QUICK.get(item.path.name, ()))):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def run_te() -> Iterator[Callable[..., Any]]:
    """Run as `run_distributed` does, in workers that believe they have a GPU and Transformer Engine."""
    reason = emulation.find()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.closing(WorkerPool("tests.te.emulation:enter")) as pool:
        yield lambda function, world_size, *args, **options: pool(jobs.fresh, world_size, function, *args, **options)


@pytest.fixture
def same_gradient(run_te) -> Callable[..., None]:
    """Assert that cases have the first one's gradient norm in their first step."""

    def check(*cases: Case) -> None:
        norms = [outcome.numbers["gradient norm 0"] for outcome in run_te(jobs.train_fresh, 1, Layout(), list(cases))]
        assert norms == pytest.approx(norms[:1] * len(cases), rel=1e-5)

    return check
