"""Split text where no piece of a vocabulary can cross, and encode the parts through a cache.

A BPE merge joins neighbors into a piece of the vocabulary. Where no piece spans the border between two characters,
nothing on the left ever merges with anything on the right, so encoding the two sides separately and joining the ids
gives exactly the ids of the whole. Words repeat, so a dictionary then does most of the encoding: about three times
sentencepiece's own rate on one core, with identical ids.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

# Sentencepiece writes a space as U+2581 and cannot tell the two apart afterwards, so neither do these patterns.
# In all of them a border depends on nothing but the two characters around it: that makes the check in
# `crosses_no_piece` (each piece is one segment) sufficient for any text.
_SPACE = " \u2581"
COARSE = re.compile(rf"\n|[{_SPACE}]++[^{_SPACE}\n]*+|[^{_SPACE}\n]++")
# Letters, approximately: which characters count as such affects only speed.
_LETTERS = ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x1FFF), (0x2C00, 0x2DFF), (0x3040, 0xD7FF), (0xF900, 0xFDFF))
_CUT = re.compile(rf"\n|(?<=[^{_SPACE}\n])[{_SPACE}]")

_ENTRIES = 400_000  # in the cache, about 80 MB
_LONGEST_CACHED = 48  # characters; longer segments rarely recur
_CHUNK = 1 << 20  # characters whose segments are in memory at once


def crosses_no_piece(pattern: re.Pattern[str], pieces: Sequence[str]) -> bool:
    """Return whether `pattern` cuts no piece of the vocabulary in two."""
    return all(len(pattern.findall(piece)) == 1 for piece in pieces if piece)


def word_pattern(pieces: Sequence[str]) -> re.Pattern[str] | None:
    """Return the finest pattern that cuts no piece of the vocabulary: words, single digits, runs of everything else.

    Characters at a border inside a piece become "glue", at which no word ends or begins. None if that is not enough.
    """
    glue: set[str] = set()
    while True:
        pattern = _compile_words(glue)
        cut = [segments for piece in pieces if len(segments := pattern.findall(piece)) > 1]
        if not cut:
            return pattern
        for segments in cut:
            for left, right in itertools.pairwise(segments):
                pair = (left[-1], right[0])
                if glue.intersection(pair):
                    continue
                sticky = max(pair, key=lambda character: (not character.isascii(), not character.isalnum()))
                if (sticky.isascii() and sticky.isalnum()) or sticky in _SPACE + "\n":
                    return None
                glue.add(sticky)


def _compile_words(glue: set[str]) -> re.Pattern[str]:
    letters = "".join(f"{_escape(first)}-{_escape(last)}" for first, last in _without(_LETTERS, glue))
    joint = "".join(_escape(ord(character)) for character in sorted(glue))
    word = rf"[{letters}]++|[0-9]|[^{_SPACE}\n0-9{letters}{joint}]++"
    if joint:
        word = rf"(?:{word})(?:[{joint}]++(?:{word})?+)*+|(?:[{joint}]++(?:{word})?+)++"
    return re.compile(rf"\n|[{_SPACE}]*+(?:{word})|[{_SPACE}]++")


def _escape(code: int) -> str:
    return f"\\U{code:08x}"


def _without(ranges: Sequence[tuple[int, int]], characters: set[str]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of code points without those of `characters`."""
    codes = sorted(map(ord, characters))
    for first, last in ranges:
        for code in codes:
            if first <= code <= last:
                if first < code:
                    yield first, code - 1
                first = code + 1
        if first <= last:
            yield first, last


def chunks(text: str, size: int = _CHUNK) -> Iterator[str]:
    """Yield parts of `text` of about `size` characters, cut only at borders of `COARSE` (longer if there are none)."""
    start = 0
    while len(text) - start > size:
        match = _CUT.search(text, start + size)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:] if start else text


class _Cache(dict[str, bytes]):
    """Segment -> its ids as bytes; emptied when full, so that memory does not grow with the corpus."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, segment: str) -> bytes:
        ids = self._encode(segment)
        if len(segment) <= _LONGEST_CACHED:
            if len(self) >= _ENTRIES:
                self.clear()
            self[segment] = ids
        return ids


class SegmentEncoder:
    """Encodes text segment by segment; `encode_segment` turns one into the bytes of its ids.

    `symbols` are the user-defined symbols, which are found before anything else and never merge.
    Exact only if `crosses_no_piece(pattern, pieces)`.
    """

    def __init__(
        self, encode_segment: Callable[[str], bytes], pattern: re.Pattern[str], symbols: Sequence[str] = ()
    ) -> None:
        self._encode_segment = encode_segment
        self._cache = _Cache(encode_segment)
        self._pattern = pattern
        longest_first = sorted(symbols, key=len, reverse=True)
        self._symbols = re.compile("|".join(map(re.escape, longest_first))) if symbols else None

    def encode(self, text: str) -> bytes:
        """Return the ids of `text` as bytes."""
        if self._symbols is None:
            return self._plain(text)
        parts, start = [], 0
        for match in self._symbols.finditer(text):
            parts += [self._plain(text[start : match.start()]), self._encode_segment(match.group())]
            start = match.end()
        return b"".join([*parts, self._plain(text[start:])])

    def _plain(self, text: str) -> bytes:
        get, find = self._cache.__getitem__, self._pattern.findall
        if len(text) <= _CHUNK:
            return b"".join(map(get, find(text)))
        # A chunk of the text may still be one long run without a border; its segments are then taken one by one.
        return b"".join(
            b"".join(map(get, find(chunk) if len(chunk) <= 2 * _CHUNK else _lazily(self._pattern, chunk)))
            for chunk in chunks(text)
        )


def _lazily(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    return (match.group() for match in pattern.finditer(text))
