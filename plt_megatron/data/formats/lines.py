"""Formats whose documents are lines: any byte range of an uncompressed file can be read on its own.

JSON lines hold one object per line, with the text in one of its fields. In plain text, each file or each line is a
document (`ReadOptions.text_documents`).
"""

from __future__ import annotations

import io
import json
import math
from abc import abstractmethod
from collections.abc import Iterator

from plt_megatron.data.compressed import open_stream
from plt_megatron.data.formats.reader import (
    Document,
    Reader,
    Span,
    check_text,
    conversation_problem,
    not_utf8,
    too_long,
)

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
            if position == 0 and self.is_beginning:
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


class JsonLines(LineReader):
    name = "jsonl"
    suffixes = (".jsonl", ".json", ".ndjson")
    has_fields = True
    has_conversations = True

    def parse(self, number: int, size: int, line: bytes) -> Document:
        try:
            value = json.loads(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            return not_utf8(number, size, error)
        except RecursionError:
            return Document(number, size, None, "broken JSON", "broken JSON (nested too deeply)")
        except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
            if not line.strip():
                return Document(number, size, None, "empty", "empty line")
            return Document(number, size, None, "broken JSON", f"broken JSON ({error})")
        if not isinstance(value, dict):
            return Document(number, size, None, "broken JSON", "broken JSON (the line is not an object)")
        quality = self.options.quality
        judged = quality and quality.judge(number, size, value.get(quality.key))
        if judged:
            return judged
        key = self.options.json_key
        if key not in value:
            return Document(number, size, None, "missing field", f"missing field {key!r}")
        text = value[key]
        if self.options.chat:
            problem = conversation_problem(text)
            if problem:
                return Document(number, size, None, "no conversation", f"field {key!r} {problem}")
            text = json.dumps({"messages": text, "tools": value.get("tools")}, ensure_ascii=False)
        if isinstance(text, str) and b"\\u" in line:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                return Document(number, size, None, "not UTF-8", f"not UTF-8 (lone surrogate in field {key!r})")
        return check_text(number, size, text, key)


class PlainText(LineReader):
    name = "text"
    suffixes = (".txt",)  # and any suffix that no format has

    @property
    def by_line(self) -> bool:
        return self.options.text_documents == "line"

    def parse(self, number: int, size: int, line: bytes) -> Document:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            return not_utf8(number, size, error)
        return check_text(number, size, text)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[Document]:
        if self.by_line:
            yield from super().read(start, end)
        else:
            yield self._read_file()

    def _read_file(self) -> Document:
        limit = self.options.max_document_bytes
        with open_stream(self.path) as stream:
            content = stream.read(limit + 1)
            if len(content) > limit:
                size = len(content)
                while part := stream.read(1 << 20):
                    size += len(part)
                return too_long(1, size, limit)
        try:
            text = content.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            return not_utf8(content.count(b"\n", 0, error.start) + 1, len(content), error)
        return check_text(1, len(content), text)
