"""Plain text: each file is a document, or each line is (`ReadOptions.text_documents`)."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.data.compressed import open_stream
from plt_megatron.data.documents import Document, check_text, not_utf8, too_long
from plt_megatron.data.formats.lines import BOM, LineReader


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
