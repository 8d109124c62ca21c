"""The sweep's own questions: two values of the compared axis against each other, with a paired interval each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plt_megatron.experiments.report.results import SweepResults
from plt_megatron.experiments.report.rows import LEVEL, Row, groups
from plt_megatron.experiments.report.statistics import Estimate, paired_difference


@dataclass(frozen=True)
class Answer:
    """One question in one group. `difference`: of the losses, `label`'s minus `reference`'s; `text`: in words."""

    question: str
    group: str
    label: str
    reference: str
    difference: Estimate | None
    text: str


def answer_questions(results: SweepResults, rows: Sequence[Row]) -> list[Answer]:
    """The plan's questions about rows that it has, for every group of rows."""
    answers = []
    labels = {row.label for row in rows}
    questions = {text: pair for text, pair in results.plan.questions.items() if labels.issuperset(pair)}
    for group in groups(rows):
        by_label = {row.label: row for row in group}
        for question, (label, reference) in questions.items():
            difference = None
            if label in by_label and reference in by_label and results.has_one_data:
                difference = paired_difference(by_label[label].losses, by_label[reference].losses, LEVEL)
            text = _in_words(difference, results.has_one_data)
            answers.append(Answer(question, ", ".join(group[0].group), label, reference, difference, text))
    return answers


def _in_words(difference: Estimate | None, has_one_data: bool) -> str:
    if not has_one_data:
        return "not answered: the runs have read different data"
    if difference is None:
        return "not answered: no seed has a usable run of both"
    if difference.half is None:
        return "not answered: one seed has no interval"
    if not difference.excludes_zero():
        return f"not told apart: between {difference.low:+.4f} and {difference.high:+.4f}"
    return "lower loss" if difference.mean < 0 else "higher loss"
