"""Find validation text in the training part: equal documents, and long shared spans.

The documents that the run's validation reads are held in memory; the training part is streamed through memory maps.
Every aligned block of W validation tokens, where 2W - 1 <= `span_tokens`, is looked up at every position of the
training text: a shared span of `span_tokens` contains at least one such block. Matches are compared token by token.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from plt_megatron.data.fill_in_middle import scramble
from plt_megatron.data.indexed import flat_tokens, read_index
from plt_megatron.data.mix import SourceShare
from plt_megatron.errors import UserError

_CHUNK = 1 << 21  # tokens hashed at once
_GROUP = 1 << 16  # documents whose offsets are in memory at once
_TABLE_BITS = 22
_BASE = 0x9E3779B97F4A7C15  # of hashes; odd, so that it has an inverse modulo 2^64


@dataclass(frozen=True)
class Place:
    """A position in a source: token `token` of document `document`, both from 0."""

    source: str
    document: int
    token: int = 0


@dataclass(frozen=True)
class Shared:
    """`length` equal tokens at two places; `tokens` has at most the first 64 of them."""

    validation: Place
    training: Place
    length: int
    tokens: tuple[int, ...] = ()


@dataclass
class Duplicates:
    """The result of a search. Validation text that occurs repeatedly is listed at its first match."""

    span_tokens: int
    validation_documents: int  # sizes of the text searched for
    validation_tokens: int
    training_documents: int  # and of the text searched
    training_tokens: int
    equal_documents: int  # validation documents that the training part contains whole
    equal_pairs: list[Shared]  # some of these
    span_documents: int  # validation documents that share a span with the training part
    span_tokens_shared: int  # validation tokens in the spans found; there may be more
    spans: list[Shared]  # the longest ones found
    by_source: dict[str, tuple[int, int, int]]  # documents, equal documents, documents with a shared span


def find_duplicates(
    validation: Sequence[tuple[str, str, Sequence[int]]],
    training: Sequence[SourceShare],
    span_tokens: int = 50,
    listed: int = 20,
) -> Duplicates:
    """Search the training part for validation documents.

    Args:
        validation: name and path prefix of each source, and the numbers of its documents.
        training: shares of the training part; those of the same documents are searched once.
        span_tokens: minimum length of a shared span, at least 8.
        listed: maximum number of pairs, and of spans, to list.

    Raises:
        UserError: there are no validation documents, or a source is damaged.
    """
    held = _Held(validation, (span_tokens + 1) // 2)
    if not held.places:
        raise UserError("the run reads no validation documents to search for: set validation.iters above 0")
    search = _Search(held, span_tokens, listed)
    for share in {(share.path, share.first, share.last): share for share in training}.values():
        search.through(share)
    return search.result()


class _Held:
    """The validation documents end to end, and the hashes of their blocks."""

    def __init__(self, sources: Sequence[tuple[str, str, Sequence[int]]], block: int) -> None:
        self.block = block
        self.places: list[Place] = []
        texts: list[np.ndarray] = [np.empty(0, np.int32)]
        for name, path, documents in sources:
            index = read_index(path)
            flat = flat_tokens(index)
            for document in documents:
                start = index.start(document)
                self.places.append(Place(name, int(document)))
                texts.append(np.asarray(flat[start : start + int(index.lengths[document])], np.int32))
        lengths = np.array([len(text) for text in texts[1:]], np.int64)
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.tokens = np.concatenate(texts)
        hasher = WindowHasher(block, max(map(len, texts)))
        hashes = np.concatenate([hasher(text)[::block] for text in texts])
        block_starts = [
            np.arange(start, end - block + 1, block) for start, end in zip(self.starts, self.ends, strict=True)
        ]
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.block_starts = np.concatenate([np.empty(0, np.int64), *block_starts])[order]
        self._table = np.zeros(1 << _TABLE_BITS, bool)  # leading bits of all hashes: rules out most windows at once
        self._table[self._slot(self.hashes)] = True
        self.by_length: dict[int, list[int]] = defaultdict(list)
        for number, length in enumerate(lengths.tolist()):
            if length > 1:  # an end-of-document token alone is not a document
                self.by_length[length].append(number)

    @staticmethod
    def _slot(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _TABLE_BITS)

    def text(self, number: int) -> np.ndarray:
        return self.tokens[self.starts[number] : self.ends[number]]

    def candidates(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield (window number, block number) of equal hashes, in the order of the windows."""
        windows = np.flatnonzero(self._table[self._slot(hashes)])
        low = np.searchsorted(self.hashes, hashes[windows], "left")
        high = np.searchsorted(self.hashes, hashes[windows], "right")
        for at in np.flatnonzero(high > low):
            for block in range(int(low[at]), int(high[at])):
                yield int(windows[at]), block


class _Search:
    """Searches training sources and collects the matches."""

    def __init__(self, held: _Held, span_tokens: int, listed: int) -> None:
        self._held, self._span, self._listed = held, span_tokens, listed
        self._hash = WindowHasher(held.block, _CHUNK + held.block - 1)
        self._block_found = np.zeros(len(held.block_starts), bool)
        self._covered = np.zeros(len(held.tokens), bool)
        self._equal: dict[int, Shared] = {}
        self._longest: list[tuple[int, int, Shared]] = []
        self._number = count()
        self._documents = self._tokens = 0

    def through(self, share: SourceShare) -> None:
        index = read_index(share.path)
        flat = flat_tokens(index)
        start = index.start(share.first) if share.documents else 0
        for first in range(share.first, share.last, _GROUP):
            lengths = np.asarray(index.lengths[first : min(first + _GROUP, share.last)], np.int64)
            ends = start + np.cumsum(lengths)
            group = _Group(share.name, first, ends - lengths, ends)
            self._find_equal(group, lengths, flat)
            for at in range(int(start), int(ends[-1]), _CHUNK):
                self._find_spans(group, flat, at, min(at + _CHUNK, int(ends[-1])))
            self._documents += len(lengths)
            self._tokens += int(ends[-1] - start)
            start = ends[-1]

    def _find_equal(self, group: _Group, lengths: np.ndarray, flat: np.ndarray) -> None:
        for at in np.flatnonzero(np.isin(lengths, list(self._held.by_length))):
            text = flat[group.starts[at] : group.ends[at]]
            for number in self._held.by_length[len(text)]:
                mine = self._held.text(number)
                if number not in self._equal and mine[0] == text[0] and np.array_equal(mine, text):
                    place = Place(group.source, group.first + int(at))
                    self._equal[number] = self._shared(self._held.places[number], place, mine)

    def _find_spans(self, group: _Group, flat: np.ndarray, begin: int, end: int) -> None:
        """Find spans with a block that begins in [begin, end) of the source."""
        block = self._held.block
        hashes = self._hash(flat[begin : min(end + block - 1, int(group.ends[-1]))])
        for window, number in self._held.candidates(hashes):
            if self._block_found[number]:
                continue
            at = begin + window
            which = int(np.searchsorted(group.ends, at, "right"))
            if at + block <= group.ends[which]:
                self._extend(group, which, flat, at, number)

    def _extend(self, group: _Group, which: int, flat: np.ndarray, at: int, number: int) -> None:
        """Record the longest span around a block that both documents share, if it is long enough."""
        held, block = self._held, self._held.block
        mine = int(held.block_starts[number])
        document = int(np.searchsorted(held.ends, mine, "right"))
        back = min(mine - int(held.starts[document]), at - int(group.starts[which]))
        ahead = min(int(held.ends[document]) - mine, int(group.ends[which]) - at)
        after = _common(held.tokens[mine : mine + ahead], flat[at : at + ahead])
        if after < block:
            return  # a hash collision
        before = _common(held.tokens[mine - back : mine][::-1], flat[at - back : at][::-1])
        if before + after < self._span:
            return
        first, last = mine - before, mine + after
        inside = (held.block_starts >= first) & (held.block_starts + block <= last)
        self._block_found |= inside
        self._covered[first:last] = True
        theirs = Place(group.source, group.first + which, at - before - int(group.starts[which]))
        ours = held.places[document]
        place = Place(ours.source, ours.document, first - int(held.starts[document]))
        entry = (last - first, -next(self._number), self._shared(place, theirs, held.tokens[first:last]))
        (heapq.heappush if len(self._longest) < self._listed else heapq.heappushpop)(self._longest, entry)

    @staticmethod
    def _shared(validation: Place, training: Place, tokens: np.ndarray) -> Shared:
        return Shared(validation, training, len(tokens), tuple(tokens[:64].tolist()))

    def result(self) -> Duplicates:
        held = self._held
        with_span = {int(number) for number in np.searchsorted(held.ends, np.flatnonzero(self._covered), "right")}
        by_source = {}
        for name in dict.fromkeys(place.source for place in held.places):
            mine = {number for number, place in enumerate(held.places) if place.source == name}
            by_source[name] = (len(mine), len(mine & self._equal.keys()), len(mine & with_span))
        return Duplicates(
            span_tokens=self._span,
            validation_documents=len(held.places),
            validation_tokens=len(held.tokens),
            training_documents=self._documents,
            training_tokens=self._tokens,
            equal_documents=len(self._equal),
            equal_pairs=[self._equal[number] for number in sorted(self._equal)][: self._listed],
            span_documents=len(with_span),
            span_tokens_shared=int(self._covered.sum()),
            spans=[shared for _, _, shared in sorted(self._longest, key=lambda entry: entry[:2], reverse=True)],
            by_source=by_source,
        )


@dataclass(frozen=True)
class _Group:
    """Consecutive documents of a source, with each one's start and end among the source's tokens."""

    source: str
    first: int
    starts: np.ndarray
    ends: np.ndarray


class WindowHasher:
    """Hashes all windows of `size` tokens in arrays of up to `longest` tokens, by a polynomial modulo 2^64.

    The hash of t_0 ... t_(n-1) is the sum of r(t_i) * B^i, with a random-looking 64-bit r for each token. Equal windows
    have equal hashes; different windows may collide, so a caller must compare the tokens themselves.
    """

    def __init__(self, size: int, longest: int) -> None:
        self.size = size
        self._powers, self._inverses = _powers(_BASE, longest), _powers(pow(_BASE, -1, 2**64), longest)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Return the hash of the window at each token, uint64 [len(tokens) - size + 1]; empty if no window fits."""
        if len(tokens) < self.size:
            return np.empty(0, np.uint64)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(scramble(tokens.astype(np.uint64)) * self._powers[: len(tokens)], out=sums[1:])
        windows = sums[self.size :] - sums[: -self.size]
        return windows * self._inverses[: len(windows)]


def _powers(base: int, count: int) -> np.ndarray:
    values = np.full(count, base, np.uint64)
    values[:1] = 1
    return np.cumprod(values, dtype=np.uint64)


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays of the same length."""
    step = 256
    for at in range(0, len(left), step):
        different = left[at : at + step] != right[at : at + step]
        if different.any():
            return at + int(np.argmax(different))
    return len(left)
