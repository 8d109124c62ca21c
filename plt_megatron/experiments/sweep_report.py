"""Write the report of a sweep: a page, Markdown, CSVs and PNGs, into `report/` in the sweep's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.experiments.decode_time import DecodeProtocol, measure, read_measurement
from plt_megatron.experiments.figures import FLOPS, MARKERS, TOKENS, Curve, Named, Panel, draw, limits_around, line
from plt_megatron.experiments.intervals import LEVEL
from plt_megatron.experiments.pages import Cell, Column, Page, Part, Table, Verdict, interval_columns, write_page
from plt_megatron.experiments.records import RunResult, SweepResults, load_results
from plt_megatron.experiments.sweep_plan import check_unpacked, records_of
from plt_megatron.experiments.verdicts import (
    FARTHER,
    Comparison,
    LoopLaw,
    Row,
    Timing,
    answer_questions,
    fit_laws,
    groups,
    make_rows,
    merged,
    verdicts,
)

FOLDER = "report"
MARKDOWN = "report.md"
_MOST_GROUPS = 6  # maximum number of groups with figures: nobody looks at more
_LOSS = "validation loss (nats per token)"


@dataclass(frozen=True)
class Report:
    """The report's folder, and its results to show to the user right away."""

    folder: Path
    verdicts: list[Verdict]
    answers: list[Comparison]
    problems: list[str]


def write_report(sweep: str | Path, output: str | Path | None = None, decode: DecodeProtocol | None = None) -> Report:
    """Report on the sweep in the folder `sweep`.

    Args:
        output: the report's folder; None: `report` in the sweep's.
        decode: how to measure decoding time first; None: use the measurement of an earlier report, if any.
    Raises `UserError` if there is no sweep, the report cannot be written, or an archived sweep is to be measured.
    """
    if decode is not None:
        check_unpacked(Path(sweep))
    results = load_results(sweep)
    if any("horizon" in run.labels and "round" in run.labels for run in results.plan.runs):
        raise UserError(f"{sweep} is a study's folder: plt study FILE.yaml --report writes its report")
    folder = Path(output) if output is not None else Path(sweep) / FOLDER
    measurement = measure(results, decode) if decode is not None else read_measurement(records_of(Path(sweep)))
    timings, conditions = (measurement.rows, measurement.conditions) if measurement else (None, None)
    rows = make_rows(results, timings)
    found, answers, laws = merged(verdicts(results, rows)), answer_questions(results, rows), fit_laws(rows)
    scores = scores_table(results.used())
    page = Page(
        title=results.plan.title or results.plan.name,
        about=_about(results),
        answers=found,
        problems=results.problems,
        parts=[
            *([Part("Questions", tables={"questions": questions_table(answers)})] if answers else []),
            Part("Results", tables={"rows": main_table(rows, conditions)}, figures=make_figures(rows, laws)),
            Part("Scaling laws", tables={"laws": laws_table(laws)}),
            *([Part("Downstream", tables={"scores": scores})] if scores else []),
            Part("Runs", tables={"runs": Table(_RUNS, results.runs, _ABOUT_RUNS)}),
        ],
    )
    write_page(page, folder, markdown=MARKDOWN)
    return Report(folder, found, answers, results.problems)


def _about(results: SweepResults) -> str:
    plan = results.plan
    held = f"held equal: {plan.match_budget.replace('_', ' ')}" if plan.match_budget else "nothing held equal"
    used = f"{len(results.used())} of {len(results.runs)} runs are used"
    compared = f"compared: {plan.compare}, against {plan.baseline}" if plan.compare else "nothing compared"
    return f"Sweep {plan.name}; {used}; {held}; {compared}."


# ---------------------------------------------------------------- tables

_MAIN = (
    Column("row", "row", lambda row: row.name),
    Column("loop_count", "loops", lambda row: row.loop_count, "d"),
    Column("seeds_used", "seeds", lambda row: len(row.losses), "d"),
    Column("seeds_planned", "of", lambda row: len(row.results), "d"),
    Column("validation_loss", "validation loss", lambda row: row.loss, ".4f", is_estimate=True),
    Column("difference_to_baseline", "to baseline", lambda row: row.to_baseline, "+.4f", is_estimate=True),
    Column("difference_to_previous", "to row above", lambda row: row.to_previous, "+.4f", is_estimate=True),
    Column("tokens", "tokens", lambda row: row.run.tokens, ","),
    Column("training_flops", "training FLOPs", lambda row: row.run.total_flops, ".3g"),
    Column("parameters", "parameters", lambda row: row.run.parameters, ","),
    Column("non_embedding_parameters", "w/o embeddings", lambda row: row.run.non_embedding_parameters, ","),
    Column("decode_milliseconds", "decode ms", lambda row: row.decode and row.decode.milliseconds, ".2f"),
    Column("decode_relative", "relative", lambda row: row.decode and _times(row.decode), ".2f"),
    Column("kv_bytes", "KV bytes", lambda row: row.kv_bytes, ","),
)
_QUESTIONS = (
    Column("question", "question", lambda answer: answer.question),
    Column("group", "where", lambda answer: answer.group),
    Column("row", "row", lambda answer: answer.label),
    Column("reference", "against", lambda answer: answer.reference),
    Column("seeds", "seeds", lambda answer: answer.difference.n if answer.difference else 0, "d"),
    Column("difference", "difference", lambda answer: answer.difference, "+.4f", is_estimate=True),
    Column("answer", "answer", lambda answer: answer.text),
)
_RUNS = (
    Column("run", "run", lambda result: result.run.name),
    Column("row", "row", lambda result: result.run.row()),
    Column("seed", "seed", lambda result: result.run.seed, "d"),
    Column("status", "status", lambda result: result.status),
    Column("validation_loss", "validation loss", lambda result: result.curve[-1][1] if result.curve else None, ".4f"),
    Column("train_loss", "last training loss", lambda result: result.train_loss, ".4f"),
    Column("tokens_per_second", "tokens/s", lambda result: result.tokens_per_second, ",.0f"),
    Column("seconds", "seconds", lambda result: result.seconds, ",.0f"),
    Column("data", "data", lambda result: (result.fingerprint or {}).get("sha256"), shown=8),
    Column("remark", "remark", lambda result: result.reason),
)
_ABOUT_RUNS = ("Only runs with status used are in the means. Data: hash of data and sample order.",)


def _times(decode: Timing) -> Cell:
    return Cell([decode.relative], decode.ratio)


def main_table(rows: Sequence[Row], conditions: str | None) -> Table:
    """Return the paper's table, with further columns."""
    length = rows[0].run.config.data.sequence_length if rows else 0
    decoding = "Decoding was not measured (--measure-decode): these columns are empty."
    notes = (
        f"Loss in nats per token, mean over seeds; ±: half of the {LEVEL:.0%} t interval, none for a single seed. "
        "Differences are paired by seed; negative is better.",
        decoding if conditions is None else f"Decoding: {conditions}.",
        f"KV bytes: keys, values, windows and carried states of one sequence of {length} tokens, bf16, by formula.",
    )
    return Table(_MAIN, rows, notes)


def questions_table(answers: Sequence[Comparison]) -> Table:
    """Return the table of the sweep's own questions and their answers."""
    has_groups = any(answer.group for answer in answers)
    note = (
        f"Final validation loss of row minus that of against, paired by seed; ±: half of the {LEVEL:.0%} t interval of "
        "each question by itself."
    )
    return Table([column for column in _QUESTIONS if has_groups or column.key != "group"], answers, (note,))


def scores_table(runs: Sequence[RunResult]) -> Table | None:
    """Return the table of each run's last scores by lm-evaluation-harness (`evaluation.tasks`); None without any."""

    def score(name: str) -> Column:
        return Column(name, name, lambda result: result.evaluation["scores"].get(name), ".4f")

    evaluated = [result for result in runs if result.evaluation.get("scores")]
    names = list(dict.fromkeys(name for result in evaluated for name in result.evaluation["scores"]))
    columns = [
        Column("run", "run", lambda result: result.run.name),
        Column("loss", "validation loss", lambda r: dict(reversed(r.curve)).get(r.evaluation["tokens"]), ".4f"),
        Column("tokens", "tokens", lambda result: result.evaluation["tokens"], ","),
        *map(score, names),
    ]
    note = "Scores of each run's last evaluated export, by lm-evaluation-harness; the loss is from the same step."
    return Table(columns, evaluated, (note,)) if evaluated else None


def laws_table(laws: Sequence[LoopLaw]) -> Table:
    """Return the table of the scaling laws' coefficients with their intervals, or why there is no law."""
    row = Column("row", "row", lambda law: law.label)
    if all(law.fit is None for law in laws):
        is_one = len({law.reason for law in laws}) == 1
        reasons = [LoopLaw("all", None, laws[0].reason)] if is_one else laws
        return Table([row, Column("remark", "remark", lambda law: law.reason)], reasons)

    def coefficient(name: str) -> list[Column]:
        return interval_columns(name, name, lambda law: law.fit and law.fit.coefficients.get(name), ".4g")

    columns = [
        row,
        Column("points", "points", lambda law: law.fit and law.fit.data.n, "d"),
        *(column for name in ("E", "A", "alpha", "B", "beta") for column in coefficient(name)),
        Column("rms_residual", "rms residual", lambda law: law.fit and law.fit.rms_residual, ".2g"),
        *interval_columns("predicted", f"at {FARTHER:.0f}x", lambda law: law.farther, ".4g", value="predicted_loss"),
        Column("remark", "remark", lambda law: law.reason if law.fit is None else "; ".join(law.fit.notes)),
    ]
    notes = (
        f"loss = E + A N^-alpha + B D^-beta, N without embeddings, D tokens; from, to: {LEVEL:.0%} bootstrap interval.",
        f"At {FARTHER:.0f}x: the law's loss for {FARTHER:.0f} times the largest N and D of its runs (where they vary).",
    )
    return Table(columns, laws, notes)


# ---------------------------------------------------------------- figures


def make_figures(rows: Sequence[Row], laws: Sequence[LoopLaw]) -> list[Named]:
    """Draw the figures that there is enough data for."""
    made: list[Named] = []
    compared = groups(rows)
    for index, group in enumerate(compared[:_MOST_GROUPS]):
        if not any(row.curve for row in group):
            continue
        suffix, where = (f"_{index + 1}", f"{', '.join(group[0].group)}: ") if len(compared) > 1 else ("", "")
        bars = "Lines: mean over seeds. Marks: the seeds, at the end of their runs."
        for stem, x, scale in (("tokens", TOKENS, lambda row: 1.0), ("flops", FLOPS, lambda r: r.run.flops_per_token)):
            panel = _curves(group, scale, x)
            made.append(_figure(f"loss_{stem}{suffix}", f"{where}Validation loss against {x}. {bars}", panel))
        timed = [(row, row.decode) for row in group if row.decode is not None and row.loss is not None]
        if timed:
            marks = {
                f"{row.label}: {decode.ratio or f'{decode.milliseconds:.2f} ms'}": [(decode.milliseconds, row)]
                for row, decode in timed
            }
            right = 1.12 * max(decode.milliseconds for _, decode in timed)
            panel = Panel(_marks(marks), "milliseconds per decoded token step", _LOSS, x_limits=(0, right))
            caption = f"{where}Validation loss (95 % interval) against measured decoding time. Left and low is better."
            made.append(_figure(f"loss_latency{suffix}", caption, panel))
    if len(compared) > 1 and any(row.loss for row in rows):
        labels = dict.fromkeys(row.label for row in rows)
        final = {label: [(row.run.total_flops, row) for row in rows if row.label == label] for label in labels}
        caption = "Final validation loss of every row against its training FLOPs."
        made.append(_figure("final_losses", caption, Panel(_marks(final), FLOPS, _LOSS, log_x=True)))
    fits = {law.label: law.fit for law in laws if law.fit is not None}
    if fits:
        curves = [
            Curve(fit.data.loss - fit.residuals, fit.residuals, n, "", MARKERS[n % len(MARKERS)], label)
            for n, (label, fit) in enumerate(fits.items())
        ]
        caption = "Residuals of the scaling laws: loss minus fitted loss. A pattern means that the law does not fit."
        made.append(_figure("residuals", caption, Panel(curves, "fitted loss", "residual", level=0), height=3.4))
    return made


def _figure(name: str, caption: str, panel: Panel, height: float = 4.6) -> Named:
    return Named(name, caption, draw([panel], 8, height))


def _curves(group: Sequence[Row], scale: Callable[[Row], float], x: str) -> Panel:
    """Plot mean validation curves, and the seeds at their ends; the first, steep part is cut off at the top. Against
    FLOPs, a row whose steps differ in cost has its end alone."""
    curves: list[Curve] = []
    shown: list[float] = []
    for index, row in enumerate(group):
        if not row.curve:
            continue
        known = row.curve if x != FLOPS or row.has_equal_steps else row.curve[-1:]
        tokens, losses = zip(*known, strict=True)
        xs, ends = [count * scale(row) for count in tokens], list(row.losses.values())
        label = row.label if row.loss is None else f"{row.label}: {row.loss.value:.3f}"
        curves.append(Curve(xs, losses, index, line(index), label=label))
        mark = MARKERS[index % len(MARKERS)]
        curves.append(Curve([xs[-1]] * len(ends), ends, index, "", mark, look={"markersize": 4.5, "alpha": 0.8}))
        shown += [*losses[len(losses) // 3 :], *ends]
    return Panel(curves, x, _LOSS, limits=limits_around(shown, 0.06, 0.12))


def _marks(rows: dict[str, list[tuple[float, Row]]]) -> list[Curve]:
    """Return curves of mean losses of rows at their x, with intervals, by label."""
    curves = []
    for index, (label, own) in enumerate(rows.items()):
        found = [(x, row.loss.value, row.loss.half or 0.0) for x, row in own if row.loss is not None]
        xs, ys, halves = zip(*found, strict=True) if found else ((), (), ())
        curves.append(Curve(xs, ys, index, "", MARKERS[index % len(MARKERS)], label, bars=halves))
    return curves
