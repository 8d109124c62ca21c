"""tools/make_venv.sh, and serving's, on machines with every kind of Python, faked by scripts; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT, SERVING = (Path(__file__).resolve().parents[3] / name / "make_venv.sh" for name in ("tools", "serving"))
REFUSED = 2

# Answers the script's `-c` questions from its own name and environment, and logs what it was asked to do.
FAKE_PYTHON = """\
#!/bin/bash
case "$*" in
    *"-m venv"*)
        echo "venv $*" >>"$LOG"
        folder="${@: -1}"; mkdir -p "$folder/bin"; touch "$folder/pyvenv.cfg"; cp "$0" "$folder/bin/python" ;;
    *"-m pip"*) echo "pip $*" >>"$LOG"; eval "${FAKE_PIP:-true}" ;;
    *transformer_engine*) [ -e "$0.gpu_stack" ] && echo banner && cat "$0.gpu_stack" ;;
    *ensurepip*) VERSION_OK && [ -z "$NO_ENSUREPIP" ] && echo "$0" ;;
    *) VERSION_OK ;;
esac
"""


class Machine:
    """A machine whose only programs are coreutils and the Pythons it is given."""

    def __init__(self, folder: Path, script: Path = SCRIPT) -> None:
        self.script = script
        self.bin, self.home, self.log = folder / "bin", folder / "home", folder / "log"
        self.venv = folder / "venv"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in "bash cat awk head tail mkdir touch rm cp ls cut du sleep dirname basename env flock".split():
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, *, supported: bool = True, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.replace("VERSION_OK", "true" if supported else "false"))
        path.chmod(0o755)
        return path

    def add_gpu_stack(self, python: Path, torch_version: str) -> None:
        """Give this Python a CUDA build of torch and Transformer Engine."""
        python.with_name(f"{python.name}.gpu_stack").write_text(f"{torch_version}\n")

    def run(self, *arguments: str, status: int = 0, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run the script, and assert that it ends with `status`."""
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=240)
        assert process.returncode == status, errors
        return subprocess.CompletedProcess(process.args, status, output, errors)

    def find(self, **environment: str | None) -> str:
        """What it prints of the Python that it has found."""
        return self.run("--find", **environment).stdout.strip()

    def start(self, *arguments: str, **environment: str | None) -> subprocess.Popen[str]:
        """Start the script; None: a variable that is not set."""
        # The script also looks at /usr/bin; a copy that looks elsewhere keeps the real one out of the test.
        script = self.home / "project" / self.script.parent.name / self.script.name
        script.parent.mkdir(parents=True, exist_ok=True)
        if not script.exists():
            script.write_text(self.script.read_text().replace("/usr/bin/python3", str(self.bin / "absent")))
        given = {"PATH": str(self.bin), "HOME": str(self.home), "LOG": str(self.log), **environment}
        env = {name: value for name, value in given.items() if value is not None}
        command = ["bash", str(script), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def logged(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_the_newest_supported_python_is_found(machine):
    machine.add_python("python3", supported=False)
    machine.add_python("python3.12")
    expected = machine.add_python("python3.13")
    assert machine.find() == str(expected)


def test_a_shim_that_starts_nothing_is_passed_over(machine):
    shim = machine.bin / "python3.13"
    shim.write_text("#!/bin/bash\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    expected = machine.add_python("python3.12")
    assert machine.find() == str(expected)


def test_a_pyenv_version_is_found_when_the_path_has_none(machine):
    machine.add_python("python3", supported=False)
    expected = machine.add_python("python", folder=machine.home / ".pyenv/versions/3.12.1/bin")
    assert machine.find() == str(expected)


def test_the_users_choice_wins(machine):
    machine.add_python("python3.13")
    chosen = machine.add_python("python", folder=machine.home / "own")
    assert machine.find(PYTHON=str(chosen)) == str(chosen)


@pytest.mark.parametrize("supported", [True, False])
def test_a_users_choice_that_does_not_work_is_refused(machine, supported):
    machine.add_python("python3.13")
    chosen = machine.add_python("python", folder=machine.home / "own", supported=supported)
    result = machine.run("--find", PYTHON=str(chosen), NO_ENSUREPIP="1", status=REFUSED)
    assert one_line(result.stderr).startswith(f"error: PYTHON={chosen} is not")


def test_no_python_at_all_is_said_in_one_line(machine):
    machine.add_python("python3", supported=False)
    result = machine.run(str(machine.venv), status=REFUSED)
    assert "no Python 3.12 or 3.13 found" in one_line(result.stderr)
    assert not machine.venv.exists()


def test_a_python_without_ensurepip_names_the_package(machine):
    machine.add_python("python3.13")
    result = machine.run(str(machine.venv), NO_ENSUREPIP="1", status=REFUSED)
    assert "python3.13 lacks venv or ensurepip" in result.stderr
    assert "apt-get install python3-venv" in one_line(result.stderr)


def test_an_environment_is_made_once_and_then_updated(machine):
    machine.add_python("python3.13")
    first = machine.run(str(machine.venv), PIP_ARGS="--no-index --quiet")
    assert "about 3 GB" in first.stdout or "updating" in first.stdout
    assert (machine.venv / "installed").exists()
    assert not (machine.venv / "unfinished").exists()
    machine.run(str(machine.venv))
    venvs = [line for line in machine.logged() if line.startswith("venv")]
    pips = [line for line in machine.logged() if line.startswith("pip")]
    assert len(venvs) == 1 and "--system-site-packages" not in venvs[0]
    assert len(pips) == 2 and "--no-index --quiet --editable" in pips[0] and pips[0].endswith("project[dev]")


def test_a_half_made_environment_is_made_anew(machine):
    machine.add_python("python3.13")
    machine.run(str(machine.venv))
    (machine.venv / "unfinished").touch()
    (machine.venv / "rubbish").touch()
    result = machine.run(str(machine.venv))
    assert "removing the incomplete" in result.stdout
    assert not (machine.venv / "rubbish").exists()
    assert (machine.venv / "installed").exists()


def test_two_at_once_do_not_remove_each_others_environment(machine):
    machine.add_python("python3.13")
    os.mkfifo(machine.home / "go")
    slow = machine.start(str(machine.venv), FAKE_PIP=f"read <{machine.home}/go || true")
    with (machine.home / "go").open("w"):  # opens once pip reads it: the first one is in the middle of its work
        other = machine.start(str(machine.venv))
        assert other.stdout is not None
        assert "another make_venv.sh of this project is running" in other.stdout.readline()
    for process in (slow, other):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "removing" not in output
    assert [line.split()[0] for line in machine.logged()] == ["venv", "pip", "pip"]


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.add_python("python3.13")
    machine.run(str(machine.venv))
    (machine.venv / "bin" / "python").unlink()
    machine.run(str(machine.venv))
    assert (machine.venv / "bin" / "python").exists()


def test_a_failing_pip_shows_its_words_and_the_next_try_goes_on(machine):
    machine.add_python("python3.13")
    result = machine.run(str(machine.venv), FAKE_PIP="echo no space left on device; exit 1", status=REFUSED)
    assert "no space left on device" in result.stderr and "make venv" in result.stderr
    assert not (machine.venv / "installed").exists()
    assert not (machine.venv / "unfinished").exists()  # whole, so that nothing downloaded is thrown away
    machine.run(str(machine.venv))
    assert (machine.venv / "installed").exists()


def test_a_killed_pip_leaves_an_environment_to_be_made_anew(machine):
    machine.add_python("python3.13")
    machine.run(str(machine.venv), FAKE_PIP="kill -KILL $$", status=REFUSED)
    assert (machine.venv / "unfinished").exists()


def test_an_installed_gpu_stack_is_kept(machine):
    machine.add_gpu_stack(machine.add_python("python3.13"), "2.9.0a0+nv25.9")
    result = machine.run(str(machine.venv))
    assert "keeping this machine's torch 2.9.0a0+nv25.9" in result.stdout
    venv, pip = machine.logged()
    assert "--system-site-packages" in venv
    assert "--constraint" in pip
    assert (machine.venv / "keep.txt").read_text() == "torch==2.9.0a0+nv25.9\n"


def test_the_python_with_the_gpu_stack_is_preferred(machine):
    machine.add_python("python3.13")
    other = machine.add_python("python3.12")
    machine.add_gpu_stack(other, "2.9.0")
    assert machine.find() == str(other)


# ---------------------------------------------------------------- both scripts


SCRIPTS = {"tools": (SCRIPT, "no Python 3.12 or 3.13 found"), "serving": (SERVING, "no Python 3.11 ")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_home_the_search_goes_on(name, tmp_path):
    script, said = SCRIPTS[name]
    machine = Machine(tmp_path, script)
    result = machine.run(str(machine.venv), HOME=None, status=REFUSED)
    assert said in one_line(result.stderr)


def test_without_a_home_a_python_is_found(machine):
    expected = machine.add_python("python3.13")
    result = machine.run("--find", HOME=None)
    assert (result.stdout.strip(), result.stderr) == (str(expected), "")


@pytest.mark.parametrize(("name", "python"), [("tools", "python3.13"), ("serving", "python3.11")])
def test_a_folder_that_is_no_environment_is_left_alone(name, python, tmp_path):
    machine = Machine(tmp_path, SCRIPTS[name][0])
    machine.add_python(python)
    machine.venv.mkdir()
    (machine.venv / "thesis.tex").write_text("years of work")
    result = machine.run(str(machine.venv), status=REFUSED)
    assert "is not a virtual environment" in one_line(result.stderr)
    assert (machine.venv / "thesis.tex").exists() and not machine.logged()
    (machine.venv / "pyvenv.cfg").touch()
    machine.run(str(machine.venv))
    assert not (machine.venv / "thesis.tex").exists(), "made anew"
