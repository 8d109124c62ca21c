"""Fill-in-the-middle (arXiv 2207.14255): a share of the training documents is rearranged before samples are cut.

A document's text is cut at two places into prefix, middle and suffix. With PRE, SUF and MID the tokenizer's tokens:

    PSM:  PRE prefix SUF suffix MID middle EOD
    SPM:  PRE SUF suffix MID prefix middle EOD       (Megatron-LM's variant, the paper's joint one)

Every decision is a hash of the seed and of numbers that do not depend on layout or history. Whether a document is
rearranged depends on its number; the cuts and the order also depend on its place in the run's order of documents, so
that each pass over a document cuts it differently. There is no random generator and no state to save.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from plt_megatron.config import derived
from plt_megatron.config.schedules import training_sources
from plt_megatron.config.schema import DataConfig
from plt_megatron.data.indexed import flat_tokens, open_index
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import UserError

# Prefix, middle and suffix tokens, tried in this order: StarCoder; Qwen, CodeGemma and relatives of StarCoder 2;
# DeepSeek; Code Llama.
KNOWN_TOKENS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
)
ADDED_TOKENS = 3
_CHOICE, _FIRST_CUT, _SECOND_CUT, _ORDER = range(4)  # streams of random numbers
_CHECKED = 64  # documents per source whose last token is checked


@dataclass(frozen=True)
class FillInMiddle:
    """Settings of a run.

    `rates`: share of documents to rearrange, by absolute path prefix of the training source; `tokens`: ids of the
    prefix, middle and suffix tokens.
    """

    rates: dict[str, float]
    spm_rate: float
    tokens: tuple[int, ...]
    seed: int


def settings_of(data: DataConfig, tokenizer: Tokenizer | None, seed: int) -> FillInMiddle | None:
    """Return a run's settings; None if nothing is rearranged. Raises `UserError` if the tokenizer lacks the tokens."""
    rates = {os.path.abspath(source.path): derived.fim_rate(data, source) for source in training_sources(data)}
    if not any(rates.values()):
        return None
    return FillInMiddle(rates, derived.fim(data).spm_rate, find_tokens(data, tokenizer), seed)


def find_tokens(data: DataConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the ids of the tokens that the settings name, else the first of `KNOWN_TOKENS` that the tokenizer has.

    Raises `UserError` if the tokenizer lacks them.
    """
    if tokenizer is None:
        raise UserError("data.fim.rate needs data.tokenizer, which has the tokens that mark prefix, middle and suffix")
    named = derived.fim(data).tokens
    for names in [tuple(named)] if named else KNOWN_TOKENS:
        ids = [index for index in map(tokenizer.token_id, names) if index is not None]
        if len(ids) == len(names):
            if len({*ids, tokenizer.eod}) < len(ids) + 1:
                raise UserError(
                    f"data.fim.tokens: {', '.join(names)} and the end-of-document token must be four different tokens "
                    f"of {tokenizer.path}"
                )
            return tuple(ids)
        if named:
            missing = next(name for name in names if tokenizer.token_id(name) is None)
            raise UserError(f"{tokenizer.path} has no token {missing!r}, which data.fim.tokens names")
    looked = ", ".join(names[0] for names in KNOWN_TOKENS)
    raise UserError(
        f"data.fim.rate: {tokenizer.path} has no fill-in-the-middle tokens (looked for {looked} and so on): name them "
        "in data.fim.tokens, or train a tokenizer with --special-token"
    )


def check_ends(setting: str, path: str, first: int, last: int, eod: int) -> None:
    """Raise `UserError` unless the documents in [first, last) of a source end with `eod`; samples up to `_CHECKED`."""
    index = open_index(path)
    documents = sorted({int(place) for place in np.linspace(first, last - 1, _CHECKED)}) if last > first else []
    flat = flat_tokens(index)
    for document in documents:
        length = int(index.lengths[document])
        if length and int(flat[index.start(document) + length - 1]) != eod:
            raise UserError(
                f"{setting}: document {document} of {path} does not end with the tokenizer's end-of-document token "
                f"{eod}: tokenize it again without --no-append-eod and --eod-token"
            )


class RearrangedDocuments:
    """A source's training documents, a share of them rearranged, in place of megatron-core's `IndexedDataset`.

    A rearranged document is `ADDED_TOKENS` longer. A document of one token, the end-of-document token, stays as it is.
    """

    def __init__(self, dataset: Any, rate: float, settings: FillInMiddle) -> None:
        self._dataset, self._rate, self._settings = dataset, rate, settings
        self.path_prefix = dataset.path_prefix

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens per document, int32 [documents]. Held in memory; needed only to build the sample index."""
        lengths = np.array(self._dataset.sequence_lengths, np.int32)
        for first in range(0, len(lengths), 1 << 20):
            part = lengths[first : first + (1 << 20)]
            drawn = self._draw(_CHOICE, np.arange(first, first + len(part), dtype=np.uint64), 0)
            part += ADDED_TOKENS * ((drawn < self._rate) & (part > 1)).astype(np.int32)
        return lengths

    def length(self, document: int) -> int:
        """Return the number of tokens of a document, including those that rearranging adds."""
        raw = int(self._dataset.sequence_lengths[document])
        return raw + ADDED_TOKENS * self._is_chosen(document, raw)

    def order(self, document: int, place: int) -> str | None:
        """Return `PSM`, `SPM`, or None if not rearranged. `place`: position in the run's order of documents."""
        if not self._is_chosen(document, int(self._dataset.sequence_lengths[document])):
            return None
        return "SPM" if self._draw(_ORDER, document, place) < self._settings.spm_rate else "PSM"

    def read(self, document: int, place: int, first: int, length: int) -> np.ndarray:
        """Return a document's tokens from `first` on, int64 [length]. Reads no others from the file."""
        pieces: list[np.ndarray] = []
        at = 0  # where the piece begins
        for begin, end in self._pieces(document, place):
            low, high = max(first, at), min(first + length, at + end - begin)
            if low < high and begin < 0:
                pieces.append(np.array([-begin - 1]))
            elif low < high:
                pieces.append(self._dataset.get(document, offset=begin + low - at, length=high - low))
            at += end - begin
        return np.concatenate(pieces, dtype=np.int64) if pieces else np.empty(0, np.int64)

    def _pieces(self, document: int, place: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of the document's tokens in reading order; (-id - 1, -id) stands for the added token `id`."""
        total = int(self._dataset.sequence_lengths[document])
        order = self.order(document, place)
        if order is None:
            yield 0, total
            return
        text = total - 1  # the last is the end-of-document token
        low, high = sorted(int(self._draw(cut, document, place) * (text + 1)) for cut in (_FIRST_CUT, _SECOND_CUT))
        tokens = self._settings.tokens
        prefix, middle, suffix = ((-token - 1, -token) for token in tokens)
        if order == "PSM":
            yield from (prefix, (0, low), suffix, (high, text), middle, (low, high))
        else:
            yield from (prefix, suffix, (high, text), middle, (0, high))
        yield text, total

    def _is_chosen(self, document: int, raw: int) -> bool:
        return raw > 1 and self._draw(_CHOICE, document, 0) < self._rate

    def _draw(self, stream: int, documents: Any, place: int) -> Any:
        return uniform(self._settings.seed, stream, documents, place)


def uniform(seed: int, stream: int, numbers: Any, place: int = 0) -> Any:
    """Return values in [0, 1) that look random and depend only on the arguments.

    `numbers` is an int, for a float, or a uint64 array, for float64 of its shape.
    """
    key = scramble(_key(seed, stream) ^ place)
    return (scramble(scramble(numbers) ^ key) >> 11) * 2.0**-53


@lru_cache
def _key(seed: int, stream: int) -> int:
    return scramble(scramble(seed) ^ stream)


def scramble[T: (int, np.ndarray)](values: T) -> T:
    """Map numbers below 2^64, an int or an array of uint64, to random-looking ones, one to one: the finalizer of
    splitmix64. For a single number, an int is an order of magnitude faster."""
    mask = 2**64 - 1
    values = (values + 0x9E3779B97F4A7C15) & mask
    values = ((values ^ (values >> 30)) * 0xBF58476D1CE4E5B9) & mask
    values = ((values ^ (values >> 27)) * 0x94D049BB133111EB) & mask
    return values ^ (values >> 31)
