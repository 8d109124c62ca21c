"""The answer in words: who wins at equal tokens, FLOPs and latency, and every way in which the data do not decide."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from sweep_helpers import LOOPS, answers, finish, saved_plan

from plt_megatron.experiments import decode_time
from plt_megatron.experiments.records import load_results
from plt_megatron.experiments.sweep_report import write_report
from plt_megatron.experiments.verdicts import Timing, answer_questions, make_rows, verdicts

FIVE_SEEDS = LOOPS.replace("seeds: [1, 2, 3]", "seeds: [1, 2, 3, 4, 5]")
EQUAL_FLOPS = FIVE_SEEDS.replace("match_budget: tokens", "match_budget: training_flops")


def judge(plan, losses, timings=None):
    """`losses`: row -> by seed. Returns the verdicts by question, the rows and the results."""
    for run in plan.runs:
        if run.seed in losses[run.row()]:
            finish(run, losses[run.row()][run.seed])
    results = load_results(plan.folder)
    return answers(results, timings), make_rows(results, timings), results


def by_seed(mean, *noise):
    return {seed: mean + extra for seed, extra in enumerate(noise or (0.01, 0.0, -0.01, 0.005, -0.005), 1)}


FALLING = {"1 loop": by_seed(3.0), "2 loops": by_seed(2.9), "3 loops": by_seed(2.8)}


def test_a_clear_winner_is_named_with_its_intervals(tmp_path):
    """Seeds differ by more than the rows; paired by seed, the rows still differ beyond chance."""
    spread = (0.3, -0.2, 0.1, -0.3, 0.2)
    losses = {
        "1 loop": by_seed(3.0, *spread),
        "2 loops": by_seed(2.9, *(x + 0.001 * n for n, x in enumerate(spread))),
        "3 loops": by_seed(2.95, *spread),
    }
    found, rows, _ = judge(saved_plan(tmp_path, FIVE_SEEDS), losses)
    assert found["tokens"].winner == "2 loops"
    assert found["tokens"].text.startswith("2 loops wins: loss 2.9")
    one, two, _ = rows
    # By hand: differences -0.1 + 0.001 n, n = 0..4; standard deviation 0.001 sqrt(2.5); t(0.975, 4) = 2.7764.
    assert two.to_baseline.value == pytest.approx(-0.098)
    assert two.to_baseline.half == pytest.approx(2.7764 * 0.001 * math.sqrt(2.5) / math.sqrt(5), rel=1e-4)
    assert two.loss.half > 0.2 and one.to_baseline is None


def test_differences_within_the_noise_decide_nothing(tmp_path):
    losses = {"1 loop": by_seed(3.0), "2 loops": by_seed(2.999, 0.02, -0.01, 0.0, -0.02, 0.01), "3 loops": by_seed(3.2)}
    found, _, _ = judge(saved_plan(tmp_path, FIVE_SEEDS), losses)
    assert found["tokens"].winner is None
    assert "the data do not decide: 2 loops has the lowest loss" in found["tokens"].text
    assert "cannot be told apart from 1 loop (" in found["tokens"].text and "3 loops" not in found["tokens"].text


def test_many_rows_widen_the_intervals(tmp_path):
    """A difference at 96 % confidence beats one rival and not two: all intervals hold together."""
    differences = [-0.1 + 0.07 * x for x in (-1.2, -0.6, 0.0, 0.6, 1.2)]
    losses = {"1 loop": by_seed(3.0, 0, 0, 0, 0, 0), "2 loops": by_seed(3.0, *differences)}
    two_rows = FIVE_SEEDS.replace("[1, 2, 3]}", "[1, 2]}")
    assert judge(saved_plan(tmp_path, two_rows), losses)[0]["tokens"].winner == "2 loops"
    losses["3 loops"] = by_seed(3.0, 0, 0, 0, 0, 0)
    assert judge(saved_plan(tmp_path / "far", FIVE_SEEDS), losses)[0]["tokens"].winner is None


def test_a_row_of_one_seed_does_not_reduce_the_ranking_to_it(tmp_path):
    """By seed 1 alone two loops were lower than one; by all three they are not."""
    losses = {"1 loop": {1: 3.0, 2: 2.7, 3: 2.7}, "2 loops": {1: 2.9, 2: 2.9, 3: 2.95}, "3 loops": {1: 2.6}}
    found, *_ = judge(saved_plan(tmp_path), losses)
    assert "1 loop has the lowest loss, 2.8000 among rows of several seeds" in found["tokens"].text
    assert "3 loops shares fewer than two seeds with it" in found["tokens"].text and found["tokens"].winner is None


def test_a_single_seed_decides_nothing(tmp_path):
    losses = {"1 loop": {1: 3.0}, "2 loops": {1: 2.0}, "3 loops": {1: 2.5}}
    found, rows, _ = judge(saved_plan(tmp_path, LOOPS, ("seeds=[1]",)), losses)
    assert found["tokens"].winner is None and "fewer than two seeds" in found["tokens"].text
    assert rows[1].loss.half is None


def test_a_row_without_runs_leaves_it_open(tmp_path):
    losses = {"1 loop": by_seed(3.0), "2 loops": by_seed(2.9), "3 loops": {}}
    found, _, _ = judge(saved_plan(tmp_path, FIVE_SEEDS), losses)
    assert found["tokens"].winner is None
    assert "not decided yet" in found["tokens"].text and "3 loops cannot be compared yet" in found["tokens"].text


def test_rows_with_different_seeds_are_compared_on_common_ones(tmp_path):
    """2 loops has the lower mean, since it lacks the seed on which all are bad; paired, 3 loops is better by far."""
    hard = {1: 3.0, 2: 3.002, 3: 4.0}
    losses = {
        "1 loop": {seed: loss + 0.5 for seed, loss in hard.items()},
        "2 loops": {1: 3.1, 2: 3.1022},
        "3 loops": hard,
    }
    found, rows, _ = judge(saved_plan(tmp_path), losses)
    assert rows[1].loss.value < rows[2].loss.value
    assert found["tokens"].winner == "3 loops"
    assert "loss 3.0010 over common seeds; the others against it: 1 loop +0.5000" in found["tokens"].text
    assert "2 loops +0.1001" in found["tokens"].text


def test_equal_tokens_do_not_decide_at_equal_flops_and_the_other_way_round(tmp_path):
    found, rows, _ = judge(saved_plan(tmp_path, FIVE_SEEDS), FALLING)
    assert (found["tokens"].winner, found["training FLOPs"].winner) == ("3 loops", None)
    share = rows[0].run.total_flops / rows[1].run.total_flops
    assert f"2 loops {rows[1].loss_at(share * 6400):.3f} (at {share:.0%} of its run)" in found["training FLOPs"].text
    assert "match_budget=training_flops decides this" in found["training FLOPs"].text
    found, _, _ = judge(saved_plan(tmp_path / "other", EQUAL_FLOPS), FALLING)
    assert (found["tokens"].winner, found["training FLOPs"].winner) == (None, "3 loops")


def test_rows_within_the_tolerance_of_the_baseline_are_equal(tmp_path):
    """Two on either side of it are farther apart."""
    plan = saved_plan(tmp_path, EQUAL_FLOPS, ("training.train_iters=38",))
    off = sorted({run.deviation for run in plan.runs})
    assert off[0] < 0 < off[-1] < plan.tolerance < off[-1] - off[0]
    assert judge(plan, FALLING)[0]["training FLOPs"].winner == "3 loops"


def test_a_tolerance_is_that_of_the_budget_that_is_held(tmp_path):
    """A wide one does not make other budgets equal."""
    found, _, _ = judge(saved_plan(tmp_path, FIVE_SEEDS, ("tolerance=0.9",)), FALLING)
    assert (found["tokens"].winner, found["training FLOPs"].winner) == ("3 loops", None)


def test_at_equal_latency_only_rows_that_are_as_fast_compete(tmp_path):
    plan = saved_plan(tmp_path, FIVE_SEEDS)
    timings = {"1 loop": Timing(2.0, 1.0, 1), "2 loops": Timing(2.08, 1.04, 1), "3 loops": Timing(2.4, 1.2, 1)}
    found, rows, results = judge(plan, FALLING, timings)
    assert found["decoding latency"].winner == "2 loops"
    assert "The others take, against it, 3 loops 1.20x" in found["decoding latency"].text
    timings["2 loops"] = Timing(3.0, 1.5, 1)
    slow = answers(results, timings)["decoding latency"]
    assert slow.winner is None and "no row decodes within 5% of 1 loop's time" in slow.text
    none = answers(results)["decoding latency"]
    assert none.winner is None and none.text.startswith("not measured")
    del timings["3 loops"]
    some = answers(results, timings)["decoding latency"]
    assert some.winner is None and "3 loops not timed yet" in some.text


def test_decoding_is_compared_with_the_baseline_alone_even_if_that_is_not_finished(tmp_path, monkeypatch):
    plan = saved_plan(tmp_path)
    _, _, results = judge(plan, FALLING | {"1 loop": {}})
    monkeypatch.setattr(decode_time, "_load", lambda *_: SimpleNamespace(dtype="torch.float32"))
    taken = {"2 loops": [2.0, 3.0], "3 loops": [2.0, 3.0]}, {"2 loops": 1, "3 loops": 1}
    monkeypatch.setattr(decode_time, "_take_turns", lambda *_: taken)
    measured = decode_time.measure(results, decode_time.DecodeProtocol())
    assert decode_time.read_measurement(plan.folder) == measured
    assert measured.rows == {name: Timing(2.5, None, 1) for name in ("2 loops", "3 loops")}
    assert "1 loop not timed yet" in answers(results, measured.rows)["decoding latency"].text
    write_report(plan.folder)
    assert (plan.folder / "report/rows.csv").read_text().count(",2.5,,") == 2


def test_groups_are_judged_by_themselves(tmp_path):
    text = FIVE_SEEDS.replace("axes: {", "axes: {model.num_layers: [2, 4], ")
    plan = saved_plan(tmp_path, text)
    for run in plan.runs:
        best = {2: 1, 4: 3}[run.config.model.num_layers]
        finish(run, by_seed(3 + 0.1 * abs(run.config.model.loop_count - best))[run.seed])
    results = load_results(plan.folder)
    found = {v.group: v.winner for v in verdicts(results, make_rows(results, {})) if v.question == "tokens"}
    assert found == {"num_layers=2": "1 loop", "num_layers=4": "3 loops"}


def test_questions_are_answered_pair_by_pair(tmp_path):
    questions = "questions: {second: [2 loops, 1 loop], third: [3 loops, 2 loops], back: [1 loop, 2 loops]}\n"
    noise = (0.02, -0.02, 0.01, -0.01, 0.0)
    losses = {"1 loop": by_seed(3.0), "2 loops": by_seed(2.9), "3 loops": by_seed(2.9, *noise)}
    _, rows, results = judge(saved_plan(tmp_path, FIVE_SEEDS + questions), losses)
    found = {answer.question: answer for answer in answer_questions(results, rows)}
    assert [answer.text.partition(":")[0] for answer in found.values()] == [
        "lower loss",
        "not told apart",
        "higher loss",
    ]
    assert found["second"].difference.value == pytest.approx(-0.1) and found["second"].difference.n == 5
    low, high = found["third"].difference.low, found["third"].difference.high
    assert low < 0 < high and found["third"].text == f"not told apart: between {low:+.4f} and {high:+.4f}"


def test_questions_without_an_answer_say_why(tmp_path):
    questions = "questions: {second: [2 loops, 1 loop], third: [3 loops, 2 loops]}\n"
    losses = {"1 loop": {1: 3.0}, "2 loops": {1: 2.9, 2: 2.9}, "3 loops": {}}
    _, rows, results = judge(saved_plan(tmp_path, LOOPS + questions), losses)
    texts = [answer.text for answer in answer_questions(results, rows)]
    assert texts == ["not answered: one seed has no interval", "not answered: no seed has a usable run of both"]


def test_curves_are_means_where_all_runs_were_validated(tmp_path):
    losses = {"1 loop": {1: 3.0, 2: 3.2, 3: 3.4}, "2 loops": {}, "3 loops": {}}
    _, rows, _ = judge(saved_plan(tmp_path), losses)
    row = rows[0]
    # `finish` leaves loss + 0.5 halfway: at steps 50 and 100 of 64 tokens.
    assert row.curve == [(3200, pytest.approx(3.7)), (6400, pytest.approx(3.2))]
    assert row.loss_at(6400) == pytest.approx(3.2) and row.loss_at(3200 * 2**0.5) == pytest.approx(3.45)
    assert row.loss_at(100) is None and row.loss_at(7000) is None and rows[1].curve == []
