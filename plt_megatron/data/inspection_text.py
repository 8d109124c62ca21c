"""Format inspected batches and duplicates as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plt_megatron.data.duplicates import Duplicates, Shared
from plt_megatron.data.inspection import Inspector, Run, ShownBatch, ShownPart
from plt_megatron.run_folder.text import format_table, plural

LEGEND = "[[...]]: tokens that do not count in the loss"


def describe_batch(batch: ShownBatch, width: int | None = None) -> str:
    """Format a batch, sample by sample and document by document. `width`: maximum characters of a document's text."""
    lines = [
        f"batch {batch.number:,} of the {batch.part} data: {len(batch.samples)} of {plural(batch.size, 'sample')} "
        f"({LEGEND})"
    ]
    for sample in batch.samples:
        if sample.tokens > batch.row_length:
            lines += ["", f"read as rows of {batch.row_length:,} tokens (data.length_schedule):"]
        lines += ["", f"sample {sample.number:,}, from {sample.source}: {sample.predicted:,} of "
                  f"{sample.tokens:,} tokens count in the loss"]  # fmt: skip
        for part in sample.parts:
            lines += [f"  --- {describe_part(part)}", *_indented(part.runs, width)]
    return "\n".join(lines)


def describe_part(part: ShownPart) -> str:
    """Describe a part, as in `document 12, tokens 1-80 of 240; attention and positions restart`."""
    last = part.first + part.length
    note = "; attention and positions restart" if part.resets else ""
    note += f"; fill-in-the-middle, {part.fill_in_middle}" if part.fill_in_middle else ""
    return f"document {part.document:,}, tokens {part.first + 1:,}-{last:,} of {part.total:,}{note}"


def _indented(runs: Sequence[Run], width: int | None) -> Iterator[str]:
    text = "".join(run.text if run.predicted else f"[[{run.text}]]" for run in runs)
    if width is not None and len(text) > width:
        text = f"{text[: width // 2]} ... {text[len(text) - width // 2 :]}"
    yield from (f"  | {line}" for line in text.split("\n"))


def describe_duplicates(found: Duplicates, inspector: Inspector) -> str:
    """Format what was found: counts, a table by source, and where the longest are."""
    rows = [(name, *(f"{number:,}" for number in numbers)) for name, numbers in found.by_source.items()]
    header = ("validation source", "documents", "equal", "sharing a span")
    lines = [summary(found), "", format_table(rows, header=header)]
    for title, pairs in (("equal documents", found.equal_pairs), ("longest shared spans", found.spans)):
        if pairs:
            lines += ["", f"{title}:", *(f"  {line}" for pair in pairs for line in _pair(pair, inspector))]
    return "\n".join(lines)


def summary(found: Duplicates) -> str:
    """Summarize the counts in one line."""
    share = found.span_tokens_shared / max(1, found.validation_tokens)
    return (
        f"{found.equal_documents:,} of {plural(found.validation_documents, 'validation document')} "
        f"({plural(found.validation_tokens, 'token')}) occur whole in the training part ({found.training_documents:,} "
        f"documents, {found.training_tokens:,} tokens); {found.span_documents:,} share a span of "
        f"{found.span_tokens} tokens or more with it, at least {found.span_tokens_shared:,} tokens in total "
        f"({share:.2%})"
    )


def _pair(pair: Shared, inspector: Inspector) -> Iterator[str]:
    ours, theirs = pair.validation, pair.training
    yield (
        f"{plural(pair.length, 'token')}: {ours.source} document {ours.document:,} at token {ours.token + 1:,} = "
        f"{theirs.source} document {theirs.document:,} at token {theirs.token + 1:,}"
    )
    yield f"    {inspector.text(pair.tokens)[:160]!r}"
