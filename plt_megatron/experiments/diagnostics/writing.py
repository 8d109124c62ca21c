"""The command: a model and a text in, numbers, figures and a page out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.experiments.diagnostics.decision import RULE, Decision, decide
from plt_megatron.experiments.diagnostics.diagnose import Diagnosis, diagnose
from plt_megatron.experiments.diagnostics.figures import make_figures
from plt_megatron.experiments.diagnostics.loading import build_model, open_model
from plt_megatron.experiments.diagnostics.page import describe, make_page
from plt_megatron.experiments.diagnostics.samples import HeldOut, draw_sequences
from plt_megatron.experiments.diagnostics.tables import as_json, csv_text, terminal_table
from plt_megatron.experiments.figures import save
from plt_megatron.experiments.pages import check_packages
from plt_megatron.hf.sources import ModelSource
from plt_megatron.run_folder.checkpoints import step_of
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import plural

JSON, CSV, PAGE = "diagnostics.json", "diagnostics.csv", "index.html"
LONGEST_DEFAULT = 2048
_SWITCHES = (
    *("cross_loop_parallel", "share_kv", "share_values", "gated_window", "window_size", "gate_input", "gate_side"),
    *("gate_activation", "norm_between_loops", "embedding_scale", "hidden_scale"),
    *("input_injection", "hidden_norm", "learned_hidden_scale", "residual_scale", "key_shift"),
)


@dataclass(frozen=True)
class DiagnoseOptions:
    """What to diagnose, on what, and where the result goes. See `plt diagnose --help`.

    `None`: `output`: beside the model; `sequence_length`: the model's, at most 2048; `reset`: as the run was trained.
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
    """The outcome, and the folder with the files."""

    diagnosis: Diagnosis
    decision: Decision
    folder: Path
    text: str


def run_diagnosis(options: DiagnoseOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Measure, decide and write diagnostics.json, diagnostics.csv, PNGs and index.html.

    Raises:
        UserError: the model or the text is missing, they do not match, or the result cannot be written.
    """
    check_packages()
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
    decision = decide(diagnosis, sequence_length=length, hidden_size=source.model.hidden_size)
    about = _about(source, options, held_out, length, reset, masked is not None, str(model.device))
    _write(folder, diagnosis, decision, about)
    return Result(diagnosis, decision, folder, _summary(diagnosis, decision, about))


def _sequence_length(options: DiagnoseOptions, source: ModelSource) -> int:
    most = source.max_position_embeddings
    length = options.sequence_length if options.sequence_length is not None else min(most, LONGEST_DEFAULT)
    if not 2 <= length <= most:
        raise UserError(f"--sequence-length {length} is not from 2 to the model's {most} tokens")
    return length


def _trained_with(source: ModelSource, setting: str) -> bool:
    """Whether a switch of the run's data was on. A Hugging Face folder does not say."""
    config = source.progress.get("config") or {}
    return bool(config.get("data", {}).get(setting, False))


def _default_folder(source: ModelSource) -> Path:
    """A run's checkpoint: `diagnostics/<checkpoint>` in the run's folder; a Hugging Face folder: beside it."""
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
    source: ModelSource,
    options: DiagnoseOptions,
    held_out: HeldOut,
    length: int,
    reset: bool,
    eod_mask_loss: bool,
    device: str,
) -> dict[str, Any]:
    model = source.model
    return {
        "model": {
            "path": str(source.path),
            "step": step_of(source.path) if source.progress else None,
            "loop_count": model.loop_count,
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
    figures = make_figures(diagnosis)
    title = f"Diagnostics of {_name(Path(about['model']['path']))}"
    with writing(folder):
        for named in figures:
            save(named.figure, folder / f"{named.name}.png")
        text = json.dumps(as_json(diagnosis, decision, about), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / JSON, text + "\n")
        write_text(folder / CSV, csv_text(diagnosis))
        write_text(folder / PAGE, make_page(diagnosis, decision, about, title, figures))


def _name(model: Path) -> str:
    """The model's folder; of a run's checkpoint the run's, and the step."""
    in_run = model.parent.name == RunFolder(Path()).checkpoints.name
    return f"{model.parent.parent.name}, step {step_of(model):,}" if in_run else model.name


def _summary(diagnosis: Diagnosis, decision: Decision, about: dict[str, Any]) -> str:
    """What the terminal shows."""
    bad = about["data"]["unreadable_documents"]
    lines = [describe(about)]
    if bad:
        lines.append(f"Left out: {plural(bad, 'document')} that are empty or cannot be read.")
    lines += ["", terminal_table(diagnosis), "", f"Rule: {RULE}.", decision.answer]
    lines += [f"- {sentence}" for sentence in (*decision.signs, *decision.cautions)]
    return "\n".join(lines)
