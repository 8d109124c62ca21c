"""The interface of a raw format: files are divided into spans, and spans are read as documents.

A `Span` is the unit of reading: a byte range of an uncompressed file (the lines that start in it), a range of row
groups of a Parquet file, or a whole file. Spans of a file are disjoint and cover it, so that several processes can
read one file without communicating. Memory is bounded by the longest document allowed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from plt_megatron.data.compressed import compression_of, open_stream
from plt_megatron.errors import UserError
from plt_megatron.extras import require

LEFT_OUT = "left out"


class Document(NamedTuple):
    """A document, or a bad line with `text` None and the reason in `kind` and `reason`.

    `line` (of a table: row) counts from 1 within the span; `size` is in bytes of the span. `kind` LEFT_OUT marks a
    document that the options leave out, not a bad line.

    The `text` of a conversation is JSON: `{"messages": [...], "tools": [...] or null}`.
    """

    line: int
    size: int
    text: str | None
    kind: str = ""
    reason: str = ""


def too_long(line: int, size: int, limit: int) -> Document:
    reason = f"document of {size} bytes is longer than --max-document-bytes {limit}"
    return Document(line, size, None, "too long", reason)


def not_utf8(line: int, size: int, error: UnicodeDecodeError) -> Document:
    reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
    return Document(line, size, None, "not UTF-8", reason)


def check_text(line: int, size: int, text: Any, key: str | None = None) -> Document:
    """Return the document for the value at `key`, or a bad line unless it is a non-empty string."""
    where = f"field {key!r}" if key else "document"
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Document(line, size, None, "missing field", f"{where} is {kind}, not a string")
    if not text or text.isspace():
        return Document(line, size, None, "empty", f"{where} is empty")
    return Document(line, size, text)


def conversation_problem(value: Any) -> str | None:
    """Return what is wrong with the `messages` of a line, or None."""
    if not isinstance(value, list) or not value:
        return "is not a list of messages"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is not an object with a role"
        if "content" not in message and "tool_calls" not in message:
            return f"message {number} has no content"
    if all(message["role"] != "assistant" for message in value):
        return "has no assistant message, so there is nothing to learn"
    return None


@dataclass(frozen=True)
class Quality:
    """A quality filter: keep documents whose number in field or column `key` is in [low, high); None: unbounded."""

    key: str
    low: float | None = None
    high: float | None = None

    def judge(self, line: int, size: int, value: Any) -> Document | None:
        """Return a bad line if `value` is not a number, a left-out document if it is out of range, else None."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
            found = "null" if value is None else repr(value)[:40]
            return Document(line, size, None, "no quality", f"field {self.key!r} is {found}, not a number")
        inside = (self.low is None or value >= self.low) and (self.high is None or value < self.high)
        return None if inside else Document(line, size, None, LEFT_OUT)


_COMPRESSION = 4  # assumed expansion of compressed text
READERS: dict[str, type[Reader]] = {}  # by name; each class registers itself


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading documents from files."""

    json_key: str = "text"  # the field or column with the text
    text_documents: str = "file"  # plain text: one document per "file" or per "line"
    max_document_bytes: int = 16 << 20  # a longer line (or text file, or value) is a bad line
    quality: Quality | None = None  # None: all documents
    chat: bool | None = None  # json_key holds a conversation's messages; a document's text is the conversation as JSON


@dataclass(frozen=True)
class Span:
    """A part of a file. `start` and `end` (exclusive; None: the file's end) are in the reader's unit, such as bytes;
    `disk_bytes` is for progress."""

    reader: Reader
    start: int = 0
    end: int | None = None
    disk_bytes: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield the documents and bad lines of the span, in order; raises like `Reader.read`."""
        return self.reader.read(self.start, self.end)


@dataclass(frozen=True)
class Reader(ABC):
    """One file of a raw format. A subclass that has a `name` is registered.

    Class attributes:
        name: the format's name in `--format`.
        suffixes: file suffixes that select the format, without those of a compression.
        requires: a module of the extra `data` that it imports.
        has_fields: whether documents have fields besides their text, such as a quality.
        has_conversations: whether `chat` is supported.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[str | None] = None
    has_fields: ClassVar[bool] = False
    has_conversations: ClassVar[bool] = False

    path: str
    size: int  # bytes on disk
    options: ReadOptions
    is_beginning: bool = True  # of a raw file, rather than a later part

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            place = (cls.__module__, cls.__qualname__)  # of a class that is defined again, as in a notebook: it may be
            others = [each for each in READERS.values() if (each.__module__, each.__qualname__) != place]
            taken = {name for each in others for name in (each.name, *each.suffixes)}
            assert not taken.intersection((cls.name, *cls.suffixes)), f"{cls.name}: already taken"
            READERS[cls.name] = cls

    @property
    def compressed(self) -> bool:
        return compression_of(self.path) is not None

    @property
    def text_size(self) -> int:
        """About how many bytes of text the file holds."""
        return self.size * (_COMPRESSION if self.compressed else 1)

    @property
    def by_line(self) -> bool:
        """Whether documents are lines, so that any byte range of the decompressed file is a span."""
        return False

    def spans(self, size: int) -> Iterator[Span]:
        """Cut the file into spans of about `size` bytes on disk. By default the whole file is one span."""
        yield Span(self, disk_bytes=self.size)

    @abstractmethod
    def read(self, start: int = 0, end: int | None = None) -> Iterator[Document]:
        """Yield the documents and bad lines of a span, in order.

        Raises `BrokenStream` where a compressed or Parquet file is damaged, and `UserError` if a file cannot be read.
        """

    def lines_before(self, start: int) -> int:
        """Count the lines (Parquet: rows) before the span that begins at `start`."""
        return 0

    def place(self, start: int, line: int) -> str:
        """Return the place in the file, for messages, of line `line` of the span that begins at `start`."""
        return str(self.lines_before(start) + line)

    def check(self) -> None:
        """Raise `UserError` if the file cannot be opened, lacks a requested field, or needs a missing package."""
        if self.options.quality and not self.has_fields:
            raise UserError(f"{self.path}: {self.name} files have no field {self.options.quality.key!r}")
        if self.options.chat and not self.has_conversations:
            raise UserError(f"{self.path}: --chat reads JSON lines, not {self.name} files")
        if self.requires:
            require(f"reading {self.name} files", self.requires)
        open_stream(self.path).close()
