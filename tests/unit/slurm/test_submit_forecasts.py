"""What plt submit says of the time that a run will take, and where it begins."""

from __future__ import annotations

import re
from unittest.mock import Mock

import pytest
from fake_slurm import RUN, write_checkpoint, write_event, write_progress
from submitting import refusal, submit_run, write_profile

from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import ModelConfig, RunConfig, TrainingConfig, UploadsConfig
from plt_megatron.errors import UserError
from plt_megatron.predict.flops import training_flops_per_token
from plt_megatron.slurm import checks
from plt_megatron.slurm.client import LONGEST_MARGIN
from tests.settings import make


def test_earlier_steps_are_measured_rather_than_estimated(folder, slurm, capsys):
    cpu = str(folder / write_profile(folder))
    submit_run(cluster=cpu)
    assert "set tflops_per_process" in capsys.readouterr().out
    write_progress(folder / "runs/try", [10, 20, 30], checkpoint=30, rate=16384 / 2)
    write_event(folder / "runs/try", event="start", attempt=1, job_id="100")
    submit_run(cluster=cpu)
    assert "2 s (measured" in capsys.readouterr().out
    # A step of two seconds: 100 of them take longer than this limit.
    assert "too short for one checkpoint interval" in refusal(cluster=cpu, time="00:09:00")[0]


def test_steps_to_come_with_more_loops_take_longer_than_those_measured(folder, slurm, capsys):
    cpu = write_profile(folder)
    stages = "training.loop_schedule=[{until: 0.5, loop_count: 1}, {loop_count: 2}]"
    model, length = make(ModelConfig, RUN["model"]), RUN["data"]["sequence_length"]
    one, two = (training_flops_per_token(model, length, model.vocab_size, loops).total for loops in (1, 2))
    submit_run(stages, cluster=cpu)
    tokens = RUN["training"]["global_batch_size"] * length  # of a step, which took a second
    write_progress(folder / "runs/try", [480, 490, 500], checkpoint=500, rate=tokens, model_tflops=tokens * one / 1e12)
    write_event(folder / "runs/try", event="start", attempt=1, job_id="100")
    capsys.readouterr()
    submit_run(stages, cluster=cpu)
    assert f"{two / one:.3g} s (measured" in capsys.readouterr().out and two / one > 1.5


def test_steps_to_come_with_larger_batches_take_longer_than_those_measured(folder, slurm, capsys):
    length = RUN["data"]["sequence_length"]
    stages = f"training.batch_schedule=[{{until: {500 * 16 * length}, global_batch_size: 16}}]"
    submit_run(stages)
    write_progress(folder / "runs/try", [480, 490, 500], checkpoint=500, rate=16 * length)  # a second for each step
    write_event(folder / "runs/try", event="start", attempt=1, job_id="100")
    capsys.readouterr()
    submit_run(stages)
    shown = " ".join(capsys.readouterr().out.split())
    assert "step time 4 s (measured" in shown and "after step 500 of 1,000" in shown
    assert f"{(500 * 16 + 500 * 64) * length:,} in 1,000 steps of {16 * length:,} to {64 * length:,}" in shown


def test_a_run_in_tokens_that_changed_its_batch_is_forecast_by_its_tokens(folder, slurm, capsys):
    length = ("training.train_iters=null", f"training.train_tokens={2000 * 64 * 256}")
    submit_run(*length)
    write_checkpoint(folder / "runs/try/checkpoints", load_config("run.yaml", length), 1000)
    for size, last in ((128, "1,500"), (32, "3,000"), (64, "2,000")):
        capsys.readouterr()
        submit_run(*length, f"training.global_batch_size={size}", accept_changes=True)
        said = capsys.readouterr().out
        assert f"after step 1,000 of {last}" in said and re.search(r"run time +0?[.]?[1-9]", said)


def test_a_limit_shorter_than_the_run_is_said(folder, slurm, capsys):
    overrides = ("training.train_iters=50_000_000", "checkpoint.save_interval=100", "checkpoint.keep_last=1")
    submit_run(*overrides)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "--requeue" in line and "one job of 1 h 00 min ends at about step" in line
    jobs = int(re.search(r"--chain (\d+)", line)[1])
    submit_run(*overrides, chain=jobs)
    assert "warning" not in capsys.readouterr().out
    submit_run(*overrides, requeue=True)
    assert "warning" not in capsys.readouterr().out


def test_a_margin_is_advised_that_sbatch_takes():
    ahead = Mock(step_seconds=30_000.0, slowest=1.0, remaining_seconds=60_000.0)
    warning, *_ = checks.time_warnings(ahead, 10**6, 300, requeue=True, chain=1)
    assert warning.endswith(f"--signal-margin {LONGEST_MARGIN}")


def test_a_run_that_starts_from_an_uploaded_checkpoint_begins_at_its_step(tmp_path):
    config = RunConfig(training=TrainingConfig(train_iters=10))
    config.checkpoint.save_interval, config.checkpoint.load = 2, f"file://{tmp_path}/run"
    with pytest.raises(UserError, match=f"checkpoint.load: file://{tmp_path}/run: no complete checkpoint there"):
        checks._begins_after(config)
    write_checkpoint(tmp_path / "run" / "checkpoints", config, 4, data_fingerprint={}, consumed_tokens=90)
    assert checks._begins_after(config) == (4, 90)
    assert checks._checkpoints_at_most(config, 0, 10) == 3
    config.checkpoint.uploads = UploadsConfig("s3://bucket")
    assert checks._checkpoints_at_most(config, 0, 10) == 4, "one is kept for its upload"
