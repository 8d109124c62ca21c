"""The contents of a batch, and duplicates, as one HTML page."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.duplicates import Duplicates, Place
from plt_megatron.data.inspection import Inspector, ShownBatch, describe_part, summary
from plt_megatron.errors import UserError
from plt_megatron.experiments.pages import Column, Page, Part, Table, Verdict, render
from plt_megatron.extras import require
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.text import plural

_COUNTS = ("documents", "equal", "sharing a span")


def check_page(path: str | Path) -> None:
    """Raise `UserError` if the page cannot be made, before the data is read."""
    require("--html", "jinja2")
    if Path(path).is_dir():
        raise UserError(f"--html {path} is a folder: name a file")


def write_page(
    path: str | Path, config: RunConfig, batch: ShownBatch, found: Duplicates | None, inspector: Inspector
) -> None:
    """Write or replace the page. `found`: None if duplicates were not searched for."""
    page = Page(
        title=f"Data of {config.name}",
        about=_about(config, batch),
        answers=[] if found is None else [Verdict(summary(found), not (found.equal_documents or found.span_documents))],
        asked="Validation text in the training data",
        parts=[] if found is None else _duplicates(found, inspector),
    )
    text = render("data.html", page=page, batch=batch, describe_part=describe_part)
    with writing(path):
        write_text(path, text)


def _about(config: RunConfig, batch: ShownBatch) -> str:
    data = config.data
    resets = "restart at each document" if data.reset_at_document_boundaries else "cross document boundaries"
    rows = "" if batch.row_length == data.sequence_length else f", read as rows of {batch.row_length:,}"
    return (
        f"{derived.run_folder(config)}: batch {batch.number:,} of the {batch.part} data, {len(batch.samples)} of "
        f"{plural(batch.size, 'sample')} of {data.sequence_length:,} tokens{rows}; attention and positions {resets}; "
        f"tokenizer {data.tokenizer or 'none: tokens are shown by id'}."
    )


def _duplicates(found: Duplicates, inspector: Inspector) -> list[Part]:
    """Return the counts by validation source, the equal documents and the longest spans."""

    def place(where: Place) -> str:
        return f"{where.source}: document {where.document:,}, token {where.token + 1:,}"

    sources = [
        Column("source", "validation source", itemgetter(0)),
        *(Column(title, title, itemgetter(at), ",") for at, title in enumerate(_COUNTS, start=1)),
    ]
    pairs = [
        Column("tokens", "tokens", lambda pair: pair.length, ","),
        Column("validation", "validation", lambda pair: place(pair.validation)),
        Column("training", "training", lambda pair: place(pair.training)),
        Column("text", "begins with", lambda pair: inspector.text(pair.tokens), shown=200),
    ]
    counts = [(name, *numbers) for name, numbers in found.by_source.items()]
    lists = {"Equal documents": found.equal_pairs, "Longest shared spans": found.spans}
    return [
        Part("By source", tables={"sources": Table(sources, counts)}),
        *(
            Part(title, tables={title.replace(" ", "_").lower(): Table(pairs, own)})
            for title, own in lists.items()
            if own
        ),
    ]
