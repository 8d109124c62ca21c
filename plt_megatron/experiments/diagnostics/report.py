"""Diagnose a model on a text, and write the numbers as JSON, CSV and a table, with figures and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from plt_megatron.errors import UserError
from plt_megatron.experiments.diagnostics.decision import RULE, Decision, decide
from plt_megatron.experiments.diagnostics.diagnose import DIFFERENCES, MEASURES, Diagnosis, Measure, diagnose
from plt_megatron.experiments.diagnostics.inputs import HeldOut, build_model, draw_sequences, open_model
from plt_megatron.experiments.figures import MARKERS, Curve, Named, Panel, draw, new_figure
from plt_megatron.experiments.intervals import FEW, LEVEL, RESAMPLES, Intervals
from plt_megatron.experiments.pages import Cell, Column, Page, Part, Table, Value, Verdict, interval_cell, write_page
from plt_megatron.hf.sources import ModelSource
from plt_megatron.hf.switches import SWITCHES
from plt_megatron.run_folder.checkpoints import step_of
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import format_table, plural

JSON, CSV = "diagnostics.json", "diagnostics.csv"
LONGEST_DEFAULT = 2048
_SWITCHES = (*(switch.setting for switch in SWITCHES), "residual_scale")


@dataclass(frozen=True)
class DiagnoseOptions:
    """Options of a diagnosis. See `plt diagnose --help`.

    Defaults for None: `output`, beside the model; `sequence_length`, the model's, at most 2048; `reset`, as the run was
    trained.
    """

    model: Path
    data: str
    output: Path | None = None
    tokenizer: Path | None = None
    max_tokens: int = 65536
    sequence_length: int | None = None
    seed: int = 0
    reset: bool | None = None
    precision: str = "fp32"
    device: str = "auto"


@dataclass(frozen=True)
class Result:
    """The outcome of a diagnosis, and the folder with its files."""

    diagnosis: Diagnosis
    decision: Decision
    folder: Path
    text: str


def run_diagnosis(options: DiagnoseOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Measure, decide and write diagnostics.json, diagnostics.csv, PNGs and index.html.

    Raises `UserError` if the model or the text is missing, they do not match, or the result cannot be written.
    """
    source = open_model(options.model, options.tokenizer)
    length = _sequence_length(options, source)
    held_out = draw_sequences(
        options.data,
        source.tokenizer,
        source.vocab_size,
        length=length,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    reset = options.reset if options.reset is not None else _trained_with(source, "reset_at_document_boundaries")
    masked = source.tokenizer.eod if source.tokenizer and _trained_with(source, "eod_mask_loss") else None
    folder = options.output if options.output is not None else _default_folder(source)
    _make_folder(folder)
    model = build_model(source, precision=options.precision, device=options.device)
    diagnosis = diagnose(model, held_out, reset=reset, masked_token=masked, seed=options.seed, progress=progress)
    decision = decide(diagnosis, length)
    about = _about(source, options, held_out, reset, masked is not None, str(model.device))
    _write(folder, diagnosis, decision, about)
    return Result(diagnosis, decision, folder, _summary(diagnosis, decision, about))


def _sequence_length(options: DiagnoseOptions, source: ModelSource) -> int:
    most = source.max_position_embeddings
    length = options.sequence_length if options.sequence_length is not None else min(most, LONGEST_DEFAULT)
    if not 2 <= length <= most:
        raise UserError(f"--sequence-length {length} must be from 2 to the model's {most} tokens")
    return length


def _trained_with(source: ModelSource, setting: str) -> bool:
    """Return whether the run's data had this switch on; False for a Hugging Face folder, which does not record it."""
    config = source.progress.get("config") or {}
    return bool(config.get("data", {}).get(setting, False))


def _default_folder(source: ModelSource) -> Path:
    """Return `diagnostics/<checkpoint>` in the run's folder, or a folder beside a Hugging Face folder."""
    path = source.path.resolve()
    if source.progress:
        return path.parent.parent / "diagnostics" / path.name
    return path.with_name(f"{path.name}-diagnostics")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; name another --output") from error


def _about(
    source: ModelSource, options: DiagnoseOptions, held_out: HeldOut, reset: bool, eod_mask_loss: bool, device: str
) -> dict[str, Any]:
    model, length = source.model, held_out.tokens.shape[1] - 1
    return {
        "model": {
            "path": str(source.path),
            "step": step_of(source.path) if source.progress else None,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            **{name: getattr(model, name) for name in _SWITCHES},
        },
        "data": {
            "path": options.data,
            "sequences": len(held_out.tokens),
            "available_sequences": held_out.seen,
            "sequence_length": length,
            "tokens": len(held_out.tokens) * length,
            "unreadable_documents": held_out.bad,
            "reset_at_document_boundaries": reset,
            "eod_mask_loss": eod_mask_loss,
            "seed": options.seed,
        },
        "computation": {"precision": options.precision, "device": device},
    }


def _write(folder: Path, diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> None:
    page = _page(diagnosis, decision, about)
    with writing(folder):
        text = json.dumps(as_json(diagnosis, decision, about), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / JSON, text + "\n")
        write_text(folder / CSV, csv_text(diagnosis))
    write_page(page, folder, tables=False)


def _name(model: Path) -> str:
    """Return the name of the model's folder, or for a run's checkpoint, the run's name and the step."""
    in_run = model.parent.name == RunFolder(Path()).checkpoints.name
    return f"{model.parent.parent.name}, step {step_of(model):,}" if in_run else model.name


def _summary(diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> str:
    bad = about["data"]["unreadable_documents"]
    header = ["", "embeddings", *(f"loop {loop}" for loop in range(1, diagnosis.loop_count + 1))]
    rows = [
        [m.title, *(diagnosis.loops[m.name].at(loop).text(m.form) for loop in range(diagnosis.loop_count + 1))]
        for m in diagnosis.measures
    ]
    lines = [_describe(about)]
    if bad:
        lines.append(f"Left out: {plural(bad, 'document')} that are empty or cannot be read.")
    lines += ["", format_table(rows, header=header), "", f"Rule: {RULE}.", decision.answer]
    lines += [f"- {sentence}" for sentence in (*decision.signs, *decision.cautions)]
    return "\n".join(lines)


def _describe(about: dict[str, Any]) -> str:
    model, data = about["model"], about["data"]
    step = f", step {model['step']:,}" if model.get("step") is not None else ""
    loops = plural(model["loop_count"], "loop")
    return (
        f"{model['path']}{step}: {model['num_layers']} layers x {loops}, width {model['hidden_size']}. "
        f"{data['sequences']} of {data['available_sequences']} sequences of {data['sequence_length']:,} tokens of "
        f"{data['path']}."
    )


def _page(diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> Page:
    loss, change = diagnosis.loops["lens_loss"], diagnosis.differences["lens_loss"]
    losses = [
        Column("loops", "loops", lambda loop: loop, "d"),
        Column("loss", "validation loss", loss.at, ".4f"),
        Column("change", "change by the last loop", change.at, "+.4f"),
    ]
    lens = "Stopping after loop r equals running with r loops, and is also the logit lens."
    if diagnosis.windows_earlier_loops:
        lens = (
            "The logit lens: predictions from the state after loop r. Running with r loops gives others, since the "
            "last of them would attend to the whole context."
        )
    note = f"{lens} Nats per token; changes are paired by sequence."
    measured = "after each loop" if diagnosis.windows_earlier_loops else "at each loop count"
    loops = range(diagnosis.loop_count + 1)

    def number(loop: int, measure: Measure) -> Cell:
        return interval_cell(diagnosis.loops[measure.name].at(loop), measure.form)

    measures = [
        Column("measure", "measure", lambda measure: measure.title),
        *(Column(f"loop_{r}", f"loop {r}" if r else "embeddings", partial(number, r), "g") for r in loops),
        Column("meaning", "", lambda measure: measure.meaning),
    ]
    return Page(
        title=f"Diagnostics of {_name(Path(about['model']['path']))}",
        about=_describe(about),
        answers=[Verdict(decision.answer, decision.verdict in ("add", "stop"))],
        asked="Another loop?",
        how=f"The rule of LoopCoder-v2 (arXiv 2606.18023): {RULE}. In brackets: 95 % intervals over sequences.",
        remarks=[*decision.signs, *decision.cautions],
        parts=[
            Part(f"Loss of these weights {measured}", tables={"losses": Table(losses, loops[1:], [note])}),
            Part("Measures by loop", tables={"measures": Table(measures, diagnosis.measures)}),
            Part("Figures", figures=make_figures(diagnosis)),
        ],
    )


# ---------------------------------------------------------------- CSV and JSON


def csv_text(diagnosis: Diagnosis) -> str:
    """Return one number per line: measure, loop, layer, head (from 0; empty: the mean over them), value, low, high."""
    names = ("measure", "loop", "layer", "head", "value", "low", "high")
    columns = [Column(name, name, itemgetter(place)) for place, name in enumerate(names)]
    return Table(columns, _all_numbers(diagnosis)).csv()


def _all_numbers(diagnosis: Diagnosis) -> Iterator[tuple[Value, ...]]:
    changes = {f"{name}_change": intervals for name, intervals in diagnosis.differences.items()}
    for group in (diagnosis.loops, changes, diagnosis.details):
        for name, intervals in group.items():
            for place in np.ndindex(intervals.mean.shape):
                found = intervals.at(*place)
                if not math.isnan(found.value):
                    ends = (found.low, found.high) if found.is_known else (None, None)
                    yield name, *[*place, None, None][:3], found.value, *ends


def as_json(diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> dict[str, Any]:
    """Return everything in JSON form, with NaN as null.

    `measures` holds, by name, lists over loops 0 .. L of `value`, `low` and `high`; `details` the same for each layer
    (and head), nested in the order loop, layer, head; `changes` the paired differences to the loop before.
    """
    return {
        **about,
        "interval": {
            "level": LEVEL,
            "method": "expanded percentile bootstrap of the mean over sequences; "
            f"Student's t of fewer than {FEW} values",
            "resamples": RESAMPLES,
            "sequences": diagnosis.sequences,
        },
        "decision": decision.as_dict(),
        "measures": {
            measure.name: {"title": measure.title, "meaning": measure.meaning, **_lists(diagnosis.loops[measure.name])}
            for measure in diagnosis.measures
        },
        "changes": {name: _lists(diagnosis.differences[name]) for name in DIFFERENCES if name in diagnosis.differences},
        "details": {name: _lists(intervals) for name, intervals in diagnosis.details.items()},
    }


def _lists(intervals: Intervals) -> dict[str, Any]:
    return {"value": _nulls(intervals.mean), "low": _nulls(intervals.low), "high": _nulls(intervals.high)}


def _nulls(values: np.ndarray) -> list[Any]:
    return [_nulls(item) if item.ndim else None if np.isnan(item) else float(item) for item in values]


# ---------------------------------------------------------------- figures

_STATES = ("step_size", "update_cosine", "effective_rank", "fixed_point_gap", "loop_map_gap", "offset_cost")
_LENS = ("lens_loss", "lens_rank", "lens_entropy", "lens_kl", "peak_loop")
_ATTENTION = ("entropy_global", "entropy_local", "kl_global", "kl_local")
_TITLES = {measure.name: measure.title for measure in MEASURES}
_UNITS = {
    **dict.fromkeys(("update_cosine", "head_cosine"), "cosine"),
    **dict.fromkeys(("lens_entropy", "lens_kl", *_ATTENTION), "nats"),
    "effective_rank": "dimensions",
    "lens_loss": "nats per token",
    "lens_rank": "rank",
    "head_rank": "heads",
    "peak_loop": "share of tokens",
}
_WIDTH, _HEIGHT = 3.4, 2.7  # of a plot, inches
_HEAT_COLUMNS = 3
_NUMBERED_CELLS = 96  # heat maps with at most this many cells show their numbers


def make_figures(diagnosis: Diagnosis) -> list[Named]:
    """Draw the figures that the model has numbers for."""

    def panels(name: str, caption: str, names: Sequence[str], kind: Callable[..., Panel], columns: int) -> Named:
        known = (each for each in names if each in diagnosis.loops)  # a cosine has no value if no loop moves anything
        found = [kind(diagnosis, each) for each in known if not np.isnan(diagnosis.loops[each].mean).all()]
        return Named(name, caption, draw(found, _WIDTH, _HEIGHT, columns))

    bars = "95 % intervals over sequences."
    moved = f"How far each loop moves the states, and where to. L2 norms. Bars: {bars}"
    predicted = f"Predictions of the model if it stopped after each loop. Bars: {bars}"
    made = [panels("states", moved, _STATES, _by_loop, 3), panels("lens", predicted, _LENS, _by_loop, 3)]
    if "gate_mean" in diagnosis.details:
        lowest, start = (-1.0, 0.0) if diagnosis.config.gate_activation == "tanh" else (0.0, 0.5)
        caption = f"Mean of the gate g by layer and head: {start:g}, its initial value, is white."
        made.append(Named("gates", caption, _gates(diagnosis.details["gate_mean"], lowest)))
    seen = f"Attention by layer, mean over heads and tokens. Shaded: {bars}"
    heads = f"Diversity of the heads' outputs by layer. Shaded: {bars}"
    made.append(panels("attention", seen, _ATTENTION, _by_layer, 2))
    return [*made, panels("heads", heads, ("head_rank", "head_cosine"), _by_layer, 2)]


def _by_loop(diagnosis: Diagnosis, name: str) -> Panel:
    intervals = diagnosis.loops[name]
    loops = [loop for loop, value in enumerate(intervals.mean) if not math.isnan(value)]
    means, low, high = (values[loops] for values in (intervals.mean, intervals.low, intervals.high))
    bars = None if np.isnan(low).any() else np.clip([means - low, high - means], 0, None)
    limits = {"update_cosine": (-1.05, 1.05), "peak_loop": (0.0, 1.05)}.get(name)
    if limits is None and len(loops) == 1:
        limits = (0.0, 1.3 * float(means[0]) or 1.0)
    return Panel(
        [Curve(loops, means, 0, "" if name == "peak_loop" else "-", "o", bars=bars)],
        "loop",
        _UNITS.get(name, "L2 norm"),
        _TITLES[name],
        level=0 if name == "update_cosine" else None,
        limits=limits,
        margin=0.25,
        x_limits=(loops[0] - 0.5, loops[-1] + 0.5),
        ticks={loop: str(loop) if loop else "E" for loop in range(loops[0], loops[-1] + 1)},
    )


def _by_layer(diagnosis: Diagnosis, name: str) -> Panel:
    # The ends of intervals are averaged over heads, too, which makes them wider than the interval of the mean.
    found = diagnosis.details[name]
    mean, low, high = (v if v.ndim == 2 else v.mean(-1) for v in (found.mean, found.low, found.high))
    layers = np.arange(mean.shape[1])
    curves = [
        Curve(layers, mean[r], r - 1, "-", MARKERS[(r - 1) % len(MARKERS)], f"loop {r}", band=(low[r], high[r]))
        for r in range(1, len(mean))
        if not np.isnan(mean[r]).all()
    ]
    every = -(-len(layers) // 8)
    ticks: dict[float, str] = {layer: str(layer) for layer in range(0, len(layers), every)}
    limits = (-0.4, len(layers) - 0.6)
    return Panel(curves, "layer", _UNITS[name], _TITLES[name], margin=0.15, x_limits=limits, ticks=ticks, legend=8)


def _gates(intervals: Intervals, lowest: float) -> Figure:
    """Draw one heat map per loop, layers down, heads across. A gate is between `lowest` and 1."""
    loops = range(2, len(intervals.mean))
    layers, heads = intervals.mean.shape[1:]
    width, height = min(max(0.42 * heads, 2.6), 6.0) + 0.6, min(max(0.36 * layers, 1.5), 6.0) + 0.6
    figure, plots = new_figure(width, height, len(loops), _HEAT_COLUMNS)
    for axes, loop in zip(plots, loops, strict=True):
        values = intervals.mean[loop]
        mesh = axes.pcolormesh(values, cmap="RdBu_r", vmin=lowest, vmax=1, edgecolors="white", linewidth=0.5)
        for (layer, head), value in np.ndenumerate(values) if values.size <= _NUMBERED_CELLS else ():
            ink = "white" if abs((value - lowest) / (1 - lowest) - 0.5) > 0.33 else "#222222"
            text = f"{value:.2f}".replace("0.", ".", 1)
            axes.text(head + 0.5, layer + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
        axes.set_title(f"loop {loop}", fontsize=10)
        axes.set_xlabel("head", fontsize=9)
        axes.set_ylabel("layer", fontsize=9)
        axes.invert_yaxis()
        for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
            every = -(-count // 12)
            axis.set_ticks(
                [index + 0.5 for index in range(0, count, every)], labels=list(map(str, range(0, count, every)))
            )
        axes.tick_params(length=0)
    figure.colorbar(mesh, ax=plots, label="g", shrink=0.9)
    return figure
