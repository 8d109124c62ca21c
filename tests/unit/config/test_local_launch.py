"""plt train from the outside: answers fast and without torch, statuses, the saved configuration."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from plt_megatron.commands import train
from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import processes_on
from plt_megatron.predict.run_estimate import estimate_run
from tests.running import ROOT, run
from tests.unit.config.run_files import write_run_files

LAUNCH = ROOT / "launch" / "train.py"

# Stands in for the trainer: `python -P -m plt_megatron.train.main` finds this one first, by the line after it.
FAKE_TRAINER = """
import os, random, sys, time
keys = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
with open(f"seen.{os.environ.get('RANK', 'alone')}", "w") as stream:
    print(sys.argv[1], *(os.environ.get(key, "-") for key in keys), file=stream)
if "WAIT" in os.environ:
    os.write(1, b"ready\\n")  # at once: two processes share the pipe
    while not os.path.exists("go"):
        time.sleep(0.01)
sys.exit(int(os.environ["FAKE_STATUS"]))
"""

FINDS_IT = "import sys\nif 'plt_megatron.train.main' in sys.orig_argv: sys.path.insert(0, {!r})\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run_files(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "name: try\ndata: {sources: [{path: corpus}], tokenizer: tokenizer.model}\ntraining: {train_iters: 3}\n"
    )
    package = tmp_path / "fake" / "plt_megatron" / "train"
    package.mkdir(parents=True)
    (package / "main.py").write_text(FAKE_TRAINER)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FINDS_IT.format(str(tmp_path / "fake")))
    (tmp_path / "random.py").write_text("raise SystemExit('not the standard library')")
    return tmp_path


def environment(folder: Path, **env: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return own | {"PYTHONPATH": str(folder / "site")} | env


def launch(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, LAUNCH, *arguments], folder, status=None, env=environment(folder, **env))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["run.yaml", "model.window_size=0"], 2),
        (["run.yaml", "training.train_iters=1e99"], 2),
        (["run.yaml", "data.tokenizer=run.yaml"], 2),  # no tokenizer
        (["run.yaml", "--dry-run"], 0),  # reads the data, as a start does
    ],
)
def test_answers_soon_and_without_torch(folder, arguments, status):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = launch(folder, *arguments, PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert result.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "argparse" in imported and "plt_megatron.errors" in imported
    unneeded = {"torch", "megatron"} if "--dry-run" in arguments else {"torch", "megatron", "numpy"}
    assert not {name.partition(".")[0] for name in imported} & unneeded


def test_a_rejected_configuration_is_one_line_each(folder):
    result = launch(folder, "run.yaml", "model.window_size=0", "training.train_iters=0", "data.tokenizer=no.model")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert result.stdout == "" and not (folder / "runs").exists()


def test_print_config_can_be_run_again(folder):
    result = launch(folder, "run.yaml", "--print-config", "model.num_layers=6")
    assert result.returncode == 0
    (folder / "printed.yaml").write_text(result.stdout)
    assert load_config(folder / "printed.yaml") == load_config(folder / "run.yaml", ["model.num_layers=6"])
    assert not (folder / "runs").exists()


def test_dry_run_counts_the_steps_of_each_batch_size(folder):
    stages = "training.batch_schedule=[{until: 5120, global_batch_size: 4}, {until: 8000, global_batch_size: 6}]"
    lines = launch(folder, "run.yaml", "--dry-run", stages, "training.train_iters=9").stdout.splitlines()
    shown = [" ".join(line.split()) for line in lines]
    at = shown.index("batches 5 steps of 4 sequences")
    assert shown[at + 1 : at + 3] == ["2 steps of 6 sequences", "2 steps of 8 sequences"]
    assert shown[at - 2 : at] == ["steps 9 of 1,024 to 2,048 tokens", f"tokens {(20 + 12 + 16) * 256:,}"]


def test_dry_run_says_what_would_run_and_does_nothing(folder):
    result = launch(folder, "run.yaml", "--dry-run", "parallel.tensor_model_parallel_size=2", "model.vocab_size=500")
    assert result.returncode == 0
    assert "2 (tensor 2 x pipeline 1 x data 1)" in result.stdout
    assert "3 of 2,048 tokens" in result.stdout
    assert "plt_megatron.train.main" in result.stdout
    assert not (folder / "runs").exists()
    result = launch(folder, "run.yaml", "--dry-run", "training.trainable=[nonsense]")
    assert result.returncode == 2 and "nonsense" in result.stderr
    result = launch(folder, "run.yaml", "--dry-run", "parallel.context_parallel_size=4")
    assert "4 (tensor 1 x pipeline 1 x context 4 x data 1)" in result.stdout


def test_a_run_folder_that_was_moved_does_not_begin_anew_where_it_was(folder):
    assert launch(folder, "run.yaml", FAKE_STATUS="0").returncode == 0
    (folder / "runs/try/checkpoints/step_00000002").mkdir(parents=True)
    (folder / "runs/try").rename(folder / "runs/moved")
    result = launch(folder, "runs/moved/config.yaml", "--dry-run")
    assert result.returncode == 2 and f"name=moved output_dir={folder / 'runs'}" in result.stderr
    assert f"seen from {folder}" in result.stderr
    assert launch(folder, "runs/moved/config.yaml", "--dry-run", "name=other").returncode == 0


@pytest.mark.parametrize("status", [0, 75])
def test_one_process_becomes_the_trainer(folder, status):
    left = {"MASTER_ADDR": "node1", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}  # by another job
    attempts = folder / "runs" / "try" / "attempts.jsonl"  # of a job that has ended
    attempts.parent.mkdir(parents=True)
    attempts.write_text('{"event": "end", "attempt": 1, "status": "preempted"}\n')
    result = launch(folder, "run.yaml", "optimizer.lr=1e-3", FAKE_STATUS=str(status), **left)
    assert result.returncode == status
    saved, rank, world_size, threads = (folder / "seen.alone").read_text().split()
    assert (saved, rank, world_size) == ("runs/try/config.yaml", "-", "-")
    assert int(threads) >= 1 and attempts.read_text().endswith('{"event": "again"}\n')
    assert load_config(folder / saved) == load_config(folder / "run.yaml", ["optimizer.lr=1e-3"])


@pytest.mark.parametrize("status", [0, 75])
def test_several_processes_pass_the_status_through(folder, status):
    result = launch(
        folder,
        "run.yaml",
        "parallel.tensor_model_parallel_size=2",
        "parallel.data_parallel_size=2",
        "training.threads_per_process=3",
        FAKE_STATUS=str(status),
    )
    assert result.returncode == status
    if status == 0:
        for rank in range(4):
            assert (folder / f"seen.{rank}").read_text().split()[1:] == [str(rank), "4", "3"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_trained_once_at_a_time(folder, processes):
    layout = f"parallel.tensor_model_parallel_size={processes}"
    first = subprocess.Popen(
        [sys.executable, str(LAUNCH), "run.yaml", layout],
        cwd=folder,
        env=environment(folder, FAKE_STATUS="0", WAIT=""),
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        try:
            for _ in range(processes):
                assert first.stdout.readline() == "ready\n"
            second = launch(folder, "run.yaml", layout, "optimizer.lr=5e-4", FAKE_STATUS="0")
            assert (second.returncode, second.stdout) == (2, "")
            assert second.stderr == "error: runs/try: another training is running there; wait for it or stop it\n"
            assert load_config(folder / "runs/try/config.yaml") == load_config(folder / "run.yaml", [layout])
        finally:
            (folder / "go").touch()
    assert first.returncode == 0
    assert launch(folder, "run.yaml", layout, FAKE_STATUS="0").returncode == 0


def test_threads_of_the_environment_are_kept(folder):
    assert launch(folder, "run.yaml", FAKE_STATUS="0", OMP_NUM_THREADS="5").returncode == 0
    assert (folder / "seen.alone").read_text().split()[-1] == "5"


@pytest.mark.parametrize(
    ("gpus", "settings", "said"),
    [
        ("0,1,2,3,4,5,6,7", [], "8 (tensor 1 x pipeline 1 x data 8) on 8 of 8 GPUs"),
        ("3,5", [], "2 (tensor 1 x pipeline 1 x data 2) on 2 of 2 GPUs"),
        ("0,1,2", [], "2 (tensor 1 x pipeline 1 x data 2) on 2 of 3 GPUs"),  # three do not divide the batch
        ("0,1,2,3", ["parallel.tensor_model_parallel_size=2"], "4 (tensor 2 x pipeline 1 x data 2) on 4 of 4 GPUs"),
        ("0,1,2,3", ["parallel.data_parallel_size=1"], "1 (tensor 1 x pipeline 1 x data 1) on 1 of 4 GPUs"),
        ("", [], "1 (tensor 1 x pipeline 1 x data 1) on the CPU"),
    ],
)
def test_all_gpus_of_the_machine_are_used(folder, gpus, settings, said, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert train.main(["run.yaml", "--dry-run", *settings]) == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "status"), [("", 0), ("0,1", 2)])
def test_the_limits_of_transformer_engine_are_those_of_gpus(folder, gpus, status):
    """It may be installed on a machine without a GPU, as in a container."""
    (folder / "site" / "transformer_engine.py").touch()
    split = ("parallel.context_parallel_size=2", "data.reset_at_document_boundaries=true", "training.precision=bf16")
    result = launch(folder, "run.yaml", "--dry-run", *split, CUDA_VISIBLE_DEVICES=gpus)
    assert result.returncode == status and ("Transformer Engine" in result.stderr) == (status == 2), result.stderr


def test_fewer_gpus_than_processes_is_one_line(folder):
    result = launch(folder, "run.yaml", "parallel.context_parallel_size=4", CUDA_VISIBLE_DEVICES="0,1")
    assert result.returncode == 2 and not (folder / "seen.0").exists()
    assert result.stderr == (
        "error: 4 processes (tensor 1 x pipeline 1 x context 4 x data 1) need a GPU each, this machine has 2: set "
        "smaller parallel sizes, or CUDA_VISIBLE_DEVICES= to train on the CPU\n"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_use_the_gpus_they_are_for(path):
    """A file that names GPUs fits on them and uses them all; one that names none is small enough for any machine."""
    named = re.search(r"^# For (\d+) GPUs of 80 GB", path.read_text(), re.MULTILINE)
    config = load_config(path)
    vocab_size = config.model.vocab_size or 8000
    if named is None:
        memory = estimate_run(config, gpu="cpu", vocab_size=vocab_size).peak_memory_bytes
        assert processes_on(config, 0) <= 4 and memory < 1 << 30
        return
    gpus = int(named[1])
    for count in (gpus, 2 * gpus):
        assert processes_on(config, count) == count
        for card in ("a100", "h100"):
            assert estimate_run(config, gpu=card, world_size=count, vocab_size=vocab_size).fits
