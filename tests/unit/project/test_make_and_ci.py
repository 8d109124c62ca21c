"""The Makefile's targets and .ci/run, with the programs they call faked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    # Not the settings of a `make test` that this may run under.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
class TestMakefile:
    def test_make_alone_lists_every_target(self):
        shown = run(["make"]).stdout
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(targets) > 8
        for target in targets:
            assert re.search(rf"^  {target} +\S", shown, re.MULTILINE), target

    @pytest.mark.parametrize("target", ["demo", "test", "test-all", "fuzz", "lint", "bench", "doctor"])
    def test_targets_make_the_environment_they_need(self, target, tmp_path):
        absent = tmp_path / "venv"
        planned = run(["make", "-n", target, f"VENV={absent}"]).stdout.splitlines()
        assert planned[0].strip() == f"tools/make_venv.sh {absent}"
        assert f"{absent}/bin/python" in planned[1]

    def test_the_quick_suite_leaves_out_what_is_slow_and_keeps_jobs_of_processes_together(self, tmp_path):
        (line,) = (line for line in run(["make", "-n", "test"]).stdout.splitlines() if "pytest" in line)
        assert (
            '-m "not slow and not bench and not slurm_faults"' in line
            and " -n 2 " in line
            and "OMP_NUM_THREADS=1" in line
        )
        (line,) = (line for line in run(["make", "-n", "test-all"]).stdout.splitlines() if "pytest" in line)
        assert "-m pytest" in line and "not slow" not in line

    def test_the_te_group_installs_what_it_needs_and_runs_all_of_its_tests(self, tmp_path):
        planned = run(
            ["make", "-n", "test-te", f"TE={tmp_path}/te/.complete", f"TE_SOURCE={tmp_path}/source/.complete"]
        ).stdout
        assert f"--target {tmp_path}/te --requirement tests/te/requirements.txt" in planned
        assert f"--dest {tmp_path}/source" in planned
        quick = run(["make", "-n", "te", f"TE={tmp_path}/te/.complete"]).stdout
        assert "pip install" in quick and "pip download" not in quick, "the source is for `make test-te` alone"
        tests = planned.splitlines()[-1]
        assert tests.endswith("tests/te") and "-m pytest" in tests and "not slow" not in tests
        (tmp_path / "te").mkdir()
        (tmp_path / "te" / ".complete").touch()
        assert "pip install" not in run(["make", "-n", "test-te", f"TE={tmp_path}/te/.complete"]).stdout

    def test_workers_and_arguments_reach_pytest(self):
        planned = run(["make", "-n", "test", "WORKERS=4", "PYTEST_ARGS=-k gate"]).stdout
        assert "-n 4" in planned and "-k gate" in planned
        assert " -n " not in run(["make", "-n", "test", "WORKERS=0"]).stdout

    def test_what_the_search_is_asked_for_reaches_it(self):
        planned = run(["make", "-n", "fuzz", "FUZZ_SEED=7", "FUZZ_KINDS=parity,resume"]).stdout.split()
        wanted = ["-m", "tests.fuzz", "--seed", "7", "--kinds", "parity,resume"]
        assert planned[planned.index("-m") :][: len(wanted)] == wanted and "--cases" not in planned


class TestCI:
    @pytest.fixture
    def fake_make(self, tmp_path):
        """A `make` that logs its target and fails on the one that FAIL_ON names, with FAIL_WITH; installs nothing."""
        installer = tmp_path / "apt-get"
        installer.write_text("#!/bin/sh\nexit 0\n")
        installer.chmod(0o755)
        program = tmp_path / "make"
        program.write_text('#!/bin/sh\necho "made $1"\n[ "$1" = "$FAIL_ON" ] && exit "$FAIL_WITH"\nexit 0\n')
        program.chmod(0o755)
        return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def test_lint_and_test_run_in_this_order(self, fake_make):
        done = run(["bash", ".ci/run"], PATH=fake_make)
        if "missing here" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^made (\w+)", done.stdout, re.MULTILINE) == ["venv", "te", "lint", "test"]
        assert "all passed" in done.stdout

    def test_without_transformer_engine_s_python_the_rest_goes_on(self, fake_make):
        done = run(["bash", ".ci/run"], PATH=fake_make, FAIL_ON="te", FAIL_WITH="2")
        if "missing here" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0 and "will be skipped" in done.stderr

    @pytest.mark.parametrize(("target", "status"), [("venv", 2), ("lint", 2), ("test", 2), ("test", 5)])
    def test_any_failure_fails_it_and_stops_it(self, fake_make, target, status):
        done = run(["bash", ".ci/run"], PATH=fake_make, FAIL_ON=target, FAIL_WITH=str(status))
        if "missing here" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == status
        assert done.stdout.rstrip().splitlines()[-1].startswith(f"== {'environment' if target == 'venv' else target}")
        assert f"exit status {status}" in done.stdout and "all passed" not in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("script", [".ci/run", "tools/make_venv.sh", "launch/container/install.sh"])
def test_shell_scripts_pass_shellcheck(script):
    done = run(["shellcheck", script])
    assert done.returncode == 0, done.stdout
