"""The report's tables as cells, which HTML, Markdown and CSV share, so that their numbers agree."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from plt_megatron.experiments.fits import Interval
from plt_megatron.experiments.report.laws import FARTHER, LoopLaw
from plt_megatron.experiments.report.questions import Answer
from plt_megatron.experiments.report.results import RunResult, SweepResults
from plt_megatron.experiments.report.rows import LEVEL, Row
from plt_megatron.experiments.report.statistics import Estimate

Value = str | int | float | None


@dataclass(frozen=True)
class Cell:
    """`value`: unrounded, for the CSV; `text`: what a reader sees."""

    value: Value
    text: str


@dataclass(frozen=True)
class Column:
    """`key`: the CSV's header; `title`: the reader's. `is_interval`: shown as "± x" beside the column before it."""

    key: str
    title: str
    is_text: bool = False
    is_interval: bool = False


@dataclass(frozen=True)
class Table:
    """A table and its notes."""

    columns: tuple[Column, ...]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()

    def csv(self) -> str:
        """With unrounded values; an empty field where there is none."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows([csv_text(cell.value) for cell in row] for row in self.rows)
        return stream.getvalue()

    def shown_columns(self) -> list[Column]:
        """The columns that a reader sees; the intervals are part of them."""
        return [column for column in self.columns if not column.is_interval]

    def shown_cells(self, row: Sequence[Cell]) -> list[tuple[Column, list[Value], str]]:
        """Column, values and text of each cell that a reader sees: an interval joins the cell before it."""
        cells: list[tuple[Column, list[Value], str]] = []
        for column, cell in zip(self.columns, row, strict=True):
            if not column.is_interval:
                cells.append((column, [cell.value], cell.text))
                continue
            before, values, text = cells[-1]
            joined = f"{text} ± {cell.text}" if cell.text else text
            cells[-1] = (before, [*values, cell.value], joined)
        return cells

    def markdown(self) -> str:
        """A pipe table, and the notes."""
        shown = self.shown_columns()
        lines = [_pipes([column.title for column in shown])]
        lines.append(_pipes(["---" if column.is_text else "---:" for column in shown]))
        lines += [_pipes([text for _, _, text in self.shown_cells(row)]) for row in self.rows]
        lines += ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def csv_text(value: Value) -> str:
    """A value in the CSV: floats so that they read back the same."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main_table(results: SweepResults, rows: Sequence[Row], conditions: str | None) -> Table:
    """The paper's table with our columns."""
    columns = (
        Column("row", "row", is_text=True),
        Column("loop_count", "loops"),
        Column("seeds_used", "seeds"),
        Column("seeds_planned", "of"),
        Column("validation_loss", "validation loss"),
        Column("validation_loss_interval", "", is_interval=True),
        Column("difference_to_baseline", "to baseline"),
        Column("difference_to_baseline_interval", "", is_interval=True),
        Column("difference_to_previous", "to row above"),
        Column("difference_to_previous_interval", "", is_interval=True),
        Column("tokens", "tokens"),
        Column("training_flops", "training FLOPs"),
        Column("parameters", "parameters"),
        Column("non_embedding_parameters", "w/o embeddings"),
        Column("decode_milliseconds", "decode ms"),
        Column("decode_relative", "relative"),
        Column("kv_bytes", "KV bytes"),
    )
    used = conditions is not None
    length = rows[0].run.config.data.sequence_length if rows else 0
    notes = (
        f"Loss in nats per token, mean over seeds; ±: half of the {LEVEL:.0%} t interval, none for a single seed. "
        "Differences are paired by seed; negative is better.",
        f"Decoding: {conditions}."
        if used
        else "Decoding was not measured (--measure-decode): these columns are empty.",
        f"KV bytes: keys, values, windows and carried states of one sequence of {length} tokens, bf16, by formula.",
    )
    return Table(columns, [_main_row(row) for row in rows], notes)


def _main_row(row: Row) -> list[Cell]:
    run = row.run
    timing = row.decode
    return [
        _cell(row.name),
        _cell(row.loop_count),
        _cell(len(row.losses)),
        _cell(len(row.results)),
        *_estimate_cells(row.loss, "{:.4f}"),
        *_estimate_cells(row.to_baseline, "{:+.4f}"),
        *_estimate_cells(row.to_previous, "{:+.4f}"),
        _cell(run.tokens, "{:,}"),
        _cell(run.total_flops, "{:.3g}"),
        _cell(run.parameters, "{:,}"),
        _cell(run.non_embedding_parameters, "{:,}"),
        _cell(timing.milliseconds if timing else None, "{:.2f}"),
        _cell(timing.relative if timing else None, "{:.2f}x"),
        _cell(row.kv_bytes, "{:,}"),
    ]


def _estimate_cells(value: Estimate | None, form: str) -> list[Cell]:
    if value is None:
        return [Cell(None, "-"), Cell(None, "")]
    return [_cell(value.mean, form), _cell(value.half, "{:.4f}")]


def questions_table(answers: Sequence[Answer]) -> Table:
    """The sweep's own questions with their answers."""
    columns: tuple[Column, ...] = (
        Column("question", "question", is_text=True),
        Column("group", "where", is_text=True),
        Column("row", "row", is_text=True),
        Column("reference", "against", is_text=True),
        Column("seeds", "seeds"),
        Column("difference", "difference"),
        Column("difference_interval", "", is_interval=True),
        Column("answer", "answer", is_text=True),
    )
    has_groups = any(answer.group for answer in answers)
    table = []
    for answer in answers:
        texts = (answer.question, answer.group, answer.label, answer.reference)
        seeds = answer.difference.n if answer.difference else 0
        table.append(
            [
                *(_cell(text) for text in texts),
                _cell(seeds),
                *_estimate_cells(answer.difference, "{:+.4f}"),
                _cell(answer.text),
            ]
        )
    if not has_groups:
        columns, table = (*columns[:1], *columns[2:]), [[*row[:1], *row[2:]] for row in table]
    note = (
        f"Final validation loss of row minus that of against, paired by seed; ±: half of the {LEVEL:.0%} t interval of "
        "each question by itself."
    )
    return Table(columns, table, (note,))


def runs_table(results: SweepResults) -> Table:
    """Every run of the plan, used or not."""
    columns = (
        Column("run", "run", is_text=True),
        Column("row", "row", is_text=True),
        Column("seed", "seed"),
        Column("status", "status", is_text=True),
        Column("validation_loss", "validation loss"),
        Column("train_loss", "last training loss"),
        Column("tokens_per_second", "tokens/s"),
        Column("seconds", "seconds"),
        Column("data", "data", is_text=True),
        Column("remark", "remark", is_text=True),
    )
    table = []
    for result in results.runs:
        last = result.curve[-1][1] if result.curve else None
        sha = (result.fingerprint or {}).get("sha256")
        table.append(
            [
                _cell(result.run.name),
                _cell(result.run.row()),
                _cell(result.run.seed),
                _cell(result.status),
                _cell(last, "{:.4f}"),
                _cell(result.train_loss, "{:.4f}"),
                _cell(result.tokens_per_second, "{:,.0f}"),
                _cell(result.seconds, "{:,.0f}"),
                Cell(sha, sha[:8] if sha else ""),
                _cell(result.reason),
            ]
        )
    return Table(columns, table, ("Only runs with status used are in the means. Data: of the sample order as well.",))


def scores_table(runs: Sequence[RunResult]) -> Table | None:
    """The last scores of each run by lm-evaluation-harness (`evaluation.tasks`); None if no run has any."""
    evaluated = [result for result in runs if result.evaluation.get("scores")]
    if not evaluated:
        return None
    names = list(dict.fromkeys(name for result in evaluated for name in result.evaluation["scores"]))
    columns = [Column("run", "run", is_text=True), Column("loss", "validation loss"), Column("tokens", "tokens")]
    columns += [Column(name, name) for name in names]
    rows = []
    for result in evaluated:
        scores, tokens = result.evaluation["scores"], result.evaluation["tokens"]
        loss = next((loss for at, loss in result.curve if at == tokens), None)
        cells = [_cell(result.run.name), _cell(loss, "{:.4f}"), _cell(tokens, "{:,}")]
        rows.append([*cells, *(_cell(scores.get(name), "{:.4f}") for name in names)])
    note = (
        "Of each run's last evaluated export, by lm-evaluation-harness; the loss is that of a validation at its step."
    )
    return Table(tuple(columns), rows, (note,))


def laws_table(laws: Sequence[LoopLaw]) -> Table:
    """Coefficients of the scaling laws with their intervals; where there is none, why."""
    if all(law.fit is None for law in laws):
        brief = (Column("row", "row", is_text=True), Column("remark", "remark", is_text=True))
        reasons = {law.label: law.reason for law in laws}
        if len(set(reasons.values())) == 1:
            reasons = {"all": laws[0].reason}
        return Table(brief, [[_cell(label), _cell(reason)] for label, reason in reasons.items()])
    names = ("E", "A", "alpha", "B", "beta")
    columns = [Column("row", "row", is_text=True), Column("points", "points")]
    for name in names:
        columns += [Column(name, name), Column(f"{name}_low", "from"), Column(f"{name}_high", "to")]
    columns += [Column("rms_residual", "rms residual"), Column("predicted_loss", f"at {FARTHER:.0f}x")]
    columns += [
        Column("predicted_low", "from"),
        Column("predicted_high", "to"),
        Column("remark", "remark", is_text=True),
    ]
    table = []
    for law in laws:
        fit = law.fit
        cells = [_cell(law.label), _cell(len(fit.points) if fit else None, "{:d}")]
        for name in names:
            cells += _interval_cells(fit.coefficients.get(name) if fit else None)
        remark = law.reason if fit is None else "; ".join(fit.notes)
        cells += [_cell(fit.rms_residual if fit else None, "{:.2g}"), *_interval_cells(law.farther)]
        table.append([*cells, _cell(remark)])
    notes = (
        f"loss = E + A N^-alpha + B D^-beta, N without embeddings, D tokens; from, to: {LEVEL:.0%} bootstrap interval.",
        f"At {FARTHER:.0f}x: the law's loss for {FARTHER:.0f} times the largest N and D of its runs (where they vary).",
    )
    return Table(tuple(columns), table, notes)


def _interval_cells(found: Interval | None) -> list[Cell]:
    return [_cell(value, "{:.4g}") for value in ((found.value, found.low, found.high) if found else [None] * 3)]


def _cell(value: Value, form: str = "{}") -> Cell:
    return Cell(value, "" if value is None else form.format(value))
