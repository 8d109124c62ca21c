"""Tokenizing on a real Slurm cluster: an array of shards, a node that dies, and a job that joins them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from plt_megatron.data.indexed import flat_tokens, read_index
from plt_megatron.data.preprocess import PreprocessOptions, preprocess
from tests.distributed.training_jobs import make_data
from tests.slurm.cluster import wait_for
from tests.slurm.runs import ROOT

PROFILE = "gpus_per_node: 0\nprocesses_per_node: 1\ncpus_per_process: 1\ndefault_time: '30'\n"


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slurm_faults)])
def test_the_cluster_writes_one_machines_tokens(dies, slurm, tmp_path):
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
    command = [sys.executable, "-m", "plt_megatron", "preprocess", "--input", str(corpus), "--tokenizer", tokenizer]
    command += ["--output-prefix", str(prefix), "--shard-mb", "0.02", "--cluster", "four.yaml", "--nodes", "4"]
    said = slurm.run("env", "-C", str(tmp_path), f"PYTHONPATH={ROOT}", *command)
    assert "4 shards" in said and str(prefix) in said

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


def test_what_cannot_be_submitted_is_refused_here(slurm, tmp_path, monkeypatch, capsys):
    from plt_megatron.commands.preprocess import main

    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    (tmp_path / "four.yaml").write_text(PROFILE)
    common = ["--input", "data/corpus.jsonl", "--output-prefix", "out/text", "--tokenizer", str(data.tokenizer)]
    for arguments, named in (
        (["--cluster", "four.yaml", "--nodes", "0"], "--nodes 0"),
        (["--cluster", "nosuch"], "--cluster nosuch"),
        (["--cluster", "four.yaml", "--time", "soon"], "--time soon"),
        (["--cluster", "four.yaml", "--output-prefix", "data/text"], "data/text.idx exists"),
    ):
        assert main([*common, *arguments]) == 2
        assert named in capsys.readouterr().err
    assert not slurm.jobs() and not (tmp_path / "out").exists()
