"""What a batch holds, and duplicates, as one HTML page."""

from __future__ import annotations

from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.duplicates import Duplicates
from plt_megatron.data.inspection import Inspector, ShownBatch
from plt_megatron.data.inspection_text import describe_part, summary
from plt_megatron.errors import UserError
from plt_megatron.experiments.pages import render
from plt_megatron.extras import require
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.text import plural


def check_page(path: str | Path) -> None:
    """`UserError` if the page could not be made: before the data are read."""
    require("--html", "jinja2")
    if Path(path).is_dir():
        raise UserError(f"--html {path} is a folder: name a file")


def write_page(
    path: str | Path, config: RunConfig, batch: ShownBatch, found: Duplicates | None, inspector: Inspector
) -> None:
    """Write or replace the page. `found`: None where duplicates were not searched for."""
    page = render(
        "data.html",
        title=f"Data of {config.name}",
        about=_about(config, batch),
        batch=batch,
        describe_part=describe_part,
        found=found,
        summary=summary(found) if found else "",
        lists=_lists(found, inspector),
    )
    with writing(path):
        write_text(path, page)


def _about(config: RunConfig, batch: ShownBatch) -> str:
    data = config.data
    resets = "begin anew at each document" if data.reset_at_document_boundaries else "run over documents' edges"
    rows = "" if batch.row_length == data.sequence_length else f", read as rows of {batch.row_length:,}"
    return (
        f"{derived.run_folder(config)}: batch {batch.number:,} of the {batch.part} data, {len(batch.samples)} of "
        f"{plural(batch.size, 'sample')} of {data.sequence_length:,} tokens{rows}; attention and positions {resets}; "
        f"tokenizer {data.tokenizer or 'none: tokens are shown by their numbers'}."
    )


def _lists(found: Duplicates | None, inspector: Inspector) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """(title, rows) of the equal documents and of the longest spans."""
    if found is None:
        return []
    lists = []
    for title, pairs in (("Equal documents", found.equal_pairs), ("Longest shared spans", found.spans)):
        rows = [
            (
                f"{pair.length:,}",
                f"{pair.validation.source}: document {pair.validation.document:,}, token {pair.validation.token + 1:,}",
                f"{pair.training.source}: document {pair.training.document:,}, token {pair.training.token + 1:,}",
                inspector.text(pair.tokens)[:200],
            )
            for pair in pairs
        ]
        if rows:
            lists.append((title, rows))
    return lists
