"""Formats whose documents are lines: any byte range of an uncompressed file can be read on its own."""

from __future__ import annotations

import io
import math
from abc import abstractmethod
from collections.abc import Iterator

from plt_megatron.data.compressed import open_stream
from plt_megatron.data.documents import Document, too_long
from plt_megatron.data.formats.reader import Reader, Span

BOM = b"\xef\xbb\xbf"


class LineReader(Reader):
    """Reads lines; a subclass parses them. A span contains the lines whose first byte is in it."""

    @abstractmethod
    def parse(self, number: int, size: int, line: bytes) -> Document:
        """Parse a line, given with its line ending. `number` counts from 1; `size` is the line's size in bytes."""

    @property
    def by_line(self) -> bool:
        return True

    def spans(self, size: int) -> Iterator[Span]:
        if self.compressed or not self.by_line:
            yield from super().spans(size)
            return
        for start in range(0, max(self.size, 1), size):
            end = min(start + size, self.size)
            yield Span(self, start, end, end - start)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[Document]:
        with open_stream(self.path) as stream:
            yield from self._lines(stream, start, math.inf if end is None else end)

    def lines_before(self, start: int) -> int:
        lines, left = min(start, 1), start - 1
        with open_stream(self.path) as stream:
            while left > 0 and (block := stream.read(min(left, 1 << 20))):
                lines += block.count(b"\n")
                left -= len(block)
        return lines

    def _lines(self, stream: io.BufferedReader, position: int, end: float) -> Iterator[Document]:
        limit = self.options.max_document_bytes
        if position:  # the line that straddles the start belongs to the span before
            stream.seek(position - 1)
            position += _rest_of_line(stream) - 1
        number = 0
        while position < end and (line := stream.readline(limit + 2)):
            size = len(line)
            whole = line.endswith(b"\n")
            too_large = size - whole > limit
            if not whole:
                size += _rest_of_line(stream)
            if position == 0:
                line = line.removeprefix(BOM)
            number += 1
            position += size
            yield too_long(number, size, limit) if too_large else self.parse(number, size, line)


def _rest_of_line(stream: io.BufferedReader) -> int:
    """Skip to the end of the line and return the bytes skipped. A line may be larger than memory."""
    size = 0
    while part := stream.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size
