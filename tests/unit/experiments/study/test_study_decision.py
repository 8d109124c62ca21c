"""The answer: the law's best by hand, its share, and what it says where nothing is decided or known."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest

from benchmarks.planted_law import Luck, PlantedLaw, synthetic_study
from plt_megatron.experiments.files import DecideSettings
from plt_megatron.experiments.intervals import Interval
from plt_megatron.experiments.law import LawFit, fit_law
from plt_megatron.experiments.solver import Run
from plt_megatron.experiments.study.decision import Candidate, Standing, contrast, decide, headline
from plt_megatron.experiments.study.report import is_flat

LAW = PlantedLaw()


def candidates(seconds: float | None = 1e-12) -> list[Candidate]:
    """Sizes from 0.1M to 100M: FLOPs and, for the naive loop, latency and cache grow with the loops."""
    made = []
    for size in np.geomspace(1e5, 1e8, 40):
        for variant, loops in (("", 1), ("PLT", 2), ("PLT", 3), ("naive loop", 2), ("naive loop", 3)):
            slow = loops if variant == "naive loop" else 1 + 0.02 * (loops - 1)
            flops = 6 * size * loops
            paid = None if seconds is None else flops * seconds
            made.append(Candidate(variant, 0.0, size, loops, flops, paid, size * slow / 1e6, 2 * size * slow))
    return made


@functools.cache
def fit(luck: Luck | None = None) -> LawFit:
    return fit_law(synthetic_study(LAW, luck or Luck(), 1), bootstraps=60)


TARGET = DecideSettings(training_flops=6 * 3e6 * 6e6, latency_ms=2.0, memory_gb=8e-3)


def by_hand(variant: str, loops: int, **limits: float) -> float:
    """The planted law's best loss over the candidates, and the one right at the limit, at the target's FLOPs."""
    best, made = np.inf, candidates()
    for name, limit in limits.items():
        (one,) = [c for c in made if (c.variant, c.loops) == (variant, loops)][:1]
        factor = limit / getattr(one, name)
        made.append(dataclasses.replace(one, looped=one.looped * factor, flops=one.flops * factor, **{name: limit}))
    for c in made:
        if (c.variant, c.loops) != (variant, loops) or any(getattr(c, k) > v for k, v in limits.items()):
            continue
        size = loops ** LAW.phis.get(variant, 0.0) * c.looped / 1e6
        loss = LAW.e + LAW.a * size**-LAW.alpha + LAW.b * (TARGET.training_flops / c.flops / 1e7) ** -LAW.beta
        best = min(best, loss)
    return best


@pytest.mark.parametrize(
    ("question", "limits"),
    [("decoding latency", {"latency_ms": 2.0}), ("memory", {"memory": 8e6}), ("training FLOPs", {}), ("step time", {})],
)
def test_losses_are_the_laws_best_within_the_limit(question, limits):
    found = {f.question: f for f in decide(fit(Luck(0.0, 0.0)), candidates(), TARGET)}[question]
    assert [verdict.group for verdict in found.verdicts] == list(LAW.phis)
    for verdict in found.verdicts:
        expected = {1: by_hand("", 1, **limits)} | {r: by_hand(verdict.group, r, **limits) for r in (2, 3)}
        assert {s.run.loops: s.loss.value for s in verdict.standings} == pytest.approx(expected, abs=1e-6)
        assert verdict.standings[0].run.loops == min(expected, key=lambda loops: expected[loops])
        assert verdict.standings[0].share == 1.0 and verdict.decided
        assert sum(s.share for s in verdict.standings) == pytest.approx(1.0)
    assert found.curves[0].loss[12] == pytest.approx(by_hand("", 1, **limits), abs=1e-6), "at the target"


def test_latency_is_where_plt_pays_and_the_naive_loop_does_not():
    """At equal latency a PLT's loops are free and the naive loop's are not; at equal FLOPs both are paid for."""
    found = decide(fit(), candidates(), dataclasses.replace(TARGET, latency_ms=0.5))
    answer = headline(found)
    assert answer.question == "decoding latency" and answer.group == "PLT" and answer.standings[0].run.loops > 1
    assert answer.text.startswith("PLT at 1.08e+14 training FLOPs and 0.5 ms a token: three loops, 100%")
    assert "] nats per token, 0%" in answer.text
    naive = next(verdict for verdict in found[0].verdicts if verdict.group == "naive loop")
    assert naive.standings[0].run.loops == 1


def test_without_measured_speed_there_is_no_frontier_of_step_time():
    questions = [f.question for f in decide(fit(), candidates(seconds=None), TARGET)]
    assert questions == ["decoding latency", "memory", "training FLOPs"]


def test_a_frontier_that_says_nothing_is_known_as_flat():
    """Where every shape is within the limit all along the axis, the budget's best is the answer everywhere."""
    found = {f.question: f for f in decide(fit(), candidates(), dataclasses.replace(TARGET, memory_gb=1e3))}
    assert [question for question, frontier in found.items() if is_flat(frontier)] == ["memory"]


def test_what_is_not_decided_says_so_and_what_nobody_pays_for_is():
    """Loops that are worth little: somewhere between tight and generous latency one loop and two are on a par."""
    noisy = fit_law(synthetic_study(PlantedLaw(phis={"PLT": 0.34}), Luck(0.05, 0.03), 5), bootstraps=60)
    own = [c for c in candidates() if c.variant != "naive loop" and c.loops < 3]
    targets = [dataclasses.replace(TARGET, latency_ms=limit) for limit in np.geomspace(0.3, 3, 15)]
    answers = [headline(decide(noisy, own, target)) for target in targets]
    assert answers[0].standings[0].run.loops == 2 and answers[-1].standings[0].run.loops == 1
    place = min(range(15), key=lambda place: answers[place].standings[0].share)
    verdict = answers[place]
    assert not verdict.decided and "Not decided: 90%" in verdict.text and verdict.standings[0].share < 0.9
    verdict = headline(decide(noisy, own, dataclasses.replace(targets[place], indifference=1.0)))
    assert verdict.decided and "is too small to matter" in verdict.text


@pytest.mark.parametrize(("times", "said"), [(0, "0%"), (116, "29%"), (359, "89%"), (360, "90%"), (400, "100%")])
def test_a_share_reads_as_no_confidence_that_it_misses(times, said):
    run = Run("PLT", 1e6, 1e7, 2, 1e9, 2.5)
    assert Standing(run, Interval(2.5), Interval(0.0), times / 400).best_in == said


def test_no_other_variant_answers_where_the_first_has_no_run_that_counts():
    others = [o for o in synthetic_study(LAW, Luck(), 1) if o.loops == 1 or o.variant == "naive loop"]
    found = decide(fit_law(others, bootstraps=20), candidates(), TARGET)
    answer = headline(found)
    assert answer.group == "PLT" and not answer.standings and not answer.decided
    assert answer.text.startswith("PLT at 1.08e+14 training FLOPs and 2 ms a token: no run with several loops counts")
    (naive,) = [verdict for verdict in found[0].verdicts if verdict.group != "PLT"]
    assert naive.decided and naive.text.startswith("naive loop at 1.08e+14 training FLOPs")


def test_a_study_of_one_variant_does_not_name_it():
    own = [c for c in candidates() if c.variant != "naive loop"]
    assert headline(decide(fit(), own, TARGET)).text.startswith("at 1.08e+14 training FLOPs")


def test_no_shape_within_the_limit():
    verdict = headline(decide(fit(), candidates(), dataclasses.replace(TARGET, latency_ms=1e-3)))
    assert not verdict.standings and not verdict.decided and "no shape" in verdict.text


def test_far_from_the_runs_nothing_is_decided():
    """However sure the samples are, and however little the difference matters: the law is not known to hold there."""
    far = dataclasses.replace(TARGET, training_flops=1e20, latency_ms=1e3, indifference=9.0)
    law = fit()
    verdict = headline(decide(law, candidates(), far))
    assert "more tokens than any run has" in verdict.beyond and verdict.beyond in verdict.text
    assert not verdict.decided and "Not decided" in verdict.text and "too small to matter" not in verdict.text
    (bound,) = re.findall(r"at least ([\d.e+]+) tokens", verdict.text)
    most = max(standing.run.tokens for standing in verdict.standings)
    assert float(bound) == pytest.approx(most / 10, rel=0.01) and float(bound) > law.data.tokens.max()


def test_an_interval_wider_than_the_laws_e_decides_nothing():
    law = fit()
    asked = dataclasses.replace(TARGET, indifference=99.0)
    assert headline(decide(law, candidates(), asked, "bits per byte")).decided
    loose = law.samples.copy()
    loose[::3, 5] = -9.0  # phi of PLT: a third of the draws take loops for ruinous
    verdict = headline(decide(dataclasses.replace(law, samples=loose), candidates(), asked, "bits per byte"))
    behind = verdict.standings[1].behind
    assert behind.high - behind.low > law.coefficients["E"].value and not verdict.beyond
    assert not verdict.decided and "E" in verdict.text and "bits per byte" in verdict.text


def test_the_contrast_is_the_gradient_of_the_difference():
    found = fit()
    verdict = headline(decide(found, candidates(), TARGET))
    (row,) = contrast(found, verdict)
    first, second = verdict.standings[:2]

    def difference(theta):
        size = lambda s: theta[1] * (s.run.loops ** theta[5] * s.run.looped / 1e6) ** -theta[3]  # noqa: E731
        text = lambda s: theta[2] * (s.run.tokens / 1e7) ** -theta[4]  # noqa: E731
        return size(first) + text(first) - size(second) - text(second)

    for index in range(7):
        step = np.zeros(7)
        step[index] = 1e-6
        slope = (difference(found.theta + step) - difference(found.theta - step)) / 2e-6
        assert row[index] == pytest.approx(slope, rel=1e-3, abs=1e-8)
