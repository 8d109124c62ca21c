"""What a batch of a run really holds: texts, documents, and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from plt_megatron.config import derived
from plt_megatron.config.batch_schedule import BatchSchedule, with_global_batch_size
from plt_megatron.config.length_schedule import LengthSchedule, with_sequence_length
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.datasets import Samples, build_datasets
from plt_megatron.data.duplicates import Duplicates, find_duplicates
from plt_megatron.data.mix import PARTS, index_folder, required_samples, sample_sources
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError


@dataclass(frozen=True)
class Run:
    """Successive tokens of one kind.

    Attributes:
        text: of ordinary tokens; for control tokens, each by its name; without a tokenizer, their numbers.
        predicted: whether the loss asks for these tokens. A sample's first token is never asked for.
        control: whether they are control tokens, which stand for no text.
        tokens: how many.
    """

    text: str
    predicted: bool
    control: bool
    tokens: int


@dataclass(frozen=True)
class ShownPart:
    """A document's part: where it is from, and its tokens.

    Attributes:
        document: its number in the source, from 0.
        first, total: of the document's `total` tokens the part begins with token `first`, from 0.
        resets: whether attention and positions begin anew with it.
        fill_in_middle: see `datasets.Part`.
    """

    document: int
    first: int
    total: int
    resets: bool
    fill_in_middle: str | None
    runs: list[Run]

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)


@dataclass(frozen=True)
class ShownSample:
    """One sample with the token after its last, which is a label only.

    Attributes:
        number: in the order that the run reads.
        source, path: its source's name, and path prefix.
        predicted: tokens that the loss asks for.
        tokens: of the sample, `data.sequence_length`.
    """

    number: int
    source: str
    path: str
    predicted: int
    tokens: int
    parts: list[ShownPart]


@dataclass(frozen=True)
class ShownBatch:
    """Samples of a part of the data: `number` of the batch, from 1, of `size` samples read as rows of `row_length`
    tokens, of which `samples` are shown."""

    part: str
    number: int
    size: int
    row_length: int
    samples: list[ShownSample]


class Inspector:
    """The samples of a run's configuration. Builds the sample index as the run would, if it is missing.

    Raises `UserError` as `build_datasets` does.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        built = build_datasets(
            config.data,
            num_samples=required_samples(config),
            seed=config.training.seed,
            cache_dir=index_folder(config),
            tokenizer=self._tokenizer,
        )
        self._shares = built.shares
        self._samples = dict(zip(PARTS, (built.train, built.validation, built.test), strict=True))
        self._sources = dict(zip(PARTS, sample_sources(config.data), strict=True))

    def samples(self, part: str) -> Samples:
        """A part's samples; `UserError` if the run reads none."""
        found = self._samples[part]
        if found is None:
            raise UserError(f"the run reads no {part} data: set validation.iters above 0, or inspect another part")
        return found

    def batch(self, part: str, number: int, limit: int) -> ShownBatch:
        """The first `limit` samples of a part's `number`-th global batch, from 1. `UserError` if there is none."""
        config, samples = self._config, self.samples(part)
        length = config.data.sequence_length
        if part != "train":
            config = with_sequence_length(with_global_batch_size(config, config.training.global_batch_size), length)
        schedule = BatchSchedule(config)
        batches = schedule.steps(len(samples) * length)
        if not 1 <= number <= batches:
            raise UserError(f"batch {number} of the {part} data: the run reads the batches 1 to {batches:,}")
        before = schedule.tokens(number - 1)
        first, size = before // length, schedule.global_batch_size(before)
        row = LengthSchedule(config).sequence_length(before)
        shown = [self._sample(samples, part, index, row) for index in range(first, first + min(limit, size))]
        return ShownBatch(part, number, size, row, shown)

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens as text, control tokens by their names."""
        return "".join(run.text for run in _runs(tokens, [True] * len(tokens), self._tokenizer))

    def find_duplicates(self, span_tokens: int) -> Duplicates:
        """Search the whole training part for the documents that the run's validation reads."""
        samples = self.samples("validation")
        documents: dict[int, set[int]] = {}
        for index in range(len(samples)):
            which, parts = samples.parts(index)
            documents.setdefault(which, set()).update(part.document for part in parts)
        sources = self._sources["validation"]
        held = [(derived.source_name(sources[which]), sources[which].path, sorted(documents[which]))
                for which in sorted(documents)]  # fmt: skip
        return find_duplicates(held, [share for share in self._shares if share.part == "train"], span_tokens)

    def _sample(self, samples: Samples, part: str, index: int, row_length: int) -> ShownSample:
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
                first = piece.first + begin - at
                parts.append(ShownPart(piece.document, first, piece.total, resets, piece.fill_in_middle, runs))
            at += piece.length
        source = self._sources[part][which]
        return ShownSample(index, derived.source_name(source), source.path, sum(asked), len(tokens) - 1, parts)


def _cuts(begin: int, end: int, row_length: int, sample_length: int) -> Iterator[tuple[int, int]]:
    """The parts of `begin` to `end` that lie in one row each; the token after the sample's last is in the last row."""
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
