"""Arrays of plt submit: each member trains in its own folder, from one copy of the code."""

from __future__ import annotations

import os

import pytest
import yaml
from fake_slurm import RUN, write_progress
from submitting import LAUNCHER, directives, refusal, submit_run

from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import locked
from plt_megatron.slurm import arrays
from plt_megatron.slurm.arrays import check_distinct
from plt_megatron.slurm.run_files import active_jobs, jobs_of, submitted_jobs


@pytest.fixture
def members(folder):
    """Four configurations, and the file that lists them."""
    for index in range(4):
        run = RUN | {"name": f"sweep/run{index}", "training": RUN["training"] | {"seed": index + 1}}
        (folder / f"config{index}.yaml").write_text(yaml.safe_dump(run))
    names = [f"config{index}.yaml" for index in range(4)]
    (folder / "list.txt").write_text("# four\n\n" + "\n".join(names) + "\n")
    return [folder / "runs/sweep" / f"run{index}" for index in range(4)]


@pytest.fixture
def array(folder, slurm, checkout, members):
    """The folder of the array that they are submitted as."""
    submit_run(root=checkout, array="list.txt")
    return folder / "runs/sweep/list.array"


def test_an_array_trains_each_in_its_own_folder(folder, slurm, checkout, job, members, capsys):
    submission = submit_run(root=checkout, array="list.txt", max_concurrent=2)
    assert submission.runs == members
    assert submission.job_ids == [["100_1"], ["100_2"], ["100_3"], ["100_4"]]
    array = folder / "runs/sweep/list.array"
    assert slurm.calls("sbatch") == [["--parsable", str(array / "job.sbatch")]]
    asked = directives(array / "job.sbatch")
    assert asked["--array"] == "1-4%2" and "--dependency" not in asked
    assert asked["--output"] == f"{array}/logs/slurm-%A_%a.out" and (array / "logs").is_dir()
    for index, run in enumerate(members, 1):
        assert load_config(run / "config.yaml").training.seed == index
        assert (run / "code").resolve() == array / "code" and not os.path.isabs(os.readlink(run / "code"))
        assert directives(run / "job.sbatch")["--dependency"] == "singleton"
        assert submitted_jobs(run) == [f"100_{index}"]
    assert job(array / "job.sbatch", SLURM_ARRAY_TASK_ID="3").wait(30) == 0
    assert f"['node', '{members[2]}']" in (folder / "seen").read_text()
    assert "4 runs, at most 2 at a time" in capsys.readouterr().out


def test_a_run_folder_on_another_disk_finds_the_code(folder, slurm, checkout, members, tmp_path):
    (tmp_path / "disk" / "runs" / "deep").mkdir(parents=True)
    members[0].parent.mkdir(parents=True)
    members[1].symlink_to(tmp_path / "disk" / "runs" / "deep")
    submit_run(root=checkout, array="list.txt")
    assert (members[1] / "code" / LAUNCHER).is_file()


def test_a_member_is_resubmitted_alone(slurm, checkout, members, array):
    write_progress(members[1], [100], checkpoint=100)
    submit_run(root=checkout, config="config1.yaml")
    assert not (members[1] / "code").is_symlink() and (members[1] / "code" / LAUNCHER).is_file()
    assert slurm.calls("sbatch")[-1] == ["--parsable", str(members[1] / "job.sbatch")]


def test_an_array_from_a_folder_of_runs(checkout, members, array):
    assert submit_run(root=checkout, array="runs/sweep").runs == members


def test_one_bad_member_refuses_the_array(folder, slurm, members):
    (folder / "config2.yaml").write_text(yaml.safe_dump(RUN | {"name": "sweep/run2", "data": {"sources": []}}))
    lines = refusal(array="list.txt")
    assert len(lines) == 1 and lines[0].startswith("sweep/run2: config2.yaml:4: data.sources is empty")
    assert not slurm.calls("sbatch") and not (folder / "runs").exists()


def test_a_member_that_waits_is_left_alone(slurm, array):
    slurm.jobs(("100_2", "PENDING", "list-1234"))
    (line,) = refusal(array="list.txt")
    assert "job 100_2 is pending: wait for it, or scancel 100_2" in line
    assert "sbatch" not in line, "its own script would not wait for the array"


def test_a_second_array_leaves_the_list_and_code_of_a_waiting_one_alone(folder, slurm, checkout, members, array):
    name = directives(array / "job.sbatch")["--job-name"]
    (folder / "list.txt").write_text("config4.yaml\n")
    more = yaml.safe_dump(RUN | {"name": "sweep/run4", "training": RUN["training"] | {"seed": 5}})
    (folder / "config4.yaml").write_text(more)
    slurm.jobs(("100_4", "PENDING", name))
    submit_run(root=checkout, array="list.txt")
    assert (array / "runs.txt").read_text().split() == [str(run) for run in members]
    second = folder / "runs/sweep/list-2.array"
    assert (second / "runs.txt").read_text().split() == [str(folder / "runs/sweep/run4")]
    assert directives(second / "job.sbatch")["--output"] == f"{second}/logs/slurm-%A_%a.out"
    slurm.jobs(("100_4", "COMPLETED", name))
    (folder / "list.txt").write_text("config3.yaml\n")
    submit_run(root=checkout, array="list.txt")
    assert (array / "runs.txt").read_text().split() == [str(members[3])], "nobody reads the first any more"


def test_an_array_that_is_submitted_meanwhile_keeps_its_list(folder, slurm, checkout, members, monkeypatch):
    """Slurm does not know its job yet when the other is planned."""
    array, plan = folder / "runs/sweep/list.array", arrays.plan_array
    (folder / "other").mkdir()
    (folder / "other/list.txt").write_text("config3.yaml\n")
    with locked(array, "plt submit"):
        (line,) = refusal(root=checkout, array="list.txt")
    assert line.startswith(f"{array}: another") and not slurm.calls("sbatch") and not (array / "runs.txt").exists()

    def plan_and_wait(*arguments):
        planned = plan(*arguments)
        monkeypatch.setattr(arrays, "plan_array", plan)
        submit_run(root=checkout, array="list.txt")
        slurm.jobs(("100_1", "PENDING", directives(array / "job.sbatch")["--job-name"]))
        return planned

    monkeypatch.setattr(arrays, "plan_array", plan_and_wait)
    (line,) = refusal(root=checkout, array="other/list.txt")
    assert str(array) in line and "100_1" in line and len(slurm.calls("sbatch")) == 1
    assert (array / "runs.txt").read_text().split() == [str(run) for run in members]


def test_an_array_leaves_the_code_of_a_member_that_goes_on_by_itself_alone(folder, slurm, checkout, members, array):
    slurm.jobs(("200", "RUNNING", directives(members[1] / "job.sbatch")["--job-name"]))
    (folder / "list.txt").write_text("config3.yaml\n")
    submit_run(root=checkout, array="list.txt")
    assert (members[1] / "code").resolve() == array / "code" and not (array / "code.1").exists()
    assert (members[3] / "code").resolve() == folder / "runs/sweep/list-2.array/code"


def test_members_of_an_array_submitted_by_hand_are_found_by_their_number(slurm, members, array):
    """As plt submit itself advises; the members' records do not know such a job."""
    slurm.jobs(("900_2", "RUNNING", directives(array / "job.sbatch")["--job-name"]))
    assert [bool(jobs_of(run, active_jobs())) for run in members[:3]] == [False, True, False]


def test_two_members_of_one_folder_are_refused(folder, slurm, members):
    (folder / "list.txt").write_text("config0.yaml\nconfig0.yaml\n")
    assert "2 configurations have the run folder" in refusal(array="list.txt")[0]
    (folder / "link").symlink_to(folder / "runs")
    with pytest.raises(UserError, match="2 configurations have the run folder"):
        check_distinct([folder / "runs" / "a", folder / "link" / "a"])


@pytest.mark.parametrize("array", ["gone.txt", "empty.txt", "data"])
def test_an_array_of_nothing_is_refused(folder, slurm, array):
    (folder / "empty.txt").write_text("# none\n")
    (line,) = refusal(array=array)
    assert line.startswith("--array")
