"""Rewrite a configuration file with the current names of its settings, keeping comments and layout if possible."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from plt_megatron.config import yaml_nodes
from plt_megatron.config.upgrade import GONE, flat, new_name, upgrade
from plt_megatron.errors import UserError


def upgrade_text(text: str, name: str) -> str:
    """Return the text with new names of a run's configuration, or of a part of one for others to include.

    Sections without moved settings stay as they are; comments stay with the settings below or beside them.

    Raises:
        UserError: the text is not a YAML document of sections, gives a setting under its old and its new name, or has
            a layout that cannot be rewritten.
    """
    before = yaml_nodes.compose(text, name)
    if before is None:
        return text
    if not isinstance(before, yaml.MappingNode):
        raise UserError(f"{name}: expected `key: value` lines")
    after = upgrade(before)
    for old in filter(new_name, flat(after) or ()):  # None: of a sweep or another file
        raise UserError(f"{name}: {old}, now {new_name(old)}, cannot be rewritten beside the others: do it by hand")
    if after is before:
        return text
    lines = text.splitlines()
    start = before.start_mark.line
    found = [*lines[: _with_comments(lines, start, 0)], *_Writer(text).block(after, before, "")]
    upgraded = "\n".join(found) + "\n"
    is_empty = not yaml_nodes.plain(after) and set(flat(before) or ()) <= GONE.keys()
    if not (is_empty or _says(upgraded, after, name)):
        raise UserError(f"{name}: its layout is too unusual to rewrite: edit it by hand")
    return upgraded


def _says(text: str, expected: yaml.MappingNode, name: str) -> bool:
    try:
        written = yaml_nodes.compose(text, name)
    except UserError:  # no valid YAML
        return False
    return written is not None and yaml_nodes.plain(written) == yaml_nodes.plain(expected)


def _with_comments(lines: list[str], line: int, end: int) -> int:
    """Return the first line of the comments right above a line, but not above line `end`."""
    while line > end and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


class _Writer:
    """Writes sections of a document, reusing lines and texts of another."""

    def __init__(self, text: str) -> None:
        self._text, self._lines = text, text.splitlines()

    def block(self, section: yaml.MappingNode, old: yaml.Node | None, indent: str) -> Iterator[str]:
        """Yield the lines of a section in block style."""
        former = {key.value: (key, value) for key, value in old.value} if isinstance(old, yaml.MappingNode) else {}
        if former and isinstance(old, yaml.MappingNode) and not old.flow_style:
            indent = old.value[0][0].start_mark.column * " "
        for key, value in section.value:
            before = former.get(key.value)
            if before is not None and _same(before[1], value):
                yield from self._untouched(old, before[0])
                continue
            if isinstance(value, yaml.MappingNode) and value.value:
                name, inner = before if before and isinstance(before[1], yaml.MappingNode) else (None, None)
                if name and inner and inner.flow_style:
                    self._refuse_comments(inner)
                    yield f"{indent}{key.value}: {yaml_nodes.to_text(value)}{self._beside(inner)}"
                    continue
                yield from self._comments(name, indent)
                yield f"{indent}{key.value}:{self._beside(name) if name else ''}"
                yield from self.block(value, inner, indent + "  ")
            else:
                yield from self._comments(value, indent)
                yield f"{indent}{key.value}: {yaml_nodes.to_text(value)}{self._beside(value)}"
        if isinstance(old, yaml.MappingNode) and not old.flow_style:
            yield from self._below(old, section)

    def _below(self, old: yaml.MappingNode, section: yaml.MappingNode) -> list[str]:
        """Return what follows a section's last setting, unless that has been written with it."""
        (key, last), end = old.value[-1], self._end(old)
        entry = next((value for name, value in section.value if name.value == key.value), None)
        is_block = isinstance(last, yaml.MappingNode) and not last.flow_style
        if entry is not None and (_same(last, entry) or (is_block and isinstance(entry, yaml.MappingNode))):
            return []
        first = end
        while self._lines[first - 1].lstrip()[:1] in ("", "#"):
            first -= 1
        return self._lines[first:end]

    def _untouched(self, section: yaml.Node | None, key: yaml.ScalarNode) -> list[str]:
        """Return the lines of a setting with the comments above it, up to those of the next one."""
        assert isinstance(section, yaml.MappingNode)
        starts = [each.start_mark.line for each, _ in section.value]
        number = starts.index(key.start_mark.line)
        end = self._end(section) if number + 1 == len(starts) else starts[number + 1]
        first = _with_comments(self._lines, starts[number], starts[number - 1] + 1 if number else 0)
        last = end if number + 1 == len(starts) else _with_comments(self._lines, end, starts[number] + 1)
        return self._lines[first:last]

    def _end(self, section: yaml.MappingNode) -> int:
        """Return the line after a section's last one and the comments below it that are not the next setting's."""
        mark = section.end_mark
        is_last = mark.index >= len(self._text)
        return len(self._lines) if is_last else _with_comments(self._lines, mark.line, section.start_mark.line)

    def _comments(self, node: yaml.Node | None, indent: str) -> list[str]:
        if node is None or not self._is_first(node):
            return []
        line = node.start_mark.line
        return [indent + text.strip() for text in self._lines[_with_comments(self._lines, line, 0) : line]]

    def _refuse_comments(self, braces: yaml.MappingNode) -> None:
        """Raise `UserError` if there are comments between braces, which are rewritten as one line."""
        for line in self._text[braces.start_mark.index : braces.end_mark.index].splitlines()[:-1]:
            if re.search(r"(^|\s)#", line):
                raise UserError(f"{yaml_nodes.where(braces)}: comments between braces would be lost: edit it by hand")

    def _is_first(self, node: yaml.Node) -> bool:
        """Return whether no other setting precedes the node in its line."""
        before = self._lines[node.start_mark.line][: node.start_mark.column]
        return "{" not in before and before.count(":") <= 1

    def _beside(self, node: yaml.Node) -> str:
        rest = "".join(self._lines[node.end_mark.line :][:1])[node.end_mark.column :].lstrip(": \t")
        return f"  {rest}" if rest.startswith("#") else ""


def _same(one: yaml.Node, other: yaml.Node) -> bool:
    """Return whether two nodes hold the same value nodes."""
    if not isinstance(one, yaml.MappingNode) or not isinstance(other, yaml.MappingNode):
        return one is other
    return [*(flat(one) or {}).items()] == [*(flat(other) or {}).items()]  # a node equals only itself
