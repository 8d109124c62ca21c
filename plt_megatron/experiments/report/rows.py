"""A sweep's runs summed up: a row for each combination of the axes' values, a law for each compared value."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plt_megatron.errors import UserError
from plt_megatron.experiments.intervals import LEVEL, Estimate, Interval, estimate, paired_difference
from plt_megatron.experiments.law import LawFit, fit_curve
from plt_megatron.experiments.report.results import RunResult, SweepResults
from plt_megatron.experiments.solver import Model, Observation
from plt_megatron.experiments.sweep_plan import PlannedRun
from plt_megatron.predict.decode_cost import kv_cache_bytes, state_bytes

FARTHER = 4.0


@dataclass(frozen=True)
class Timing:
    """One row's decoding: milliseconds per token step (median slice), the ratio to the baseline's, and its cache."""

    milliseconds: float
    relative: float
    cache_bytes: int  # of one sequence after the measurement, in the checkpoint's precision


@dataclass
class Row:
    """One row of the table.

    Attributes:
        group: labels of all axes but the compared one; rows are compared within a group.
        label: of the compared axis.
        losses: seed -> final validation loss of the runs that are used.
        loss: their mean; None without one.
        to_baseline, to_previous: paired differences of losses to the group's baseline and to the row above.
        kv_bytes: K, V and state of one sequence of the training length while decoding, in bf16, by formula.
        decode: measured, if it was.
    """

    group: tuple[str, ...]
    label: str
    results: list[RunResult]
    losses: dict[int, float]
    loss: Estimate | None
    kv_bytes: int
    to_baseline: Estimate | None = None
    to_previous: Estimate | None = None
    decode: Timing | None = None

    @property
    def run(self) -> PlannedRun:
        """The first of its runs, for what does not depend on the seed."""
        return self.results[0].run

    @property
    def name(self) -> str:
        return ", ".join([*self.group, self.label])

    @property
    def loop_count(self) -> int:
        return self.run.config.model.loop_count

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens, mean validation loss over the used runs) where all of them were validated."""
        curves = [dict(result.curve) for result in self.results if result.status == "used"]
        common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        return [(tokens, math.fsum(curve[tokens] for curve in curves) / len(curves)) for tokens in common]

    def loss_at(self, tokens: float) -> float | None:
        """The mean curve at `tokens`, between two validations by interpolation in log tokens; None outside."""
        curve = self.curve
        if not curve or not curve[0][0] <= tokens <= curve[-1][0] * (1 + 1e-9):
            return None
        places = [place for place, _ in curve]
        right = min(bisect.bisect_left(places, tokens), len(curve) - 1)
        (x0, y0), (x1, y1) = curve[max(0, right - 1)], curve[right]
        if x0 == x1:
            return y1
        share = (math.log(tokens) - math.log(x0)) / (math.log(x1) - math.log(x0))
        return y0 + min(1.0, share) * (y1 - y0)


def make_rows(results: SweepResults, timings: Mapping[str, Timing] | None = None) -> list[Row]:
    """Rows in the plan's order. `timings`: by row name."""
    compare = results.plan.compare
    rows: dict[tuple[tuple[str, ...], str], list[RunResult]] = {}
    for result in results.runs:
        labels = result.run.labels
        group = tuple(label for axis, label in labels.items() if axis != compare)
        label = labels[compare] if compare is not None else "all"
        rows.setdefault((group, label), []).append(result)
    order = list(dict.fromkeys(group for group, _ in rows))
    made = [_row(group, label, found) for (group, label), found in rows.items()]
    made.sort(key=lambda row: order.index(row.group))  # stable: a group's rows stay in the plan's order
    for row in made:
        row.decode = (timings or {}).get(row.name)
    for compared in groups(made):
        _compare(compared, results.plan.baseline)
    return made


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are compared with one another, in order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.values())


def baseline_of(group: Sequence[Row], baseline: str | None) -> Row:
    """The row the others are measured against: the plan's, else the first."""
    return next((row for row in group if row.label == baseline), group[0])


def _row(group: tuple[str, ...], label: str, results: list[RunResult]) -> Row:
    losses = {r.run.seed: r.loss for r in results if r.status == "used" and r.loss is not None}
    model = results[0].run.config.model
    length = results[0].run.config.data.sequence_length
    return Row(
        group=group,
        label=label,
        results=results,
        losses=losses,
        loss=estimate(list(losses.values()), LEVEL) if losses else None,
        kv_bytes=kv_cache_bytes(model, length) + state_bytes(model, length),
    )


def _compare(group: Sequence[Row], baseline: str | None) -> None:
    reference = baseline_of(group, baseline)
    for index, row in enumerate(group):
        if row is not reference:
            row.to_baseline = paired_difference(row.losses, reference.losses, LEVEL)
        if index > 0:
            row.to_previous = paired_difference(row.losses, group[index - 1].losses, LEVEL)


# ---------------------------------------------------------------- scaling laws


@dataclass(frozen=True)
class LoopLaw:
    """The law of one compared value, or why there is none. `farther`: its loss `FARTHER` times beyond its runs."""

    label: str
    fit: LawFit | None
    reason: str = ""
    farther: Interval | None = None


def fit_laws(rows: Sequence[Row], bootstraps: int = 400) -> list[LoopLaw]:
    """A law per label, over the sizes and budgets of all groups. N counts parameters without embeddings."""
    laws = []
    for label in dict.fromkeys(row.label for row in rows):
        points = [
            Observation("", 0.0, result.run.non_embedding_parameters, 1, result.run.tokens, result.loss, label)
            for row in rows
            if row.label == label
            for result in row.results
            if result.status == "used" and result.loss is not None
        ]
        if not points:
            laws.append(LoopLaw(label, None, "no fit: no finished run"))
            continue
        try:
            fit = fit_curve(points, bootstraps=bootstraps)
            laws.append(LoopLaw(label, fit, farther=_farther(fit)))
        except UserError as error:
            laws.append(LoopLaw(label, None, str(error)))
    return laws


def _farther(fit: LawFit) -> Interval:
    largest = fit.data.looped.max(), fit.data.tokens.max()
    n, d = (value * (FARTHER if has else 1) for value, has in zip(largest, fit.terms, strict=True))
    return fit.predict(Model("", 0.0, n, 1, d)).loss
