"""The job script and the code that it runs: a snapshot of what was submitted, and nothing that a user gives is code."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from submitting import IN_JOB, LAUNCHER, ROOT, directives, submit_run, submitted, write_profile

from plt_megatron.errors import UserError
from plt_megatron.slurm import run_files
from plt_megatron.slurm.run_files import snapshot_code, write_script
from tests.files import contents
from tests.running import wait_for


@pytest.mark.parametrize("status", [0, 1, 2, 75, 76])
def test_the_snapshot_runs_though_the_checkout_changes(folder, slurm, checkout, job, status):
    run = submitted(root=checkout)
    (checkout / LAUNCHER).write_text(IN_JOB.replace("VERSION", "changed"))
    assert job(run / "job.sbatch", STATUS=str(status)).wait(30) == status
    node, finalize = (folder / "seen").read_text().splitlines()
    assert node.startswith(f"submitted ['node', '{run}']")
    assert finalize.startswith(f"submitted ['finalize', '{run}', '--status', '{status}']")
    options = (folder / "srun.options").read_text().splitlines()
    assert {"--nodes=1", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--gpus-per-node=8"} <= set(options)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_launchers_as_usr1(folder, slurm, checkout, job, number):
    process = job(submitted(root=checkout) / "job.sbatch", WAIT="1")
    wait_for((folder / "ready").exists, seconds=20)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert "'--status', '75'" in (folder / "seen").read_text()


# A process that the script waits for, as srun: it says when it is ready, and ends with status 41 once told to.
WAITING = """
(trap '' USR1; echo ready; read -r; exit 41) <&0 &
_plt_step=$!
wait_for_step
echo $?
"""


def test_signals_at_once_do_not_end_the_wait_for_srun():
    """As scancel and preemption send them: TERM to every process, which the outer script also passes on as USR1. Bash
    ended the wait once in thirteen tries."""
    functions = (ROOT / "plt_megatron" / "slurm" / "job.sbatch").read_text()
    script = functions[functions.index("_plt_step=") : functions.index("finalize()")] + WAITING
    waits = [subprocess.Popen(["bash", "-c", script], stdin=PIPE, stdout=PIPE, text=True) for _ in range(80)]
    assert [wait.stdout.readline() for wait in waits] == ["ready\n"] * len(waits)
    for _ in range(5):
        for number, wait in enumerate(waits):
            wait.send_signal(signal.SIGTERM)
            between = time.perf_counter() + number * 2e-6  # up to 0.16 ms: the second meets the first being handled
            while time.perf_counter() < between:
                pass
            wait.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    assert {wait.communicate("\n")[0] for wait in waits} == {"41\n"}


LEFT = {  # by salloc with --mem, --cpus-per-gpu, --gpus-per-task and --hint, which Slurm 24.11 leaves to a job
    "SLURM_MEM_PER_NODE": "1000",
    "SLURM_CPUS_PER_GPU": "2",
    "SLURM_TRES_BIND": "gres/gpu:per_task:1",
    "SLURM_HINT": "nomultithread",
    "SLURM_THREADS_PER_CORE": "1",
    "SLURM_CLUSTERS": "east,west",
}


@pytest.mark.parametrize("wanted", [[], ["--hint=nomultithread"]], ids=["", "a hint"])
def test_a_job_submitted_from_within_an_allocation_asks_for_its_own(folder, slurm, checkout, job, wanted):
    """srun would refuse the step, or give it that allocation's memory."""
    profile = write_profile(folder, setup=["env >step"], sbatch_options=wanted)
    assert job(submitted(root=checkout, cluster=profile) / "job.sbatch", **LEFT).wait(30) == 0
    left = {line.partition("=")[0] for line in (folder / "step").read_text().splitlines()} & set(LEFT)
    assert left == ({"SLURM_HINT", "SLURM_THREADS_PER_CORE"} if wanted else set())


@pytest.mark.parametrize("answer", ["JobId=9 JobName=a", "JobId=9 ArrayJobId=5 ArrayTaskId=2 JobName=a", ""])
def test_a_job_submitted_by_a_member_of_an_array_is_not_that_member(folder, slurm, checkout, job, answer):
    """It would requeue that one instead of itself. Slurm leaves it the variables."""
    (slurm.bin / "scontrol").write_text(f"#!/bin/sh\n[ '{answer}' ] && [ $3 = 9 ] && echo '{answer}'\n")
    (slurm.bin / "scontrol").chmod(0o755)
    member = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    script = submitted(root=checkout, cluster=write_profile(folder, setup=["env >step"])) / "job.sbatch"
    assert job(script, SLURM_JOB_ID="9", **member).wait(30) == 0
    assert ("SLURM_ARRAY_" in (folder / "step").read_text()) == (answer != "JobId=9 JobName=a")


def test_a_profile_sets_the_jobs_environment(folder, slurm, checkout, job, monkeypatch):
    monkeypatch.setenv("WHERE", "/a b")
    profile = write_profile(
        folder,
        environment={"PROFILE_VARIABLE": '$WHERE/it\'s "quoted" `id` $(id)'},
        scratch="/scratch/$WHERE",
        setup=["echo set up >>seen"],
        sbatch_options=["--exclusive", "--comment=two words"],
    )
    script = submitted(root=checkout, cluster=profile) / "job.sbatch"
    assert directives(script)["--comment"] == "two words" and "--exclusive" in directives(script)
    assert job(script).wait(30) == 0
    lines = (folder / "seen").read_text().splitlines()
    assert lines[0] == "set up"
    assert lines[1].endswith('/a b/it\'s "quoted" `id` $(id) /scratch//a b')


def test_an_installed_package_goes_along_without_its_neighbors(folder, slurm, checkout, capsys):
    (checkout / "pyproject.toml").unlink()
    (checkout / "plt_megatron-0.1.0.dist-info").mkdir()
    run = submitted(root=checkout)
    assert [path.name for path in (run / "code").iterdir()] == ["plt_megatron"]
    assert (run / "code" / LAUNCHER).is_file()
    assert (run / "git.txt").read_text().startswith("plt-megatron ")
    assert re.search(r"^watch +plt status runs/try$", capsys.readouterr().out, re.MULTILINE)


def test_two_submissions_in_containers_leave_whole_code(checkout, tmp_path, monkeypatch):
    """Their processes may have one id."""
    (run := tmp_path / "run").mkdir()
    stock = run_files._make_way

    def second_first(target: Path) -> None:
        monkeypatch.setattr(run_files, "_make_way", stock)
        snapshot_code(checkout, run)
        stock(target)

    monkeypatch.setattr(run_files, "_make_way", second_first)
    snapshot_code(checkout, run)
    assert contents(run / "code") == contents(run / "code.1") != {}


def test_other_code_is_kept_beside_the_new(folder, slurm, checkout):
    run = submitted(root=checkout)
    submit_run(root=checkout)
    assert not (run / "code.1").exists()
    (checkout / LAUNCHER).write_text("# new\n")
    submit_run(root=checkout)
    assert (run / "code" / LAUNCHER).read_text() == "# new\n"
    assert "submitted" in (run / "code.1" / LAUNCHER).read_text()


def test_a_full_disk_leaves_the_code_that_was_there(folder, slurm, checkout, monkeypatch):
    run, write = submitted(root=checkout), Path.write_bytes
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
    run = submitted(root=checkout)
    submit_run(root=run / "code")
    assert (run / "code" / "launch" / "submit.py").is_file() and not (run / "code.1").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o022, 0o755)])
def test_a_job_script_is_for_those_whom_the_umask_lets_read_it(tmp_path, umask, mode):
    """Set-up commands and variables of a profile may have secrets."""
    former = os.umask(umask)
    try:
        write_script(tmp_path, "#!/bin/bash\n")
    finally:
        os.umask(former)
    assert (tmp_path / "job.sbatch").stat().st_mode & 0o777 == mode


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
    run = submitted(root=checkout, name=name)
    assert run == folder / "runs" / name
    asked = directives(run / "job.sbatch")
    assert asked["--output"] == str(run).replace("%", "%%") + "/logs/slurm-%j.out"
    assert re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", asked["--job-name"])
    assert set(asked) == OPTIONS
    assert job(run / "job.sbatch").wait(30) == 0
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
    asked = directives(submitted(root=checkout, **{option: value}) / "job.sbatch")
    assert asked[f"--{option}"] == value and "--wrap" not in asked
