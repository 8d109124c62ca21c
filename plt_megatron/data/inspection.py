"""Inspect what a run's batches contain: texts, documents, and the tokens that are trained on; as data or as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from plt_megatron.config import derived
from plt_megatron.config.loop_schedule import with_equal_steps
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule
from plt_megatron.config.schema import DataSource, RunConfig
from plt_megatron.data.datasets import Part, Samples, build_datasets
from plt_megatron.data.duplicates import Duplicates, Shared, find_duplicates
from plt_megatron.data.mix import PARTS, drawn_samples, sample_sources, validation_alone
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError, printable
from plt_megatron.run_folder.text import format_table, plural


@dataclass(frozen=True)
class Run:
    """`tokens` consecutive tokens of one kind."""

    text: str  # of the tokens; names of control tokens; ids if there is no tokenizer
    predicted: bool  # whether these tokens count in the loss as labels; a sample's first token never does
    control: bool  # whether they are control tokens, which stand for no text
    tokens: int


@dataclass(frozen=True)
class ShownPart(Part):
    """A part of a document with its tokens. `resets`: whether attention and positions restart at it."""

    resets: bool
    runs: list[Run]


@dataclass(frozen=True)
class ShownSample:
    """One sample, including the token after its last, which is only a label."""

    number: int  # position in the order in which the run reads samples
    source: str  # name of its source
    path: str  # and path prefix
    predicted: int  # number of tokens that count in the loss as labels
    tokens: int  # length of the sample, `data.sequence_length`
    parts: list[ShownPart]


@dataclass(frozen=True)
class ShownBatch:
    """Batch `number` (from 1) of a part of the data. It has `size` samples, read as rows of `row_length` tokens;
    `samples` are those shown."""

    part: str
    number: int
    size: int
    row_length: int
    samples: list[ShownSample]


class Inspector:
    """The samples of a run configuration. Builds the sample index as the run would, if it is missing.

    Raises `UserError` like `build_datasets`.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        counts = drawn_samples(config)
        built = build_datasets(config, counts, self._tokenizer)
        self._shares = built.shares
        parts = zip(PARTS, sample_sources(config.data), (built.train, built.validation, built.test), strict=True)
        self._samples = {part: [(sources, found)] if found else [] for part, sources, found in parts}
        if config.validation.by_source and counts[1]:
            alone = validation_alone(config)
            ones = [([each], build_datasets(run, (0, counts[1], 0), self._tokenizer)) for each, run in alone]
            self._samples["validation"] = [(each, one.validation) for each, one in ones if one.validation]

    def samples(self, part: str) -> list[tuple[list[DataSource], Samples]]:
        """Return a part's samples, and the sources that they number; with `validation.by_source` those of each source,
        which the run reads one after another. Raises `UserError` if the run reads none."""
        if not self._samples[part]:
            raise UserError(f"the run reads no {part} data: set validation.iters above 0, or inspect another part")
        return self._samples[part]

    def batch(self, part: str, number: int, limit: int) -> ShownBatch:
        """Return the first `limit` samples of a part's global batch `number`, from 1. Raises `UserError` if none."""
        config, found = self._config, self.samples(part)
        length = config.data.sequence_length
        if part != "train":
            config = with_equal_steps(config)
        schedule = BatchSchedule(config)
        batches = [schedule.steps(len(samples) * length) for _, samples in found]
        if not 1 <= number <= sum(batches):
            raise UserError(f"batch {number} of the {part} data: the run reads batches 1 to {sum(batches):,}")
        which, step = 0, number - 1
        while step >= batches[which]:
            which, step = which + 1, step - batches[which]
        (sources, samples), before = found[which], schedule.tokens(step)
        first, size = before // length, schedule.global_batch_size(before)
        row = LengthSchedule(config).sequence_length(before)
        shown = [self._sample(samples, sources, index, row) for index in range(first, first + min(limit, size))]
        return ShownBatch(part, number, size, row, shown)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the tokens as text, with control tokens by name."""
        return "".join(run.text for run in _runs(tokens, [True] * len(tokens), self._tokenizer))

    def find_duplicates(self, span_tokens: int) -> Duplicates:
        """Search the whole training part for the documents that the run's validation reads."""
        documents: dict[tuple[str, str], set[int]] = {}
        for sources, samples in self.samples("validation"):
            for index in range(len(samples)):
                which, parts = samples.parts(index)
                source = derived.source_name(sources[which]), sources[which].path
                documents.setdefault(source, set()).update(part.document for part in parts)
        held = [(*source, sorted(documents[source])) for source in documents]
        return find_duplicates(held, [share for share in self._shares if share.part == "train"], span_tokens)

    def _sample(self, samples: Samples, sources: Sequence[DataSource], index: int, row_length: int) -> ShownSample:
        item = samples[index]
        which, pieces = samples.parts(index)
        tokens = [*item["tokens"].tolist(), int(item["labels"][-1])]
        asked = [False, *(mask > 0 for mask in item["loss_mask"].tolist())]
        starts = item.get("document_starts")
        parts, at = [], 0
        for piece in pieces:
            for begin, end in _cuts(at, at + piece.length, row_length, len(tokens) - 1):
                packed = starts is not None and begin < len(starts) and bool(starts[begin])
                resets = packed or 0 < begin < len(tokens) - 1 and begin % row_length == 0
                runs = list(_runs(tokens[begin:end], asked[begin:end], self._tokenizer))
                part_of = replace(piece, first=piece.first + begin - at, length=end - begin)
                parts.append(ShownPart(**vars(part_of), resets=resets, runs=runs))
            at += piece.length
        source = sources[which]
        return ShownSample(index, derived.source_name(source), source.path, sum(asked), len(tokens) - 1, parts)


def _cuts(begin: int, end: int, row_length: int, sample_length: int) -> Iterator[tuple[int, int]]:
    """Cut [begin, end) where rows begin; the token after the sample's last belongs to the last row."""
    edges = [edge for edge in range(row_length, sample_length, row_length) if begin < edge < end]
    return zip([begin, *edges], [*edges, end], strict=True)


def _runs(tokens: Sequence[int], asked: Sequence[bool], tokenizer: Tokenizer | None) -> Iterator[Run]:
    controls = {token: tokenizer is not None and tokenizer.decode([token]) == "" for token in set(tokens)}
    pairs = zip(tokens, asked, strict=True)
    for (predicted, control), group in groupby(pairs, key=lambda pair: (pair[1], controls[pair[0]])):
        ids = [token for token, _ in group]
        if tokenizer is None:
            text = " ".join(map(str, ids))
        elif control:
            text = "".join(map(tokenizer.token_name, ids))
        else:
            text = tokenizer.decode(ids)
        yield Run(text, predicted, control, len(ids))


def describe_batch(batch: ShownBatch, width: int | None = None) -> str:
    """Format a batch, sample by sample and document by document. `width`: maximum characters of a document's text."""
    lines = [
        f"batch {batch.number:,} of the {batch.part} data: {len(batch.samples)} of {plural(batch.size, 'sample')} "
        "([[...]]: tokens that do not count in the loss)"
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
    text = printable("".join(run.text if run.predicted else f"[[{run.text}]]" for run in runs))
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
