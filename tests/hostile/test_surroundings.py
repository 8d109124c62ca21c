"""Commands whose output goes nowhere, whose folder is gone, that are interrupted, and that are asked who they are."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

import plt_megatron
from plt_megatron.commands import COMMANDS
from tests.running import ROOT, run

ESTIMATE = ("estimate", "run.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_version_and_what_it_does_not_know(world, command):
    done = world.run(command, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"plt-megatron {plt_megatron.__version__}\n", "")
    for words in (["--no-such-option"], ["\udcff"]):  # a byte that is no UTF-8
        done = world.run(command, *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ---------------------------------------------------------------- streams


def test_a_full_disk_for_the_output_is_a_line(world):
    with open("/dev/full", "w") as full:
        done = world.run(*ESTIMATE, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "standard output" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_encoding_that_lacks_a_letter_is_no_trouble(world):
    done = world.run("generate", "--model", "exported", "--prompt", "\u00e9a", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_no_trouble(world, closed):
    """The real interpreter: only it sees that a stream is closed."""
    command = f"exec {sys.executable} -m plt_megatron estimate run.yaml {closed}"
    done = run(["sh", "-c", command], world.folder, env=environment())
    assert "Traceback" not in done.stderr, done.stderr
    assert ("parameters" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("where", ["/dev/full", "a reader that leaves"])
def test_training_goes_on_without_its_output(world, where):
    name = "full" if where == "/dev/full" else "left"
    command = [world.python, "-m", "plt_megatron", "train", "run.yaml", f"name={name}", "training.train_iters=3"]
    options = {"cwd": world.folder, "env": os.environ, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    try:
        if where == "/dev/full":
            with open(where, "w") as full:
                status = subprocess.run(command, stdout=full, timeout=240, **options).returncode
        else:
            with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
                process.stdout.readline()
                process.stdout.close()
                status = process.wait(240)
        assert status == 0 and (world.folder / f"runs/{name}/checkpoints/step_00000003").is_dir()
        assert (world.folder / f"runs/{name}/metrics.jsonl").read_text().count('"kind": "train"') >= 1
    finally:
        subprocess.run(["rm", "-rf", str(world.folder / f"runs/{name}")], check=True)


# ---------------------------------------------------------------- the process's surroundings


def test_a_folder_that_is_gone_is_a_line(world, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {world.python} -m plt_megatron train run.yaml --print-config"
    shell = ["sh", "-c", command.replace(world.python, sys.executable)]
    done = run(shell, gone, status=2, env=environment())
    assert (done.stdout, done.stderr.count("\n")) == ("", 1) and "folder" in done.stderr


def test_few_open_files_are_a_line(world):
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (20, 20))
    command = [sys.executable, "-m", "plt_megatron", "train", "run.yaml", "name=new"]
    run = partial(subprocess.run, command, cwd=world.folder, capture_output=True, text=True, env=environment())
    before = world.content()
    done = run(preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "ulimit -Hn" in done.stderr
    assert done.stderr.count("\n") == 1 and world.content() == before


def test_another_launcher_is_a_line(world):
    before = world.content()
    launcher = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    done = world.run("train", "run.yaml", "name=new", env=launcher)
    assert done.returncode == 2 and "WORLD_SIZE" in done.stderr and done.stderr.count("\n") == 1
    assert world.content() == before


UNREADABLE = """
import os, sys
if os.geteuid() == 0:
    os.setuid(65534)
from plt_megatron.data.indexed import open_index
from plt_megatron.errors import run_command
sys.exit(run_command(lambda: open_index("secret") and None))
"""


def test_a_file_that_may_not_be_read_is_a_line(world):
    """As another user, where the tests are root's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for suffix in (".bin", ".idx"):
            shutil.copy(world.folder / f"data/text{suffix}", Path(folder, f"secret{suffix}"))
        Path(folder, "secret.bin").chmod(0)
        done = run([sys.executable, "-c", UNREADABLE], Path(folder), status=2, env=environment())
    assert "secret.bin" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "read" in done.stderr and "written" not in done.stderr


# ---------------------------------------------------------------- Ctrl-C


INTERRUPTED = """
import os, signal, sys
at = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job's children ignore

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
import runpy
runpy.run_module("plt_megatron", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("command", "at"),
    [
        ("train run.yaml name=new", "plt_megatron.config.schema"),  # while its own modules are imported
        ("train run.yaml name=new", "numpy"),
        ("estimate run.yaml", "plt_megatron.predict.report"),
        ("status", "plt_megatron.slurm.status"),
        ("doctor", "plt_megatron.runtime.machine"),
        ("plot runs/mine", "matplotlib"),
        ("report runs/mine", "plt_megatron.experiments.sweep_report"),
        ("generate --model exported --prompt a", "torch"),
        ("diagnose exported --data text.jsonl", "torch"),
        ("inspect-data run.yaml", "torch"),
        ("export --checkpoint runs/mine --output o", "torch"),
        ("study configs/studies/smoke.yaml --dry-run", "plt_megatron.experiments.study.rounds"),
        ("sweep configs/sweeps/smoke.yaml --dry-run", "plt_megatron.experiments.sweep"),
        ("rehearse run.yaml", "plt_megatron.predict.rehearsal.rehearse"),
        ("preprocess --input text.jsonl --tokenizer tokenizer --output-prefix o", "numpy"),
    ],
)
def test_ctrl_c_at_an_import_is_a_line(world, command, at):
    before = world.content()
    command = [sys.executable, "-c", INTERRUPTED, at, *command.split()]
    done = run(command, world.folder, status=130, env=environment())
    assert done.stderr.startswith("interrupted") and done.stderr.count("\n") == 1, done.stderr
    assert world.content() == before


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_before_the_first_step_is_a_line_and_leaves_no_run(world, processes):
    """The run's folder is there as soon as the trainer is started."""
    before = world.content()
    command = [sys.executable, "-m", "plt_megatron", "train", "run.yaml", "name=stopped"]
    process = subprocess.Popen(
        [*command, f"parallel.tensor_model_parallel_size={processes}"],
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (world.folder / "runs/stopped/config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and not out, out + err
    assert err.count("\n") == 1 and "interrupted" in err, err
    assert world.content() == before


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
