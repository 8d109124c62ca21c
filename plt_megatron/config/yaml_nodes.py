"""YAML parsed into nodes that know their file and line, and layers of them: later layers override earlier ones.

Scalars are read as in YAML 1.2, `1e-4` as a number and `yes` as a string, but digits may have `_`, whole numbers in
exponent form are integers, and there are no octal or hexadecimal ones.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from plt_megatron.config.fields import either, field_types, section_of
from plt_megatron.errors import UserError, file_error, first_line

OVERRIDE = "override "  # name prefix of nodes from the command line, which has no lines
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FLOW_MARKS = re.compile(r"[,\[\]{}]")
_MOST_VALUES = 1_000_000
_LONGEST = 60  # characters of a value that a message quotes


# Use libyaml if PyYAML was built with it, as its wheels are: a sweep reads and writes hundreds of files.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes strings that only this module reads as numbers."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        quoted = _INT.fullmatch(data) or _FLOAT.fullmatch(data)
        node: yaml.ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quoted else None)
        return node


_Dumper.add_representer(str, _Dumper.represent_str)


class _Named(io.StringIO):
    """A text with a name, which the marks of its nodes carry."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def read_text(path: Path) -> str:
    """Read a file's text. Raises `UserError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise file_error(f"cannot read {path}: {error.strerror or error}", error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def dump(values: object) -> str:
    """Return YAML text of plain values, keys in their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def load(text: str) -> object:
    """Return the plain values of YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_LOADER)


def compose(text: str, name: str) -> yaml.Node | None:
    """Parse one YAML document into nodes whose marks carry `name`. None if it is empty."""
    try:
        node = yaml.compose(_Named(text, name), Loader=_LOADER)
        _count_values(node, {})
        return typing.cast("yaml.Node | None", node)
    except RecursionError as error:
        raise UserError(f"{name}: nested too deeply") from error
    except UnicodeEncodeError as error:  # command-line bytes that are not text
        raise UserError(f"{name!a}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = where_mark(mark) if mark else name
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{at}: not valid YAML: {problem}") from error


def _count_values(node: object, counts: dict[int, int]) -> int:
    """Return how many values a node has, those of its aliases included; `counts` has those of other nodes, by their id.

    Raises `UserError` if an alias stands for a node that it lies in, there are too many to read, or one has a NUL.
    """
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise UserError(f"{where(node)}: {describe(node)} has a NUL character, which no path or name can have")
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = 0  # it is being counted
        parts = (part if isinstance(part, tuple) else (part,) for part in node.value)
        counts[id(node)] = 1 + sum(_count_values(inner, counts) for part in parts for inner in part)
    if not counts[id(node)]:
        raise UserError(f"{where(node)}: an alias inside this stands for all of it: write out what it means there")
    if counts[id(node)] > _MOST_VALUES:
        raise UserError(f"{where(node)}: aliases inside this make more than {_MOST_VALUES:,} values of it: use fewer")
    return counts[id(node)]


def items(node: yaml.Node, what: str = "") -> list[tuple[str, yaml.Node, str]]:
    """Return (key, value, file and line of the key) for each entry of a mapping.

    Args:
        what: dotted key of the mapping, for messages; empty: the document.

    Raises:
        UserError: it is not a mapping, a key is not a scalar, or a key is given twice.
    """
    if not isinstance(node, yaml.MappingNode):
        named = f"{what}: " if what else ""
        raise UserError(f"{where(node)}: {named}expected `key: value` lines, got {describe(node)}")
    found: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value in node.value:
        at, prefix = where(key_node), f"{what}." if what else ""
        if not isinstance(key_node, yaml.ScalarNode):
            below = f" below {what}" if what else ""
            raise UserError(f"{at}: expected a setting's name{below}, got {describe(key_node)}")
        if key_node.value in found:
            raise UserError(f"{at}: {prefix}{key_node.value} is given twice")
        found[key_node.value] = (key_node.value, value, at)
    return list(found.values())


def scalar(hint: type, node: yaml.Node) -> str | bool | int | float | None:
    """Return the node's value as `hint`, one of str, bool, int and float; None if it is not one."""
    if not isinstance(node, yaml.ScalarNode) or is_null(node):
        return None
    text = str(node.value)
    if hint is str:
        return text
    if node.style:  # quoted
        return None
    if hint is bool:
        return _BOOL.get(text)
    if hint is int:
        return _integer(text)
    if hint is float and _FLOAT.fullmatch(text):
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return None


def plain(node: yaml.Node) -> Any:
    """Return the plain value of a node without a schema, as YAML 1.2 reads it."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    if is_null(node):
        return None
    return next(value for kind in (bool, int, float, str) if (value := scalar(kind, node)) is not None)


def _integer(text: str) -> int | None:
    """Parse `12`, `1_000` and whole numbers in exponent form: the writer of `4e11` tokens means an integer."""
    with contextlib.suppress(ValueError):  # int() refuses thousands of digits
        if _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text) and "e" in text.lower():
            number = float(text.replace("_", ""))
            if math.isfinite(number) and number.is_integer():
                return int(number)
    return None


def is_null(node: yaml.Node) -> bool:
    """Return whether the node is an unquoted `null`, `~` or nothing."""
    return isinstance(node, yaml.ScalarNode) and not node.style and bool(_NULL.fullmatch(node.value))


def where(node: yaml.Node) -> str:
    """Return the file and line, or the override, that a node comes from."""
    return where_mark(node.start_mark)


def where_mark(mark: yaml.Mark) -> str:
    """Return the file and line, or the override, of a mark."""
    return mark.name if mark.name.startswith(OVERRIDE) else f"{mark.name}:{mark.line + 1}"


def describe(node: yaml.Node) -> str:
    """Describe a node for a message."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    text = node.value if len(node.value) <= _LONGEST else f"{node.value[:_LONGEST]}..."
    return "nothing (null)" if is_null(node) else repr(text)


def text_of(value: object) -> str:
    """Format a scalar as YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def to_text(node: yaml.Node) -> str:
    """Format the node as one line of YAML, scalars as their writer wrote them."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if not node.style else yaml.serialize(node, width=10**9).strip()
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(map(_text_inside, node.value)) + "]"
    return "{" + ", ".join(f"{_text_inside(key)}: {_text_inside(value)}" for key, value in node.value) + "}"


def _text_inside(node: yaml.Node) -> str:
    """Format a node in brackets, where an unquoted scalar may be neither empty nor have marks that end it."""
    text = to_text(node)
    if not isinstance(node, yaml.ScalarNode) or node.style or (text and not _FLOW_MARKS.search(text)):
        return text
    return "'" + text.replace("'", "''") + "'" if text else "null"


# Sections are trees, values the YAML nodes they are read from.
Tree = dict[str, "Tree | yaml.Node"]


def join(section: str, name: str) -> str:
    """Return the dotted key of a name in a section; the empty section is the document."""
    return f"{section}.{name}" if section else name


def merge(tree: Tree, layer: Tree) -> None:
    """Merge `layer` into `tree` key by key; `layer` wins."""
    for name, value in layer.items():
        below = tree.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            merge(below, value)
        else:
            tree[name] = value


def supersede(cls: type, earlier: Tree, layer: Tree, key: str) -> None:
    """Remove from `earlier` the alternatives to what `layer` gives. Raises `UserError` if `layer` gives several."""
    alternatives: Sequence[Sequence[str]] = getattr(cls, "ALTERNATIVES", ())
    given = [[name for name in names if not _is_nothing(layer.get(name))] for names in alternatives]
    first, *others = [names[0] for names in given if names] or [""]
    if others:
        at, also = (where(typing.cast(yaml.Node, layer[name])) for name in (others[0], first))
        raise UserError(f"{at}: {join(key, others[0])}: give either {either(alternatives)}, not both ({first}: {also})")
    for names in alternatives if first else ():
        if first not in names:
            for name in names:
                earlier.pop(name, None)
    for name, value in layer.items():
        section = section_of(field_types(cls).get(name))
        if section is not None and isinstance(value, dict):
            below = earlier.get(name)
            supersede(section, below if isinstance(below, dict) else {}, value, join(key, name))


def _is_nothing(value: Tree | yaml.Node | None) -> bool:
    """Return whether a key is left out, null or an empty list."""
    return value is None or (isinstance(value, yaml.Node) and (is_null(value) or value.value == []))
