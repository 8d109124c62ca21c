"""Divide the input of preprocessing into shards.

The division depends only on the input and on `shard_bytes`, not on the number of workers, which may change when a run
is resumed. A large compressed file can only be read from its start: it is decompressed here, block by block, into
files in the work folder, one per shard.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from plt_megatron.data.compressed import BrokenStream, compressed_offset, open_stream
from plt_megatron.data.formats import Reader, Span
from plt_megatron.data.shards import Shard, publish_json

_COPY = 1 << 20


class Plan:
    """The shards of `readers`, or of the portion of one machine: number `portion[0]`, from 1, of `portion[1]`.

    Each machine gets consecutive spans of about the same number of bytes; a file that must be decompressed from its
    start goes to one machine. `keys` are the shards known so far, in the order of the output. `done(key)` tells whether
    a shard was finished before: such shards are not yielded.
    """

    def __init__(
        self, readers: Sequence[Reader], shard_bytes: int, work: Path, portion: tuple[int, int] = (1, 1)
    ) -> None:
        self._readers = readers
        self._shard_bytes = shard_bytes
        self._work = work
        self._portion = portion
        self.keys: list[str] = []

    @cached_property
    def _all(self) -> list[tuple[int, Span | None, int]]:
        """(file number, span or None for a file that is decompressed here, bytes on disk) of all machines, in order."""
        units: list[tuple[int, Span | None, int]] = []
        for file, reader in enumerate(self._readers):
            if reader.by_line and reader.compressed and reader.size > self._shard_bytes // 4:
                units.append((file, None, reader.size))
            else:
                units += [(file, span, span.disk_bytes) for span in reader.spans(self._shard_bytes)]
        return units

    @cached_property
    def _own(self) -> list[tuple[int, Span | None, int]]:
        """Those of this machine."""
        total = max(1, sum(size for *_, size in self._all))
        own, before = [], 0
        for file, span, size in self._all:
            if min(1 + self._portion[1] * before // total, self._portion[1]) == self._portion[0]:
                own.append((file, span, size))
            before += size
        return own

    def files(self) -> set[int]:
        """Return the numbers of the files that this machine reads."""
        return {file for file, *_ in self._own}

    def whole_files(self) -> list[int]:
        """Return the numbers of the files that this machine alone reads."""
        own, total = (Counter(file for file, *_ in units) for units in (self._own, self._all))
        return [file for file, spans in own.items() if spans == total[file]]

    def bytes(self) -> int:
        """Return this machine's share of the input, in bytes on disk."""
        return sum(size for *_, size in self._own)

    def first(self) -> tuple[int, int]:
        """Return the number of the file this machine begins with, and the place in it, in the reader's unit."""
        file, span, _ = next(iter(self._own), (0, None, 0))
        return file, 0 if span is None else span.start

    def done(self, key: str) -> bool:
        return (self._work / f"{key}.json").exists()

    def shards(self) -> Iterator[Shard]:
        """Yield the shards still to do, in order; `keys` is complete when this is exhausted."""
        for number, unit in enumerate(self._grouped()):
            yield from self._spooled(number, unit) if isinstance(unit, int) else self._undone(number, unit)

    def _grouped(self) -> Iterator[int | list[tuple[int, Span]]]:
        """Yield the number of each file to decompress, and groups of spans that share a shard, each with its file's."""
        group: list[tuple[int, Span]] = []
        for file, span, _ in self._own:
            full = sum(span.disk_bytes for _, span in group) >= self._shard_bytes or len(group) >= 1000
            if group and (full or span is None):
                yield group
                group = []
            if span is None:
                yield file
            else:
                group.append((file, span))
        if group:
            yield group

    def _undone(self, number: int, group: list[tuple[int, Span]]) -> Iterator[Shard]:
        key = f"{number:06d}"
        self.keys.append(key)
        if not self.done(key):
            files, spans = zip(*group, strict=True)
            yield Shard(key, spans, files)

    def _spooled(self, number: int, file: int) -> Iterator[Shard]:
        """Decompress a file into blocks of whole lines, and yield the shards of those that are not done."""
        reader = self._readers[file]
        complete = self._work / f"{number:06d}.blocks"  # written once the number of blocks is known
        if complete.exists():
            blocks = [f"{number:06d}-{block:06d}" for block in range(json.loads(complete.read_text()))]
            if all(map(self.done, blocks)):
                self.keys += blocks
                return
        block, credited, start = 0, 0, 0
        with open_stream(reader.path) as stream:
            spool = _Spool(stream, self._shard_bytes)
            while not spool.finished:
                key = f"{number:06d}-{block:06d}"
                path = self._work / f"{key}.spool"
                known = self.done(key)
                size = spool.copy_block(None if known else path)
                offset = compressed_offset(stream)
                self.keys.append(key)
                if not known:
                    part = replace(reader, path=str(path), size=size, is_beginning=block == 0)
                    span = Span(part, disk_bytes=offset - credited)
                    yield Shard(key, (span,), (file,), start, spool.broken)
                credited, block, start = offset, block + 1, start + size
        publish_json(complete, block)


class _Spool:
    """Cuts a stream into blocks of at least `size` bytes that end at a line's end, without holding one in memory."""

    def __init__(self, stream: io.BufferedReader, size: int) -> None:
        self._stream = stream
        self._size = size
        self._rest = b""
        self.finished = False
        self.broken = ""

    def copy_block(self, path: Path | None) -> int:
        """Write the next block to `path` (None: discard it), and return its size in bytes."""
        with open(path, "wb") if path else io.BytesIO() as target:
            written = whole = 0  # whole: up to the end of the last line
            while True:
                chunk = self._rest or self._next()
                self._rest = b""
                if not chunk:
                    self.finished = True
                    if self.broken:  # in the middle of a line, which is lost
                        target.truncate(written := whole)
                    return written
                end = chunk.rfind(b"\n") + 1
                whole = written + end if end else whole
                if written + len(chunk) >= self._size and end:
                    target.write(chunk[:end])
                    self._rest = chunk[end:]
                    return written + end
                written += target.write(chunk) if path else len(chunk)

    def _next(self) -> bytes:
        try:
            return self._stream.read1(_COPY)
        except BrokenStream as error:
            self.broken = str(error)
            return b""
