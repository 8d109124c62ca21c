"""The diagnosis as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plt_megatron.experiments.diagnostics.decision import RULE, Decision
from plt_megatron.experiments.diagnostics.diagnose import Diagnosis
from plt_megatron.experiments.diagnostics.tables import cell, loop_rows
from plt_megatron.experiments.figures import Named
from plt_megatron.experiments.pages import render
from plt_megatron.run_folder.text import plural


def make_page(
    diagnosis: Diagnosis, decision: Decision, about: dict[str, Any], title: str, figures: Sequence[Named]
) -> str:
    """The whole page."""
    loss, change = diagnosis.loops["lens_loss"], diagnosis.differences["lens_loss"]
    loops = range(1, diagnosis.loop_count + 1)
    return render(
        "diagnosis.html",
        title=title,
        about=describe(about),
        decision=decision,
        rule=RULE,
        losses=[(loop, cell(loss.at(loop), ".4f"), cell(change.at(loop), "+.4f")) for loop in loops],
        loop_count=diagnosis.loop_count,
        measures=loop_rows(diagnosis),
        figures=figures,
    )


def describe(about: dict[str, Any]) -> str:
    """One line: the model, and the text."""
    model, data = about["model"], about["data"]
    step = f", step {model['step']:,}" if model.get("step") is not None else ""
    loops = plural(model["loop_count"], "loop")
    return (
        f"{model['path']}{step}: {model['num_layers']} layers x {loops}, width {model['hidden_size']}. "
        f"{data['sequences']} of {data['available_sequences']} sequences of {data['sequence_length']:,} tokens of "
        f"{data['path']}."
    )
