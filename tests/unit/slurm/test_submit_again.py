"""plt submit into a folder that is there, or from a checkpoint: what goes on, and what is refused."""

from __future__ import annotations

import re

import pytest
from fake_slurm import write_checkpoint, write_progress, write_tokens
from submitting import command, refusal, submit_run, submitted

from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import locked
from plt_megatron.slurm.run_files import check_no_active_job, job_name, submitted_jobs
from tests.files import contents


@pytest.fixture
def run(folder, slurm):
    """The folder of a submitted run, to which nothing has happened yet."""
    return submitted()


def test_a_run_is_resumed_with_the_same_configuration(run, capsys):
    write_progress(run, [100, 200], checkpoint=200)
    capsys.readouterr()
    assert submit_run(nodes=2).job_ids == [["101"]]
    assert "after step 200 of 1,000" in capsys.readouterr().out
    assert submitted_jobs(run) == ["100", "101"]


def test_another_configuration_is_refused_and_the_difference_said(run):
    write_progress(run, [100], checkpoint=100)
    before = contents(run)
    lines = refusal("optimizer.lr=1e-3", "training.seed=7")
    assert len(lines) == 3 and "2 settings" in lines[0] and "--accept-changes" in lines[0]
    assert "training.seed was 1234, is 7" in lines[1] and "optimizer.lr was 0.0003, is 0.001" in lines[2]
    assert contents(run) == before
    submit_run("optimizer.lr=1e-3", accept_changes=True)
    assert load_config(run / "config.yaml").optimizer.lr == 1e-3


REFUSED = {  # what the job would say of the checkpoint, and what --accept-changes does not promise
    "optimizer.lr=1e-3": "optimizer.lr 0.0003 (now 0.001)",
    "training.train_iters=2000": "checkpoint.allow_other_schedule=true",
    "optimizer.name=sgd": "optimizer.name adam (now sgd)",
    "model.hidden_size=256": "model.hidden_size 128 (now 256)",
    "model.vocab_size=1024": "its vocabulary has 512 entries",
    "data.sources=[{path: data/other}]": "checkpoint.allow_other_data=true",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_the_job_would_refuse_is_refused_with_accepted_changes_too(run, folder, slurm, setting):
    write_tokens(folder / "data" / "other", lengths=(400, 600))
    write_checkpoint(run / "checkpoints", load_config("run.yaml"), 100)
    submit_run("training.micro_batch_size=2", accept_changes=True)  # which no checkpoint minds
    before = contents(run)
    lines = refusal(setting, accept_changes=True)
    assert any(REFUSED[setting] in line for line in lines), lines
    assert len(slurm.calls("sbatch")) == 2 and contents(run) == before


def test_what_the_checkpoint_is_told_to_allow_is_submitted(run, folder):
    write_tokens(folder / "data" / "other", lengths=(400, 600))
    write_checkpoint(run / "checkpoints", load_config("run.yaml"), 100)
    allowed = ("checkpoint.allow_other_schedule=true", "checkpoint.allow_other_data=true")
    submit_run("optimizer.lr=1e-3", "data.sources=[{path: data/other}]", *allowed, accept_changes=True)


def test_a_checkpoint_to_start_from_is_checked_wherever_it_is(folder, slurm):
    """Here, or where the job would have to fetch it from; of its weights alone only the model counts."""
    other = folder / "other"
    write_checkpoint(other / "checkpoints", load_config("run.yaml"), 100)
    for load in (other, f"file://{other}"):
        lines = refusal(f"checkpoint.load={load}", "optimizer.lr=1e-3")
        assert "optimizer.lr 0.0003 (now 0.001)" in lines[0] and f"{load}/checkpoints/step_00000100" in lines[0]
    weights = (f"checkpoint.load={other}", "checkpoint.weights_only=true")
    (line, *_) = refusal(*weights, "model.hidden_size=256")
    assert "model.hidden_size 128 (now 256)" in line
    submit_run(*weights, "optimizer.lr=1e-3")


def test_a_run_in_tokens_goes_on_with_another_batch_wherever_its_checkpoint_is(folder, slurm):
    """In the order that its samples were drawn in, which another batch would make a few samples shorter."""
    length = ("training.train_iters=null", "training.train_tokens=90000")
    write_checkpoint(folder / "other" / "checkpoints", load_config("run.yaml", length), 2)
    for number, load in enumerate((folder / "other", f"file://{folder}/other")):
        batch = ("training.global_batch_size=24", "checkpoint.allow_other_schedule=true", f"name=try{number}")
        submit_run(*length, *batch, f"checkpoint.load={load}")
        (line, *_) = refusal(*length, *batch, f"checkpoint.load={load}", "training.seed=5", f"name=no{number}")
        assert "other data" in line


def test_a_run_in_tokens_that_is_finished_is_so_with_another_batch(folder, slurm):
    length = ("training.train_iters=null", f"training.train_tokens={1000 * 64 * 256}")
    run = submitted(*length)
    write_checkpoint(run / "checkpoints", load_config("run.yaml", length), 1000)
    write_progress(run, [1000], tokens=1000 * 64 * 256)
    (line,) = refusal(*length, "training.global_batch_size=32", accept_changes=True)
    assert "is finished: step 1,000 of 1,000" in line


def test_a_decay_branch_has_a_folder_of_its_own_and_only_its_steps_ahead(folder, slurm, capsys):
    submit_run("optimizer.lr_decay_style=WSD", "checkpoint.keep_every=900")
    write_progress(folder / "runs/try", [900], checkpoint=900)
    capsys.readouterr()
    submit_run("name=shorter", branch_from="runs/try@900", decay_steps=50)
    said = capsys.readouterr().out
    config = load_config(folder / "runs/shorter/config.yaml")
    assert (config.training.train_iters, config.optimizer.lr_wsd_decay_iters) == (950, 50)
    assert config.checkpoint.load == "runs/try/checkpoints/step_00000900"
    assert "after step 900 of 950" in said
    submit_run(branch_from="runs/try@900", name="x #y")  # a name is no YAML
    assert load_config(folder / "runs/x #y/config.yaml").name == "x #y"
    assert load_config(folder / "runs/try/config.yaml").training.train_iters == 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"branch_from": "runs/try"}, "--branch-from runs/try: expected RUN@STEP, as in runs/trunk@2000"),
        ({"branch_from": "runs/try@9", "config": "run.yaml"}, "give a configuration, as in configs/runs, or --branch-"),
        ({"branch_from": "runs/try@9", "array": "list.txt"}, "give a configuration, as in configs/runs, or --branch-"),
        ({"decay_steps": 3}, "--decay-steps needs --branch-from"),
        ({"branch_from": "runs/try@9", "name": "try"}, "lr_decay_style cosine: only WSD runs"),
    ],
)
def test_what_is_no_branch_is_refused(run, options, said):
    write_progress(run, [9], checkpoint=9)
    (line,) = refusal(**options)
    assert said in line


def test_a_run_recorded_with_old_names_goes_on(run):
    write_progress(run, [100], checkpoint=100)
    recorded = run / "config.yaml"
    recorded.write_text(recorded.read_text().replace("window_cp_comm_type", "local_cp_comm_type"))
    (line, *changed) = refusal("optimizer.lr=1e-3")
    assert "1 setting" in line and "optimizer.lr" in changed[0]
    submit_run()
    assert load_config(recorded).parallel.window_cp_comm_type == "a2a"


def test_a_run_folder_that_was_moved_does_not_begin_anew_where_it_was(run, folder):
    write_progress(run, [100], checkpoint=100)
    run.rename(folder / "runs/moved")
    (line,) = refusal(config="runs/moved/config.yaml")
    assert f"name=moved output_dir={folder / 'runs'}" in line
    assert submit_run("name=moved", config="runs/moved/config.yaml").runs == [folder / "runs/moved"]


def test_a_run_that_never_trained_is_written_anew(run):
    submit_run("optimizer.lr=1e-3")
    assert load_config(run / "config.yaml").optimizer.lr == 1e-3


def test_a_finished_run_is_not_submitted_again(run):
    write_progress(run, [1000], checkpoint=1000)
    (line,) = refusal()
    assert "is finished: step 1,000 of 1,000" in line
    # More steps are another configuration, of a run that is not finished.
    submit_run("training.train_iters=2000", accept_changes=True)


# While it has a job.


def test_a_run_whose_job_is_queued_is_left_alone(run, slurm):
    for job in (("100", "RUNNING", "any"), ("555", "PENDING", job_name(run, "try"))):
        slurm.jobs(job)
        (line,) = refusal()
        assert f"job {job[0]} is {job[1].lower()}" in line and f"sbatch {run}/job.sbatch" in line
    slurm.jobs(("100", "CANCELLED", job_name(run, "try")), ("556", "RUNNING", "another-run"))
    submit_run()


def test_a_run_that_is_trained_here_gets_no_job(run):
    with locked(run, "training"):
        (line,) = refusal()
        assert str(run) in line and "training" in line
    submit_run()


def test_a_run_with_a_job_is_not_trained_here(run, folder, slurm):
    check_no_active_job(run)
    slurm.jobs(("100", "PENDING", "any"))
    with pytest.raises(UserError, match=re.escape(f"{run}: its job 100 is pending: wait for it, or scancel 100")):
        check_no_active_job(run)
    trained = command(folder, "train.py", "run.yaml")
    assert trained.returncode == 2 and "its job 100 is pending" in trained.stderr
    slurm.jobs()
    json_lines.append(run / "attempts.jsonl", {"event": "start", "attempt": 1, "job_id": "77"})
    (slurm.bin / "scontrol").symlink_to("squeue")
    slurm.answer("scontrol", "JobId=77 JobState=RUNNING")
    with pytest.raises(UserError, match="job 77, another user's"):
        check_no_active_job(run)
