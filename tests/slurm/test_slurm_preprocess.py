"""Tokenizing on a real Slurm cluster: an array of shards, a node that dies, and jobs that join them and build the
sample index."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from plt_megatron.config.schema import DataConfig, DataSource, RunConfig
from plt_megatron.data.datasets import build_datasets
from plt_megatron.data.indexed import flat_tokens, read_index
from plt_megatron.data.mix import required_samples
from plt_megatron.data.preprocess import PreprocessOptions, preprocess
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.run_folder.folder import save_config
from tests.distributed.training_jobs import make_data, run_config
from tests.running import ROOT, wait_for
from tests.settings import changed

PROFILE = "gpus_per_node: 0\nprocesses_per_node: 1\ncpus_per_process: 1\ndefault_time: '30'\n"


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slurm_faults)])
def test_the_cluster_writes_one_machines_tokens_and_samples(dies, slurm, tmp_path):
    """Also if a node is switched off while its shard is worked on: Slurm starts it again, and it goes on."""
    tokenizer = make_data(tmp_path / "data").tokenizer
    assert tokenizer is not None
    rng = random.Random(3)
    lines = (json.dumps({"text": " ".join(rng.choices(("loop", "kara", "minop", "terus"), k=60))}) for _ in range(1600))
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(f"{line}\n" for line in lines))
    one, prefix = tmp_path / "one" / "text", tmp_path / "out" / "text"
    preprocess(PreprocessOptions([str(corpus)], str(one), tokenizer))
    (tmp_path / "four.yaml").write_text(PROFILE)
    data = DataConfig([DataSource(str(prefix))], tokenizer=tokenizer, sequence_length=32, index_cache="cache")
    run = run_config("run", tmp_path / "runs", data, training={"train_iters": 500})
    save_config(run, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "plt_megatron", "preprocess", "--input", str(corpus), "--tokenizer", tokenizer]
    command += ["--output-prefix", str(prefix), "--shard-mb", "0.02", "--cluster", "four.yaml", "--nodes", "4"]
    command += ["--build-index", "run.yaml", "training.train_iters=7"]
    said = slurm.run("env", "-C", str(tmp_path), f"PYTHONPATH={ROOT}", *command)
    assert "4 shards" in said and "sample index" in said and str(prefix) in said

    def working() -> list[Path]:
        return [path for path in prefix.parent.glob("text.shard-*.partial") if list(path.glob("*.json"))]

    if dies:
        wait_for(working, "a shard to be worked on", 120, lambda: slurm.run("squeue"))
        node = slurm.run("squeue", "--noheader", "--states=RUNNING", "--format=%N").split()[0]
        slurm.control("node-off", node)
        slurm.control("node-on", node)
    wait_for(lambda: not slurm.jobs(), "the jobs to end", 300, lambda: slurm.run("squeue"), interval=0.5)
    logs = "".join(path.read_text() for path in (prefix.parent / "text.slurm").rglob("*.out"))
    ours, theirs = read_index(prefix), read_index(one)
    assert np.array_equal(ours.lengths, theirs.lengths), logs
    assert np.array_equal(flat_tokens(ours)[:], flat_tokens(theirs)), logs
    assert not Path(f"{prefix}.bin").exists() and not list(prefix.parent.glob("*.partial"))
    (index,) = (tmp_path / "cache").iterdir()
    stamps = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    samples = [_samples(prefix, tmp_path / "cache", run), _samples(one, tmp_path / "own", run)]
    assert samples[0] == samples[1] and len(samples[0]) == 7 * run.training.global_batch_size, logs
    assert list((tmp_path / "cache").iterdir()) == [index]
    assert stamps == {path: path.stat().st_mtime_ns for path in index.rglob("*")}


def _samples(prefix: Path, cache: Path, run: RunConfig) -> list[list[int]]:
    """The tokens of the training samples of 7 steps, from the index in `cache`, which is built if it is missing."""
    data = changed(run.data, {"sources": [DataSource(str(prefix))], "index_cache": str(cache)})
    config = changed(run, {"data": data, "training": changed(run.training, {"train_iters": 7})})
    built = build_datasets(config, required_samples(config), load_tokenizer(str(data.tokenizer)))
    assert built.train is not None
    return [built.train[number]["tokens"].tolist() for number in range(len(built.train))]


def test_what_cannot_be_submitted_is_refused_here(slurm, tmp_path, monkeypatch, capsys):
    from plt_megatron.commands.preprocess import main

    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    (tmp_path / "four.yaml").write_text(PROFILE)
    save_config(run_config("run", tmp_path, data), tmp_path / "run.yaml")
    common = ["--input", "data/corpus.jsonl", "--output-prefix", "out/text", "--tokenizer", str(data.tokenizer)]
    for arguments, named in (
        (["--cluster", "nosuch"], "--cluster nosuch"),
        (["--cluster", "four.yaml", "--time", "soon"], "--time soon"),
        (["--cluster", "four.yaml", "--output-prefix", "data/text"], "data/text.idx exists"),
        (["--cluster", "four.yaml", "--build-index", "nosuch.yaml"], "nosuch.yaml"),
        (["--cluster", "four.yaml", "--build-index", "run.yaml", "training.seed=x"], "training.seed"),
        (["--cluster", "four.yaml", "--build-index", "run.yaml"], "out/text"),
    ):
        assert main([*common, *arguments]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--cluster", "four.yaml", "--nodes", "0"])
    assert "--nodes: must be from 1 to " in capsys.readouterr().err
    assert not slurm.jobs() and not (tmp_path / "out").exists()
