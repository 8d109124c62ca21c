"""One class reads a run's folder: what is there, and what is missing, broken or half written."""

from __future__ import annotations

import json
import math

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import CheckpointConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.run_folder.resuming import find_start
from plt_megatron.run_folder.status import read_run_status


def write(folder, *records, tail=""):
    text = "".join((json.dumps(record) if isinstance(record, dict) else record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    return RunFolder(folder)


def train(step, loss, **more):
    return {"kind": "train", "step": step, "tokens": step * 100, "loss": loss, "grad_norm": 1.0, **more}


def validation(step, loop_count, loss):
    record = {"kind": "validation", "step": step, "tokens": step * 100}
    return {**record, "loop_count": loop_count, "loss": loss}


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path):
    run = RunFolder(tmp_path / "nowhere")
    assert not run.has_trained() and run.latest_checkpoint() is None and run.attempts() == [] and run.bad_steps() == 0
    metrics = run.metrics()
    assert (metrics.step, metrics.tokens, metrics.tokens_per_second()) == (0, 0, None)
    with pytest.raises(UserError, match="has no run that has started"):
        run.trained_metrics()
    with pytest.raises(UserError, match=r"config\.yaml"):
        run.config()
    assert not run.path.exists()


def test_the_configuration_comes_back_and_says_where_its_run_lies(tmp_path):
    config = RunConfig(name="mine", output_dir=str(tmp_path))
    run = RunFolder.of(config)
    run.save_config(config)
    assert run.path == tmp_path / "mine" and run.config() == config == load_config(tmp_path / "mine" / "config.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_config(config, tmp_path / "file" / "config.yaml")


def test_a_start_after_a_killed_one_keeps_its_lock(tmp_path):
    run, config = RunFolder(tmp_path / "run"), RunConfig(name="run", output_dir=str(tmp_path))
    with locked(run.path, "training"):
        run.try_config(config)  # and ends here, before its first step
    with locked(run.path, "training"):
        run.try_config(config)
        with pytest.raises(UserError, match="training"), locked(run.path, "training"):
            pass
    run.restore_config()
    assert not run.path.exists()


def test_a_start_that_is_refused_undoes_no_later_submission(tmp_path):
    """A start that was killed before its first step, then plt submit, whose job is refused on its node."""
    run, config = RunFolder(tmp_path / "run"), RunConfig(name="run", output_dir=str(tmp_path))
    run.try_config(config)
    submitted = RunConfig(name="run", output_dir=str(tmp_path), training=TrainingConfig(train_iters=7))
    run.save_config(submitted)
    run.restore_config()
    run.try_config(submitted)
    run.restore_config()
    assert run.config() == submitted


def test_a_run_with_checkpoints_is_not_begun_anew_without(tmp_path):
    config = RunConfig(name="mine", output_dir=str(tmp_path), checkpoint=CheckpointConfig(enabled=False))
    assert find_start(config) is None
    (RunFolder.of(config).checkpoints / "step_00000004").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mine/checkpoints has .* checkpoint\.enabled=false .* another name"):
        find_start(config)


def test_final_figures(tmp_path):
    records = [train(step, 5.0 - step / 10, tokens_per_second=step) for step in range(1, 21)]
    records += [validation(10, 1, 4.5), validation(10, 2, 4.0), validation(20, 1, 3.5), validation(20, 2, 3.0)]
    metrics = write(tmp_path, *records, {"kind": "gates", "step": 3}).trained_metrics()
    assert (metrics.step, metrics.tokens, metrics.tokens_per_second()) == (20, 2000, 10.5)
    assert metrics.final_train_loss() == pytest.approx((3.1 + 3.0) / 2)
    assert metrics.final_train_loss(share=1.0) == pytest.approx(sum(5.0 - s / 10 for s in range(1, 21)) / 20)
    assert metrics.final_validation_losses() == {1: 3.5, 2: 3.0}
    assert [record["step"] for record in metrics.validation_at(2)] == [10, 20]
    assert metrics.loop_counts() == [1, 2]


def test_a_single_record_is_its_own_final_loss(tmp_path):
    metrics = write(tmp_path, train(1, 7.0)).trained_metrics()
    assert metrics.final_train_loss() == 7.0 and metrics.final_validation_losses() == {}


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    run = write(tmp_path, train(1, 7.0), train(2, 6.0), tail='{"kind": "train", "st')
    assert [record["step"] for record in run.metrics().train] == [1, 2]
    assert run.has_trained()


@pytest.mark.parametrize("written", [None, math.nan], ids=["null", "by earlier versions"])
def test_a_loss_that_was_not_finite_is_nan(tmp_path, written):
    evaluation = {"kind": "evaluation", "step": 1, "tokens": 100, "scores": {"task/acc": written}}
    found = write(tmp_path, train(1, written), validation(1, 2, 3.0) | {"ema_loss": written}, evaluation).metrics()
    losses = found.train[0]["loss"], found.validation[0]["ema_loss"], found.evaluation[0]["scores"]["task/acc"]
    assert all(map(math.isnan, losses)) and found.validation[0]["loss"] == 3.0


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([train(1, 7.0), "not json", train(2, 6.0)], "line 2 is not a JSON object"),
        ([validation(1, 2, 3.0)], "no training step yet"),
        ([], "no training step yet"),
        ([{"kind": "train", "step": 1}], "a train record without tokens, loss"),
        ([train(1, "seven")], "a train record without loss"),
        ([train(1, 7.0), {"kind": "validation", "step": 1, "tokens": 1, "loss": 2.0}], "without loop_count"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, records, said):
    with pytest.raises(UserError, match=said) as raised:
        write(tmp_path, *records).trained_metrics()
    assert str(tmp_path / "metrics.jsonl") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_evaluations_are_in_the_order_of_their_steps_whoever_did_them(tmp_path):
    """A job does later ones before the next job repeats one that was cut short."""
    records = [
        {"kind": "evaluation", "step": step, "tokens": step, "scores": {"n": n}} for n, step in enumerate((2, 1, 2))
    ]
    found = write(tmp_path, *records).metrics().evaluation
    assert [(record["step"], record["scores"]["n"]) for record in found] == [(1, 1), (2, 0), (2, 2)]


def test_a_run_that_goes_on_without_a_job_is_no_longer_what_its_last_job_made_of_it(tmp_path):
    folder = write(tmp_path, train(4, 1.0))
    folder.try_again()
    assert not folder.attempts_file.exists()
    job = {"attempt": 1, "job_id": "7"}
    ends = [
        {"event": "start", **job},
        {"event": "end", **job, "status": "failed"},
        {"event": "stop", **job, "reason": "r"},
    ]
    folder.attempts_file.write_text("".join(f"{json.dumps(event)}\n" for event in ends))
    folder.why_file.write_text("r\n")
    assert (read_run_status(folder.path).stopped, read_run_status(folder.path).last_status) == ("r", "failed")
    for _ in range(2):
        folder.try_again()
        assert [event["event"] for event in folder.attempts()] == ["start", "end", "stop", "again"]
    assert (folder.logs / "why-before-attempt-2.txt").read_text() == "r\n" and not folder.why_file.exists()
    assert (read_run_status(folder.path).stopped, read_run_status(folder.path).last_status) == (None, "")


def test_a_batch_script_that_could_run_no_python_is_heard(tmp_path):
    folder = write(tmp_path, train(4, 1.0))
    folder.why_file.write_text("the job's setup failed\n")
    assert read_run_status(folder.path).stopped == f"see {folder.why_file}"


@pytest.mark.parametrize(("saved", "finished"), [(0, False), (2, False), (4, True)])
def test_a_run_is_finished_once_its_last_step_is_saved(tmp_path, saved, finished):
    folder = write(tmp_path, train(4, 1.0))
    folder.config_file.write_text("training: {train_iters: 4}\ndata: {sources: [{path: c}]}\n")
    if saved:
        (folder.checkpoints / f"step_{saved:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step_{saved:08d}" / "manifest.json").touch()
    assert read_run_status(folder.path).finished is finished
    for note, seen in (("{", False), ("[]", False), ('{"status": "started"}', False), ('{"status": "finished"}', True)):
        folder.sweep_note.write_text(note)  # an archive of a sweep has its notes, without checkpoints
        assert read_run_status(folder.path).finished is (finished or (seen and not saved))
