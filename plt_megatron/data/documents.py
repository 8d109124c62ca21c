"""Documents as readers return them, and the checks that make a line bad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            found = "null" if value is None else repr(value)[:40]
            return Document(line, size, None, "no quality", f"field {self.key!r} is {found}, not a number")
        inside = (self.low is None or value >= self.low) and (self.high is None or value < self.high)
        return None if inside else Document(line, size, None, LEFT_OUT)
