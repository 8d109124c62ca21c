"""Scaling laws of a sweep: one for each value of the compared axis, from the final losses of its finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plt_megatron.errors import UserError
from plt_megatron.experiments.fits import Interval, Point, ScalingFit, fit_scaling_law
from plt_megatron.experiments.report.rows import LEVEL, Row

FARTHER = 4.0


@dataclass(frozen=True)
class LoopLaw:
    """The law of one compared value, or why there is none. `farther`: its loss `FARTHER` times beyond its runs."""

    label: str
    fit: ScalingFit | None
    reason: str = ""
    farther: Interval | None = None


def fit_laws(rows: Sequence[Row], bootstraps: int = 400) -> list[LoopLaw]:
    """A law per label, over the sizes and budgets of all groups. N counts parameters without embeddings."""
    laws = []
    for label in dict.fromkeys(row.label for row in rows):
        points = [
            Point(result.run.non_embedding_parameters, result.run.tokens, result.loss)
            for row in rows
            if row.label == label
            for result in row.results
            if result.status == "used" and result.loss is not None
        ]
        if not points:
            laws.append(LoopLaw(label, None, "no fit: no finished run"))
            continue
        try:
            fit = fit_scaling_law(points, bootstraps=bootstraps, level=LEVEL)
            laws.append(LoopLaw(label, fit, farther=_farther(fit)))
        except UserError as error:
            laws.append(LoopLaw(label, None, str(error)))
    return laws


def _farther(fit: ScalingFit) -> Interval:
    largest = max(p.parameters for p in fit.points), max(p.tokens for p in fit.points)
    n, d = (
        value * (FARTHER if term in fit.coefficients else 1)
        for value, term in zip(largest, ("alpha", "beta"), strict=True)
    )
    return fit.predict(n, d)
