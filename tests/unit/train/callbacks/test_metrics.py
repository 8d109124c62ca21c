"""The records of a run on disk."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from plt_megatron.config import derived
from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.callbacks import train_log
from plt_megatron.train.callbacks.train_log import LoopLosses, Metrics, ProgressBar
from tests.unit.train.callbacks.a_run import a_run


def read(folder) -> list[dict]:
    return RunFolder(folder).records()


def record(step: int, **more) -> dict:
    return {"kind": "train", "step": step, "tokens": 10 * step, "loss": 1.0 / step, **more}


def started(run, step: int = 0) -> Metrics:
    metrics, run.clock.step = Metrics(run), step
    metrics.on_start()
    return metrics


def test_rewinding_forgets_later_steps_and_a_line_cut_short(tmp_path):
    metrics = started(a_run(tmp_path))
    for step in (1, 2, 3):
        metrics.on_record(record(step, gate_mean=[None, 0.5]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    metrics.run.clock.step = 2
    metrics.on_start()
    metrics.on_record(record(3, again=True))
    assert read(tmp_path) == [*(record(step, gate_mean=[None, 0.5]) for step in (1, 2)), record(3, again=True)]


def curves(folder) -> Any:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_gets_one_curve_a_loop(tmp_path):
    metrics = started(a_run(tmp_path, tensorboard=True))
    metrics.on_record(record(5, gate_mean=[None, 0.25], updated=True))
    metrics.on_record({"kind": "validation", "step": 5, "tokens": 50, "loop_count": 2, "loss": 3.5})
    metrics.close()
    events = curves(tmp_path)
    assert {"train/loss", "train/gate_mean/loop_2", "validation/loss_loops_2"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/gate_mean/loop_2")] == [(5, 0.25)]


def test_tensorboard_forgets_the_steps_that_a_run_returns_from(tmp_path):
    """After a crash, and after a rollback."""
    for start, until in ((0, 6), (2, 5)):
        metrics = started(run := a_run(tmp_path, tensorboard=True), start)
        for step in range(start + 1, until + 1):
            metrics.on_record(record(step))
        if start:
            run.clock.step = 3
            metrics.on_rollback({})
            metrics.on_record(record(4))
        metrics.close()
    assert [event.step for event in curves(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_run_that_does_not_start_leaves_nothing(tmp_path):
    Metrics(a_run(tmp_path / "run", tensorboard=True)).close()
    assert not (tmp_path / "run").exists()


class WandB:
    """As much of W&B as is used: runs by id, and its rule that a log at a step already passed is dropped."""

    def __init__(self, unreachable: bool = False) -> None:
        self.unreachable, self.held = unreachable, set[str]()
        self.teardown = self.held.clear
        self.runs: dict[str, list[dict]] = {}
        self.axes: dict[str, str] = {}

    class Error(Exception):
        pass

    def init(self, *, id: str, resume: str, mode: str | None = None, **settings) -> SimpleNamespace:
        assert id not in self.held, "run ID is in use"
        if self.unreachable and mode != "offline":
            self.held.add(id)
            raise self.Error("timed out\nwhile retrying")
        logged = self.runs.setdefault(id, [])
        assert resume == "allow" and settings["project"] == "loops"

        def log(numbers: dict, step: int | None = None) -> None:
            if step is None or step >= len(logged):
                logged.append(numbers)

        def define_metric(name: str, step_metric: str) -> None:
            self.axes[name] = step_metric

        return SimpleNamespace(log=log, define_metric=define_metric, finish=lambda: None)


def test_wandb_has_one_run_a_folder_and_all_of_its_steps(tmp_path, monkeypatch):
    """Started twice, and rolled back from step 3 to step 1 in between."""
    wandb = WandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ((1, 2, 3), (2, 3)):
        metrics = started(a_run(tmp_path / "one", wandb_project="loops"))
        for step in steps:
            metrics.on_record(record(step))
        metrics.close()
    for kind in ("stragglers", "upload"):
        metrics.on_record(record(3) | {"kind": kind})
    started(a_run(tmp_path / "other", wandb_project="loops")).on_record(record(1))
    one, other = wandb.runs.values()
    assert [numbers["step"] for numbers in one] == [1, 2, 3, 2, 3, 3, 3] and len(other) == 1
    assert all(wandb.axes[f"{tag.split('/')[0]}/*"] == "step" for numbers in one for tag in numbers if tag != "step")


def test_wandb_that_cannot_be_reached_logs_offline(tmp_path, monkeypatch):
    wandb, run = WandB(unreachable=True), a_run(tmp_path, wandb_project="loops")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    started(run).on_record(record(1))
    assert [len(logged) for logged in wandb.runs.values()] == [1]
    (line,) = run.said
    assert line.startswith("warning: Weights & Biases: timed out; logging offline, `wandb sync ")


def test_the_time_left_counts_from_a_rollback(tmp_path, monkeypatch, capsys):
    run, now = a_run(tmp_path), [0.0]
    run.config.training.train_iters, run.last_step = 1000, 1000
    monkeypatch.setattr(train_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step_tokens = derived.tokens_per_step(run.config)
    run.data = SimpleNamespace(describe=lambda: "the sources")
    bar = ProgressBar(run)
    bar.on_start()
    rates = {"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": step_tokens, "mfu": None}
    for seconds, step, left in ((900, 900, "1 min 40 s"), (910, 110, "14 min 50 s"), (950, 150, "14 min 10 s")):
        if step == 110:
            run.clock.step, run.clock.tokens = 100, 100 * step_tokens
            bar.on_rollback({})
        now[0] = float(seconds)
        bar.on_record(record(step, **rates) | {"tokens": step * step_tokens})
        assert capsys.readouterr().out.endswith(f", {left} left\n")


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb_project.*plt-megatron\[track\]"):
        started(a_run(tmp_path, wandb_project="loops"))


def test_losses_by_loops_are_those_of_all_steps_since_the_last_record_and_of_none_given_up(tmp_path):
    def step(callback: LoopLosses, loops: int, loss: float, tokens: int = 8) -> None:
        result = SimpleNamespace(updated=True, loss=loss, loss_tokens=tokens)
        callback.after_step(SimpleNamespace(loop_count=loops), result)  # type: ignore

    rolled_back, restarted = LoopLosses(a_run(tmp_path)), LoopLosses(a_run(tmp_path))
    step(rolled_back, 1, 4.0)
    step(rolled_back, 2, 3.0)
    saved = json.dumps(rolled_back.state_dict())
    step(rolled_back, 1, 9.0)
    rolled_back.on_rollback(json.loads(saved))
    restarted.load_state_dict(json.loads(saved))
    for callback in (rolled_back, restarted):
        step(callback, 1, 2.0)
        step(callback, 2, 0.0, tokens=0)  # a step in which no token counts has no loss
        assert callback.on_log()["loss_by_loops"] == {"1": 3.0, "2": 3.0}
