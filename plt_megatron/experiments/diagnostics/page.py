"""The diagnosis as one HTML page: everything inside it, no script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from plt_megatron.experiments.diagnostics.decision import RULE, Decision
from plt_megatron.experiments.diagnostics.diagnose import Diagnosis
from plt_megatron.experiments.diagnostics.tables import cell, loop_rows
from plt_megatron.experiments.report.figures import Named, svg

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1d2129;
  background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d9dce1; padding-bottom: .25rem; }
p.about, p.note, figcaption, td.meaning { color: #545b66; font-size: .85rem; }
p.answer { border-left: 4px solid #b5bac2; padding-left: .7rem; font-weight: 600; }
p.add, p.stop { border-color: #009e73; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 2px solid #1d2129; font-weight: 600; }
td { border-bottom: 1px solid #e6e8eb; vertical-align: top; }
th:first-child, td:first-child, td.meaning { text-align: left; }
td.meaning { white-space: normal; min-width: 15rem; }
td span { color: #6b727d; font-size: .92em; }
figure { margin: 1.4rem 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7pt; } th, td { padding: .15rem .3rem; }
  tr { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def make_page(
    diagnosis: Diagnosis, decision: Decision, about: dict[str, Any], title: str, figures: Sequence[Named]
) -> str:
    """The whole page."""
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="about">{html.escape(describe(about))}</p>',
        "<h2>Another loop?</h2>",
        f'<p class="answer {decision.verdict}">{html.escape(decision.answer)}</p>',
        f'<p class="note">The rule of LoopCoder-v2 (arXiv 2606.18023): {html.escape(RULE)}. '
        "In brackets: 95 % bootstrap intervals over sequences.</p>",
        _list(decision.signs),
        _list(decision.cautions),
        "<h2>Loss of these weights at each loop count</h2>",
        _losses(diagnosis),
        "<h2>Measures by loop</h2>",
        _table(diagnosis),
        "<h2>Figures</h2>",
        *(f"<figure>{svg(named)}<figcaption>{html.escape(named.caption)}</figcaption></figure>" for named in figures),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def describe(about: dict[str, Any]) -> str:
    """One line: the model, and the text."""
    model, data = about["model"], about["data"]
    step = f", step {model['step']:,}" if model.get("step") is not None else ""
    loops = f"{model['loop_count']} loop{'s' if model['loop_count'] > 1 else ''}"
    return (
        f"{model['path']}{step}: {model['num_layers']} layers x {loops}, width {model['hidden_size']}. "
        f"{data['sequences']} of {data['available_sequences']} sequences of {data['sequence_length']:,} tokens of "
        f"{data['path']}."
    )


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _losses(diagnosis: Diagnosis) -> str:
    rows = []
    for loop in range(1, diagnosis.loop_count + 1):
        loss = _spans(cell(diagnosis.loops["lens_loss"].at(loop), ".4f"))
        change = _spans(cell(diagnosis.differences["lens_loss"].at(loop), "+.4f"))
        rows.append(f"<tr><td>{loop}</td><td>{loss}</td><td>{change}</td></tr>")
    note = (
        "Stopping after loop r is what running with r loops computes: this is also the logit lens. Nats per token; "
        "changes are paired by sequence."
    )
    head = "<tr><th>loops</th><th>validation loss</th><th>change by the last loop</th></tr>"
    return (
        f'<div class="scroll"><table id="losses"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )


def _table(diagnosis: Diagnosis) -> str:
    heads = ["measure", "embeddings", *(f"loop {loop}" for loop in range(1, diagnosis.loop_count + 1)), ""]
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = []
    for measure, cells in loop_rows(diagnosis):
        columns = "".join(f"<td>{_spans(text)}</td>" for text in cells)
        meaning = f'<td class="meaning">{html.escape(measure.meaning)}</td>'
        body.append(f"<tr><td>{html.escape(measure.title)}</td>{columns}{meaning}</tr>")
    return (
        f'<div class="scroll"><table id="measures"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def _spans(text: str) -> str:
    """The interval smaller than the number."""
    number, bracket, rest = text.partition(" [")
    return f"{number} <span>[{rest}</span>" if bracket else text
