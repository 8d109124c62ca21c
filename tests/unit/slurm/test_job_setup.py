"""What job.sbatch makes of the lines of a cluster's profile; test_slurm_profiles.py has a real cluster."""

from __future__ import annotations

import json
import signal

import pytest
from submitting import submitted, write_profile

from tests.running import wait_for

IGNORED = "the job's setup went on after status {} of: {}"


@pytest.fixture
def run_with(folder, slurm, checkout, job, capfd):
    """`run_with(**profile)`: the job's status, the launcher's calls, and what it was told of the setup."""

    def run(edit=str, status: str = "0", **profile) -> tuple[int, list[str], dict[str, str | None]]:
        script = submitted(root=checkout, cluster=write_profile(folder, **profile)) / "job.sbatch"
        script.write_text(edit(script.read_text()))
        ended = job(script, STATUS=status).wait(30)
        seen = (folder / "seen").read_text().splitlines() if (folder / "seen").exists() else []
        told = json.loads((folder / "told").read_text()) if (folder / "told").exists() else {}
        return ended, [line.split("'")[1] for line in seen], told

    return run


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        ({"setup": ["exit 3"]}, "exit 3"),
        ({"setup": ["exit"]}, "exit"),
        ({"setup": ["export X=1; if true; then", "exit 4", "fi"]}, "exit 4"),
        ({"setup": ["set -u", "export A=$NOT_SET"]}, "export A=$NOT_SET"),
        ({"setup": ["set -e", "cd /nosuch"]}, "cd /nosuch"),
        ({"setup": ["leave() { exit 3; }", "leave"]}, "leave"),
        ({"setup": ["cd /nosuch", "source /nosuch || exit"]}, "source /nosuch || exit"),
        ({"modules": ["cuda/12"]}, "module load cuda/12 || exit"),
        ({"setup": ["module() { return 1; }"], "modules": ["a b"]}, "module load 'a b' || exit"),
        ({"setup": ["unset USER"], "scratch": "/scratch/$USER"}, 'export TMPDIR="/scratch/$USER"'),
        ({"setup": ["trap true EXIT", "exit 3"]}, ""),
        ({"setup": ["exec true"]}, ""),
    ],
)
def test_a_setup_that_ends_the_job_is_a_reason(run_with, profile, line):
    """The launcher is not started, what follows is asked with the line."""
    assert run_with(**profile) == (2, ["finalize"], {"FAILED": line, "WARNINGS": None})


def test_a_script_that_bash_cannot_read_is_a_reason(run_with):
    """As somebody has edited it; a profile's is refused."""
    edit = lambda text: text.replace("\necho mine\n", "\nif mine; fi\n")  # noqa: E731
    assert run_with(edit, setup=["echo mine"]) == (2, ["finalize"], {"FAILED": "", "WARNINGS": None})


@pytest.mark.parametrize(
    ("profile", "warnings"),
    [
        ({"setup": ["export LD_LIBRARY_PATH=/opt/x/lib:$NOT_SET"]}, []),
        ({"setup": ["false | true", "if false; then", "true", "fi", "false || true"]}, []),
        ({"setup": ["cd /nosuch", "source /nosuch/profile"]},
         [IGNORED.format(1, "cd /nosuch"), IGNORED.format(1, "source /nosuch/profile")]),
        ({"setup": ["fail() { false; return 4; }", "fail", "fail || true"]}, [IGNORED.format(4, "fail")]),
        ({"setup": ["source ./lines"]}, []),
        ({"environment": {"A": "$NONE/${NONE}"}}, ["environment: NONE is not set, and is empty in A"]),
        ({"setup": ["PYTHON=/nosuch RUN=/nosuch IFS=/ status=3 workdir=/ asked=1 step=1 at=2", "set -eu", "cd /"]}, []),
        ({"setup": ["trap '' USR1 TERM; trap 'exit 9' ERR EXIT; trap - DEBUG ERR EXIT"]}, []),
    ],
)  # fmt: skip
def test_what_a_setup_passes_over_is_warned_of(run_with, folder, profile, warnings):
    (folder / "lines").write_text("false\ntrue\n")
    ended, calls, told = run_with(**profile)
    assert (ended, calls) == (0, ["node", "finalize"])
    assert told == {"FAILED": None, "WARNINGS": "\n".join(warnings)}
    assert f"'--status', '0'] None {profile.get('scratch')}" in (folder / "seen").read_text()


def test_srun_takes_its_environment_from_the_job_alone(run_with, folder, monkeypatch):
    """Not from the interactive allocation in which sbatch was run, and all of it with sbatch's --export=NONE."""
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    assert run_with(setup=['echo "left: $SLURM_MEM_PER_CPU" >left'])[0] == 0
    assert (folder / "left").read_text() == "left: \n"
    assert "--export=ALL" in (folder / "srun.options").read_text().splitlines()


def test_an_environment_without_srun_is_the_launchers_failure(run_with):
    """The shell's status, from which what follows is decided."""
    assert run_with(environment={"PATH": "/nosuch"})[:2] == (127, ["finalize"])


def test_an_environment_that_python_cannot_start_in_is_a_reason(run_with):
    ended, calls, told = run_with(environment={"PYTHONHOME": "/nosuch"})
    assert (ended, calls) == (2, ["finalize"]) and "in_job.py" in str(told["FAILED"])


def test_a_run_that_another_job_trains_is_left_alone(run_with, monkeypatch):
    """Asked outside the container, where Slurm answers: no launcher starts, and nothing is decided about the run."""
    monkeypatch.setenv("BUSY", "78")
    assert run_with()[:2] == (78, [])


@pytest.mark.parametrize("there", [False, True], ids=["missing", "of another machine"])
def test_without_python_the_script_itself_writes_why(run_with, folder, monkeypatch, there):
    python = folder / "python"
    monkeypatch.setattr("sys.executable", str(python))
    if there:
        python.write_text("#!/bin/sh\necho version GLIBC_2.34 not found >&2\nexit 1\n")
        python.chmod(0o755)
    assert run_with(setup=["exit 3"])[:2] == (2, [])
    why = (folder / "runs" / "try" / "why.txt").read_text()
    assert "at: exit 3" in why and str(python) in why


def test_a_job_told_to_leave_while_it_is_set_up_leaves(folder, slurm, checkout, job):
    profile = write_profile(folder, setup=["touch begun; sleep 1"])
    process = job(submitted(root=checkout, cluster=profile) / "job.sbatch")
    wait_for((folder / "begun").exists, seconds=20)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    assert [line.split("'")[1] for line in (folder / "seen").read_text().splitlines()] == ["finalize"]
