"""The Makefile's targets and .ci/run, with the programs they call faked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.running import ROOT, run

# Not the settings of a `make test` that this may run under.
_OTHERS = ("MAKE", "MFLAGS", "WORKERS", "PYTEST_ARGS")
INHERITED = {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}


def make(*arguments: str) -> str:
    """Run `make`; return what it prints."""
    return run(["make", *arguments], env=INHERITED).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
class TestMakefile:
    def test_make_alone_lists_every_target(self):
        shown = make()
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(targets) > 8
        for target in targets:
            assert re.search(rf"^  {target} +\S", shown, re.MULTILINE), target

    @pytest.mark.parametrize("target", ["demo", "test", "test-all", "fuzz", "lint", "bench", "doctor"])
    def test_targets_make_the_environment_they_need(self, target, tmp_path):
        absent = tmp_path / "venv"
        planned = make("-n", target, f"VENV={absent}").splitlines()
        assert planned[0].strip() == f"tools/make_venv.sh {absent}"
        assert f"{absent}/bin/python" in planned[1]

    def test_the_quick_suite_leaves_out_what_is_slow_and_keeps_jobs_of_processes_together(self, tmp_path):
        (line,) = (line for line in make("-n", "test").splitlines() if "pytest" in line)
        assert '-m "not slow and not bench and not slurm_faults"' in line and " -n 2 " in line
        assert "OMP_NUM_THREADS=1" in line
        (line,) = (line for line in make("-n", "test-all").splitlines() if "pytest" in line)
        assert "-m pytest" in line and "not slow" not in line

    def test_the_te_group_installs_what_it_needs_and_runs_all_of_its_tests(self, tmp_path):
        planned = make("-n", "test-te", f"TE={tmp_path}/te/.complete", f"TE_SOURCE={tmp_path}/source/.complete")
        assert f"--target {tmp_path}/te --requirement tests/te/requirements.txt" in planned
        assert f"--dest {tmp_path}/source" in planned
        quick = make("-n", "te", f"TE={tmp_path}/te/.complete")
        assert "pip install" in quick and "pip download" not in quick, "the source is for `make test-te` alone"
        tests = planned.splitlines()[-1]
        assert tests.endswith("tests/te") and "-m pytest" in tests and "not slow" not in tests
        (tmp_path / "te").mkdir()
        (tmp_path / "te" / ".complete").touch()
        assert "pip install" not in make("-n", "test-te", f"TE={tmp_path}/te/.complete")

    def test_workers_and_arguments_reach_pytest(self):
        planned = make("-n", "test", "WORKERS=4", "PYTEST_ARGS=-k gate")
        assert "-n 4" in planned and "-k gate" in planned
        assert " -n " not in make("-n", "test", "WORKERS=0")

    def test_what_the_search_is_asked_for_reaches_it(self):
        planned = make("-n", "fuzz", "FUZZ_SEED=7", "FUZZ_KINDS=parity,resume").split()
        wanted = ["-m", "tests.fuzz", "--seed", "7", "--kinds", "parity,resume"]
        assert planned[planned.index("-m") :][: len(wanted)] == wanted and "--cases" not in planned

    @pytest.mark.parametrize("name", ["VENV", "SERVING_VENV"])
    def test_an_environment_with_a_space_in_its_path_is_refused(self, name):
        """`rm -rf` would be told of two."""
        said = run(["make", "-n", "clean-all", f"{name}=a b"], status=2, env=INHERITED).stderr
        assert "VENV" in said and "without spaces" in said
        make("-n", "clean-all", f"{name}=ab")


class TestCI:
    @pytest.fixture
    def ci(self, tmp_path):
        """Run .ci/run with a `make` that logs its target and fails on `fail_on`; nothing is installed."""
        for name, program in (
            ("apt-get", "exit 0\n"),
            ("make", 'echo "made $1"\n[ "$1" = "$FAIL_ON" ] && exit "$FAIL_WITH"\nexit 0\n'),
        ):
            (tmp_path / name).write_text(f"#!/bin/sh\n{program}")
            (tmp_path / name).chmod(0o755)

        def ci(*arguments: str, fail_on: str = "", fail_with: int = 0) -> subprocess.CompletedProcess[str]:
            path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
            env = {**INHERITED, "PATH": path, "FAIL_ON": fail_on, "FAIL_WITH": str(fail_with)}
            done = run(["bash", ".ci/run", *arguments], status=None, env=env)
            if "missing here" in done.stderr:
                pytest.skip(done.stderr.strip())
            return done

        return ci

    def test_lint_and_test_run_in_this_order(self, ci):
        done = ci()
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^made (\w+)", done.stdout, re.MULTILINE) == ["venv", "te", "lint", "test"]
        assert "all passed" in done.stdout

    def test_the_week_s_run_takes_every_test(self, ci):
        assert ".ci/run test-all" in (ROOT / ".github/workflows/weekly.yml").read_text()
        assert ci("test-all").stdout.count("made test-all\n") == 1

    def test_without_transformer_engine_s_python_the_rest_goes_on(self, ci):
        done = ci(fail_on="te", fail_with=2)
        assert done.returncode == 0 and "will be skipped" in done.stderr

    @pytest.mark.parametrize(("target", "status"), [("venv", 2), ("lint", 2), ("test", 5)])
    def test_any_failure_fails_it_and_stops_it(self, ci, target, status):
        done = ci(fail_on=target, fail_with=status)
        assert done.returncode == status
        assert done.stdout.rstrip().splitlines()[-1].startswith(f"== {'environment' if target == 'venv' else target}")
        assert f"exit status {status}" in done.stdout and "all passed" not in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("script", [".ci/run", "tools/make_venv.sh", "launch/container/install.sh"])
def test_shell_scripts_pass_shellcheck(script):
    run(["shellcheck", script])
