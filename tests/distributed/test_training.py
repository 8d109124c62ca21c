"""Whole runs: what they write, and that stopping and resuming changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from plt_megatron.config.schema import DataSource, ExportsConfig, RunConfig, SpikeConfig
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.run_folder.resuming import branch_config
from plt_megatron.train.checkpoint.reading import read_weights
from tests.checkpoints import read_progress
from tests.distributed.params import slow
from tests.distributed.pool import DistributedFailure
from tests.distributed.training_jobs import (
    diverging_config,
    make_data,
    run_config,
    train,
    train_beside_an_export,
    train_in_turns,
)
from tests.distributed.whole_runs import assert_close, folder, numbers

ROOT = Path(__file__).resolve().parents[2]
TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run of six steps, TP 2 with sequence parallelism, that was never disturbed."""
    config = run_config("undisturbed", tmp_path_factory.mktemp("runs"), data, parallel=TP_SP)
    assert run_distributed(train, 2, config) is True
    return config


def test_a_run_writes_its_metrics_and_checkpoints(finished):
    records = RunFolder(folder(finished)).records()
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in trained] == [256 * step for step in range(1, 7)]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in trained)
    assert trained[0]["loss"] == pytest.approx(math.log(380), rel=0.05), "an untrained model guesses"
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert [record["lr"] for record in trained[:3]] == pytest.approx([0.0, 1.5e-3, 3e-3])
    assert all(record["mfu"] == pytest.approx(record["model_tflops"] / 0.2, rel=1e-5) for record in trained)
    validated = [(record["step"], record["loop_count"]) for record in records if record["kind"] == "validation"]
    assert validated == [(3, 1), (3, 2), (6, 1), (6, 2)]
    assert sorted(path.name for path in (folder(finished) / "checkpoints").glob("step_*")) == [
        "step_00000004",
        "step_00000006",
    ]


def test_loop_statistics_tell_the_loops_apart(finished):
    record = RunFolder(folder(finished)).records()[0]
    assert record["gate_mean"] == [None, 0.5], "gates start at one half, and the first loop has none"
    assert len(record["hidden_norm"]) == len(record["step_size"]) == 2
    assert all(value > 0 for value in (*record["hidden_norm"], *record["step_size"]))


def test_a_stopped_run_goes_on_bit_for_bit(finished, data, tmp_path, run_distributed):
    config = run_config("stopped", tmp_path, data, parallel=TP_SP)
    train_in_turns(run_distributed, 2, config, stops=2)
    assert numbers(config) == numbers(finished)


def test_a_run_that_waits_for_its_exports_can_be_stopped_and_goes_on(data, tmp_path, run_distributed):
    config = run_config(
        "exporting",
        tmp_path,
        data,
        training={"train_iters": 3},
        checkpoint={"save_interval": 3, "exports": ExportsConfig(3)},
    )
    waiting = RunFolder(folder(config)).exporting
    assert run_distributed(train_beside_an_export, 2, config, False) is False
    assert sorted(path.name for path in waiting.glob("step_*")) == ["step_00000003", "step_00000003.log"]
    assert run_distributed(train_beside_an_export, 2, config, True) is True
    assert not list(waiting.iterdir())


@pytest.mark.slow
def test_a_run_with_a_z_loss_says_so_and_is_not_gone_on_without(finished, data, tmp_path, run_distributed):
    training = {"z_loss_coeff": 1e-2}
    whole, stopped = (run_config(name, tmp_path, data, parallel=TP_SP, training=training) for name in ("whole", "cut"))
    for config, stops in ((whole, 0), (stopped, 1)):
        train_in_turns(run_distributed, 2, config, stops)
    assert numbers(stopped) == numbers(whole)
    records, plain = RunFolder(folder(whole)).records(), RunFolder(folder(finished)).records()
    assert records[0]["loss"] == plain[0]["loss"] and records[0]["grad_norm"] != plain[0]["grad_norm"]
    assert records[0]["head_z_loss"] == pytest.approx(math.log(380) ** 2, rel=0.05), "near-equal logits of 380 tokens"
    assert [("head_z_loss" in record) for record in records] == [record["kind"] == "train" for record in records]
    assert not any("head_z_loss" in record for record in plain)
    without = dataclasses.replace(whole, training=dataclasses.replace(whole.training, z_loss_coeff=0.0))
    with pytest.raises(DistributedFailure, match=r"trained with training\.z_loss_coeff 0\.01 \(now 0\.0\)"):
        run_distributed(train, 2, without)


@pytest.mark.parametrize(
    "changes",
    [
        slow({"parallel": TP_SP}),
        slow({"parallel": {"pipeline_model_parallel_size": 2}, "training": {"precision": "bf16"}}),
        {"parallel": {"data_parallel_size": 2, "overlap_grad_reduce": True, "recompute_granularity": "full"}},
    ],
    ids=["tp2", "pp2-bf16", "dp2-overlap-recompute"],
)
def test_deterministic_runs_repeat_bit_for_bit(data, tmp_path, run_distributed, changes):
    """With several threads a rank, where sums could come in any order."""
    training = {"deterministic": True, "threads_per_process": 2} | changes.get("training", {})
    runs = [run_config(name, tmp_path, data, **(changes | {"training": training})) for name in ("first", "second")]
    for config in runs:
        assert run_distributed(train, 2, config) is True
    first, second = (numbers(config) for config in runs)
    assert first == second and len(first) == 10


def test_a_record_says_where_the_time_went_and_how_far_the_data_is(finished):
    records = [record for record in RunFolder(folder(finished)).records() if record["kind"] == "train"]
    parts = {"data", "forward_backward", "gradient_reduction", "optimizer"}
    assert all(parts <= record["step_seconds"].keys() for record in records)
    assert all(min(record["step_seconds"].values()) >= 0 for record in records)
    assert "checkpoint" in records[2]["step_seconds"] and "validation" in records[3]["step_seconds"], (
        "of the step before"
    )
    assert [record["source_epochs"]["text"] for record in records] == pytest.approx(
        [step * records[0]["source_epochs"]["text"] for step in range(1, 7)]
    )
    assert all(record["peak_memory_bytes"] > 1e8 for record in records), "a process with torch in it"


def test_a_trace_is_written_on_request(data, tmp_path, run_distributed):
    logging = {"profile.step_start": 1, "profile.step_end": 2, "profile.ranks": [1]}
    config = run_config("traced", tmp_path, data, parallel=TP_SP, training={"train_iters": 3}, logging=logging)
    assert run_distributed(train, 2, config) is True
    assert [path.name for path in (folder(config) / "profile").iterdir()] == ["rank_0001_steps_2-2.json.gz"]


def test_save_file_saves_and_goes_on(data, tmp_path, run_distributed):
    config = run_config("saving", tmp_path, data, training={"train_iters": 3}, checkpoint={"save_interval": 0})
    folder(config).mkdir(parents=True)
    (folder(config) / "SAVE").touch()
    assert run_distributed(train, 1, config) is True
    assert sorted(path.name for path in (folder(config) / "checkpoints").glob("step_*")) == [
        "step_00000001",
        "step_00000003",
    ]


def test_the_layout_does_not_change_the_run(finished, data, tmp_path, run_distributed):
    """The same metrics from a pipeline whose loops are virtual stages, microbatches cut otherwise."""
    config = run_config(
        "pipeline", tmp_path, data, parallel={"pipeline_model_parallel_size": 2}, training={"micro_batch_size": 1}
    )
    assert run_distributed(train, 2, config) is True
    assert_close(config, finished, "loss", kind=None)


def test_steps_that_are_not_finite_are_skipped_reported_and_limited(data, tmp_path, run_distributed):
    config = diverging_config(tmp_path, data)
    message = run_distributed(train, 2, config)
    assert isinstance(message, str) and "not finite" in message and "checkpoint" in message
    reports = sorted((folder(config) / "incidents").glob("step_*.json"))
    assert len(reports) == 2
    report = json.loads(reports[0].read_text())
    assert report["action"] == "skip" and report["grad_norm"] in ("nan", "inf")
    assert json.loads(reports[1].read_text())["action"] == "fail"
    assert {row["rank"] for row in report["microbatches"]} == {0, 1}
    assert all(len(row["samples"]) == 2 and row["samples"][0]["documents"] for row in report["microbatches"])


def test_a_rollback_goes_back_in_weights_and_on_in_data(finished, data, tmp_path, run_distributed):
    """The fourth step is bad: back to step 2's checkpoint, on with the samples after the bad step's."""
    config = run_config("rolled", tmp_path, data, parallel=TP_SP, training={"on_nonfinite": "rollback"})
    assert run_distributed(train, 2, config, bad_step=4) is True
    trained = numbers(config, "train")
    undisturbed = numbers(finished, "train")
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert trained[:2] == undisturbed[:2]
    assert all(one["loss"] != other["loss"] for one, other in zip(trained[2:], undisturbed[2:], strict=True))
    (report,) = (folder(config) / "incidents").glob("step_*.json")
    assert report.name == "step_00000004_sample_0000000024.json"
    assert json.loads(report.read_text()).items() >= {"action": "rollback", "first_sample": 24}.items()
    assert read_progress(folder(config))["consumed_samples"] == 8 * (6 + 2)


def test_a_step_that_stays_bad_has_a_report_of_each_try_and_ends_the_run(data, tmp_path, run_distributed):
    """Step 4, back to step 2 twice. Started again it ends again, unless somebody has changed something."""
    settings = {"on_nonfinite": "rollback", "max_skipped_steps": 2}
    config = run_config("stuck", tmp_path, data, training=settings, validation={"interval": 0})
    run, tries = RunFolder.of(config), [f"step_00000004_sample_{sample:010d}.json" for sample in (24, 40, 56)]
    for bad_steps in ((4, 6, 8), (2,)):
        message = run_distributed(train, 1, config, bad_step=bad_steps)
        assert isinstance(message, str) and "step 4: not finite" in message
        assert all(name in message for name in ("training.max_skipped_steps 2", "counts anew", str(run.checkpoints)))
        reports = sorted(run.incidents.iterdir())
        assert [path.name for path in reports] == tries and run.bad_steps() == 3
        assert [json.loads(path.read_text())["action"] for path in reports] == ["rollback", "rollback", "fail"]
    config.training.spikes = SpikeConfig("skip")
    assert run_distributed(train, 1, config, bad_step=2) is True
    assert json.loads((run.incidents / tries[-1]).read_text())["action"] == "rollback"


def test_a_decay_branch_is_a_run_of_its_own_length(data, tmp_path, run_distributed):
    """Bit for bit: a run of five steps, and the branch of one of eight from its third step."""
    data = dataclasses.replace(data, order_samples=64)
    shared = {"optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}, "validation": {"interval": 0}}
    saving = {"save_interval": 3, "keep_every": 3}
    trunk = run_config("trunk", tmp_path, data, training={"train_iters": 8}, checkpoint=saving, **shared)
    alone = run_config("alone", tmp_path, data, training={"train_iters": 5}, **shared)
    for config in (trunk, alone):
        RunFolder.of(config).save_config(config)
        assert run_distributed(train, 1, config) is True
    branch = branch_config(f"{folder(trunk)}@3", ["name=branch"], decay=2)
    assert run_distributed(train, 1, branch) is True
    assert numbers(branch) == [record for record in numbers(alone) if record["step"] > 3] and numbers(branch)
    weights = [dict(read_weights(folder(config))) for config in (branch, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert numbers(trunk)[-1]["loss"] != numbers(branch)[-1]["loss"]


@pytest.mark.slow
def test_a_run_goes_on_with_longer_texts(finished, data, tmp_path, run_distributed):
    """From the weights of texts of 32 tokens, in texts of 64: the first loss is not that of a new model."""
    yarn = {"rope_scaling.factor": 2.0, "rope_scaling.yarn.original_max_position_embeddings": 32}
    loaded = {"load": str(folder(finished)), "weights_only": True}
    longer = dataclasses.replace(data, sequence_length=64)
    config = run_config("longer", tmp_path, longer, parallel=TP_SP, model=yarn, checkpoint=loaded)
    RunFolder.of(config).save_config(config)
    assert run_distributed(train, 2, config) is True
    before, after = numbers(finished)[-1]["loss"], numbers(config)[0]["loss"]
    assert abs(after - before) < 0.1 * (math.log(380) - before)
    result = export(ExportOptions(folder(config), tmp_path / "out"))
    keys = json.loads((result.output / "config.json").read_text())
    assert keys["max_position_embeddings"] == 64
    assert keys["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }


def test_losses_of_sources_add_up(data, tmp_path, run_distributed):
    """The total over two sources with other texts each is their sum over tokens, and so are bits."""
    other = make_data(tmp_path / "other", seed=8, tokenizer=data.tokenizer)
    sources = [DataSource(data.sources[0].path, name="one"), DataSource(other.sources[0].path, name="two")]
    parts = dataclasses.replace(data, sources=sources, split="60,40,0")
    config = run_config(
        "by_source",
        tmp_path,
        parts,
        training={"train_iters": 3},
        validation={"interval": 0, "iters": 2, "loop_counts": [], "by_source": True},
        checkpoint={"enabled": False},
    )
    assert run_distributed(train, 2, config) is True
    (record,) = [record for record in RunFolder(folder(config)).records() if record["kind"] == "validation"]
    losses = record["source_loss"]
    assert set(losses) == {"one", "two"} and losses["one"] != losses["two"]
    assert record["loss"] == pytest.approx(sum(losses.values()) / 2), "as many tokens of each"
    bits, tokens = record["source_bits_per_byte"], 2 * 8 * 32
    sizes = {name: losses[name] * tokens / math.log(2) / bits[name] for name in losses}
    assert all(size == pytest.approx(round(size)) and 0.5 * tokens < size < 10 * tokens for size in sizes.values())
    total = sum(bits[name] * sizes[name] for name in losses) / sum(sizes.values())
    assert record["bits_per_byte"] == pytest.approx(total)
    config.name, config.validation.iters = "never_validated", 0
    assert run_distributed(train, 2, config) is True
    assert all(record["kind"] != "validation" for record in RunFolder(folder(config)).records())


def test_local_launch_trains_from_the_command_line(data, tmp_path, warm_python):
    """Two real processes, and the exit status of a run that is asked to stop; then it goes on. test_wheel.py starts one
    as a user does, with an interpreter that has imported nothing."""
    config = run_config("launched", tmp_path, data, parallel=TP_SP, training={"train_iters": 3})
    save_config(config, tmp_path / "run.yaml")
    command = [warm_python, str(ROOT / "launch/train.py"), str(tmp_path / "run.yaml")]
    folder(config).mkdir(parents=True)
    (folder(config) / "STOP").touch()
    for status in (75, 0):
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert result.returncode == status, result.stdout + result.stderr
        assert "step " in result.stdout and "Traceback" not in result.stderr
    assert (folder(config) / "config.yaml").is_file()
    result = subprocess.run([*command, "model.num_layers=0"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
