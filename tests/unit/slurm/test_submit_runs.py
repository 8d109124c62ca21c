"""What plt submit writes and asks Slurm for: run folders, chains; beside it are files for what else it does."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import resource
import sys
from unittest.mock import Mock

import pytest
from fake_slurm import write_tokenizer
from submitting import ROOT, command, directives, submit_run

from plt_megatron.config.loader import load_config
from plt_megatron.launcher.job import load_settings
from plt_megatron.run_folder import json_lines
from plt_megatron.slurm.run_files import submitted_jobs
from plt_megatron.slurm.submission import Options, submit


def test_the_run_folder_holds_all_that_the_job_needs(folder, slurm, whole_code, capsys):
    options = {"account": "mine", "qos": "high", "constraint": "ib&h100", "exclude": "n[1-3]"}
    submission = submit_run("optimizer.lr=1e-3", nodes=2, **options)
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
    size = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "128", "gpus-per-node": "8", "time": "01:00:00"}
    others = {"signal": "B:USR1@300", "open-mode": "append", "dependency": "singleton", "chdir": str(folder)}
    expected = options | size | others | {"output": f"{run}/logs/slurm-%j.out"}
    assert {f"--{name}": value for name, value in expected.items()}.items() <= asked.items()
    assert "--no-requeue" in asked and "--partition" not in asked
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


@pytest.mark.parametrize("answer", ["%s", "%s;west", "Checking your quota\\n%s\\nIt costs 3 units of 2027"])
def test_what_a_site_says_at_submission(folder, slurm, capsys, answer):
    """In its wrapper of sbatch, or by a plugin that has changed the job. Without the id the job would be unknown."""
    slurm.says("sbatch: your time limit is now 01:00:00\n", answer)
    submission = submit_run(chain=2)
    assert submission.job_ids == [["100", "101"]] and submitted_jobs(submission.runs[0]) == ["100", "101"]
    assert "your time limit is now 01:00:00" in capsys.readouterr().err


def test_a_job_is_known_though_nothing_can_be_said(folder, slurm, monkeypatch):
    """Else the user would not know its id, and the rest of a chain would be missing."""
    slurm.says("sbatch: your time limit is now 01:00:00\n", "%s")
    with open("/dev/full", "w", buffering=1) as full:  # as stderr is
        monkeypatch.setattr(sys, "stderr", full)
        submission = submit_run(chain=2)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert submitted_jobs(folder / submission.runs[0]) == ["100", "101"]


def test_the_environment_adds_no_options(folder, slurm, monkeypatch):
    """Inside another job, or with SBATCH_ variables, sbatch would change what the script says."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SBATCH_TIMELIMIT": "1", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"SBATCH_ACCOUNT": "theirs", "SBATCH_CONSTRAINT": "a100", "SCANCEL_STATE": "RUNNING"}.items():
        monkeypatch.setenv(name, value)
    submit_run()
    seen = slurm.environment("sbatch")
    assert [name for name in seen if name.startswith(("SLURM_", "SBATCH_", "SCANCEL_"))] == ["SLURM_CONF"]
    found = directives(folder / "runs/try/job.sbatch")
    assert (found["--account"], found["--constraint"]) == ("theirs", "a100")


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


def test_a_chain_is_the_same_script_several_times(folder, slurm, capsys):
    submission = submit_run(chain=3, requeue=True)
    script = folder / "runs/try/job.sbatch"
    assert slurm.calls("sbatch") == [["--parsable", str(script)]] * 3
    assert submission.job_ids == [["100", "101", "102"]] == [submitted_jobs(folder / "runs/try")]
    recorded = (folder / "runs/try/submissions.jsonl").read_text().splitlines()
    assert [json.loads(line)["job_ids"] for line in recorded] == [["100"], ["101"], ["102"]]
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


# The command.


def test_submitting_takes_little_and_no_torch(folder, slurm):
    path = write_tokenizer(folder / "data/tokenizer.json")
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
