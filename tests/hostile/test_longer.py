"""What one types after a run has finished, and what the answer says to type, word by word."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator

import pytest

from plt_megatron.run_folder.folder import RunFolder
from tests.running import ROOT
from tests.running import run as run_command

LONGER = "training.train_iters=4"
ALLOWED = ("checkpoint.allow_other_schedule=true", "checkpoint.allow_other_data=true")


@pytest.fixture
def run(world) -> Iterator[RunFolder]:
    """A run of two steps, finished, of a name of its own."""
    folder = world.folder / "runs/other"
    shutil.copytree(world.folder / "runs/mine", folder)
    yield RunFolder(folder)
    shutil.rmtree(folder)
    shutil.rmtree(world.folder / "runs/NEW", ignore_errors=True)


def ways(answer: str) -> list[list[str]]:
    """The settings that an error's indented lines say to add."""
    return [line.rpartition(": ")[2].split() for line in answer.splitlines() if line.startswith("error:   ")]


def steps(folder: RunFolder) -> list[int]:
    return [record["step"] for record in folder.records() if record["kind"] == "train"]


def test_a_finished_run_says_so_at_once_and_without_torch(world):
    before, started = world.content(), resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    done = run_command([sys.executable, "-m", "plt_megatron", "train", "run.yaml"], world.folder, env=env)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "runs/mine is finished: step 2 of 2" in done.stdout
    assert "training.train_iters" in done.stdout and "error: " not in done.stderr
    assert used.ru_utime + used.ru_stime - started.ru_utime - started.ru_stime < 1  # of the processor
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "plt_megatron" in imported and not imported & {"torch", "megatron", "numpy"}
    assert world.content() == before


@pytest.mark.parametrize("way", [0, 1])
def test_longer_in_the_words_of_the_answer(world, run, way):
    asked = ("train", "run.yaml", "name=other", LONGER)
    answer = world.run(*asked).stderr
    found = ways(answer)
    assert len(found) == 2 and "training.train_iters 2 (now 4)" in answer and "0.0003" in answer
    done = world.run(*asked, *found[way])
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(run)[-1] == 4 and "resum" in done.stderr
    rates = [record["lr"] for record in run.records() if record["kind"] == "train"]
    assert (rates[-1] > 3.1e-4) == (way == 0), "the new schedule's rate, or the old one's last"
    assert run.config().training.train_iters == 4 and not run.former_config_file.exists()
    done = world.run("train", "runs/other/config.yaml")  # as it is now
    assert done.returncode == 0 and "finished: step 4 of 4" in done.stdout


def test_another_rate_is_a_run_from_its_weights(world, run):
    answer = world.run("train", "run.yaml", "name=other", "optimizer.lr=1e-3").stderr
    (settings,) = ways(answer)
    assert "runs/other is finished" in answer
    done = world.run("train", "run.yaml", "optimizer.lr=1e-3", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    new = RunFolder(world.folder / "runs/NEW")
    assert steps(new)[-1] == 2 and new.config().optimizer.lr == 1e-3


def test_a_constant_rate_asks_for_the_order_of_samples_alone(world, run):
    """Its schedule does not depend on the run's length."""
    path = run.checkpoints / "step_00000002/progress.json"
    progress = json.loads(path.read_text())
    progress["schedule"]["optimizer.lr_decay_style"] = progress["config"]["optimizer"]["lr_decay_style"] = "constant"
    size = path.stat().st_size
    text = json.dumps(progress)
    path.write_text(text + " " * (size - len(text)))  # only sizes are looked at before the trainer
    done = world.run("train", "run.yaml", "name=other", LONGER, "optimizer.lr_decay_style=constant")
    assert done.returncode == 2 and "checkpoint.allow_other_data=true" in done.stderr
    assert "lr_decay_iters" not in done.stderr and "allow_other_schedule" not in done.stderr


def test_what_only_the_trainer_sees_leaves_no_trace_either(world, run):
    """The checkpoint is damaged inside: its sizes are right."""
    weights = next((run.checkpoints / "step_00000002").glob("*.distcp"))
    weights.write_bytes(bytes(weights.stat().st_size))
    before = world.content()
    done = world.run("train", "run.yaml", "name=other", LONGER, *ALLOWED)
    assert done.returncode == 2 and "step_00000002" in done.stderr and "Traceback" not in done.stderr
    after = world.content()
    index = {name for name in after if name.startswith("runs/other/index_cache")}  # which the next try needs too
    assert {name: after[name] for name in after.keys() - index} == {
        name: before[name] for name in before.keys() - index
    }
