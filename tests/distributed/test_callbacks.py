"""Callbacks of a user's own in whole runs: when they are asked, what they may change, their state in checkpoints."""

from __future__ import annotations

import shutil
from typing import Any
from unittest import mock

import pytest
import torch

from plt_megatron.config.schema import ExportsConfig, RunConfig
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.callbacks.base import Callback, TrainingFailed
from tests.distributed.checkpoint_jobs import stored_tensors
from tests.distributed.params import slow
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import as_after_step, folder, numbers

TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


class Average(Callback):
    """An exponential moving average of the weights, as it would be for an export."""

    name = "average"

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.updates = 0
        self.weights = {name: weight.detach().float().clone() for name, weight in run.engine.stage.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def parameter_state(self) -> dict[str, torch.Tensor]:
        return self.weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def after_step(self, step: Any, result: Any) -> None:
        self.updates += 1
        self.run.engine.gather_parameters()
        for name, weight in self.run.engine.stage.named_parameters():
            self.weights[name].lerp_(weight.detach().float(), 0.5)

    def on_log(self) -> dict[str, Any]:
        return {"average_updates": self.updates}


class Spy(Callback):
    """Notes when it is asked."""

    name = "spy"
    asked: list[str] = []

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        Spy.asked = []

    def __getattribute__(self, name: str) -> Any:
        if name in vars(Callback) and callable(vars(Callback)[name]) and not name.startswith("_"):
            Spy.asked.append(name)
        return super().__getattribute__(name)


class FewerLoopsAtFirst(Callback):
    """One loop in the first three steps."""

    def before_step(self, step: Any) -> None:
        step.loop_count = 1 if step.number <= 3 else 2


class CrashAfterRollback(Callback):
    """The run ends in the step after one that was rolled back."""

    rolled_back = False

    def on_rollback(self, state: dict[str, Any]) -> None:
        self.rolled_back = True

    def before_step(self, step: Any) -> None:
        if self.rolled_back:
            raise TrainingFailed("crashed")


def train_with(config: RunConfig, *added: type[Callback], bad_step: int = 0) -> Any:
    """A run with callbacks before the others: whether it finished, and what `Spy` has noted."""
    from plt_megatron.train import trainer

    with mock.patch.object(trainer, "CALLBACKS", (*added, *trainer.CALLBACKS)):
        return train(config, bad_step), Spy.asked


def kept_tensors(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """The average in a checkpoint."""
    return stored_tensors(folder(config) / "checkpoints" / f"step_{step:08d}", "kept.average.")


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Six steps in bf16 on two ranks, with an average."""
    config = run_config(
        "averaged", tmp_path_factory.mktemp("runs"), data, parallel=TP_SP, training={"precision": "bf16"}
    )
    assert run_distributed(train_with, 2, config, Average)[0] is True
    return config


def test_what_a_callback_keeps_is_loaded_in_another_layout(averaged, tmp_path, run_distributed):
    one_process = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    config = as_after_step(averaged, 4, "alone", tmp_path, parallel=one_process)
    assert run_distributed(train_with, 1, config, Average)[0] is True
    assert [record["average_updates"] for record in numbers(config, "train")] == [1, 2, 3, 4, 5, 6]
    ours, theirs = kept_tensors(config, 6), kept_tensors(averaged, 6)
    assert ours.keys() == theirs.keys() and len(ours) >= 10
    for key, tensor in theirs.items():
        rows = min(len(tensor), len(ours[key]))  # the vocabulary is padded for each layout
        torch.testing.assert_close(ours[key][:rows], tensor[:rows], rtol=1e-2, atol=1e-3, msg=key)


def test_a_run_goes_on_without_a_callback_whose_state_it_has_and_with_one_whose_state_it_lacks(
    averaged, tmp_path, run_distributed
):
    without = as_after_step(averaged, 4, "without", tmp_path)
    assert run_distributed(train, 2, without) is True
    losses = [[record["loss"] for record in numbers(config)] for config in (without, averaged)]
    assert losses[0] == losses[1]
    shutil.rmtree(folder(without) / "checkpoints" / "step_00000004")
    without.training.train_iters = 7  # another schedule, another data order
    without.checkpoint.allow_other_schedule = without.checkpoint.allow_other_data = True
    assert run_distributed(train_with, 2, without, Average)[0] is True
    assert [record["average_updates"] for record in numbers(without) if "average_updates" in record][-1] == 1


def test_a_callback_is_asked_at_every_turn_of_a_run(data, tmp_path, run_distributed):
    """Two steps, of which the second is bad at first: back to the first one's checkpoint."""
    config = run_config(
        "spied",
        tmp_path,
        data,
        training={"train_iters": 2, "on_nonfinite": "rollback"},
        optimizer={"lr_warmup_iters": 1},
        checkpoint={"save_interval": 1},
        validation={"loop_counts": [2]},
    )
    finished, asked = run_distributed(train_with, 1, config, Spy, bad_step=2)
    assert finished is True
    assert "say" in asked
    step = ["before_step", "accept", "after_step", "on_log", "on_record"]
    saving = ["state_dict", "parameter_state", "on_save"]
    assert [name for name in asked if name != "say"] == [
        "parameter_state",  # there might be a checkpoint
        "on_start",
        *step,
        *saving,
        "before_step",
        "accept",
        "on_rejected",
        "parameter_state",
        "on_rollback",
        "load_state_dict",
        *saving,
        *step,
        "other_weights",
        "on_record",  # of validation
        *saving,
        "is_working",
        "on_end",
        "close",
    ]


def test_a_run_that_fails_keeps_what_was_being_saved(data, tmp_path, run_distributed):
    """Step 5 is no number, while the checkpoint of step 4 is written beside it."""
    saving = {"async_save": True, "save_interval": 4}
    config = run_config("fails", tmp_path, data, checkpoint=saving, training={"on_nonfinite": "fail"})
    said = run_distributed(train, 1, config, bad_step=5)
    assert isinstance(said, str) and "step_00000004" in said
    assert [path.name for path in (folder(config) / "checkpoints").glob("step_*")] == ["step_00000004"]


@pytest.mark.parametrize("async_save", [slow(False), True])
def test_a_crash_after_a_rollback_does_not_bring_the_bad_data_back(data, tmp_path, run_distributed, async_save):
    changes: dict[str, Any] = {"training": {"on_nonfinite": "rollback"}, "checkpoint": {"async_save": async_save}}
    whole, crashed = (run_config(name, tmp_path, data, **changes) for name in ("whole", "crashed"))
    assert run_distributed(train_with, 1, whole, bad_step=4)[0] is True
    assert run_distributed(train_with, 1, crashed, CrashAfterRollback, bad_step=4)[0] == "crashed"
    assert run_distributed(train, 1, crashed) is True
    assert numbers(crashed) == numbers(whole)


def test_a_callback_may_choose_the_loops_of_a_step(data, tmp_path, run_distributed):
    runs = []
    for layout in ({}, {"pipeline_model_parallel_size": 2}):
        config = run_config(f"loops{len(runs)}", tmp_path, data, parallel=layout, training={"micro_batch_size": 1})
        assert run_distributed(train_with, 1 + bool(layout), config, FewerLoopsAtFirst)[0] is True
        runs.append(numbers(config, "train"))
    assert [len(record["gate_mean"]) for record in runs[0]] == [1, 1, 1, 2, 2, 2]
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_run_exports_as_it_goes(data, tmp_path, run_distributed):
    """Its last export, which is uploaded too, is what plt export makes of the checkpoint."""
    checkpoint = {"save_interval": 2, "exports": ExportsConfig(4, f"file://{tmp_path}/there")}
    config = run_config("exporting", tmp_path, data, training={"train_iters": 4}, checkpoint=checkpoint)
    RunFolder.of(config).path.mkdir(parents=True)
    RunFolder.of(config).save_config(config)
    assert run_distributed(train, 1, config, timeout_s=240) is True
    run, expected = RunFolder.of(config), tmp_path / "step_00000004"
    assert [path.name for path in run.exports.iterdir()] == [expected.name] and not list(run.exporting.iterdir())
    export(ExportOptions(run.path, expected))
    files = {path.name: path.read_bytes() for path in expected.iterdir()}
    assert {path.name: path.read_bytes() for path in (run.exports / expected.name).iterdir()} == files
    assert b"loss with 2 loops" in files["README.md"]
    uploaded = {path.name: path.read_bytes() for path in (tmp_path / "there/exporting/exports/step_00000004").iterdir()}
    assert uploaded.pop("upload.json") and uploaded == files
    (record,) = [record for record in run.records() if record["kind"] == "upload"]
    assert record["what"] == "export" and record["bytes"] == sum(map(len, files.values()))
