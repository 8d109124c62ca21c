"""The study command: rounds, kills, runs that go wrong, what is submitted, and the report."""

from __future__ import annotations

import csv
import re
import shutil
import time
from pathlib import Path

import pytest

from plt_megatron.commands import study as command
from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.experiments import sweep
from plt_megatron.experiments.files import read_study
from plt_megatron.experiments.records import RunRecord, read_record, state_of, write_record
from plt_megatron.experiments.study import rounds
from plt_megatron.experiments.study.grid import make_grid
from plt_megatron.experiments.study.knowledge import learn
from plt_megatron.experiments.study.report import write_report
from plt_megatron.experiments.study.rounds import StudyOptions, run_study
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, config_path, load_plan, save_plan
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.archive import ARCHIVE, write_archive
from plt_megatron.run_folder.files import locked
from plt_megatron.slurm.submission import Options
from tests.files import contents
from tests.unit.experiments.study.study_helpers import PHIS, STUDY, PlantedTraining, train, write_study
from tests.unit.experiments.sweep_helpers import note_scores


@pytest.fixture
def training(monkeypatch) -> type[PlantedTraining]:
    class Training(PlantedTraining):
        killed_after, diverging, failing, trained, sources = None, set(), set(), [], {}

    monkeypatch.setattr(sweep, "LocalSweep", Training)
    learn_quickly = lambda grid, plan: learn(grid, plan, bootstraps=12)  # noqa: E731
    monkeypatch.setattr(rounds, "learn", learn_quickly)
    return Training


@pytest.fixture
def reported(monkeypatch) -> list:
    """What reports would be made of, instead of the reports."""
    known: list = []
    monkeypatch.setattr(rounds, "write_report", lambda grid, plan, found, ended: known.append(found) or "page")
    return known


def settings(folder, *more: str) -> list[str]:
    return [f"output_dir={folder / 'studies'}", *more]


ONE_ROUND = ("rounds=1", "budget=1h")


def begin(folder: Path) -> tuple[Path, list[PlannedRun]]:
    """A study of one round of two trunks with a branch each, none of which has been trained: its file and its runs."""
    path = write_study(folder)
    grid = make_grid(read_study(path, settings(folder, *ONE_ROUND)))
    runs = grid.planned([(0, 5120.0), (0, 1280.0), (1, 5120.0), (1, 1280.0)], 1, [])
    save_plan(SweepPlan("study", grid.study.folder, runs, "study"))
    return path, runs


def give_up(run: PlannedRun) -> None:
    """What a Slurm job leaves that has given its run up."""
    run.folder.logs.mkdir(parents=True, exist_ok=True)
    for event in ({"event": "start", "attempt": 1}, {"event": "stop", "attempt": 1, "reason": "out of memory"}):
        json_lines.append(run.folder.attempts_file, event)
    run.folder.why_file.write_text("out of memory\n")


def test_two_at_once_in_a_folder_are_refused(tmp_path):
    path = str(write_study(tmp_path))
    with locked(tmp_path / "studies" / "study", "sweep or study"):
        with pytest.raises(UserError, match="another sweep or study is running there"):
            run_study(path, settings(tmp_path), StudyOptions())


@pytest.mark.slow
def test_rounds_go_on_until_the_last_and_the_report_says_what_they_found(tmp_path, training, capsys):
    path = write_study(tmp_path)
    far = "decide.training_flops=1e12"  # for 44 times more tokens than any run has: nothing decides it
    assert run_study(str(path), settings(tmp_path, "rounds=2", far), StudyOptions()) == 0
    plan = load_plan(tmp_path / "studies/study")
    assert {run.labels["round"] for run in plan.runs} == {"1", "2"}
    assert sorted(training.trained) == sorted(run.name for run in plan.runs) and len(plan.runs) > 20
    said = capsys.readouterr().out
    assert "round 1 of at most 2" in said and "this budget determines phi of PLT within ±" in said
    assert "not decided after 2 rounds; report: " in said
    with (tmp_path / "studies/study/report/phi.csv").open() as file:
        phis = {row["variant"]: row for row in csv.DictReader(file)}
    for name, phi in PHIS.items():
        assert float(phis[name]["low"]) < phi < float(phis[name]["high"])
    page = (tmp_path / "studies/study/report/index.html").read_text()
    answer = re.search(r'<p class="answer open">(.*?)</p>', page)[1]
    assert answer.startswith("PLT at 1e+12 training FLOPs and 0.0006 ms a token: ") and "%" in answer
    assert "Not decided" in answer and "44 times more tokens" in answer
    assert page.index("Answer") < page.index("Frontier") < page.index("<h2>Law") < page.index("Learning curves")
    assert page.index("Learning curves") < page.index("<h2>Runs") and "http" not in page.replace(
        "http://www.w3.org", ""
    )
    assert "<title>every-s-1x-seed1-" in page, "hovering tells a run's name"


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_study_killed_anywhere_ends_as_one_that_was_not(tmp_path, training, reported, thorough):
    path = write_study(tmp_path)
    run_study(str(path), settings(tmp_path / "whole", "rounds=2"), StudyOptions())
    whole = reported.pop()
    for runs in (1, len(whole.results) - 1) if thorough else (len(whole.results) // 2,):
        training.killed_after, training.trained[:] = runs, []
        killed = settings(tmp_path / f"killed{runs}", "rounds=2")
        with pytest.raises(KeyboardInterrupt):
            run_study(str(path), killed, StudyOptions())
        training.killed_after = None
        assert run_study(str(path), killed, StudyOptions()) == 0
        assert len(training.trained) == len(set(training.trained)) == len(whole.results), "none was trained twice"
        assert reported[-1].observations == whole.observations
        assert (reported[-1].fit.samples == whole.fit.samples).all() and reported[-1].answer == whole.answer


def test_runs_that_went_wrong_are_named_and_never_averaged(tmp_path, training, reported, capsys):
    path = write_study(tmp_path)
    training.diverging = {"plt-s-3x-seed1-1.28k"}
    training.failing = {"every-m-1x-seed1-5.12k"}
    assert run_study(str(path), settings(tmp_path, "rounds=1", "budget=1h"), StudyOptions()) == 1
    grid = make_grid(read_study(path, settings(tmp_path, "rounds=1", "budget=1h")))
    plan = load_plan(tmp_path / "studies/study")
    known = learn(grid, plan, bootstraps=12)
    problems = "\n".join(known.problems())
    assert "plt-s-3x-seed1-1.28k does not count (diverged): the loss is 6.5" in problems
    lost = [run.name for run in plan.runs if run.name.startswith("every-m-1x-seed1-")]
    for name in lost:
        assert name in problems
    assert "every-m-1x-seed1-1.28k does not count (missing): its trunk every-m-1x-seed1-5.12k has no" in problems
    assert len(known.observations) == len(plan.runs) - 1 - len(lost)
    assert max(o.loss for o in known.observations) < 5
    said = capsys.readouterr().out
    assert all(f"note: {line}" in said for line in known.problems())


def test_a_decision_ends_the_study(tmp_path, training, reported, capsys):
    text = STUDY.replace("indifference: 0}", "indifference: 9}")
    assert text != STUDY
    assert run_study(str(write_study(tmp_path, text)), settings(tmp_path), StudyOptions()) == 0
    assert {run.labels["round"] for run in load_plan(tmp_path / "studies/study").runs} == {"1"}
    assert "decided; report" in capsys.readouterr().out
    assert run_study(str(tmp_path / "study.yaml"), settings(tmp_path), StudyOptions(dry_run=True)) == 0
    assert capsys.readouterr().out == "decided: there is nothing to run\n"


@pytest.mark.slow
def test_another_study_in_the_folder_is_refused(tmp_path, training, reported):
    path = write_study(tmp_path)
    run_study(str(path), settings(tmp_path, "rounds=1"), StudyOptions())
    with pytest.raises(UserError, match="holds another study: .*optimizer.lr"):
        run_study(str(path), settings(tmp_path, "rounds=1", "optimizer.lr=1e-3"), StudyOptions())
    path.write_text(STUDY.replace("  L:", "  XL:"))
    with pytest.raises(UserError, match="holds another study: .*is no longer one of its runs"):
        run_study(str(path), settings(tmp_path, "rounds=1"), StudyOptions())


def test_a_dry_run_leaves_nothing(tmp_path, capsys):
    path = write_study(tmp_path)
    assert command.main([str(path), *settings(tmp_path), "--dry-run", "--budget", "30min"]) == 0
    assert not (tmp_path / "studies").exists() and "round 1 of at most 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("profile", "card"), [("gpu: a100\n", "a100"), ("processes_per_node: 2\n", "cpu"), ("{}", "h100")]
)
def test_a_budget_buys_at_the_clusters_prices(tmp_path, monkeypatch, capsys, profile, card):
    """As it does with the card given by name; the data may be missing."""
    path, cluster = write_study(tmp_path), tmp_path / "mine.yaml"
    cluster.write_text(profile)
    monkeypatch.setattr(sweep, "run_file_problems", lambda runs, **_: ["no data"])
    for named in (None, card):
        options = StudyOptions(dry_run=True, submit=Options(config=None, cluster=str(cluster)), gpu=named)
        assert run_study(str(path), settings(tmp_path, "budget=30min"), options) == 0
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :] and "note: no data" in said


def test_a_budget_too_small_for_a_law_says_so(tmp_path, capsys):
    path = write_study(tmp_path)
    assert run_study(str(path), settings(tmp_path, "budget=0.0001h"), StudyOptions(dry_run=True)) == 0
    assert re.search(
        "this budget does not determine a law: (no finished run|\\d sizes|\\d+ finished runs)", capsys.readouterr().out
    )


def test_on_a_cluster_trunks_are_an_array_and_their_branches_the_next(
    tmp_path, monkeypatch, training, reported, capsys
):
    """The same command, called when an array has ended, submits what can start now: two rounds of two arrays."""
    submitted: list[list[str]] = []

    def submit(plan, runs, options) -> None:
        submitted.append([run.name for run in runs])
        for run in runs:
            train(run, 2.0 + 0.1 * len(run.name))

    monkeypatch.setattr(sweep, "submit", submit)
    path, options = write_study(tmp_path), StudyOptions(submit=Options(config=None), gpu="cpu")
    for _ in range(4):
        assert run_study(str(path), settings(tmp_path, "rounds=2"), options) == 0
    plan = load_plan(tmp_path / "studies/study")
    by_name = {run.name: run for run in plan.runs}
    kinds = [
        {(by_name[n].labels["round"], by_name[n].config.checkpoint.load is None) for n in s} for s in submitted[:2]
    ]
    assert kinds == [{("1", True)}, {("1", False)}]
    assert sorted(name for names in submitted for name in names) == sorted(by_name)
    assert "when they have ended, the same command continues" in capsys.readouterr().out


def test_on_a_cluster_a_run_that_was_given_up_is_left_out_until_it_is_asked_for(
    tmp_path, monkeypatch, training, reported, capsys
):
    path, (trunk, branch, other, last) = begin(tmp_path)
    submitted: list[list[str]] = []
    checked: list[list[str]] = []
    for module, name, noted in ((sweep, "submit", submitted), (sweep, "submit_dry", checked)):
        monkeypatch.setattr(module, name, lambda plan, runs, options, to=noted: to.append([run.name for run in runs]))

    def call(**options) -> int:
        return run_study(
            str(path), settings(tmp_path, *ONE_ROUND), StudyOptions(submit=Options(config=None), gpu="cpu", **options)
        )

    train(trunk, 2.0)
    give_up(other)
    assert call() == 0 and submitted == [[branch.name]]
    said = capsys.readouterr().out
    assert f"note: failed and left out: {other.name}; --retry-failed tries them again" in said
    train(branch, 2.1)
    assert call() == 1 and len(submitted) == 1, "nothing more can start, and the study goes on"
    said = capsys.readouterr().out
    assert f"note: {other.name} does not count (failed): out of memory" in said and "--retry-failed" in said
    assert f"{last.name} does not count (missing): its trunk {other.name}" in said
    assert "not decided after 1 round; report: page" in said
    assert call(dry_run=True) == 0 and f"left out: {other.name}" in capsys.readouterr().out
    assert call(retry_failed=True, dry_run=True) == 0
    assert checked == [[other.name]] and other.folder.why_file.exists()
    assert call(retry_failed=True) == 0 and submitted[1:] == [[other.name]]
    assert state_of(other) == "pending", "one that is queued again is not left out by the next call"
    assert (other.folder.logs / "why-before-attempt-2.txt").read_text() == "out of memory\n"


def test_here_too_a_run_that_failed_is_left_out_until_it_is_asked_for(tmp_path, training, reported, capsys):
    path, (trunk, branch, other, last) = begin(tmp_path)
    other.folder.path.mkdir(parents=True)
    write_record(other.folder, RunRecord("failed", 1, 1, 3.0, "out of memory"))
    assert run_study(str(path), settings(tmp_path, *ONE_ROUND), StudyOptions()) == 1
    assert training.trained == [trunk.name, branch.name]
    said = capsys.readouterr().out
    assert f"{other.name} does not count (failed): out of memory" in said
    assert f"note: failed and left out: {other.name}; --retry-failed tries them again" in said
    assert run_study(str(path), settings(tmp_path, *ONE_ROUND), StudyOptions(retry_failed=True)) == 0
    assert training.trained[2:] == [other.name, last.name]
    assert read_record(other.folder).status == "finished" and "--retry-failed" not in capsys.readouterr().out


def test_a_study_that_was_moved_goes_on_where_it_is(tmp_path, monkeypatch, training):
    path, (trunk, branch, *_) = begin(tmp_path / "old")
    train(trunk, 2.0)
    (tmp_path / "old/studies").rename(tmp_path / "studies")
    before = contents(tmp_path)
    moved = settings(tmp_path, *ONE_ROUND)
    assert run_study(str(path), moved, StudyOptions(dry_run=True)) == 0 and contents(tmp_path) == before
    begun: dict[str, tuple[str, str | None]] = {}

    def run(self) -> int:
        for each in self.runs:
            config = load_config(config_path(load_plan(tmp_path / "studies/study"), each))
            begun[each.name] = (config.output_dir, config.checkpoint.load)
        return 75

    monkeypatch.setattr(training, "run", run)
    assert run_study(str(path), moved, StudyOptions()) == 75
    here = tmp_path / "studies/study"
    assert begun[branch.name] == (str(here), f"{here}/{trunk.name}/checkpoints/step_00000016")
    assert {output_dir for output_dir, _ in begun.values()} == {str(here)} and len(begun) == 2


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path, monkeypatch, training, capsys):
    path, (trunk, branch, other, last) = begin(tmp_path)
    train(trunk, 2.0)
    dry, before = [str(path), *settings(tmp_path, *ONE_ROUND), "--dry-run"], contents(tmp_path)
    assert command.main(dry) == 0 and contents(tmp_path) == before
    said = capsys.readouterr().out
    assert said.startswith("round 1 of at most 1, left to run: 3 of 4 runs\n")
    assert re.search(r"every-s-1x-seed1 +1.28k\nevery-s-1x-seed2 +5.12k, 1.28k\n", said)
    checked: list[list[str]] = []
    monkeypatch.setattr(sweep, "submit_dry", lambda plan, runs, options: checked.append([r.name for r in runs]))
    on_slurm = StudyOptions(submit=Options(config=None), dry_run=True, gpu="cpu")
    assert run_study(str(path), settings(tmp_path, *ONE_ROUND), on_slurm) == 0
    assert checked == [[branch.name, other.name]]
    for run in (branch, other, last):
        train(run, 2.0)
    before = contents(tmp_path)
    assert command.main(dry) == 0 and contents(tmp_path) == before
    assert capsys.readouterr().out.endswith("not decided after 1 round: there is nothing to run\n")


def test_a_report_on_no_study_is_refused_and_leaves_nothing(tmp_path, capsys):
    path = write_study(tmp_path)
    assert command.main([str(path), *settings(tmp_path), "--report"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"error: {tmp_path / 'studies/study'} has no study to report on: leave out --report to start it, or set "
        "output_dir\n"
    )
    assert said.out == "" and not (tmp_path / "studies").exists()
    with pytest.raises(SystemExit):
        command.main([str(path), *settings(tmp_path), "--report", "--dry-run"])
    assert "--report runs nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_of_a_hundred_runs_takes_seconds(tmp_path, training, monkeypatch):
    path = write_study(tmp_path)
    more = settings(tmp_path, "seeds=[1,2,3]", "rounds=1", "budget=4h")
    monkeypatch.setattr(rounds, "write_report", lambda *_: "page")
    run_study(str(path), more, StudyOptions())
    monkeypatch.undo()
    grid, plan = make_grid(read_study(path, more)), load_plan(tmp_path / "studies/study")
    assert len(plan.runs) >= 100
    note_scores(plan.runs[0], {"reading/acc": 0.25})
    started = time.process_time()
    page = write_report(grid, plan, learn(grid, plan), "decided")
    assert time.process_time() - started < 30
    assert "Downstream" in page.read_text() and f"{plan.runs[0].name}," in (page.parent / "scores.csv").read_text()


def test_bits_per_byte_and_each_source_alone(tmp_path, training, reported):
    """A source in which loops are worth more, and one in which they are worth nothing, have laws and answers of
    their own; the study's is about both together."""
    text = STUDY.replace("set: {", "set: {validation.by_source: true, ")
    text += "measure: bits_per_byte\nrounds: 1\n"
    path = write_study(tmp_path, text)
    training.sources = {"code": 1.0, "prose": 0.0}
    assert run_study(str(path), settings(tmp_path), StudyOptions()) == 0
    (known,) = reported
    assert known.measure == "bits_per_byte" and [domain.name for domain in known.domains] == ["code", "prose"]
    code, prose = (domain.fit.phis["PLT"] for domain in known.domains)
    assert 1.0 in code and 0.0 in prose and known.fit.phis["PLT"].value == pytest.approx(0.5, abs=0.2)
    with pytest.raises(UserError, match=r"measure: bits_per_byte needs validation.by_source=true"):
        run_study(str(path), settings(tmp_path, "validation.by_source=false", "name=x"), StudyOptions())
    with pytest.raises(UserError, match=r"validation.iters: a study compares validated losses"):
        run_study(str(path), settings(tmp_path, "validation.iters=0", "name=x"), StudyOptions())


def test_an_archived_study_is_reported_on_as_it_was_and_not_gone_on_with(tmp_path, training, reported):
    (path, _), kept = begin(tmp_path), tmp_path / "kept/studies/study"
    assert run_study(str(path), settings(tmp_path, *ONE_ROUND), StudyOptions()) == 0
    write_archive(tmp_path / "studies/study", kept / ARCHIVE)
    shutil.rmtree(tmp_path / "studies")
    there = settings(tmp_path / "kept", *ONE_ROUND)
    assert run_study(str(path), there, StudyOptions(report_only=True)) == 0
    before, after = reported
    assert after.observations == before.observations and len(after.observations) == 4
    assert (after.problems(), after.no_law, after.rates) == (before.problems(), before.no_law, before.rates)
    for options in (StudyOptions(), StudyOptions(dry_run=True)):
        with pytest.raises(UserError, match=ARCHIVE):
            run_study(str(path), there, options)
