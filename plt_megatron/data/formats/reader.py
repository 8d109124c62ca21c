"""The interface of a raw format: files are divided into spans, and spans are read as documents.

A `Span` is the unit of reading: a byte range of an uncompressed file (the lines that start in it), a range of row
groups of a Parquet file, or a whole file. Spans of a file are disjoint and cover it, so that several processes can
read one file without communicating. Memory is bounded by the longest document allowed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from plt_megatron.data.compressed import COMPRESSIONS, open_stream
from plt_megatron.data.documents import Document, Quality
from plt_megatron.errors import UserError
from plt_megatron.extras import require

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

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            others = {suffix for reader in READERS.values() for suffix in reader.suffixes}
            assert cls.name not in READERS and not others.intersection(cls.suffixes), f"{cls.name}: already taken"
            READERS[cls.name] = cls

    @property
    def compressed(self) -> bool:
        return Path(self.path).suffix in COMPRESSIONS

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

        Raises `BrokenStream` where a compressed file is damaged, and `UserError` if a file cannot be read.
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
