"""What plt submit does: run folders, job scripts, chains, resuming; test_submit_arrays.py has arrays."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from fake_slurm import RUN, write_checkpoint, write_event, write_progress, write_tokens
from submitting import IN_JOB, LAUNCHER, ROOT, command, directives, refusal, submit_run

from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import load_settings
from plt_megatron.predict.flops import training_flops_per_token
from plt_megatron.run_folder import json_lines
from plt_megatron.slurm.run_files import check_no_active_job, job_name, submitted_jobs, write_script
from plt_megatron.slurm.submission import Options, submit
from tests.running import wait_for
from tests.settings import make

# The run folder.


def test_the_run_folder_holds_all_that_the_job_needs(folder, slurm, whole_code, capsys):
    submission = submit_run(
        "optimizer.lr=1e-3", nodes=2, account="mine", qos="high", constraint="ib&h100", exclude="n[1-3]"
    )
    run = folder / "runs" / "try"
    assert submission.runs == [run] and submission.job_ids == [["100"]]
    assert load_config(run / "config.yaml") == load_config("run.yaml", ["optimizer.lr=1e-3"])
    for part in ("plt_megatron/slurm/job.sbatch", "launch/submit.py", "tools/doctor.py", "configs/clusters/cpu.yaml"):
        assert (run / "code" / part).read_bytes() == (ROOT / part).read_bytes()
    assert (run / "code" / "pyproject.toml").is_file()
    assert not list((run / "code").rglob("*.pyc"))
    assert re.match(r"commit [0-9a-f]{40}\n", (run / "git.txt").read_text())
    environment = (run / "environment.txt").read_text()
    assert sys.executable in environment and "PyYAML==" in environment
    settings = load_settings(run)
    assert (settings.nodes, settings.processes_per_node, settings.gpus_per_node) == (2, 8, 8)
    assert settings.cpus_per_process == 16 and settings.time_limit_seconds == 3600 and settings.world_size == 16
    assert slurm.calls("sbatch") == [["--parsable", str(run / "job.sbatch")]]
    assert (run / "logs").is_dir()
    asked = directives(run / "job.sbatch")
    assert asked["--nodes"] == "2" and asked["--ntasks-per-node"] == "1" and asked["--cpus-per-task"] == "128"
    assert asked["--gpus-per-node"] == "8" and asked["--time"] == "01:00:00" and asked["--signal"] == "B:USR1@300"
    assert asked["--account"] == "mine" and asked["--qos"] == "high" and asked["--constraint"] == "ib&h100"
    assert asked["--exclude"] == "n[1-3]" and asked["--chdir"] == str(folder)
    assert asked["--output"] == f"{run}/logs/slurm-%j.out" and asked["--open-mode"] == "append"
    assert "--no-requeue" in asked and asked["--dependency"] == "singleton" and "--partition" not in asked
    shown = capsys.readouterr().out
    for words in ("GPU-hours", "bubble", "per rank", "FLOPs", "scancel 100", "job 100", "sbatch runs/try/job.sbatch"):
        assert words in shown


def test_no_secret_is_recorded(folder, slurm, monkeypatch):
    monkeypatch.setenv("TORCH_HUB_TOKEN", "hidden-one")
    monkeypatch.setenv("NCCL_API_KEY", "hidden-two")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    submit_run()
    text = (folder / "runs/try/environment.txt").read_text()
    assert "NCCL_DEBUG='INFO'" in text and "hidden" not in text


def test_a_dry_run_shows_the_script_and_writes_nothing(folder, slurm, capsys):
    assert submit(Options("run.yaml", time="1:00:00", dry_run=True), ROOT) is None
    assert "#SBATCH --time=01:00:00" in capsys.readouterr().out
    assert not (folder / "runs").exists() and not slurm.calls("sbatch")


def test_a_dry_run_needs_no_slurm(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(Options("run.yaml", time="1:00:00", dry_run=True), ROOT) is None
    shown = capsys.readouterr().out
    assert "not checked" in shown and "assumed: neither --gpus-per-node" in shown


def test_the_environment_adds_no_options(folder, slurm, monkeypatch):
    """Inside another job, or with SBATCH_ variables, sbatch would change what the script says."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SBATCH_TIMELIMIT": "1", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_ACCOUNT", "theirs")
    submit_run()
    seen = slurm.environment("sbatch")
    assert [name for name in seen if name.startswith(("SLURM_", "SBATCH_"))] == ["SLURM_CONF"]
    assert directives(folder / "runs/try/job.sbatch")["--account"] == "theirs"


def test_a_linked_working_directory_keeps_its_name(folder, slurm, monkeypatch, tmp_path):
    """Nodes may mount the file system under the link's name only."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(link)
    monkeypatch.setenv("PWD", str(link))
    assert submit_run().runs == [link / "runs" / "try"]
    assert directives(link / "runs/try/job.sbatch")["--chdir"] == str(link)


def test_a_wrong_pwd_is_not_believed(folder, slurm, monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", str(tmp_path))
    assert submit_run().runs == [folder / "runs" / "try"]


# The submitted code is what runs.


@pytest.mark.parametrize("status", [0, 1, 2, 75, 76])
def test_the_snapshot_runs_though_the_checkout_changes(folder, slurm, checkout, job, status):
    submit_run(root=checkout)
    (checkout / LAUNCHER).write_text(IN_JOB.replace("VERSION", "changed"))
    run = folder / "runs" / "try"
    assert job(run / "job.sbatch", STATUS=str(status)).wait(30) == status
    node, finalize = (folder / "seen").read_text().splitlines()
    assert node.startswith(f"submitted ['node', '{run}']")
    assert finalize.startswith(f"submitted ['finalize', '{run}', '--status', '{status}']")
    options = (folder / "srun.options").read_text().splitlines()
    assert {"--nodes=1", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--gpus-per-node=8"} <= set(options)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_launchers_as_usr1(folder, slurm, checkout, job, number):
    submit_run(root=checkout)
    process = job(folder / "runs" / "try" / "job.sbatch", WAIT="1")
    wait_for((folder / "ready").exists, seconds=20)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert "'--status', '75'" in (folder / "seen").read_text()


def test_a_profile_sets_the_jobs_environment(folder, slurm, checkout, job, monkeypatch):
    monkeypatch.setenv("WHERE", "/a b")
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "processes_per_node": 2,
                "partition": "cpu",
                "environment": {"PROFILE_VARIABLE": '$WHERE/it\'s "quoted" `id` $(id)'},
                "scratch": "/scratch/$WHERE",
                "setup": ["echo set up >>seen"],
                "sbatch_options": ["--exclusive", "--comment=two words"],
            }
        )
    )
    submit_run(root=checkout, cluster="./mine.yaml")
    script = folder / "runs" / "try" / "job.sbatch"
    assert directives(script)["--comment"] == "two words" and "--exclusive" in directives(script)
    assert job(script).wait(30) == 0
    lines = (folder / "seen").read_text().splitlines()
    assert lines[0] == "set up"
    assert lines[1].endswith('/a b/it\'s "quoted" `id` $(id) /scratch//a b')


# Nothing that a user gives is code.

HOSTILE = [
    *("two words", "it's", 'a "quoted" name', "$(touch injected)", "`touch injected`", "; touch injected; #"),
    *("x' --wrap='touch injected", "# comment", "%j %% %A", "@RUN@ @PYTHON@", "-rf", "${HOME}"),
    *("a&b|c>d*?[x]{y}~!", "\u00fc\u4e16"),
]
OPTIONS = {
    *("--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--signal"),
    *("--no-requeue", "--open-mode", "--output", "--chdir", "--dependency"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_never_code(folder, slurm, checkout, job, name):
    submit_run(root=checkout, name=name)
    run = folder / "runs" / name
    script = run / "job.sbatch"
    asked = directives(script)
    assert asked["--output"] == str(run).replace("%", "%%") + "/logs/slurm-%j.out"
    assert re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", asked["--job-name"])
    assert set(asked) == OPTIONS
    assert job(script).wait(30) == 0
    assert f"submitted {['node', str(run)]}" in (folder / "seen").read_text()
    assert not list(folder.glob("**/injected"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "x' --wrap='id") for option in ("partition", "account", "qos", "constraint", "exclude")),
        *(("partition", value) for value in ("two words", 'x" --wrap="id', "$(id)", "a --wrap=id", "# c")),
    ],
)
def test_an_options_value_is_one_word(folder, slurm, checkout, option, value):
    slurm.answer("sinfo", f"{value}*|up|infinite|16|128|2000000|gpu:h100:8")
    submit_run(root=checkout, **{option: value})
    asked = directives(folder / "runs/try/job.sbatch")
    assert asked[f"--{option}"] == value and "--wrap" not in asked


# Longer than a job.


def test_a_chain_is_the_same_script_several_times(folder, slurm, capsys):
    submission = submit_run(chain=3, requeue=True)
    script = folder / "runs/try/job.sbatch"
    assert slurm.calls("sbatch") == [["--parsable", str(script)]] * 3
    assert submission.job_ids == [["100", "101", "102"]] == [submitted_jobs(folder / "runs/try")]
    asked = directives(script)
    assert asked["--dependency"] == "singleton" and "--requeue" in asked
    assert load_settings(folder / "runs/try").chain == 3
    assert "scancel 100 101 102" in capsys.readouterr().out


def test_a_job_that_cannot_be_recorded_is_submitted_all_the_same(folder, slurm, monkeypatch, capsys):
    full = Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded"))
    monkeypatch.setattr(json_lines, "append", full)
    assert submit_run(chain=3).job_ids == [["100", "101", "102"]] and len(slurm.calls("sbatch")) == 3
    out = capsys.readouterr().out
    assert "scancel 100 101 102" in out
    assert f"job 101 is submitted, but {folder}/runs/try/submissions.jsonl cannot be written: Disk quota" in out


def test_two_runs_of_one_name_have_jobs_of_two_names(folder, slurm):
    """Singleton goes by the name: runs must not wait for one another."""
    submit_run()
    submit_run("output_dir=elsewhere")
    names = [directives(folder / where / "try/job.sbatch")["--job-name"] for where in ("runs", "elsewhere")]
    assert names[0] != names[1]


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


# Into a folder that is there.


def test_a_run_is_resumed_with_the_same_configuration(folder, slurm, capsys):
    submit_run()
    write_progress(folder / "runs/try", [100, 200], checkpoint=200)
    capsys.readouterr()
    assert submit_run(nodes=2).job_ids == [["101"]]
    assert "after step 200 of 1,000" in capsys.readouterr().out
    assert submitted_jobs(folder / "runs/try") == ["100", "101"]


def test_another_configuration_is_refused_and_the_difference_said(folder, slurm):
    submit_run()
    run = folder / "runs/try"
    write_progress(run, [100], checkpoint=100)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lines = refusal("optimizer.lr=1e-3", "training.seed=7")
    assert len(lines) == 3 and "2 settings" in lines[0] and "--accept-changes" in lines[0]
    assert "training.seed was 1234, is 7" in lines[1] and "optimizer.lr was 0.0003, is 0.001" in lines[2]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
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
def test_what_the_job_would_refuse_is_refused_with_accepted_changes_too(folder, slurm, setting):
    submit_run()
    run = folder / "runs/try"
    write_tokens(folder / "data" / "other", lengths=(400, 600))
    write_checkpoint(run / "checkpoints", load_config("run.yaml"), 100)
    submit_run("training.micro_batch_size=2", accept_changes=True)  # which no checkpoint minds
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lines = refusal(setting, accept_changes=True)
    assert any(REFUSED[setting] in line for line in lines), lines
    assert len(slurm.calls("sbatch")) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_the_checkpoint_is_told_to_allow_is_submitted(folder, slurm):
    submit_run()
    write_tokens(folder / "data" / "other", lengths=(400, 600))
    write_checkpoint(folder / "runs/try/checkpoints", load_config("run.yaml"), 100)
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


def test_a_run_in_tokens_that_changed_its_batch_is_forecast_by_its_tokens(folder, slurm, capsys):
    length = ("training.train_iters=null", f"training.train_tokens={2000 * 64 * 256}")
    submit_run(*length)
    write_checkpoint(folder / "runs/try/checkpoints", load_config("run.yaml", length), 1000)
    for size, last in ((128, "1,500"), (32, "3,000"), (64, "2,000")):
        capsys.readouterr()
        submit_run(*length, f"training.global_batch_size={size}", accept_changes=True)
        said = capsys.readouterr().out
        assert f"after step 1,000 of {last}" in said and re.search(r"run time +0?[.]?[1-9]", said)


def test_a_run_in_tokens_that_is_finished_is_so_with_another_batch(folder, slurm):
    length = ("training.train_iters=null", f"training.train_tokens={1000 * 64 * 256}")
    submit_run(*length)
    run = folder / "runs/try"
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
def test_what_is_no_branch_is_refused(folder, slurm, options, said):
    submit_run()
    write_progress(folder / "runs/try", [9], checkpoint=9)
    (line,) = refusal(**options)
    assert said in line


def test_a_run_recorded_with_old_names_goes_on(folder, slurm):
    submit_run()
    write_progress(folder / "runs/try", [100], checkpoint=100)
    recorded = folder / "runs/try/config.yaml"
    recorded.write_text(recorded.read_text().replace("window_cp_comm_type", "local_cp_comm_type"))
    (line, *changed) = refusal("optimizer.lr=1e-3")
    assert "1 setting" in line and "optimizer.lr" in changed[0]
    submit_run()
    assert load_config(recorded).parallel.window_cp_comm_type == "a2a"


def test_a_run_folder_that_was_moved_does_not_begin_anew_where_it_was(folder, slurm):
    submit_run()
    write_progress(folder / "runs/try", [100], checkpoint=100)
    (folder / "runs/try").rename(folder / "runs/moved")
    (line,) = refusal(config="runs/moved/config.yaml")
    assert f"name=moved output_dir={folder / 'runs'}" in line
    assert submit_run("name=moved", config="runs/moved/config.yaml").runs == [folder / "runs/moved"]


def test_a_run_that_never_trained_is_written_anew(folder, slurm):
    submit_run()
    submit_run("optimizer.lr=1e-3")
    assert load_config(folder / "runs/try/config.yaml").optimizer.lr == 1e-3


def test_a_finished_run_is_not_submitted_again(folder, slurm):
    submit_run()
    write_progress(folder / "runs/try", [1000], checkpoint=1000)
    (line,) = refusal()
    assert "is finished: step 1,000 of 1,000" in line
    # More steps are another configuration, of a run that is not finished.
    submit_run("training.train_iters=2000", accept_changes=True)


def test_a_run_whose_job_is_queued_is_left_alone(folder, slurm):
    submit_run()
    run = folder / "runs/try"
    for job in (("100", "RUNNING", "any"), ("555", "PENDING", job_name(run, "try"))):
        slurm.jobs(job)
        (line,) = refusal()
        assert f"job {job[0]} is {job[1].lower()}" in line and f"sbatch {run}/job.sbatch" in line
    slurm.jobs(("100", "CANCELLED", job_name(run, "try")), ("556", "RUNNING", "another-run"))
    submit_run()


def test_a_run_with_a_job_is_not_trained_here(folder, slurm):
    submit_run()
    run = folder / "runs/try"
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


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o022, 0o755)])
def test_a_job_script_is_for_those_whom_the_umask_lets_read_it(tmp_path, umask, mode):
    """Set-up commands and variables of a profile may have secrets."""
    former = os.umask(umask)
    try:
        write_script(tmp_path, "#!/bin/bash\n")
    finally:
        os.umask(former)
    assert (tmp_path / "job.sbatch").stat().st_mode & 0o777 == mode


def test_an_installed_package_goes_along_without_its_neighbors(folder, slurm, checkout, capsys):
    (checkout / "pyproject.toml").unlink()
    (checkout / "plt_megatron-0.1.0.dist-info").mkdir()
    submit_run(root=checkout)
    run = folder / "runs" / "try"
    assert [path.name for path in (run / "code").iterdir()] == ["plt_megatron"]
    assert (run / "code" / LAUNCHER).is_file()
    assert (run / "git.txt").read_text().startswith("plt-megatron ")
    assert re.search(r"^watch +plt status runs/try$", capsys.readouterr().out, re.MULTILINE)


def test_other_code_is_kept_beside_the_new(folder, slurm, checkout):
    submit_run(root=checkout)
    run = folder / "runs/try"
    submit_run(root=checkout)
    assert not (run / "code.1").exists()
    (checkout / LAUNCHER).write_text("# new\n")
    submit_run(root=checkout)
    assert (run / "code" / LAUNCHER).read_text() == "# new\n"
    assert "submitted" in (run / "code.1" / LAUNCHER).read_text()


def test_a_full_disk_leaves_the_code_that_was_there(folder, slurm, checkout, monkeypatch):
    submit_run(root=checkout)
    run, write = folder / "runs/try", Path.write_bytes
    (checkout / LAUNCHER).write_text("# new\n")

    def full(path, content):
        if path.name == "pyproject.toml":  # the last
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        submit_run(root=checkout)
    assert "submitted" in (run / "code" / LAUNCHER).read_text() and len(list(run.glob("*code*"))) == 1


def test_a_run_submits_itself_from_its_snapshot(folder, slurm, checkout):
    submit_run(root=checkout)
    run = folder / "runs/try"
    submit_run(root=run / "code")
    assert (run / "code" / "launch" / "submit.py").is_file() and not (run / "code.1").exists()


@pytest.fixture
def cpu(folder):
    """A profile."""
    (folder / "cpu.yaml").write_text("processes_per_node: 2\npartition: cpu\n")
    return str(folder / "cpu.yaml")


def test_earlier_steps_are_measured_rather_than_estimated(folder, slurm, capsys, cpu):
    submit_run(cluster=cpu)
    assert "set tflops_per_process" in capsys.readouterr().out
    write_progress(folder / "runs/try", [10, 20, 30], checkpoint=30, rate=16384 / 2)
    write_event(folder / "runs/try", event="start", attempt=1, job_id="100")
    submit_run(cluster=cpu)
    assert "2 s (measured" in capsys.readouterr().out
    # A step of two seconds: 100 of them take longer than this limit.
    assert "too short for one checkpoint interval" in refusal(cluster=cpu, time="00:09:00")[0]


def test_steps_to_come_with_more_loops_take_longer_than_those_measured(folder, slurm, capsys, cpu):
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


# The command.


def test_submitting_takes_little_and_no_torch(folder, slurm):
    path = folder / "data" / "tokenizer.json"
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>")).save(str(path))
    arguments = ("run.yaml", "--time", "60", f"data.tokenizer={path}", "--nodes", "2", "optimizer.lr=1e-3")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(folder, "submit.py", *arguments, PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: what the clock shows, tests/slurm measures on a real cluster.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0 and not errors
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "plt_megatron" in imported and not imported & {"torch", "megatron", "transformers"}
    assert load_config(folder / "runs/try/config.yaml").optimizer.lr == 1e-3


def test_a_refusal_is_status_2_and_error_lines(folder, slurm):
    done = command(folder, "submit.py", "run.yaml", "--time", "60", "--partition", "no")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: --partition no: no such partition; [^\n]*\n", done.stderr)


def test_the_record_of_submissions_is_json_lines(folder, slurm):
    submit_run(chain=2)
    lines = (folder / "runs/try/submissions.jsonl").read_text().splitlines()
    assert [json.loads(line)["job_ids"] for line in lines] == [["100"], ["101"]]
