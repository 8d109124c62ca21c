"""Documents as readers return them, and what makes a line bad."""

from __future__ import annotations

from typing import Any, NamedTuple


class Document(NamedTuple):
    """A document, or a bad line with `text` None and the reason in `kind` and `reason`.

    `line` (of a table: row) counts from 1 within the span, `size` is in bytes of the span.
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
    """The document of a value found at `key`; a bad line unless it is a non-empty string."""
    where = f"field {key!r}" if key else "document"
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Document(line, size, None, "missing field", f"{where} is {kind}, not a string")
    if not text or text.isspace():
        return Document(line, size, None, "empty", f"{where} is empty")
    return Document(line, size, text)
