"""`data.length_schedule` in whole runs: the rows of each step, in all layouts and however often a run stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.schema import BatchStage, DataConfig, LengthStage, LoopStage, RunConfig
from tests.distributed.schedule_jobs import as_after_step, loss_of_rows, train_and_tell
from tests.distributed.training_jobs import make_data, run_config
from tests.distributed.whole_runs import numbers

SLOW = pytest.mark.slow
# Of eight samples of 32 tokens: two steps in rows of 8, two in rows of 16, then whole.
STAGES = [LengthStage(512, 8), LengthStage(1000, 16)]
LENGTHS = [8, 8, 16, 16, 32, 32]
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return dataclasses.replace(make_data(tmp_path_factory.mktemp("length_data")), length_schedule=STAGES)


def growing(name: str, output_dir: Path, data: DataConfig, **changes: Any) -> RunConfig:
    checkpoint = {"save_interval": 1, "keep_last": 20} | changes.pop("checkpoint", {})
    return run_config(name, output_dir, data, checkpoint=checkpoint, **changes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run on one process that was left alone, with validation after its third and last step."""
    config = growing("whole", tmp_path_factory.mktemp("runs"), data)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == [list(range(first, first + 8)) for first in range(0, 48, 8)]
    return config


def trained(config: RunConfig) -> list[dict[str, Any]]:
    return [record for record in numbers(config) if record["kind"] == "train"]


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=SLOW)], ids=["running text", "packed documents"])
def test_a_step_trains_on_its_samples_cut_into_rows(data, tmp_path, run_distributed, packed):
    """The first step's loss is that of each row alone, cut by hand."""
    data = dataclasses.replace(data, reset_at_document_boundaries=packed)
    changes = {"training": {"train_iters": 1}, "optimizer": {"lr_warmup_iters": 0}}
    config = growing("cut", tmp_path, data, model={"init_method_std": 0.3}, **changes)  # attention matters
    expected = run_distributed(loss_of_rows, 1, config, 8)
    assert expected != pytest.approx(run_distributed(loss_of_rows, 1, config, 32), rel=1e-3)
    assert run_distributed(train_and_tell, 1, config).result is True
    assert trained(config)[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_records_tell_the_rows(whole):
    assert [record["sequence_length"] for record in trained(whole)] == LENGTHS
    assert [record["tokens"] for record in trained(whole)] == [256 * step for step in range(1, 7)]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, DP2, marks=SLOW),
        pytest.param(2, PP2, marks=SLOW),
        pytest.param(4, {**PP2, **DP2}, marks=SLOW),
        pytest.param(4, {**TP2, **PP2}, marks=SLOW),
        pytest.param(2, {"context_parallel_size": 2}, marks=SLOW),
        pytest.param(4, {**TP2, "context_parallel_size": 2}, marks=SLOW),
        pytest.param(2, {**TP2, "recompute_granularity": "full"}, marks=SLOW),
    ],
    ids=["dp2", "pp2", "pp2-dp2", "tp2-pp2", "cp2", "tp2-cp2", "tp2-recompute"],
)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=SLOW)], ids=["running text", "packed documents"])
def test_no_layout_changes_a_step(data, tmp_path, run_distributed, ranks, layout, packed):
    data = dataclasses.replace(data, reset_at_document_boundaries=packed)
    one, other = growing("one", tmp_path, data), growing("other", tmp_path, data, parallel=layout)
    assert run_distributed(train_and_tell, 1, one).result is True
    assert run_distributed(train_and_tell, ranks, other).result is True
    for field in ("loss", "grad_norm", "lr", "tokens", "sequence_length"):
        expected = [record[field] for record in trained(one)]
        assert [record[field] for record in trained(other)] == pytest.approx(expected, rel=1e-5), field


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=SLOW) for step in (1, 3, 4, 5))])
def test_resumed_at_any_step_a_run_goes_on_bit_for_bit(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, len(LENGTHS), "resumed", tmp_path)
    assert run_distributed(train_and_tell, 1, config).result is True
    assert numbers(config) == numbers(whole)


@SLOW
def test_a_switch_is_a_change_of_the_rows_by_hand(whole, data, tmp_path, run_distributed):
    """A run whose rows are all of 8 goes on, bit for bit, with other rows after its second step."""
    short = growing("short", tmp_path, dataclasses.replace(data, length_schedule=[LengthStage(10**6, 8)]))
    assert run_distributed(train_and_tell, 1, short).result is True
    later = dataclasses.replace(short, data=dataclasses.replace(data, length_schedule=[LengthStage(1000, 16)]))
    later = as_after_step(later, 2, len(LENGTHS), "later", tmp_path)
    assert run_distributed(train_and_tell, 1, later).result is True
    ours = [(record["loss"], record["grad_norm"]) for record in trained(whole)]
    assert ours == [(record["loss"], record["grad_norm"]) for record in trained(later)]


WITH = {
    "batches and loops": {
        "training": {
            "batch_schedule": [BatchStage(600, 4)],
            "train_iters": None,
            "train_tokens": 1536,
            "loop_schedule": [LoopStage(0.4, 1), LoopStage(loop_count=2)],
        }
    },
    "z-loss and an average": {"training": {"z_loss_coeff": 1e-2, "ema_decay": 0.5}},
    "layers that run once": {"model": {"num_layers": 4, "loop_span": [1, 3]}},
    "layer by layer": {"model": {"loop_order": "layer", "cross_loop_parallel": False, "share_kv": False,
                                 "gated_window": False}},
    "YaRN": {"model": {"rope_scaling.factor": 4.0,
                       "rope_scaling.yarn.original_max_position_embeddings": 16}},
    "Muon": {"optimizer": {"name": "muon"}},
    "experts": {"model": {"moe.num_experts": 4, "moe.router_topk": 2, "moe.ffn_hidden_size": 16}},
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("changes", WITH.values(), ids=WITH.keys())
def test_with_what_else_changes_a_step(data, tmp_path, run_distributed, changes):
    """On two data-parallel ranks as on one process, and stopped after the third step as left alone."""
    one, two = (growing(name, tmp_path, data, **changes) for name in ("one", "two"))
    two.parallel = dataclasses.replace(two.parallel, **DP2)
    for ranks, config in ((1, one), (2, two)):
        assert run_distributed(train_and_tell, ranks, config).result is True
    records = trained(one)
    for field in ("loss", "grad_norm"):
        expected = [record[field] for record in records]
        assert [record[field] for record in trained(two)] == pytest.approx(expected, rel=2e-5), field
    stopped = as_after_step(one, 3, len(records), "stopped", tmp_path)
    assert run_distributed(train_and_tell, 1, stopped).result is True
    assert numbers(stopped) == numbers(one)
