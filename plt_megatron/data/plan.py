"""Dividing the input of preprocessing into shards.

The division depends on the input and on `shard_bytes` only, not on the number of workers, so that a run may be
resumed with another number of them. A large compressed file can only be read from its start: it is decompressed
here, block by block, into files of the work folder, one per shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from plt_megatron.data.compressed import BrokenStream, compressed_offset, open_stream
from plt_megatron.data.shards import Shard, publish_json
from plt_megatron.data.sources import InputFile, ReadOptions, Span
from plt_megatron.errors import UserError

_COPY = 1 << 20


class Plan:
    """The shards of `sources`. `keys` are those known so far, in the order of the output.

    `done(key)` says whether a shard was finished before; such shards are not yielded.
    """

    def __init__(self, sources: Sequence[InputFile], read: ReadOptions, shard_bytes: int, work: Path) -> None:
        self._sources = sources
        self._read = read
        self._shard_bytes = shard_bytes
        self._work = work
        self.keys: list[str] = []

    def done(self, key: str) -> bool:
        return (self._work / f"{key}.json").exists()

    def shards(self) -> Iterator[Shard]:
        """The shards still to do, in order; `keys` is complete when this is exhausted."""
        group: list[tuple[int, Span, int]] = []  # small spans that share a shard: file, span, bytes on disk
        number = 0
        for file, source in enumerate(self._sources):
            if self._must_spool(source):
                if group:
                    yield from self._undone(number, group)
                    number, group = number + 1, []
                yield from self._spooled(number, file)
                number += 1
                continue
            for span, disk_bytes in self._spans(source):
                group.append((file, span, disk_bytes))
                if sum(size for _, _, size in group) >= self._shard_bytes or len(group) >= 1000:
                    yield from self._undone(number, group)
                    number, group = number + 1, []
        if group:
            yield from self._undone(number, group)

    def _undone(self, number: int, group: list[tuple[int, Span, int]]) -> Iterator[Shard]:
        key = f"{number:06d}"
        self.keys.append(key)
        if not self.done(key):
            files, spans, sizes = zip(*group, strict=True)
            yield Shard(key, spans, files, sizes)

    def _must_spool(self, source: InputFile) -> bool:
        by_line = source.format == "jsonl" or (source.format == "text" and self._read.text_documents == "line")
        return by_line and source.compressed and source.size > self._shard_bytes // 4

    def _spans(self, source: InputFile) -> Iterator[tuple[Span, int]]:
        """The spans of a file that can be read at any place, with their bytes on disk."""
        if source.format == "parquet":
            yield from self._row_groups(source)
        elif source.compressed or (source.format == "text" and self._read.text_documents == "file"):
            yield Span(source), source.size
        else:
            for start in range(0, max(source.size, 1), self._shard_bytes):
                end = min(start + self._shard_bytes, source.size)
                yield Span(source, start, end), end - start

    def _row_groups(self, source: InputFile) -> Iterator[tuple[Span, int]]:
        from plt_megatron.data.parquet import row_group_sizes

        sizes = row_group_sizes(source.path, self._read.json_key)
        whole = max(1, sum(sizes))
        start, pending = 0, 0
        for group, size in enumerate(sizes):
            pending += size
            if pending >= self._shard_bytes or group == len(sizes) - 1:
                yield Span(source, start, group + 1), source.size * pending // whole
                start, pending = group + 1, 0

    def _spooled(self, number: int, file: int) -> Iterator[Shard]:
        """Decompress a file into blocks of whole lines; the shards of those that are not done."""
        source = self._sources[file]
        complete = self._work / f"{number:06d}.blocks"  # written once the number of blocks is known
        if complete.exists():
            blocks = [f"{number:06d}-{block:06d}" for block in range(json.loads(complete.read_text()))]
            if all(map(self.done, blocks)):
                self.keys += blocks
                return
        block, credited, start = 0, 0, 0
        with open_stream(source.path) as stream:
            spool = _Spool(stream, self._shard_bytes)
            while not spool.finished:
                key = f"{number:06d}-{block:06d}"
                path = self._work / f"{key}.spool"
                known = self.done(key)
                size = spool.copy_block(None if known else path)
                offset = compressed_offset(stream)
                self.keys.append(key)
                if not known:
                    span = Span(replace(source, path=str(path), size=size))
                    yield Shard(key, (span,), (file,), (offset - credited,), start, spool.broken)
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
        """Write the next block to `path` (None: nowhere); its size in bytes."""
        with open(path, "wb") if path else io.BytesIO() as target:
            written = 0
            while True:
                chunk = self._rest or self._next()
                self._rest = b""
                if not chunk:
                    self.finished = True
                    return written
                end = chunk.rfind(b"\n") + 1
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


def check_readable(sources: Sequence[InputFile]) -> None:
    """`UserError` if a source cannot be opened: before any work, not hours into it."""
    for source in sources:
        try:
            with open(source.path, "rb"):
                pass
        except OSError as error:
            raise UserError(f"{source.path}: cannot be read ({error.strerror})") from error
