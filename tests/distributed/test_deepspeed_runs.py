"""Whole runs on the DeepSpeed engine: data, metrics, signals, incidents and exit statuses are the megatron engine's."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest

from plt_megatron.config.schema import DeepSpeedConfig, RunConfig
from plt_megatron.run_folder.folder import RunFolder
from tests.checkpoints import read_progress
from tests.distributed.params import slow
from tests.distributed.training_jobs import diverging_config, run_config, train
from tests.distributed.whole_runs import LocalRun, assert_close, folder, last_step, numbers

TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
DP_RECOMPUTE = {"data_parallel_size": 2, "recompute_granularity": "full"}
OFFLOAD = DeepSpeedConfig(3, "cpu", "cpu")


def on_deepspeed(config: RunConfig, zero: DeepSpeedConfig) -> RunConfig:
    return dataclasses.replace(config, deepspeed=zero)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory, run_deepspeed) -> RunConfig:
    """A run of six steps on megatron's engine."""
    config = run_config("megatron", tmp_path_factory.mktemp("runs"), data, parallel=DP_RECOMPUTE)
    assert run_deepspeed(train, 2, config) is True
    return config


@pytest.mark.parametrize("zero", [slow(DeepSpeedConfig(1)), OFFLOAD], ids=["stage 1", "stage 3"])
def test_the_records_are_the_megatron_engines(undisturbed, data, tmp_path, run_deepspeed, zero):
    """The same kinds, steps, fields and numbers, loop statistics and validation at each loop count included."""
    config = on_deepspeed(run_config("deepspeed", tmp_path, data, parallel=DP_RECOMPUTE), zero)
    assert run_deepspeed(train, 2, config) is True
    expected, ours = (RunFolder(folder(run)).records() for run in (undisturbed, config))
    assert [sorted(record) for record in ours] == [sorted(record) for record in expected]
    for one, other in zip(numbers(config), numbers(undisturbed), strict=True):
        assert _flat(one) == pytest.approx(_flat(other), rel=1e-5, abs=1e-9)
    parts = {"data", "forward_backward", "optimizer"}
    assert all(parts <= record["step_seconds"].keys() for record in ours if record["kind"] == "train")


def _flat(record: dict) -> dict[str, float]:
    """Its numbers by name, lists item by item; a text or null counts as its hash, so that it must be equal."""
    flat = {}
    for name, value in record.items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            flat[f"{name} {index}"] = item if isinstance(item, int | float) else hash(item)
    return flat


@pytest.mark.slow
def test_a_bad_step_is_rolled_back_as_on_the_megatron_engine(data, tmp_path, run_deepspeed):
    """The fourth step is bad: back to step 2's checkpoint, on with the samples after the bad step's."""
    rollback = {"on_nonfinite": "rollback"}
    megatron, ours = (run_config(name, tmp_path, data, parallel=TP_SP, training=rollback) for name in ("one", "other"))
    ours = on_deepspeed(ours, DeepSpeedConfig(3))
    for config in (megatron, ours):
        assert run_deepspeed(train, 2, config, bad_step=4) is True
        (report,) = (folder(config) / "incidents").glob("step_*.json")
        assert (
            report.name == "step_00000004_sample_0000000024.json"
            and json.loads(report.read_text())["action"] == "rollback"
        )
        assert read_progress(folder(config))["consumed_samples"] == 8 * (6 + 2)
    assert_close(ours, megatron, "loss", kind=None)


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_steps_that_are_not_finite_are_skipped_reported_and_limited(data, tmp_path, run_deepspeed, stage):
    config = diverging_config(tmp_path, data)
    message = run_deepspeed(train, 2, on_deepspeed(config, DeepSpeedConfig(stage)))
    assert isinstance(message, str) and "not finite" in message and "checkpoint" in message
    first, second = (json.loads(path.read_text()) for path in sorted((folder(config) / "incidents").glob("*.json")))
    assert (first["action"], second["action"]) == ("skip", "fail")
    assert {row["rank"] for row in first["microbatches"]} == {0, 1}


# ---------------------------------------------------------------- as a user starts it


@pytest.fixture
def stale_build(tmp_path: Path) -> dict[str, str]:
    """An environment in which a compiler of CUDA was found, and whose folder of JIT-compiled extensions holds locks
    that killed builds of DeepSpeed's helpers have left: who waits for one waits for ever."""
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils", "pin_memory"):
        (tmp_path / "extensions" / name).mkdir(parents=True)
        (tmp_path / "extensions" / name / "lock").touch()
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CUDA_HOME": str(tmp_path)}


EXPECTED_LINES = (
    r"building the sample index in .*",
    r"built the sample index in [\d.]+ s",
    r"part +source .*|-+",
    r"(train|validation) +text .*",
    r"AdamW; learning rate, weight decay: .*",
    r"model: .*",
    r"(resuming from|resumed at step) .*",
    r"step \d+/\d+: loss .*",
    r"  validation, \d loops?: loss .*",
    r"(saved|asked to stop|stopping|SIGTERM).*",
)


def _unexpected(run: LocalRun) -> list[str]:
    lines = (run.out + run.err).splitlines()
    return [line for line in lines if line and not any(re.fullmatch(known, line) for known in EXPECTED_LINES)]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(
    data, tmp_path, run_deepspeed, stale_build, warm_python
):
    """ZeRO 3 with everything offloaded, through the command: 75, then 0, the uninterrupted run's records; no word but
    ours, and nothing compiled."""
    before = sorted((tmp_path / "extensions").rglob("*"))
    changes = {
        "parallel": DP_RECOMPUTE,
        "training": {"train_iters": 24},
        "validation": {"interval": 0},
        "checkpoint": {"save_interval": 10},
    }
    config, undisturbed = (
        on_deepspeed(run_config(name, tmp_path, data, **changes), OFFLOAD) for name in ("stopped", "undisturbed")
    )
    run = LocalRun(config, env=stale_build)
    try:
        run.until(lambda: last_step(config) >= 1)
        run.process.send_signal(signal.SIGTERM)
    finally:
        status = run.finish()
    assert status == 75, run.out + run.err
    assert _unexpected(run) == []
    stopped_at = read_progress(folder(config))["step"]
    assert 1 <= stopped_at < 24
    run = LocalRun(config, env=stale_build, python=warm_python)
    assert run.finish() == 0, run.out + run.err
    assert _unexpected(run) == [] and "resumed at step" in run.out
    assert run_deepspeed(train, 2, undisturbed) is True
    assert numbers(config) == numbers(undisturbed)
    assert sorted((tmp_path / "extensions").rglob("*")) == before


@pytest.mark.slow
def test_the_megatron_engine_does_not_notice_that_deepspeed_is_installed(data, tmp_path, stale_build):
    one = {"training": {"train_iters": 1}, "optimizer": {"lr_warmup_iters": 0}, "validation": {"iters": 0}}
    config = run_config("plain", tmp_path, data, **one)
    run = LocalRun(config, env=stale_build)
    assert run.finish() == 0, run.out + run.err
    assert _unexpected(run) == []
