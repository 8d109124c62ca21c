"""A shipped study on a real Slurm cluster: its rounds are arrays, trunks before their branches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from plt_megatron.experiments.sweep import LIST
from plt_megatron.experiments.sweep_plan import load_plan
from tests.running import ROOT, wait_for


@pytest.mark.slow
def test_two_rounds_are_arrays(slurm, tmp_path):
    """The same command whenever an array has ended; the second round is paid for when the first has been seen."""
    (tmp_path / "one.yaml").write_text("gpus_per_node: 0\nprocesses_per_node: 1\ncpus_per_process: 1\n")
    folder = tmp_path / "studies/smoke"
    command = [sys.executable, str(ROOT / "tools/study.py"), str(ROOT / "configs/studies/smoke.yaml")]
    command += ["rounds=2", "output_dir=studies", "horizons=[4096,8192,16384]"]
    command += ["--slurm", "--cluster", "one.yaml", "--gpu", "cpu", "--submit", "--time 30"]
    arrays: list[list[str]] = []
    said = "submitted"
    while "submitted" in said:
        budget = "0.0005h" if len(arrays) < 2 else "1h"  # too little for a law, so a second round is needed
        said = slurm.run("env", "-C", str(tmp_path), *command, "--budget", budget)
        if "submitted" in said:
            arrays.append([Path(line).stem for line in (folder / LIST).read_text().splitlines()])
            wait_for(lambda: not slurm.jobs(), "the array to end", 900, lambda said=said: said)
    runs = {run.name: run for run in load_plan(folder).runs}
    assert "not decided after 2 rounds; report: " in said or "decided; report: " in said, said
    assert sorted(name for names in arrays for name in names) == sorted(runs), "each was submitted once"
    rounds = [{runs[name].labels["round"] for name in names} for names in arrays]
    assert rounds == sorted(rounds, key=min) and all(len(number) == 1 for number in rounds)
    assert {"1", "2"} == set.union(*rounds)
    seen: set[str] = set()
    for names in arrays:
        trunks = {Path(load).parts[-3] for name in names if (load := runs[name].config.checkpoint.load) is not None}
        assert trunks <= seen, "a branch comes after what it starts from"
        seen |= set(names)
    assert all(run.folder.metrics_file.is_file() for run in runs.values())
    assert (folder / "report/index.html").is_file()
