"""`make sweep-smoke` as on a clean clone: data made, four runs trained, reported; then a copy without checkpoints."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import pytest

from tests import running
from tests.running import ROOT

SWEEP = Path("runs/sweeps/smoke")


def recipe(python: str) -> list[list[str]]:
    """The target's commands, with a given Python and the repository's files by absolute paths."""
    # Under `make test` an inner make would say which folder it enters.
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/installed", "sweep-smoke"]
    commands = [line.split() for line in running.run(command).stdout.splitlines() if line.strip()]
    return [[python, *(absolute(word) for word in words[1:])] for words in commands]


def absolute(word: str) -> str:
    return str(ROOT / word) if word.startswith(("tools/", "configs/")) else word


def run(command: list[str], folder: Path) -> str:
    return running.run(command, folder, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout


def rows_of(folder: Path, name: str = "rows") -> list[dict[str, str]]:
    with (folder / "report" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clone(tmp_path_factory, warm_python) -> tuple[Path, str]:
    """A folder in which the target has been made, and what it said."""
    folder = tmp_path_factory.mktemp("clone")
    commands = recipe(warm_python)
    assert [Path(words[1]).name for words in commands] == ["sweep.py", "report.py"]
    said = "".join(run(command, folder) for command in commands)
    return folder, said


def test_all_runs_are_trained_and_reported(clone):
    folder, said = clone
    assert "4 finished, 0 failed" in said and "at equal tokens: " in said
    rows = rows_of(folder / SWEEP)
    assert [(row["row"], row["seeds_used"]) for row in rows] == [("1 loop", "2"), ("2 loops", "2")]
    # Untrained, a model of 512 ids is at 6.24; what they share in 60 steps takes more than one nat off.
    assert all(3.5 < float(row["validation_loss"]) < 5.2 for row in rows)
    runs = rows_of(folder / SWEEP, "runs")
    assert {run["status"] for run in runs} == {"used"}
    assert all(run["data"] for run in runs) and len({run["validation_loss"] for run in runs}) == 4
    page = (folder / SWEEP / "report" / "index.html").read_text()
    assert all(f'data-value="{row["validation_loss"]}"' in page for row in rows)


def test_the_same_command_goes_on_from_a_copy_without_checkpoints(clone, warm_python):
    folder, _ = clone
    small = shutil.ignore_patterns("checkpoints", "exports", "index_cache", ".lock", "report")
    shutil.copytree(folder / SWEEP, folder / "results" / "smoke", ignore=small)
    assert not list((folder / "results").rglob("*.distcp"))
    assert sum(path.stat().st_size for path in (folder / "results").rglob("*")) < 500_000
    command = [warm_python, str(ROOT / "tools/sweep.py"), str(ROOT / "configs/sweeps/smoke.yaml")]
    assert "every run is finished" in run([*command, "output_dir=results"], folder)
    plan = run([*command, "output_dir=results", "seeds=[1, 2, 3]", "--dry-run"], folder)
    assert re.search(r"2 of 6 runs to do .* GFLOP/s per run of its earlier runs", plan)
    run([warm_python, str(ROOT / "tools/report.py"), "results/smoke"], folder)
    assert rows_of(folder / "results" / "smoke") == rows_of(folder / SWEEP)


def test_decoding_is_measured_on_the_exported_checkpoints(clone, warm_python):
    folder, _ = clone
    command = [warm_python, str(ROOT / "tools/report.py"), str(SWEEP)]
    run([*command, "--measure-decode", "--decode-tokens", "16", "--decode-prefill", "16"], folder)
    one, two = rows_of(folder / SWEEP)
    assert float(one["decode_relative"]) == 1.0 and float(one["decode_milliseconds"]) > 0.05
    assert 0.5 < float(two["decode_relative"]) < 6  # two loops of a token are one pass of twice the rows
    assert (folder / SWEEP / "report" / "loss_latency.png").exists()
    assert "decode_milliseconds" in (folder / SWEEP / "report" / "rows.csv").read_text()
    again = run(command, folder)  # what was measured is kept
    assert "not measured" not in again and rows_of(folder / SWEEP) == [one, two]
