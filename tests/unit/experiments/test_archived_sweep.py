"""A sweep or a study whose records are one file: reports are the same byte by byte, and nothing is added to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_helpers import finish, saved_plan, write_sweep

from plt_megatron.commands.archive import main as archive
from plt_megatron.errors import UserError
from plt_megatron.experiments import sweep
from plt_megatron.experiments.decode_time import DecodeProtocol
from plt_megatron.experiments.plots import plot_metrics
from plt_megatron.experiments.records import load_results, note_finished
from plt_megatron.experiments.sweep import RunOptions
from plt_megatron.experiments.sweep_plan import load_plan
from plt_megatron.experiments.sweep_report import write_report
from plt_megatron.run_folder.archive import ARCHIVE, unpack_command, write_archive
from plt_megatron.run_folder.folder import runs_named
from tests.files import contents
from tests.running import ROOT
from tests.running import run as run_command


@pytest.fixture
def archived(tmp_path: Path) -> tuple[Path, Path]:
    """A finished sweep with one run that was not begun, a measurement, and the same archived."""
    plan = saved_plan(tmp_path)
    for run in plan.runs[:-1]:
        finish(run, 3.0 - 0.1 * run.config.model.loop_count + 0.001 * run.seed)
    note_finished(plan.runs[:-1])
    incidents = plan.runs[0].folder.incidents
    incidents.mkdir()
    (incidents / "step_00000042_sample_0000000336.json").write_text("{}")
    rows = {label: {"milliseconds": 1.5, "relative": 1.0, "cache_bytes": 64} for label in ("1 loop", "2 loops")}
    (plan.folder / "decode.json").write_text(json.dumps({"conditions": "quiet", "rows": rows}))
    kept = tmp_path / "results" / plan.name
    write_archive(plan.folder, kept / ARCHIVE)
    return plan.folder, kept


def test_its_report_is_the_same_byte_by_byte(archived, tmp_path):
    folder, kept = archived
    before = write_report(folder, tmp_path / "before")
    shutil.rmtree(folder)
    after = write_report(kept)
    assert contents(kept / "report") == contents(tmp_path / "before") and len(contents(tmp_path / "before")) >= 8
    assert (after.verdicts, after.answers, after.problems) == (before.verdicts, before.answers, before.problems)
    assert any("1 step skipped" in problem for problem in after.problems) and any(
        "not started" in p for p in after.problems
    )
    assert "1.5" in (kept / "report" / "rows.csv").read_text(), "what was measured"
    assert sorted(path.name for path in kept.iterdir()) == [ARCHIVE, "report"]


def test_what_would_add_to_it_is_refused_and_the_command_that_is_told_helps(archived, tmp_path, capsys):
    folder, kept = archived
    shutil.rmtree(folder)
    path, here = write_sweep(tmp_path), f"output_dir={kept.parent}"
    for options in (RunOptions(), RunOptions(dry_run=True)):
        with pytest.raises(UserError) as error:
            sweep.run_sweep(str(path), [here], options)
        assert unpack_command(kept) in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=ARCHIVE):
        write_report(kept, decode=DecodeProtocol())
    with pytest.raises(UserError) as error:
        runs_named([str(kept)], "runs", print)
    assert unpack_command(kept) in str(error.value)
    with pytest.raises(UserError) as error:
        plot_metrics([kept / "a run"], tmp_path / "plot.png")
    assert unpack_command(kept) in str(error.value)
    assert [path.name for path in kept.iterdir()] == [ARCHIVE]
    subprocess.run(unpack_command(kept), shell=True, check=True)
    assert sweep.run_sweep(str(path), [here], RunOptions(dry_run=True)) == 0
    assert "1 of 9 runs to do" in capsys.readouterr().out


def test_records_that_are_unpacked_count_before_the_archive(archived):
    _, kept = archived
    subprocess.run(unpack_command(kept), shell=True, check=True)
    plan = load_plan(kept)
    finish(plan.runs[-1], 2.5)
    assert [result.status for result in load_results(kept).runs] == ["used"] * 9


def test_an_archive_of_no_sweep_is_refused_by_its_own_name(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "metrics.jsonl").write_text("")
    write_archive(tmp_path / "runs", tmp_path / "kept" / ARCHIVE)
    with pytest.raises(UserError, match=f"{tmp_path}/kept is not a sweep"):
        load_results(tmp_path / "kept")


def test_the_command_archives_what_plt_report_reads(archived, tmp_path):
    folder, kept = archived
    command = [sys.executable, str(ROOT / "tools/archive.py"), str(folder), str(tmp_path / "again")]
    assert str(tmp_path / "again" / ARCHIVE) in run_command(command).stdout
    assert (tmp_path / "again" / ARCHIVE).read_bytes() == (kept / ARCHIVE).read_bytes()
    for wrong in (tmp_path / "nowhere", tmp_path / "again"):
        done = run_command([*command[:2], wrong, tmp_path / "x"], status=2)
        assert str(wrong) in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_what_slurm_has_run_is_still_finished_without_its_checkpoints(archived, tmp_path):
    """A job of an array writes no note; the next `plt sweep` would."""
    folder, _ = archived
    before = [result.status for result in load_results(folder).runs]
    for note in folder.rglob("sweep_run.json"):
        note.unlink()
    archive([str(folder), str(tmp_path / "again")])
    assert [result.status for result in load_results(tmp_path / "again").runs] == before and "used" in before
