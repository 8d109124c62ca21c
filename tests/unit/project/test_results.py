"""results/ keeps few files, and records from which commands still make the figures that its pages show."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from statistics import fmean

import pytest

from plt_megatron.experiments.files import read_sweep
from plt_megatron.experiments.study.rounds import StudyOptions, run_study
from plt_megatron.experiments.sweep_plan import has_plan, load_plan, make_plan, plan_differences
from plt_megatron.experiments.sweep_report import write_report
from plt_megatron.run_folder.archive import ARCHIVE, unpacked
from plt_megatron.run_folder.folder import RunFolder
from tests.running import ROOT, run
from tests.unit.project.test_sweep_benchmarks import load

RESULTS = ROOT / "results"
REPORTS = sorted(path.parents[1].name for path in RESULTS.glob("*/report/report.md"))


def test_they_are_few_files_and_small():
    listed = run(["git", "ls-files", "-z", "results"], status=None)
    if listed.returncode != 0:
        pytest.skip("no checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0")[:-1]]
    assert 40 < len(paths) <= 80 and sum(path.stat().st_size for path in paths) <= 5_000_000


@pytest.mark.parametrize("archive", sorted(RESULTS.rglob(ARCHIVE)), ids=lambda path: path.parent.name)
def test_archives_are_as_the_script_writes_them(archive):
    """Records alone, in order, without times and owners: archived again, they change only where records do."""
    with tarfile.open(archive) as packed:
        entries = packed.getmembers()
    names = [entry.name for entry in entries]
    assert names == [str(path) for path in sorted(map(Path, names))] and len(set(names)) == len(names)
    assert all(
        entry.isfile() and (entry.mtime, entry.uid, entry.uname, entry.mode) == (0, 0, "", 0o644) for entry in entries
    )
    assert {Path(name).suffix for name in names} <= {".yaml", ".json", ".jsonl"}
    assert sum(name.endswith("metrics.jsonl") for name in names) >= 6


def _leads(runs: Path, plain: str, row: str, seed: int) -> list[float]:
    """Return at each validation how much lower a row's loss is than that of one loop."""
    one, looped = (
        {record["step"]: record["loss"] for record in RunFolder(runs / f"{name}-seed{seed}").metrics().validation}
        for name in (plain, row)
    )
    return [one[step] - looped[step] for step in sorted(one)]


def test_leads_are_those_of_the_records():
    page = " ".join((RESULTS / "depth_gain/README.md").read_text().split())
    names = ("four_million", "two_wide_layers", "six_layers", "", "torch", "manuals")
    larger, wide, deep, *corpora = (unpacked(RESULTS / "depth_gain" / name / ARCHIVE) for name in names)
    shown = {}
    for row in ("plt-2", "plt-2_last_loop_global", "eight_layers"):
        shown |= {f"{row} {seed}": _leads(larger, "one_loop", row, seed) for seed in (1, 2)}
    for runs, plain, row in (
        *((wide, "k_layers", row) for row in ("plt-2", "plt-2_last_loop_global", "2k_layers")),
        *((deep, "one_loop", row) for row in ("plt-2", "plt-2_last_loop_global", "twelve_layers")),
    ):
        of_seeds = [_leads(runs, plain, row, seed) for seed in (1, 2, 3)]
        shown[f"{plain}, {row}, mean"] = [fmean(leads) for leads in zip(*of_seeds, strict=True)]
        ends = [f"{leads[-1]:.3f}" for leads in of_seeds]
        assert f"{ends[0]}, {ends[1]} and {ends[2]}" in page, row
    for runs in corpora:
        of_seeds = [_leads(runs, "k_layers", "plt-3", seed) for seed in (1, 2, 3)]
        shown[f"three loops, {runs}"] = [fmean(leads) for leads in zip(*of_seeds, strict=True)]
    for what, leads in shown.items():
        texts = [f"{lead:.3f}" for lead in leads]
        assert len(texts) == 5 and f"{', '.join(texts[:-1])} and {texts[-1]}" in page, what


def test_the_shipped_sweeps_are_those_that_the_records_are_of():
    """Seeds that a command added are only in the records."""
    files = {read_sweep(path, []).name: path for path in (ROOT / "configs/sweeps").glob("*.yaml")}
    compared = 0
    for folder in sorted(archive.parent for archive in RESULTS.rglob(ARCHIVE)):
        plan = load_plan(folder) if has_plan(folder) else None
        if plan is not None and plan.name in files and len(plan.runs) < 100:  # hundreds take seconds
            now = {run.name: run.config for run in make_plan(read_sweep(files[plan.name], []), check_files=False).runs}
            kept = [run for run in plan.runs if run.name in now]
            compared += len(kept)
            assert not any(plan_differences(run.config, now[run.name]) for run in kept), folder
    assert compared > 150


@pytest.mark.parametrize("study", REPORTS)
def test_a_report_of_the_records_is_the_kept_one(study, tmp_path):
    write_report(RESULTS / study, tmp_path)
    assert (tmp_path / "report.md").read_text() == (RESULTS / study / "report/report.md").read_text()


def test_the_table_of_depths_gain_is_its_benchmarks():
    depth_gain = load("depth_gain")
    page = (RESULTS / "depth_gain/README.md").read_text()
    shown = re.findall(
        r"^\| (?!row|-|k layers \()\**([^|*]*?)\**(?:, six seeds)? \| ([\d.]+) \| (.*) \|$", page, re.MULTILINE
    )
    corpora = [depth_gain.read(RESULTS / "depth_gain" / name) for name in ("", "torch", "manuals")]
    flops = corpora[0].rows["k layers"].flops
    for name, cost, texts in shown:
        name = "PLT-2 + loop loss" if "a loss for the first loop" in name else name
        assert cost == f"{corpora[0].rows[name].flops / flops:.2f}", name
        cells = [text.strip(" *") for text in texts.split("|")]
        for corpus, gain, share in zip(corpora, cells[::2], cells[1::2], strict=True):
            if name in corpus.rows:
                found = depth_gain.estimate(list(corpus.gains(name).values()))
                assert re.match(r"-?[\d.]+", gain)[0] == f"{found.value:.3f}", (name, corpus.title)
                assert found.half is None or gain.endswith(f" ± {found.half:.3f}"), (name, corpus.title)
                kept = corpus.share(name)
                assert not share or share.startswith(f"{100 * kept.value:.0f} %"), (name, corpus.title)
            else:
                assert not gain and not share
    assert {name for name, *_ in shown} >= {"2k layers", "PLT-2"} and len(shown) == len(corpora[0].rows) - 1


def test_the_curriculums_table_is_its_benchmarks():
    rows = load("loop_curriculum").read(RESULTS / "curriculum")
    page = (RESULTS / "curriculum/README.md").read_text()
    shown = re.findall(r"^\| [a-z: ]+ \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    flops = rows["one loop"].flops
    found = [(row.flops / flops, sum(row.losses.values()) / len(row.losses)) for row in rows.values()]
    assert [(f"{cost:.3g}", f"{loss:.4f}") for cost, loss in found] == shown and len(shown) == 5


@pytest.mark.slow
def test_the_tables_of_learning_rates_are_their_benchmarks():
    rates = load("learning_rate_transfer")
    forms = rates.read(RESULTS / "learning_rate_transfer")
    page = (RESULTS / "learning_rate_transfer/README.md").read_text()
    shown = re.findall(r"^\| (\d+ wide, \d layers, \d loops?) \| ([\de.-]+) \| (.*) \|$", page, re.MULTILINE)
    rows = [(name, best, row.replace("*", "")) for name, best, row in shown]
    assert len(rows) == 48
    for place, form in enumerate(("recommended", "equal rates", "paper")):
        made = []
        for cell, losses in forms[form].items():
            best = f"{rates.best_rate(losses):.2e}".replace("e-0", "e-")
            made.append((", ".join(cell), best, " | ".join(f"{losses[rate]:.3f}" for rate in sorted(losses))))
        assert sorted(made) == sorted(rows[16 * place : 16 * place + 16]), form


@pytest.mark.slow
def test_the_study_still_says_what_a_loop_is_worth(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop_law").mkdir()
    (tmp_path / "loop_law" / ARCHIVE).symlink_to(RESULTS / "loop_law" / ARCHIVE)
    monkeypatch.chdir(ROOT)
    study = "configs/studies/loop_law.yaml"
    assert run_study(study, [f"output_dir={tmp_path}"], StudyOptions(report_only=True)) == 0
    assert "Not decided" in capsys.readouterr().out
    kept, made = (
        re.sub(r"<svg.*?</svg>|</?span>", "", (folder / "loop_law/report/index.html").read_text(), flags=re.DOTALL)
        for folder in (RESULTS, tmp_path)
    )
    cells = [[cell.lstrip("+") for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)] for page in (kept, made)]
    assert cells[0] == cells[1] and len(cells[0]) > 500
