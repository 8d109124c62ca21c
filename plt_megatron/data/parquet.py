"""Reading documents from Parquet files with pyarrow, an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plt_megatron.data.sources import Document, ReadOptions, Span, check_text
from plt_megatron.errors import UserError

_ROWS = 512  # decoded at a time


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet files needs the package pyarrow: pip install 'plt-megatron[data]'") from error
    return pyarrow


def _open(path: str) -> Any:
    pyarrow = _import_pyarrow()
    try:
        # No pre-buffering and no memory map: a row group is decoded as it is read.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, memory_map=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def row_group_sizes(path: str, column: str) -> list[int]:
    """Bytes on disk of the column in each row group. `UserError` if the file has no such column of strings."""
    pyarrow = _import_pyarrow()
    with _open(path) as file:
        schema = file.schema_arrow
        index = schema.get_field_index(column)
        if index < 0:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
        kind = schema.field(index).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"{path}: column {column!r} holds {kind}, not strings")
        metadata = file.metadata
        position = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
        return [
            metadata.row_group(group).column(position).total_compressed_size for group in range(metadata.num_row_groups)
        ]


def rows_before(path: str, group: int) -> int:
    """Rows in the row groups before `group`."""
    with _open(path) as file:
        return sum(file.metadata.row_group(index).num_rows for index in range(group))


def read_row_groups(span: Span, options: ReadOptions) -> Iterator[Document]:
    """The rows of a span of row groups; a document's `line` is its row in the span, from 1."""
    pyarrow = _import_pyarrow()
    with _open(span.source.path) as file:
        stop = file.metadata.num_row_groups if span.end is None else span.end
        row = 0
        try:
            batches = file.iter_batches(
                _ROWS, row_groups=range(span.start, stop), columns=[options.json_key], use_threads=False
            )
            for batch in batches:
                column = batch.column(0)
                for value in column:
                    row += 1
                    yield _document(row, value, options)
        except (OSError, pyarrow.ArrowException) as error:
            where = f"after row {row} from row group {span.start} on"
            raise UserError(f"{span.source.path}: damaged Parquet file {where} ({_first_line(error)})") from error


def _document(row: int, value: Any, options: ReadOptions) -> Document:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        return Document(row, 0, None, "not UTF-8", reason)
    size = len(text.encode("utf-8")) if text else 0
    if size > options.max_document_bytes:
        reason = f"document of {size} bytes is longer than --max-document-bytes {options.max_document_bytes}"
        return Document(row, size, None, "too long", reason)
    return check_text(row, size, text, options.json_key)
