"""JSON lines: one object per line, with the text in one of its fields."""

from __future__ import annotations

import json

from plt_megatron.data.documents import Document, check_text, conversation_problem, not_utf8
from plt_megatron.data.formats.lines import LineReader


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
