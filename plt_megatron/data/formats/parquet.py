"""Parquet, read with pyarrow: the text is a string column, and a span is a range of row groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from plt_megatron.data.compressed import BrokenStream
from plt_megatron.data.formats.reader import Document, Reader, ReadOptions, Span, check_text, not_utf8, too_long
from plt_megatron.errors import UserError, first_line

_ROWS = 512  # decoded at a time


class Parquet(Reader):
    name = "parquet"
    suffixes = (".parquet",)
    requires = "pyarrow"
    has_fields = True

    def spans(self, size: int) -> Iterator[Span]:
        groups = self._group_sizes()
        whole = max(1, sum(groups))
        start, pending = 0, 0
        for group, group_size in enumerate(groups):
            pending += group_size
            if pending >= size or group == len(groups) - 1:
                yield Span(self, start, group + 1, self.size * pending // whole)
                start, pending = group + 1, 0

    def read(self, start: int = 0, end: int | None = None) -> Iterator[Document]:
        import pyarrow

        row = 0
        try:
            for row, (value, number) in enumerate(self._values(start, end), 1):
                yield _read_value(row, value, number, self.options)
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None) is not None:  # the disk's, not the data's
                raise
            groups = f"row groups {start} to {'the last' if end is None else end - 1}"
            raise BrokenStream(f"broken Parquet data after row {row} of {groups} ({first_line(error)})") from error

    def _values(self, start: int, end: int | None) -> Iterator[tuple[Any, Any]]:
        """Yield each row's text and quality (None without a quality filter)."""
        with self._open() as file:
            groups = range(start, file.metadata.num_row_groups if end is None else end)
            text, quality = self.options.json_key, self.options.quality
            columns = [text, quality.key] if quality else [text]
            for batch in file.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False):
                numbers = batch.column(quality.key) if quality else itertools.repeat(None)
                yield from zip(batch.column(text), numbers, strict=False)

    def lines_before(self, start: int) -> int:
        with self._open() as file:
            return sum(file.metadata.row_group(group).num_rows for group in range(start))

    def place(self, start: int, line: int) -> str:
        return f"row {super().place(start, line)}"

    @property
    def text_size(self) -> int:
        return sum(self._group_sizes("total_uncompressed_size"))

    def check(self) -> None:
        super().check()
        self._group_sizes()

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            # No pre-buffering and no memory map: a row group is decoded as it is read.
            return pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, memory_map=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{self.path}: not a readable Parquet file ({first_line(error)})") from error

    def _group_sizes(self, size: str = "total_compressed_size") -> list[int]:
        """Return the text column's bytes, on disk unless said otherwise, in each row group. Raises `UserError` if a
        column is unusable."""
        with self._open() as file:
            column = self.options.json_key
            _check_column(self.path, file.schema_arrow, column, "strings")
            if self.options.quality:
                _check_column(self.path, file.schema_arrow, self.options.quality.key, "numbers")
            metadata = file.metadata
            position = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            return [getattr(group.column(position), size) for group in groups]


def _check_column(path: str, schema: Any, column: str, wanted: str) -> None:
    """Raise `UserError` unless an Arrow schema has a column of this name that holds `wanted`, strings or numbers."""
    from pyarrow import types

    index = schema.get_field_index(column)
    if index < 0:
        raise UserError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
    kind = schema.field(index).type
    if wanted == "numbers":
        fits = types.is_integer(kind) or types.is_floating(kind)
    else:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        fits = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not fits:
        raise UserError(f"{path}: column {column!r} holds {kind}, not {wanted}")


def _read_value(row: int, value: Any, number: Any, options: ReadOptions) -> Document:
    """Return the document of an Arrow scalar. `number`: the scalar of its quality, read only if it is filtered by."""
    judged = options.quality and options.quality.judge(row, 0, number.as_py())
    if judged:
        return judged
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return not_utf8(row, 0, error)
    size = len(text.encode("utf-8")) if text else 0
    if size > options.max_document_bytes:
        return too_long(row, size, options.max_document_bytes)
    return check_text(row, size, text, options.json_key)
