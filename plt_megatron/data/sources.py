"""Reading documents from JSONL (plain, .gz, .zst), Parquet and plain text, with every bad line accounted for.

A `Span` is the unit of reading: a byte range of an uncompressed file (the lines that start in it), a range of row
groups of a Parquet file, or a whole file. Spans of a file are disjoint and cover it, so that several processes can
read one file without talking to each other. Memory is bounded by the longest line allowed.
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plt_megatron.data.compressed import COMPRESSIONS, open_stream
from plt_megatron.errors import UserError

FORMATS = ("jsonl", "parquet", "text")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """An input file."""

    path: str
    format: str  # one of FORMATS
    size: int  # bytes on disk

    @property
    def compressed(self) -> bool:
        return Path(self.path).suffix in COMPRESSIONS


@dataclass(frozen=True)
class Span:
    """A part of a source. `end` is exclusive: bytes, or row groups for Parquet; None: the whole file."""

    source: InputFile
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files."""

    json_key: str = "text"  # the JSONL field or Parquet column
    text_documents: str = "file"  # plain text: one document per "file" or per "line"
    max_document_bytes: int = 16 << 20  # a longer line (or text file, or Parquet value) is a bad line


class Document(NamedTuple):
    """A document, or a bad line: then `text` is None and `kind` and `reason` say why.

    `line` (Parquet: row) counts from 1 within the span, `size` is in bytes of the span.
    """

    line: int
    size: int
    text: str | None
    kind: str = ""
    reason: str = ""


def expand_sources(patterns: Sequence[str], format: str | None = None) -> list[InputFile]:
    """The files behind paths and globs (`**` included), each once, in the order given, a glob's sorted by name.

    The format follows from the suffix unless `format` is given; an unknown suffix is plain text.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            what = "is a folder: name its files, as in folder/*.jsonl" if found else "matches no file"
            raise UserError(f"input {pattern!r} {what}")
        paths.update(dict.fromkeys(files))
    return [InputFile(path, format or _format_of(path), os.path.getsize(path)) for path in paths]


def _format_of(path: str) -> str:
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1] if suffixes else "", "text")


def read_span(span: Span, options: ReadOptions) -> Iterator[Document]:
    """The documents and bad lines of a span, in order.

    Raises `BrokenStream` where a compressed file is damaged, and `UserError` if a file cannot be opened.
    """
    if span.source.format == "parquet":
        from plt_megatron.data.parquet import read_row_groups

        yield from read_row_groups(span, options)
    elif span.source.format == "text" and options.text_documents == "file":
        yield _read_text_file(span.source.path, options.max_document_bytes)
    else:
        parse = _parse_json if span.source.format == "jsonl" else _parse_text
        with open_stream(span.source.path) as stream:
            yield from _read_lines(stream, span, options, parse)


def _read_lines(stream: io.BufferedReader, span: Span, options: ReadOptions, parse: Any) -> Iterator[Document]:
    limit = options.max_document_bytes
    position = span.start
    end = math.inf if span.end is None else span.end
    if span.start:  # the line that straddles the start belongs to the span before
        stream.seek(span.start - 1)
        position -= 1
        while position < end and (part := stream.readline(1 << 20)):
            position += len(part)
            if part.endswith(b"\n"):
                break
    number = 0
    while position < end:
        line = stream.readline(limit + 2)
        if not line:
            break
        size = len(line)
        too_long = size - line.endswith(b"\n") > limit
        if not line.endswith(b"\n"):
            while part := stream.readline(1 << 20):
                size += len(part)
                if part.endswith(b"\n"):
                    break
        if position == 0:
            line = line.removeprefix(_BOM)
        number += 1
        position += size
        yield _too_long(number, size, limit) if too_long else parse(number, size, line, options.json_key)


def _too_long(line: int, size: int, limit: int) -> Document:
    reason = f"document of {size} bytes is longer than --max-document-bytes {limit}"
    return Document(line, size, None, "too long", reason)


def _not_utf8(line: int, size: int, error: UnicodeDecodeError) -> Document:
    reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
    return Document(line, size, None, "not UTF-8", reason)


def _parse_text(number: int, size: int, line: bytes, key: str) -> Document:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return _not_utf8(number, size, error)
    return check_text(number, size, text)


def _parse_json(number: int, size: int, line: bytes, key: str) -> Document:
    try:
        value = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _not_utf8(number, size, error)
    except RecursionError:
        return Document(number, size, None, "broken JSON", "broken JSON (nested too deeply)")
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        if not line.strip():
            return Document(number, size, None, "empty", "empty line")
        return Document(number, size, None, "broken JSON", f"broken JSON ({error})")
    if not isinstance(value, dict):
        return Document(number, size, None, "broken JSON", "broken JSON (the line is not an object)")
    if key not in value:
        return Document(number, size, None, "missing field", f"missing field {key!r}")
    text = value[key]
    if isinstance(text, str) and b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Document(number, size, None, "not UTF-8", f"not UTF-8 (lone surrogate in field {key!r})")
    return check_text(number, size, text, key)


def check_text(number: int, size: int, text: Any, key: str | None = None) -> Document:
    """The document of a value found at `key`: a bad line unless it is a string with something in it."""
    where = f"field {key!r}" if key else "document"
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Document(number, size, None, "missing field", f"{where} is {kind}, not a string")
    if not text or text.isspace():
        return Document(number, size, None, "empty", f"{where} is empty")
    return Document(number, size, text)


def _read_text_file(path: str, limit: int) -> Document:
    with open_stream(path) as stream:
        content = stream.read(limit + 1)
        if len(content) > limit:
            size = len(content)
            while part := stream.read(1 << 20):
                size += len(part)
            return _too_long(1, size, limit)
    try:
        text = content.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(content.count(b"\n", 0, error.start) + 1, len(content), error)
    return check_text(1, len(content), text)
