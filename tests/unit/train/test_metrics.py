"""The records of a run on disk."""

from __future__ import annotations

import json

import pytest

from plt_megatron.config.schema import LoggingConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.metrics import MetricsWriter


def writer(folder, **logging) -> MetricsWriter:
    return MetricsWriter(folder, RunConfig(logging=LoggingConfig(**{"tensorboard": False, **logging})), enabled=True)


def record(step: int, **more) -> dict:
    return {"kind": "train", "step": step, "tokens": 10 * step, "loss": 1.0 / step, **more}


def test_records_come_back_as_written(tmp_path):
    metrics = writer(tmp_path)
    records = [record(1, gate_mean=[None, 0.5]), {"kind": "validation", "step": 1, "loop_count": 2, "loss": 3.5}]
    for one in records:
        metrics.write(one)
    assert RunFolder(tmp_path).records() == records


def test_rewinding_forgets_later_steps_and_a_line_cut_short(tmp_path):
    metrics = writer(tmp_path)
    for step in (1, 2, 3):
        metrics.write(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    metrics.rewind(2)
    metrics.write(record(3, again=True))
    assert RunFolder(tmp_path).records() == [record(1), record(2), record(3, again=True)]


def test_tensorboard_gets_one_curve_a_loop(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = writer(tmp_path, tensorboard=True)
    metrics.write(record(5, gate_mean=[None, 0.25], updated=True))
    metrics.write({"kind": "validation", "step": 5, "tokens": 50, "loop_count": 2, "loss": 3.5})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/gate_mean/loop_2", "validation/loss_loops_2"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/gate_mean/loop_2")] == [(5, 0.25)]


def test_other_ranks_write_nothing(tmp_path):
    metrics = MetricsWriter(tmp_path / "run", RunConfig(), enabled=False)
    metrics.write(record(1))
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb_project.*plt-megatron\[track\]"):
        writer(tmp_path, wandb_project="loops")


def test_lines_are_json_objects(tmp_path):
    writer(tmp_path).write(record(1))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
