"""plt status and --follow: what they make of Slurm's answers and a run's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import yaml
from fake_slurm import RUN, write_attempt, write_event, write_progress
from submitting import ROOT, command, directives, submit_run, submitted

from plt_megatron.errors import UserError
from plt_megatron.launcher.records import stamp
from plt_megatron.run_folder.status import read_run_status
from plt_megatron.slurm import status as follow_module
from plt_megatron.slurm.run_files import job_name
from plt_megatron.slurm.status import follow, report, watch


def rows(text: str) -> dict[str, list[str]]:
    """The table by run: state, step, tokens/s, time left, restarts, checkpoint."""
    lines = text.split("\n\n")[0].splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("RUN"))
    return {line.split()[0]: line.split(None, 1)[1].split("  ") for line in lines[header + 1 :]}


def cells(text: str, run: str) -> list[str]:
    return [cell.strip() for cell in rows(text)[run] if cell.strip()]


@pytest.fixture
def run(folder, slurm):
    return submitted(chain=2)


def test_a_running_run(run, slurm):
    write_progress(run, [100, 200, 250], checkpoint=200, rate=16384.0)
    write_attempt(run)
    name = job_name(run, "try")
    slurm.jobs(("100", "RUNNING", name), ("101", "PENDING", name), ("7", "RUNNING", "another"))
    text = report([], "runs", False)
    # 750 steps of 16,384 tokens are left, one a second.
    assert cells(text, "runs/try") == ["running", "250 of 1,000", "16,384", "12 min 30 s", "0", "step 200"]
    assert "job 100 on node[1-2], 1:00 of 30:00, 1 more of its chain queued behind it" in text


def test_steps_between_the_last_record_and_a_checkpoint_are_done(run, slurm):
    write_progress(run, [90, 100], checkpoint=150, rate=16384.0)
    assert cells(report([], "runs", False), "runs/try")[1:4] == ["150 of 1,000", "16,384", "14 min 10 s"]


def test_restarts_and_their_reasons(run, slurm):
    write_progress(run, [100], checkpoint=100)
    for attempt, (status, reason) in enumerate(
        [("preempted", "told to leave"), ("failed", "rank 3 was killed by SIGKILL"), ("killed", "it left no record")], 1
    ):
        write_attempt(run, attempt, status=status, step=50 * attempt, reason=reason)
    write_attempt(run, 4)
    slurm.jobs(("100", "RUNNING", job_name(run, "try")))
    text = report(["runs/try"], "elsewhere", False)
    assert cells(text, "runs/try")[0] == "running" and cells(text, "runs/try")[4] == "3"
    assert "attempt 2 on node1, node2, step 100: failed: rank 3 was killed by SIGKILL" in text


def test_a_run_whose_checkpoints_are_not_mounted_says_so_and_hides_no_other(run, slurm):
    write_progress(run, [100])
    shutil.copytree(run, run.parent / "whole")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").symlink_to("/scratch/not/mounted")
    text = report([], "runs", False)
    assert "100 of 1,000" in cells(text, "runs/try") and "/scratch/not/mounted" in text
    assert "100 of 1,000" in cells(text, "runs/whole")


def test_runs_behind_links_are_found_once(run, slurm, tmp_path):
    write_progress(run, [5])
    elsewhere = tmp_path / "large_disk"
    shutil.copytree(run, elsewhere / "moved")
    (run.parent / "moved").symlink_to(elsewhere / "moved")
    (run.parent / "again").symlink_to(run)
    (run.parent / "round").symlink_to(run.parent)
    text = report([], "runs", False)
    assert text.count("5 of 1,000") == 2 and "runs/moved" in text and "runs/try" in text


def test_a_pending_job_says_why(run, slurm):
    slurm.answer("squeue", f"100|PENDING|Resources|0:00|30:00|2026-11-26T01:00:00||{job_name(run, 'try')}")
    text = report([], "runs", False)
    assert cells(text, "runs/try") == ["pending", "0 of 1,000", "-", "-", "0", "none"]
    assert "job 100 (Resources, expected to start 2026-11-26T01:00:00)" in text
    slurm.answer("squeue", f"100|PENDING|None|0:00|30:00|N/A||{job_name(run, 'try')}")
    assert report([], "runs", False).endswith("\n  job 100"), "Slurm has not said why"


@pytest.mark.parametrize("linked", [False, True])
def test_a_job_submitted_by_hand_is_found_by_its_name(folder, slurm, monkeypatch, tmp_path, linked):
    if linked:
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path / "link")
        monkeypatch.setenv("PWD", str(tmp_path / "link"))
    slurm.jobs(("987", "RUNNING", directives(submitted() / "job.sbatch")["--job-name"]))
    assert "job 987" in report([], "runs", False)


@pytest.mark.parametrize(("status", "step"), [("finished", 1000), ("preempted", 400), ("node_failed", 400)])
def test_at_rest_the_folder_says_how_it_ended(run, slurm, status, step):
    write_progress(run, [step])
    write_attempt(run, status=status, step=step, reason="because")
    slurm.jobs(("100", "COMPLETED", job_name(run, "try")))
    shown = cells(report([], "runs", False), "runs/try")
    assert (shown[0], shown[4]) == (status, "0"), "it has been started once"


def test_a_finished_run_that_was_made_longer_is_not_finished(run, slurm):
    write_progress(run, [400])
    write_attempt(run, status="finished", step=400, reason="")
    assert cells(report([], "runs", False), "runs/try")[:2] == ["not finished", "400 of 1,000"]
    write_progress(run, [400], checkpoint=400)
    assert not read_run_status(run).finished
    write_event(run, event="end", attempt=1, job_id="100", status="finished", step=1000, reason="")
    assert read_run_status(run).finished, "though no metrics and no checkpoint say so"


def test_a_run_that_was_given_up(run, slurm):
    write_attempt(run, status="failed", step=5, reason="rank 1 failed")
    write_event(run, event="stop", attempt=1, job_id="100", reason="rank 1 failed twice at step 5")
    (run / "why.txt").write_text("rank 1 failed twice at step 5\n")
    text = report([], "runs", False)
    assert cells(text, "runs/try")[0] == "failed" and "rank 1 failed twice at step 5" in text


def test_a_job_that_slurm_ended_before_it_could_say_so(run, slurm):
    write_progress(run, [100])
    write_attempt(run)
    slurm.jobs(("100", "NODE_FAIL", job_name(run, "try")))
    text = report([], "runs", False)
    assert cells(text, "runs/try")[0] == "node_fail"
    assert "job 100 ended that way; no job continues it: sbatch runs/try/job.sbatch" in text


def test_the_log_of_a_job_that_left_no_record_is_named(run, slurm):
    log = run / "logs" / "slurm-100.out"
    log.write_text("slurmstepd: error\n")
    slurm.answer("squeue", f"100|FAILED|NonZeroExitCode|0:01|30:00|N/A|node1|{job_name(run, 'try')}")
    assert "job 100 ended that way (NonZeroExitCode): see runs/try/logs/slurm-100.out; " in report([], "runs", False)
    write_attempt(run, job_id="99", status="preempted", step=5, reason="asked to stop")
    text = report([], "runs", False)
    assert cells(text, "runs/try")[0] == "preempted"
    assert "job 100 has failed since (NonZeroExitCode): see runs/try/logs/slurm-100.out; no job continues" in text


def test_a_run_that_was_given_up_on_a_full_disk(run, slurm):
    """There was no room for why.txt."""
    write_attempt(run, status="failed", step=5, reason="rank 1 failed")
    write_event(run, event="stop", attempt=1, job_id="100", reason="rank 1: no space left on device")
    text = report([], "runs", False)
    assert cells(text, "runs/try")[0] == "failed" and "no space left" in text and "sbatch" not in text
    write_attempt(run, 2, job_id="101")
    assert cells(report([], "runs", False), "runs/try")[0] != "failed", "somebody has started it again"


def test_what_a_setup_passed_over_is_shown(run, slurm):
    write_event(run, event="start", attempt=1, job_id="100", step=0, warnings=["it went on after status 1 of: cd /x"])
    slurm.jobs(("100", "RUNNING", job_name(run, "try")))
    assert "  warning: it went on after status 1 of: cd /x" in report([], "runs", False)


def test_one_earlier_attempt_is_one(run, slurm):
    for attempt in range(1, 5):
        write_attempt(run, attempt, status="preempted", step=attempt, reason="r")
    assert "... 1 earlier attempt in runs/try/attempts.jsonl" in report([], "runs", False)


# For root too, what it may not read is not read.
AS_ONE_OF_MANY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.parametrize("file", ["attempts.jsonl", "metrics.jsonl"])
def test_what_cannot_be_read_hides_no_other_run(run, slurm, file):
    """A folder that is another user's, and a run one of whose files is."""
    half, mine = run.parent / "half", run.parent / "mine"
    shutil.copytree(run, half, symlinks=True)
    write_attempt(half, job_id="7")
    write_progress(half, [20])
    mine.mkdir()
    locked = [half / file, mine]
    for path in locked:
        path.chmod(0)
    try:
        arguments = [*AS_ONE_OF_MANY, sys.executable, str(ROOT / "launch" / "status.py")]
        shown, as_json, alone = (
            subprocess.run([*arguments, *more], cwd=run.parents[1], capture_output=True, text=True, check=False)
            for more in ([], ["--json"], ["--output-dir", "runs/mine"])
        )
    finally:
        for path in locked:
            path.chmod(0o755)
    assert shown.returncode == as_json.returncode == 0 and shown.stderr == ""
    assert cells(shown.stdout, "runs/try")[0] == "not started" and cells(shown.stdout, "runs/half")[0] == "not readable"
    assert "note: runs/mine cannot be read (Permission denied)" in shown.stdout
    assert f"  runs/half/{file} cannot be read (Permission denied)" in shown.stdout
    assert [json.loads(line)["state"] for line in as_json.stdout.splitlines()] == ["not readable", "not started"]
    assert as_json.stderr == "note: runs/mine cannot be read (Permission denied)\n"
    assert alone.returncode == 2 and "runs/mine cannot be read" in alone.stderr


def test_a_damaged_metrics_file_leaves_the_checkpoint(run, slurm):
    write_progress(run, [20], checkpoint=20)
    (run / "metrics.jsonl").write_bytes(b"\0" * 300)
    text = report([], "runs", False)
    assert cells(text, "runs/try") == ["not finished", "20 of 1,000", "-", "-", "0", "step 20"]
    assert "metrics.jsonl: damaged" in text
    (run / "metrics.jsonl").unlink()
    assert cells(report([], "runs", False), "runs/try")[1] == "20 of 1,000"


@pytest.mark.parametrize("damage", ["]", "training: {train_tokens: 100, global_batch_size: 0}"])
def test_a_damaged_configuration_leaves_the_steps(run, slurm, damage):
    (run / "config.yaml").write_text(damage)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 20, "tokens": null}\n')
    text = report([], "runs", False)
    assert cells(text, "runs/try")[1] == "20 of ?" and "config.yaml: " in text
    write_attempt(run, status="finished", reason="done")
    assert list(follow_module._conclusion(run, "")) == [f"finished: step 20 of ?; {run}"]


def test_without_slurm_the_folder_alone_is_shown(run, slurm, monkeypatch, tmp_path):
    write_progress(run, [100], checkpoint=100)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = report([], "runs", False)
    assert text.startswith("note: status from the run folders alone") and "squeue is not installed here" in text
    assert cells(text, "runs/try")[1] == "100 of 1,000"


def test_members_of_an_array_are_told_apart(folder, slurm):
    """Also where their jobs' logs are, in the array's folder."""
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(RUN | {"name": f"sweep/{name}"}))
    (folder / "list").write_text("a.yaml\nb.yaml\n")
    submit_run(array="list")
    slurm.jobs(("100_1", "RUNNING", "list-0"), ("100_2", "PENDING", "list-0"))
    text = report([], "runs", False)
    assert cells(text, "runs/sweep/a")[0] == "running" and cells(text, "runs/sweep/b")[0] == "pending"
    assert set(rows(text)) == {"runs/sweep/a", "runs/sweep/b"}
    log = folder / "runs" / "sweep" / "list.array" / "logs" / "slurm-100_2.out"
    log.touch()
    slurm.jobs(("100_1", "COMPLETED", "list-0"), ("100_2", "FAILED", "list-0"))
    assert f"job 100_2 ended that way: see {log}; " in report([], "runs", False)


@pytest.mark.parametrize("damage", ["config.yaml", "metrics.jsonl", "attempts.jsonl", "checkpoints"])
def test_damage_to_a_folder_is_no_reason_to_fail(run, slurm, damage):
    write_progress(run, [100], checkpoint=100)
    if damage == "checkpoints":
        (run / damage / "latest").write_bytes(b"\xff\x00")
    elif damage == "metrics.jsonl":
        (run / damage).write_bytes((run / damage).read_bytes() + b'{"kind": "train", "st')
    else:
        (run / damage).write_bytes(b"\xff{]: [\n\n")
    text = report([], "runs", False)
    assert cells(text, "runs/try")[1].startswith("100 of" if damage != "config.yaml" else "100 of ?")


def test_a_local_run_is_shown_too(folder, slurm):
    run = folder / "runs" / "local"
    write_progress(run, [10])
    (run / "config.yaml").write_text(yaml.safe_dump(RUN | {"name": "local"}))
    assert cells(report([], "runs", False), "runs/local")[0] == "not finished"
    write_progress(run, [1000])
    assert not read_run_status(run).finished, "its last step was not saved"
    (run / "config.yaml").write_text(yaml.safe_dump(RUN | {"name": "local", "checkpoint": {"enabled": False}}))
    assert read_run_status(run).finished
    write_progress(run, [1000], checkpoint=1000)
    (run / "config.yaml").write_text(yaml.safe_dump(RUN | {"name": "local"}))
    assert read_run_status(run).finished


def test_json_lines(run, slurm):
    write_progress(run, [100, 200], checkpoint=200, rate=16384.0)
    slurm.jobs(("100", "RUNNING", job_name(run, "try")))
    (record,) = [json.loads(line) for line in report(["try"], "runs", True).splitlines()]
    expected = {"run": "runs/try", "state": "running", "step": 200, "steps": 1000, "checkpoint": 200, "jobs": ["100"]}
    assert expected.items() <= record.items() and record["seconds_left"] == 800.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/gone", "not found"),
        ("data", "contains none|not found"),
        ("gone", "not found"),
        ("runs/try/config.yaml", "file: .* runs/try$"),
    ],
)
def test_what_is_no_run_is_refused(run, slurm, name, words):
    with pytest.raises(UserError, match=words) as caught:
        report([name], "runs", False)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command(run, slurm):
    done = command(run.parents[1], "status.py")
    assert done.returncode == 0 and "runs/try" in done.stdout
    done = command(run.parents[1], "status.py", "gone")
    assert done.returncode == 2 and done.stderr.startswith("error: ")


# --follow.


@pytest.fixture
def run_name(folder):
    """What Slurm calls the run's job."""
    return job_name(folder / "runs" / "try", "try")


@pytest.fixture
def look(folder, slurm):
    """The lines of the next look at a submitted run."""
    looks = watch(submit_run(), look_seconds=0, ask_seconds=0)
    return lambda: next(looks)


def test_following_a_run_to_its_end(run_name, look, folder, slurm):
    run = folder / "runs" / "try"
    slurm.answer("squeue", f"100|PENDING|Priority|0:00|30:00|N/A||{run_name}")
    assert look() == ["job 100 is pending (Priority)"]
    assert look() == []
    slurm.jobs(("100", "RUNNING", run_name))
    assert look() == ["job 100 is running on node[1-2]"]
    output = run / "logs" / "slurm-100.out"
    output.write_text(f"{stamp(1, 'launcher node1', 'preflight: 2 nodes')}\nsrun: torn")
    assert look() == ["preflight: 2 nodes"]
    with output.open("a") as file:
        file.write(" now whole\n")
    assert look() == ["srun: torn now whole"]
    write_progress(run, [10])
    assert look() == ["step 10/1,000: loss 2.0000, 1,000 tokens/s"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "validation", "step": 10, ')
        file.flush()
        assert look() == [], "the line is torn"
        file.write('"loop_count": 2, "loss": 3.5}\n{"kind": "train", "st\n')  # and one that a crash has left
    assert look() == ["step 10/1,000: validation, 2 loops: loss 3.5000"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation", "step": 10, "tokens": 9, "scores": {"reading/acc": 0.5}}\n')
        for outcome in ('"to": "s3://b/exports/step_00000005"', '"error": "no bucket"'):
            file.write(f'{{"kind": "upload", "step": 10, "of_step": 5, "what": "export", {outcome}}}\n')
    assert look() == [
        "step 10/1,000: evaluation, reading/acc 0.5000",
        "step 10/1,000: upload of the export of step 5: s3://b/exports/step_00000005",
        "step 10/1,000: upload of the export of step 5: failed: no bucket",
    ]
    write_progress(run, [1000])
    write_attempt(run, status="finished", step=1000, reason="done")
    slurm.jobs(("100", "COMPLETED", run_name))
    # The file is looked at after the state: nothing is lost of what came before the end.
    assert look() == ["job 100 is completed", "step 1,000/1,000: loss 2.0000, 1,000 tokens/s"]
    assert look() == [f"finished: step 1,000 of 1,000; {run}"]
    with pytest.raises(StopIteration):
        look()


def test_following_a_run_that_fails(run_name, look, folder, slurm):
    (folder / "runs" / "try" / "why.txt").write_text("rank 2 was killed by SIGKILL\nlast step: 7\n")
    slurm.jobs(("100", "FAILED", run_name))
    assert look() == ["job 100 is failed"]
    unfinished, why = look()
    assert unfinished.startswith("not finished: step 0") and why == "rank 2 was killed by SIGKILL\nlast step: 7"


def test_a_resumed_run_goes_back(run_name, look, folder, slurm):
    run = folder / "runs" / "try"
    write_progress(run, [10, 20])
    slurm.jobs(("100", "RUNNING", run_name))
    assert look() == ["job 100 is running on node[1-2]"]
    write_progress(run, [30], loss=None)  # it was not finite
    assert look() == ["step 30/1,000: loss nan, 1,000 tokens/s"]
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:1]
    (run / "metrics.tmp").write_text("".join(kept))
    (run / "metrics.tmp").replace(run / "metrics.jsonl")
    assert look() == ["continues after step 10"]
    write_progress(run, [20])
    assert look() == ["step 20/1,000: loss 2.0000, 1,000 tokens/s"]


def test_a_controller_that_restarts_is_asked_again(run_name, look, slurm):
    slurm.fail("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    (line,) = look()
    assert line.startswith("Slurm does not answer, trying again")
    assert look() == []
    (slurm.folder / "squeue.fails").unlink()
    slurm.jobs(("100", "COMPLETED", run_name))
    assert look() == ["job 100 is completed"]


@pytest.mark.parametrize(("steps", "status"), [([1000], 0), ([400], 1)])
def test_the_status_says_whether_the_run_is_finished(run_name, folder, slurm, capsys, steps, status):
    submission = submit_run()
    write_progress(folder / "runs" / "try", steps, checkpoint=steps[-1])
    slurm.jobs(("100", "COMPLETED", run_name))
    assert follow(submission) == status
    assert f"step {steps[-1]:,}" in capsys.readouterr().out


def test_ctrl_c_leaves_the_job(run_name, slurm, monkeypatch, capsys):
    submission = submit_run()
    slurm.jobs(("100", "RUNNING", run_name))

    monkeypatch.setattr(follow_module.time, "sleep", Mock(side_effect=KeyboardInterrupt))
    assert follow(submission) == 0
    said = capsys.readouterr().out
    assert "scancel 100" in said and "the job continues" in said
    assert not slurm.calls("scancel")
