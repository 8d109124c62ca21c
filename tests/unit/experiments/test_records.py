"""What a report says of missing, unfinished, diverged or incomparable runs: named, and left out of the means."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
from sweep_helpers import FINGERPRINT, LOOPS, answers, edit_records, finish, planned, saved_plan, write_records

from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.experiments.decode_time import read_measurement
from plt_megatron.experiments.records import RunRecord, load_results, read_record, write_record
from plt_megatron.experiments.sweep_plan import SweepPlan
from plt_megatron.experiments.sweep_report import main_table, write_report
from plt_megatron.experiments.verdicts import fit_laws, make_rows, verdicts
from plt_megatron.run_folder.folder import save_config

LOSS = {"1 loop": 3.0, "2 loops": 2.9, "3 loops": 2.95}


def finish_all(plan, without=(), **changes):
    """All runs finished, 2 loops best by far; `changes`: run name -> arguments of `finish`."""
    for run in plan.runs:
        if run.name not in without:
            loss = LOSS[run.row()] + 0.001 * run.seed
            finish(run, **{"loss": loss, **changes.get(run.name, {})})


@pytest.fixture
def finished(tmp_path) -> SweepPlan:
    """A sweep all of whose runs are finished."""
    plan = saved_plan(tmp_path)
    finish_all(plan)
    return plan


def statuses(results):
    return {result.run.name: result.status for result in results.runs if result.status != "used"}


def edit_metrics(run, change):
    edit_records(run.folder.metrics_file, change)


def test_a_whole_sweep_has_no_problems_and_an_answer(finished):
    results = load_results(finished.folder)
    assert results.problems == [] and len(results.used()) == 9
    assert answers(results)["tokens"].winner == "2 loops"


def test_an_empty_sweep_says_so_and_decides_nothing(tmp_path):
    plan = saved_plan(tmp_path)
    report = write_report(plan.folder)
    assert report.problems[0].startswith("no run of the sweep is finished and usable (9 are planned)")
    assert "9 runs not started: 1_loop-seed1, 2_loops-seed1" in report.problems[1]
    assert all(verdict.winner is None for verdict in report.verdicts)
    page = (report.folder / "index.html").read_text()
    assert "there is no result yet" in page and "0 of 9 runs are used" in page


def test_unfinished_and_missing_runs_are_in_no_mean(tmp_path):
    plan = saved_plan(tmp_path)
    finish_all(plan, without=("3_loops-seed3",), **{"2_loops-seed2": {"loss": 0.5, "upto": 0.4}})
    results = load_results(plan.folder)
    assert statuses(results) == {"2_loops-seed2": "partial", "3_loops-seed3": "missing"}
    text = "\n".join(results.problems)
    assert "2_loops-seed2 is left out of the means (partial): at 40% of its tokens" in text
    assert "1 run not started: 3_loops-seed3" in text
    assert "the rows have different seeds" in text and "1, 3: 2 loops" in text
    one, two, three = make_rows(results, {})
    assert (one.loss.n, two.loss.n, three.loss.n) == (3, 2, 2)
    assert two.loss.value == pytest.approx(2.9 + 0.001 * 2)  # of seeds 1 and 3
    assert two.to_baseline.value == pytest.approx(-0.1) and two.to_baseline.n == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, math.log(256) + 0.1], ids=["nan", "inf", "above guessing"])
def test_a_diverged_run_is_named_and_in_no_mean(finished, loss):
    run = planned(finished, "1_loop-seed2")
    edit_metrics(run, lambda r: {**r, "loss": loss} if r["step"] == 100 else r)
    results = load_results(finished.folder)
    assert statuses(results) == {"1_loop-seed2": "diverged"}
    assert any(
        "1_loop-seed2 is left out of the means (diverged): the loss is" in problem for problem in results.problems
    )
    assert make_rows(results, {})[0].loss.value == pytest.approx(3.002)  # of seeds 1 and 3
    if math.isnan(loss):  # figures and tables of it can be made
        assert write_report(finished.folder).folder.is_dir()


def test_a_failed_run_is_told_with_its_reason(tmp_path):
    plan = saved_plan(tmp_path)
    finish_all(plan, **{"1_loop-seed1": {"loss": 3.0, "upto": 0.5}, "2_loops-seed1": {"loss": 3.0, "upto": 0.5}})
    write_record(
        planned(plan, "1_loop-seed1").folder, RunRecord(status="failed", reason="exit status 1: no luck today")
    )
    slurm = planned(plan, "2_loops-seed1").folder  # as plt_megatron/launcher leaves it
    slurm.why_file.write_text("out of memory\n")
    stop = {"event": "stop", "attempt": 1, "reason": "rank 3 was killed by signal 9"}
    write_records(slurm.attempts_file, [{"event": "start", "attempt": 1}, stop])
    results = load_results(plan.folder)
    assert statuses(results) == {"1_loop-seed1": "failed", "2_loops-seed1": "failed"}
    text = "\n".join(results.problems)
    assert "(failed): exit status 1: no luck today" in text and "(failed): rank 3 was killed by signal 9" in text


def test_the_seconds_of_slurms_jobs_count(finished):
    """Of two attempts, the second on another clock; and of one here and one there."""
    slurm, both, unknown = (planned(finished, f"1_loop-seed{seed}") for seed in (1, 2, 3))
    times = [("start", 1, 100.0), ("end", 1, 160.0), ("start", 2, 200.0), ("end", 2, 190.0), ("stop", 2, 500.0)]
    for run in (slurm, both):
        events = [{"event": event, "attempt": n, "time": time} for event, n, time in times]
        write_records(run.folder.attempts_file, events)
    write_record(slurm.folder, RunRecord(status="finished"))  # as the sweep notes a run that a job has finished
    write_record(both.folder, RunRecord(status="finished", attempts=1, seconds=5.0))
    seconds = {result.run.name: result.seconds for result in load_results(finished.folder).runs}
    assert [seconds[run.name] for run in (slurm, both, unknown)] == [60.0, 65.0, None]


def test_rows_may_differ_in_their_data(tmp_path):
    """By plan: their losses are shown, but nothing is decided."""
    text = "base: base.yaml\naxes: {data.reset_at_document_boundaries: [false, true]}\nseeds: [1, 2]\n"
    plan = saved_plan(tmp_path, text)
    other = {**FINGERPRINT, "reset_at_document_boundaries": True}
    for run in plan.runs:
        finish(run, 4.0, fingerprint=other if run.config.data.reset_at_document_boundaries else FINGERPRINT)
    results = load_results(plan.folder)
    assert statuses(results) == {}
    assert all(verdict.winner is None and "different data" in verdict.text for verdict in answers(results).values())


def test_runs_on_other_data_are_set_aside_and_nothing_is_decided(tmp_path):
    plan = saved_plan(tmp_path)
    other = {**FINGERPRINT, "sources": {"train": [["xyz", 1.0]]}}
    finish_all(plan, **{"2_loops-seed3": {"fingerprint": other}})
    results = load_results(plan.folder)
    assert statuses(results) == {"2_loops-seed3": "other data"}
    aside = next(result for result in results.runs if result.run.name == "2_loops-seed3")
    assert aside.reason == "read other data than 1_loop-seed1: other train data or weights"
    assert aside.loss is None
    found = answers(results)
    assert all(verdict.winner is None and "different data" in verdict.text for verdict in found.values())


def test_groups_may_read_data_of_their_own(tmp_path):
    """Rows are compared within a group; only a law would mix them."""
    plan = saved_plan(tmp_path, LOOPS.replace("axes: {", "axes: {data.sequence_length: [32, 64], "))
    for run in plan.runs:
        length = run.config.data.sequence_length
        own = {**FINGERPRINT, "sequence_length": length}
        finish(run, LOSS[run.labels["model.loop_count"]] + 0.001 * run.seed, fingerprint=own)
    results = load_results(plan.folder)
    rows = make_rows(results, {})
    assert statuses(results) == {}
    found = [verdict.winner for verdict in verdicts(results, rows) if verdict.question == "tokens"]
    assert found == ["2 loops", "2 loops"]
    assert [law.reason for law in fit_laws(rows)] == ["no fit: its runs have read different data"] * 3


def test_a_run_under_way_has_not_diverged_by_what_it_has_left_behind(tmp_path):
    plan = saved_plan(tmp_path)
    early, recovered, lost = (planned(plan, f"1_loop-seed{seed}") for seed in (1, 2, 3))
    skipped = planned(plan, "2_loops-seed1")
    for run in (early, recovered, lost, skipped):
        finish(run, 3.0, upto=0.6)
    edit_metrics(early, lambda r: {**r, "loss": 9.0} if r["kind"] == "validation" else r)
    edit_metrics(recovered, lambda r: {**r, "loss": math.nan} if r["step"] == 20 else r)
    edit_metrics(lost, lambda r: {**r, "loss": math.nan} if r["step"] == 60 else r)
    edit_metrics(skipped, lambda r: {**r, "loss": math.nan, "updated": False} if r["step"] == 60 else r)
    found = statuses(load_results(plan.folder))
    assert [found[run.name] for run in (early, recovered, skipped, lost)] == [*["partial"] * 3, "diverged"]


def test_runs_whose_data_nobody_recorded_are_said_to_be_so(finished):
    (progress,) = planned(finished, "1_loop-seed1").folder.path.glob("checkpoints/step_*/progress.json")
    progress.write_text(json.dumps({"format": 1, "step": 100}))
    assert any("no data fingerprint" in problem for problem in load_results(finished.folder).problems)


def test_a_run_with_other_settings_than_planned_is_in_no_mean(finished):
    run = planned(finished, "3_loops-seed1")
    changed = load_config(finished.folder / "plan" / f"{run.name}.yaml", ["optimizer.lr=0.5", "logging.log_interval=3"])
    save_config(changed, run.folder.config_file)
    results = load_results(finished.folder)
    assert statuses(results) == {"3_loops-seed1": "other settings"}
    (problem,) = [p for p in results.problems if "other settings" in p]
    assert "optimizer.lr was" in problem and "is 0.5" in problem and "log_interval" not in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{broken\n", "line 1 is not a JSON object"),
        ('{"kind": "train"}\n', "a train record without step, tokens, loss"),
        ("[1, 2]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_broken_file_costs_its_run_alone(finished, text, said):
    planned(finished, "1_loop-seed1").folder.metrics_file.write_text(text)
    results = load_results(finished.folder)
    assert statuses(results) == {"1_loop-seed1": "unreadable"}
    assert any(said in problem and "1_loop-seed1" in problem for problem in results.problems)


@pytest.mark.parametrize("content", [b"{cut short", b"[]", b'{"conditions": "x", "rows": []}', b'{"a": "\xe9"}'])
def test_a_broken_note_or_measurement_is_named(finished, content):
    run, timings = finished.runs[0].folder, finished.folder / "decode.json"
    for path, read in (
        (run.sweep_note, lambda: read_record(run)),
        (timings, lambda: read_measurement(finished.folder)),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: broken .*remove it"):
            read()


def test_steps_that_were_skipped_are_told(finished):
    incidents = planned(finished, "2_loops-seed2").folder.incidents
    incidents.mkdir()
    (incidents / "step_00000007.json").write_text("{}")
    assert "2_loops-seed2: 1 step skipped or rolled back" in load_results(finished.folder).problems


def test_what_is_held_only_roughly_is_told(tmp_path):
    text = LOOPS.replace("match_budget: tokens", "match_budget: training_flops\ntolerance: 0.05")
    plan = saved_plan(tmp_path, text, ("training.train_iters=20",))
    assert any(abs(run.deviation) > 0.005 for run in plan.runs)
    (problem,) = [p for p in load_results(plan.folder).problems if "held only within" in p]
    assert re.search(r"training_flops is held only within: .*loops [+-]\d\.\d%", problem)


def test_a_copy_without_checkpoints_reports_the_same(finished):
    for run in finished.runs:
        write_record(
            run.folder, RunRecord(status="finished", exit_status=0, fingerprint={**FINGERPRINT, "sha256": "x"})
        )
    before = load_results(finished.folder)
    table = main_table(make_rows(before, {}), None).csv()
    for run in finished.runs:
        shutil.rmtree(run.folder.checkpoints)
    after = load_results(finished.folder)
    assert after.problems == before.problems == [] and len(after.used()) == 9
    assert main_table(make_rows(after, {}), None).csv() == table
