"""The results of a sweep: a row for each combination of the axes' values, a law for each compared value, and answers.

The answers are which loop count wins at equal tokens, FLOPs and decoding latency, or why that is not decided. A row
wins if the intervals of all other rows' paired differences (by seed) to it exclude zero, at 95 % for all together
(Bonferroni). A sweep decides nothing about a budget that it did not hold equal, whatever the curves suggest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from plt_megatron.config import derived
from plt_megatron.errors import UserError
from plt_megatron.experiments.intervals import LEVEL, Interval, estimate, paired_difference
from plt_megatron.experiments.law import LawFit, fit_law
from plt_megatron.experiments.pages import Verdict
from plt_megatron.experiments.records import RunResult, SweepResults, data_key
from plt_megatron.experiments.solver import Run
from plt_megatron.experiments.sweep_plan import PlannedRun
from plt_megatron.predict.decode_cost import kv_cache_bytes, state_bytes
from plt_megatron.run_folder.text import plural

FARTHER = 4.0
_EQUAL = 0.02  # deviation of a budget that the sweep did not hold equal


@dataclass(frozen=True)
class Timing:
    """Decoding time of a row: milliseconds per token step (median slice), ratio to the baseline's (None: the baseline
    was not timed), and cache size."""

    milliseconds: float
    relative: float | None
    cache_bytes: int  # of one sequence after the measurement, in the checkpoint's precision

    @property
    def ratio(self) -> str:
        return "" if self.relative is None else f"{self.relative:.2f}x"


@dataclass
class Row:
    """One row of the table.

    Attributes:
        group: labels of all axes but the compared one; rows are compared within a group.
        label: label of its value of the compared axis.
        to_baseline, to_previous: paired differences of losses to the group's baseline and to the row above.
        decode: measured decoding time, if any.
    """

    group: tuple[str, ...]
    label: str
    results: list[RunResult]
    to_baseline: Interval | None = None
    to_previous: Interval | None = None
    decode: Timing | None = None

    @property
    def run(self) -> PlannedRun:
        """The first of its runs, for properties that do not depend on the seed."""
        return self.results[0].run

    @property
    def name(self) -> str:
        return ", ".join([*self.group, self.label])

    @property
    def has_equal_steps(self) -> bool:
        """Whether a token costs the same throughout the runs."""
        return derived.has_equal_steps(self.run.config)

    @property
    def loop_count(self) -> int:
        return self.run.config.model.loop_count

    @cached_property
    def losses(self) -> dict[int, float]:
        """Final validation loss of the used runs, by seed."""
        return {result.run.seed: result.loss for result in self.results if result.loss is not None}

    @cached_property
    def loss(self) -> Interval | None:
        """The mean of the losses; None without any."""
        return estimate(list(self.losses.values()), LEVEL) if self.losses else None

    @property
    def kv_bytes(self) -> int:
        """K, V and state of one sequence of the training length while decoding, in bf16, by formula."""
        model, length = self.run.config.model, self.run.config.data.sequence_length
        return kv_cache_bytes(model, length) + state_bytes(model, length)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens, mean validation loss over the used runs) where all of them were validated."""
        curves = [dict(result.curve) for result in self.results if result.status == "used"]
        common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        return [(tokens, math.fsum(curve[tokens] for curve in curves) / len(curves)) for tokens in common]

    def loss_at(self, tokens: float) -> float | None:
        """Return the mean curve at `tokens`, interpolated in log tokens between two validations; None outside."""
        curve = self.curve
        if not curve or not curve[0][0] <= tokens <= curve[-1][0] * (1 + 1e-9):
            return None
        places, losses = zip(*curve, strict=True)
        return float(np.interp(math.log(tokens), np.log(places), losses))


def make_rows(results: SweepResults, timings: Mapping[str, Timing] | None = None) -> list[Row]:
    """Group results into rows, a group's together, in the plan's order. `timings`: by row name."""
    compare = results.plan.compare
    found: dict[tuple[str, ...], dict[str, list[RunResult]]] = {}
    for result in results.runs:
        label = result.run.labels[compare] if compare is not None else "all"
        found.setdefault(results.plan.group_of(result.run), {}).setdefault(label, []).append(result)
    made: list[Row] = []
    for group, by_label in found.items():
        compared = [Row(group, label, own) for label, own in by_label.items()]
        made += compared
        reference = baseline_of(compared, results.plan.baseline)
        for index, row in enumerate(compared):
            row.decode = (timings or {}).get(row.name)
            if row is not reference:
                row.to_baseline = paired_difference(row.losses, reference.losses, LEVEL)
            if index > 0:
                row.to_previous = paired_difference(row.losses, compared[index - 1].losses, LEVEL)
    return made


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the groups of `make_rows` that are compared with one another, in order."""
    return [list(own) for _, own in itertools.groupby(rows, key=lambda row: row.group)]


def has_one_data(group: Sequence[Row]) -> bool:
    """Return whether all used runs of a group have read the same data."""
    set_aside = any(result.status == "other data" for row in group for result in row.results)
    return not set_aside and len(_data_of(group)) < 2


def _data_of(rows: Sequence[Row]) -> set[str]:
    """Return the keys of the data that the used runs of some rows have read."""
    results = (result for row in rows for result in row.results)
    return {data_key(result.fingerprint) for result in results if result.status == "used" and result.fingerprint}


def baseline_of(group: Sequence[Row], baseline: str | None) -> Row:
    """Return the row that the others are measured against: the plan's, else the first."""
    return next((row for row in group if row.label == baseline), group[0])


# ---------------------------------------------------------------- scaling laws


@dataclass(frozen=True)
class LoopLaw:
    """The law of one compared value, or why there is none. `farther`: its loss `FARTHER` times beyond its runs."""

    label: str
    fit: LawFit | None
    reason: str = ""
    farther: Interval | None = None


def fit_laws(rows: Sequence[Row]) -> list[LoopLaw]:
    """Fit a law per label, over the sizes and budgets of all groups. N counts parameters without embeddings."""
    laws = []
    for label in dict.fromkeys(row.label for row in rows):
        own = [row for row in rows if row.label == label]
        used = [(r.run, r.loss) for row in own for r in row.results if r.loss is not None]
        points = [
            Run("", 0.0, run.non_embedding_parameters, 1, run.tokens, loss, run.name, run.seed) for run, loss in used
        ]
        try:
            if not points:
                raise UserError("no fit: no finished run")
            if len(_data_of(own)) > 1:
                raise UserError("no fit: its runs have read different data")
            if len({(row.run.non_embedding_parameters, row.run.tokens) for row in own}) < len(own):
                raise UserError("no fit: runs of one size and budget differ in other settings")
            fit = fit_law(points, with_phi=False)
            laws.append(LoopLaw(label, fit, farther=_farther(fit)))
        except UserError as error:
            laws.append(LoopLaw(label, None, str(error)))
    return laws


def _farther(fit: LawFit) -> Interval:
    largest = fit.data.looped.max(), fit.data.tokens.max()
    n, d = (value * (FARTHER if has else 1) for value, has in zip(largest, fit.data.terms, strict=True))
    return fit.predict(Run("", 0.0, n, 1, d))


# ---------------------------------------------------------------- the answer in words


SAME_LATENCY = 0.05  # relative; rows this near to the baseline count as equally fast


def verdicts(results: SweepResults, rows: Sequence[Row]) -> list[Verdict]:
    """Return three answers for each group of compared rows."""
    found = []
    for group in groups(rows):
        for question, answer in _QUESTIONS.items():
            winner, text = None, "not decided: the runs have read different data"
            if has_one_data(group):
                winner, text = answer(results, group)
            found.append(Verdict(text, winner is not None, question, ", ".join(group[0].group), winner))
    return found


def _equal_or_curves(
    results: SweepResults, group: Sequence[Row], *, what: str, amount: Callable[[Row], float], hold: str
) -> tuple[str | None, str]:
    """Decide by final losses if every row has spent the same; else say what the curves show, which decides nothing."""
    plan, reference = results.plan, amount(baseline_of(group, results.plan.baseline))
    # The sweep's tolerance is that of its own budget.
    tolerance = plan.tolerance if plan.match_budget == hold else min(plan.tolerance, _EQUAL)
    if all(abs(amount(row) / reference - 1) <= tolerance for row in group):
        return _best(group)
    common = min(amount(row) for row in group)
    parts = []
    for row in group:
        if hold == "training_flops" and not row.has_equal_steps:
            parts.append(f"{row.label} unknown (its steps differ in cost)")
            continue
        share = common / amount(row)
        loss = row.loss_at(share * row.run.tokens)
        if loss is not None:
            parts.append(f"{row.label} {loss:.3f}" + ("" if share > 0.999 else f" (at {share:.0%} of its run)"))
    curves = f" On the way, at {common:.3g} {what}: {', '.join(parts)}." if parts else ""
    return None, (
        f"not decided by this sweep, whose rows end at different {what}.{curves} A run read off before its learning "
        f"rate has fallen looks worse than it is: match_budget={hold} decides this."
    )


def _at_equal_latency(results: SweepResults, group: Sequence[Row]) -> tuple[str | None, str]:
    if results.plan.match_budget == "decode_latency":
        winner, text = _best(group)
        return winner, f"{text} (Latency was held equal on paper or by the sweep's table.)"
    timed = {row.label: row.decode.relative for row in group if row.decode is not None}
    ratios = {label: ratio for label, ratio in timed.items() if ratio is not None}
    if not timed:
        return None, "not measured: report with --measure-decode"
    if len(ratios) < len(group):
        untimed = ", ".join(row.label for row in group if row.label not in timed)
        return None, f"not decided: {untimed} not timed yet: report with --measure-decode once all rows are finished"
    reference = baseline_of(group, results.plan.baseline)
    equal = [row for row in group if abs(ratios[row.label] - 1) <= SAME_LATENCY]
    labels = [row.label for row in equal]
    slower = ", ".join(f"{label} {ratio:.2f}x" for label, ratio in ratios.items() if label not in labels)
    others = f" The others take, against it, {slower}." if slower else ""
    if len(equal) < 2:
        text = f"not decided: no row decodes within {SAME_LATENCY:.0%} of {reference.label}'s time.{others}"
        return None, f"{text} match_budget=decode_latency decides this."
    winner, text = _best(equal)
    as_fast = f"as fast as {reference.label}, within {SAME_LATENCY:.0%}: {', '.join(labels)}."
    return winner, f"{as_fast} {text[:1].upper()}{text[1:]}{others}"


_QUESTIONS: dict[str, Callable[[SweepResults, Sequence[Row]], tuple[str | None, str]]] = {
    "tokens": partial(_equal_or_curves, what="tokens", amount=lambda row: row.run.tokens, hold="tokens"),
    "training FLOPs": partial(
        _equal_or_curves, what="training FLOPs", amount=lambda row: row.run.total_flops, hold="training_flops"
    ),
    "decoding latency": _at_equal_latency,
}


def _best(rows: Sequence[Row]) -> tuple[str | None, str]:
    """Return the row with the lowest loss, if it beats all others by more than chance explains, and the answer."""
    known = [row for row in rows if row.loss is not None]
    unknown = [row.label for row in rows if row.loss is None]
    without = f" {', '.join(unknown)} cannot be compared yet." if unknown else ""
    if len(known) < 2:
        return None, f"not decided: {len(known)} of {len(rows)} rows have a usable run."
    best, loss = _lowest(known)
    level = 1 - (1 - LEVEL) / (len(known) - 1)
    gaps = {row.label: paired_difference(row.losses, best.losses, level) for row in known if row is not best}
    rivals = [label for label, gap in gaps.items() if gap is None or gap.sign <= 0]
    words = ", ".join(f"{label} {_signed(gaps[label])}" for label in rivals or gaps)
    lead = f"{_with_loops(best)} has the lowest loss, {loss}"
    if rivals:
        apart = f"cannot be told apart from {', '.join(rivals)} (against it: {words})"
        return None, f"the data do not decide: {lead}, but {apart}.{without}"
    if unknown:
        return None, f"not decided yet: {lead} and beats {', '.join(gaps)} ({words}), but{without}"
    return best.label, f"{_with_loops(best)} wins: loss {loss}; the others against it: {words}."


def _lowest(rows: Sequence[Row]) -> tuple[Row, str]:
    """Return the row with the lowest mean loss, and that loss in words: over the seeds that all rows have, if any.

    Rows with a single seed are left out if others have several: they would limit the ranking to that seed, and have no
    interval.
    """
    several = [row for row in rows if len(row.losses) > 1]
    if 1 < len(several) < len(rows):
        best, loss = _lowest(several)
        return best, f"{loss} among rows of several seeds"
    common = set.intersection(*(set(row.losses) for row in rows))
    means = {row.name: estimate([row.losses[seed] for seed in common or row.losses]).value for row in rows}
    best = min(rows, key=lambda row: means[row.name])
    is_whole = all(set(row.losses) == common for row in rows)
    where = "" if is_whole else " over common seeds" if common else " over seeds of its own"
    return best, f"{means[best.name]:.4f}{where}"


def _signed(difference: Interval | None) -> str:
    if difference is None or difference.half is None:
        return "shares fewer than two seeds with it"
    return f"{difference.value:+.4f} ± {difference.half:.4f}"


def _with_loops(row: Row) -> str:
    loops = plural(row.loop_count, "loop")
    return loops if row.label == loops else f"{row.label} ({loops})"


def merged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Sort verdicts by question, with a single one, of no group, where all groups have the same."""
    found: list[Verdict] = []
    for question in dict.fromkeys(verdict.question for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.question == question]
        is_one = len({verdict.text for verdict in own}) == 1
        found += [dataclasses.replace(own[0], group="")] if is_one else own
    return found


# ---------------------------------------------------------------- the sweep's own questions


@dataclass(frozen=True)
class Comparison:
    """One question in one group. `difference`: loss of `label` minus loss of `reference`; `text`: the answer."""

    question: str
    group: str
    label: str
    reference: str
    difference: Interval | None
    text: str


def answer_questions(results: SweepResults, rows: Sequence[Row]) -> list[Comparison]:
    """Answer the plan's questions about existing rows, for every group of rows."""
    answers = []
    labels = {row.label for row in rows}
    questions = {text: pair for text, pair in results.plan.questions.items() if labels.issuperset(pair)}
    for group in groups(rows):
        by_label, is_fair = {row.label: row for row in group}, has_one_data(group)
        for question, (label, reference) in questions.items():
            difference = None
            if label in by_label and reference in by_label and is_fair:
                difference = paired_difference(by_label[label].losses, by_label[reference].losses, LEVEL)
            text = _in_words(difference, is_fair)
            answers.append(Comparison(question, ", ".join(group[0].group), label, reference, difference, text))
    return answers


def _in_words(difference: Interval | None, is_fair: bool) -> str:
    if not is_fair:
        return "not answered: the runs have read different data"
    if difference is None:
        return "not answered: no seed has a usable run of both"
    if difference.half is None:
        return "not answered: one seed has no interval"
    if not difference.sign:
        return f"not told apart: between {difference.low:+.4f} and {difference.high:+.4f}"
    return "lower loss" if difference.value < 0 else "higher loss"
