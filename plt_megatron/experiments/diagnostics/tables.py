"""The numbers as text: a table for the terminal, a long CSV, and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from plt_megatron.experiments.diagnostics.bootstrap import LEVEL, RESAMPLES, Intervals
from plt_megatron.experiments.diagnostics.catalog import Measure
from plt_megatron.experiments.diagnostics.decision import Decision
from plt_megatron.experiments.diagnostics.diagnose import DIFFERENCES, Diagnosis
from plt_megatron.run_folder.text import format_table

Number = tuple[float, float, float]  # mean, low, high; NaN: none


def cell(number: Number, form: str) -> str:
    """`1.23 [1.20, 1.26]`; empty where the measure is not defined, the mean alone without an interval."""
    mean, low, high = number
    if math.isnan(mean):
        return ""
    text = f"{mean:{form}}"
    return text if math.isnan(low) else f"{text} [{low:{form}}, {high:{form}}]"


def loop_rows(diagnosis: Diagnosis) -> list[tuple[Measure, list[str]]]:
    """Each measure with its cells for loops 0 .. L."""
    return [
        (measure, [cell(diagnosis.loops[measure.name].at(loop), measure.form) for loop in _loops(diagnosis)])
        for measure in diagnosis.measures
    ]


def _loops(diagnosis: Diagnosis) -> range:
    return range(diagnosis.loop_count + 1)


def terminal_table(diagnosis: Diagnosis) -> str:
    """Measures down, loops across. Loop 0 is the embeddings."""
    header = ["", "embeddings", *(f"loop {loop}" for loop in range(1, diagnosis.loop_count + 1))]
    rows = [[measure.title, *cells] for measure, cells in loop_rows(diagnosis)]
    return format_table(rows, header=header)


# ---------------------------------------------------------------- CSV


def csv_text(diagnosis: Diagnosis) -> str:
    """One number a line: measure, loop, layer and head (from 0; empty: the mean over them), value, low, high."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["measure", "loop", "layer", "head", "value", "low", "high"])
    for name, place, number in _all_numbers(diagnosis):
        places = [*map(str, place), "", ""][:3]
        writer.writerow([name, *places, *("" if math.isnan(value) else repr(value) for value in number)])
    return stream.getvalue()


def _all_numbers(diagnosis: Diagnosis) -> Iterator[tuple[str, tuple[int, ...], Number]]:
    changes = {f"{name}_change": intervals for name, intervals in diagnosis.differences.items()}
    for group in (diagnosis.loops, changes, diagnosis.details):
        for name, intervals in group.items():
            for place in np.ndindex(intervals.mean.shape):
                if not np.isnan(intervals.mean[place]):
                    yield name, place, intervals.at(*place)


# ---------------------------------------------------------------- JSON


def as_json(diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> dict[str, Any]:
    """Everything, NaN as null.

    `measures` holds, by name, lists over loops 0 .. L of `value`, `low` and `high`; `details` the same for each layer
    (and head), nested in the order loop, layer, head; `changes` the paired differences to the loop before.
    """
    return {
        **about,
        "interval": {
            "level": LEVEL,
            "method": "expanded percentile bootstrap of the mean over sequences",
            "resamples": RESAMPLES,
            "sequences": diagnosis.sequences,
        },
        "decision": decision.as_dict(),
        "measures": {
            measure.name: {
                "title": measure.title,
                "meaning": measure.meaning,
                **_lists(diagnosis.loops[measure.name]),
            }
            for measure in diagnosis.measures
        },
        "changes": {name: _lists(diagnosis.differences[name]) for name in DIFFERENCES if name in diagnosis.differences},
        "details": {name: _lists(intervals) for name, intervals in diagnosis.details.items()},
    }


def _lists(intervals: Intervals) -> dict[str, Any]:
    return {"value": _nulls(intervals.mean), "low": _nulls(intervals.low), "high": _nulls(intervals.high)}


def _nulls(values: np.ndarray) -> list[Any]:
    return [_nulls(item) if item.ndim else None if np.isnan(item) else float(item) for item in values]
