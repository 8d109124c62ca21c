"""`data.length_schedule` in whole runs: the rows of each step, in all layouts and however often a run stops."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config.schema import BatchStage, DataConfig, LengthStage, LoopStage, RunConfig
from tests.distributed.cases import Layout
from tests.distributed.params import layouts, slow
from tests.distributed.schedule_jobs import loss_of_rows, train_and_tell
from tests.distributed.training_jobs import run_config
from tests.distributed.whole_runs import as_after_step, assert_close, numbers

# Of eight samples of 32 tokens: two steps in rows of 8, two in rows of 16, then whole.
STAGES = [LengthStage(512, 8), LengthStage(1000, 16)]
LENGTHS = [8, 8, 16, 16, 32, 32]
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}


@pytest.fixture(scope="module")
def data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, length_schedule=STAGES)


GROWING = {"checkpoint": {"save_interval": 1, "keep_last": 20}}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run on one process that was left alone, with validation after its third and last step."""
    config = run_config("whole", tmp_path_factory.mktemp("runs"), data, GROWING)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == [list(range(first, first + 8)) for first in range(0, 48, 8)]
    return config


@pytest.mark.parametrize("packed", [False, slow(True)], ids=["running text", "packed documents"])
def test_a_step_trains_on_its_samples_cut_into_rows(data, tmp_path, run_distributed, packed):
    """The first step's loss is that of each row alone, cut by hand."""
    data = dataclasses.replace(data, reset_at_document_boundaries=packed)
    changes = {"training": {"train_iters": 1}, "optimizer": {"lr_warmup_iters": 0}}
    config = run_config("cut", tmp_path, data, GROWING, model={"init_method_std": 0.3}, **changes)  # attention matters
    expected = run_distributed(loss_of_rows, 1, config, 8)
    assert expected != pytest.approx(run_distributed(loss_of_rows, 1, config, 32), rel=1e-3)
    assert run_distributed(train_and_tell, 1, config).result is True
    assert numbers(config, "train")[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_records_tell_the_rows(whole):
    assert [record["sequence_length"] for record in numbers(whole, "train")] == LENGTHS
    assert [record["tokens"] for record in numbers(whole, "train")] == [256 * step for step in range(1, 7)]


@layouts("", slow="DP2, PP2, PP2 DP2, TP2 SP PP2, CP2, TP2 SP CP2, TP2 SP")
@pytest.mark.parametrize("packed", [False, slow(True)], ids=["running text", "packed documents"])
def test_no_layout_changes_a_step(data, tmp_path, run_distributed, layout, packed):
    data = dataclasses.replace(data, reset_at_document_boundaries=packed)
    one = run_config("one", tmp_path, data, GROWING)
    recompute = "full" if layout == Layout.of("TP2 SP") else "none"
    how = {"overlap_grad_reduce": layout.dp > 1, "recompute_granularity": recompute}
    other = run_config("other", tmp_path, data, GROWING, parallel={**layout.settings, **how})
    assert run_distributed(train_and_tell, 1, one).result is True
    assert run_distributed(train_and_tell, layout.world_size, other).result is True
    assert_close(other, one, "loss", "grad_norm", "lr", "tokens", "sequence_length")


@pytest.mark.parametrize("step", [2, *(slow(step) for step in (1, 3, 4, 5))])
def test_resumed_at_any_step_a_run_goes_on_bit_for_bit(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, "resumed", tmp_path)
    assert run_distributed(train_and_tell, 1, config).result is True
    assert numbers(config) == numbers(whole)


@pytest.mark.slow
def test_a_switch_is_a_change_of_the_rows_by_hand(whole, data, tmp_path, run_distributed):
    """A run whose rows are all of 8 goes on, bit for bit, with other rows after its second step."""
    short = run_config("short", tmp_path, dataclasses.replace(data, length_schedule=[LengthStage(10**6, 8)]), GROWING)
    assert run_distributed(train_and_tell, 1, short).result is True
    later = as_after_step(short, 2, "later", tmp_path, data={"length_schedule": [LengthStage(1000, 16)]})
    assert run_distributed(train_and_tell, 1, later).result is True
    ours = [(record["loss"], record["grad_norm"]) for record in numbers(whole, "train")]
    assert ours == [(record["loss"], record["grad_norm"]) for record in numbers(later, "train")]


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


@pytest.mark.slow
@pytest.mark.parametrize("changes", WITH.values(), ids=WITH.keys())
def test_with_what_else_changes_a_step(data, tmp_path, run_distributed, changes):
    """On two data-parallel ranks as on one process, and stopped after the third step as left alone."""
    one, two = (run_config(name, tmp_path, data, GROWING, **changes) for name in ("one", "two"))
    two.parallel = dataclasses.replace(two.parallel, **DP2)
    for ranks, config in ((1, one), (2, two)):
        assert run_distributed(train_and_tell, ranks, config).result is True
    assert_close(two, one, "loss", "grad_norm", rel=2e-5)
    stopped = as_after_step(one, 3, "stopped", tmp_path)
    assert run_distributed(train_and_tell, 1, stopped).result is True
    assert numbers(stopped) == numbers(one)
