"""YAML files and `key=value` overrides to a `RunConfig`, and back.

A file holds any part of a `RunConfig`. Its `include:` (one path or a list, relative to the file) names files
that are read first, in order; later values win, the file's own win over those it includes, and overrides win
over all. Sections merge key by key; lists are replaced whole. All other paths in a configuration are relative
to the directory the command runs in.

Values are converted to the type the schema states, and every error names the file, the line and the key.
Scalars are read as YAML 1.2 does: `1e-4` is a number and `yes` is a string.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.installation import find_config

INCLUDE = "include"

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# Dotted key -> the YAML node that sets it. Nodes know their file and line, and whether a scalar was quoted.
_Settings = dict[str, yaml.Node]


def load_config(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply `key=value` overrides (dotted keys, values in YAML).

    Raises `UserError` on a missing or malformed file, an unknown key or a value of the wrong type.
    Whether the values make sense together is `validation.validate`'s question.
    """
    settings: _Settings = {}
    _read_file(find_config(path), settings, ())
    for override in overrides:
        _read_override(override, settings)
    config = _build(RunConfig, "", settings)
    assert isinstance(config, RunConfig)
    return config


def dump_config(config: RunConfig) -> str:
    """YAML text that `load_config` reads back to an equal configuration."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `dump_config` to `path`, all of it or nothing: a reader never sees half a file.

    Creates the folder. Raises `UserError` where that cannot be done.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(dump_config(config))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


# ---------------------------------------------------------------- reading


def _read_file(path: Path, settings: _Settings, including: tuple[Path, ...]) -> None:
    """Merge a file, after the files it includes, into `settings`."""
    if path.resolve() in [other.resolve() for other in including]:
        raise UserError(f"{including[-1]}: {INCLUDE} of {path} leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        by = f"{including[-1]}: {INCLUDE}: " if including else ""
        raise UserError(f"{by}cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    root = _compose(text, str(path))
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{_where(root)}: expected `key: value` lines, got {_describe(root)}")
    own: _Settings = {}
    for key_node, value in root.value:
        if key_node.value == INCLUDE:
            for included in _include_paths(value):
                _read_file(path.parent / included, settings, (*including, path))
    _flatten(RunConfig, root, "", own)
    settings.update(own)


def _include_paths(node: yaml.Node) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) and item.value for item in items):
        raise UserError(f"{_where(node)}: {INCLUDE}: expected a path or a list of paths")
    return [item.value for item in items]


def _read_override(override: str, settings: _Settings) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, as in model.loop_count=1")
    where = f"override {override!r}"
    node = _compose(text, where)
    if node is None:
        node = yaml.ScalarNode("", "", yaml.Mark(where, 0, 0, 0, None, 0))
    *sections, last = key.split(".")
    cls: type = RunConfig
    prefix = ""
    for section in sections:
        if _is_free(_field_types(cls).get(section)):
            _flatten_free(node, key, settings)
            return
        inner = _dataclass_of(_field_types(cls).get(section))
        if inner is None:
            raise _unknown_key(where, cls, prefix, section)
        cls, prefix = inner, f"{prefix}{section}."
    _flatten_item(cls, last, node, where, prefix, settings)


class _Loader(yaml.SafeLoader):
    """Used for parsing only; values are converted from the nodes."""


def _compose(text: str, name: str) -> yaml.Node | None:
    """Parse one YAML document into nodes whose marks carry `name`. None if it is empty."""
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            return typing.cast("yaml.Node | None", loader.get_single_node())
        finally:
            loader.dispose()
    except RecursionError as error:
        raise UserError(f"{name}: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = _where_mark(mark) if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from error


def _flatten(cls: type, node: yaml.MappingNode, prefix: str, settings: _Settings) -> None:
    """Put a section's leaves into `settings`, checking its keys against the dataclass `cls`."""
    seen: set[str] = set()
    for key_node, value in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{_where(key_node)}: expected a setting's name, got {_describe(key_node)}")
        if key in seen:
            raise UserError(f"{_where(key_node)}: {prefix}{key} is given twice")
        seen.add(key)
        if key == INCLUDE and not prefix:
            continue
        _flatten_item(cls, key, value, _where(key_node), prefix, settings)


def _flatten_item(cls: type, key: str, node: yaml.Node, where: str, prefix: str, settings: _Settings) -> None:
    field_types = _field_types(cls)
    if key not in field_types:
        raise _unknown_key(where, cls, prefix, key)
    section = _dataclass_of(field_types[key])
    if _is_free(field_types[key]):
        if not isinstance(node, yaml.MappingNode) and not _is_null(node):
            raise UserError(f"{where}: {prefix}{key} is a section of its own keys, got {_describe(node)}")
        _flatten_free(node, prefix + key, settings)
    elif section is None:
        settings[prefix + key] = node
    elif isinstance(node, yaml.MappingNode):
        _flatten(section, node, f"{prefix}{key}.", settings)
    elif not _is_null(node):  # an empty section sets nothing
        names = ", ".join(f"{prefix}{key}.{name}" for name in list(_field_types(section))[:3])
        raise UserError(f"{where}: {prefix}{key} is a section ({names}, ...), got {_describe(node)}")


def _flatten_free(node: yaml.Node, key: str, settings: _Settings) -> None:
    """Put the leaves of a section whose keys another program knows into `settings`, that files merge key by key."""
    if not isinstance(node, yaml.MappingNode):
        if not _is_null(node) or "." in key:
            settings[key] = node
        return
    for key_node, value in node.value:
        name = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or not name or "." in name:
            raise UserError(f"{_where(key_node)}: expected a setting's name below {key}, got {_describe(key_node)}")
        _flatten_free(value, f"{key}.{name}", settings)


# ---------------------------------------------------------------- conversion to the schema's types


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _dataclass_of(hint: Any) -> type | None:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _is_free(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _build_free(prefix: str, settings: _Settings) -> dict[str, Any]:
    """The nested dictionary of the leaves under `prefix`."""
    built: dict[str, Any] = {}
    for key, node in settings.items():
        if not key.startswith(prefix):
            continue
        *sections, last = key[len(prefix) :].split(".")
        place = built
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{_where(node)}: {key}: {section} is a value already")
        if isinstance(place.get(last), dict):
            raise UserError(f"{_where(node)}: {key} is a section already")
        place[last] = _convert_free(node, key)
    return built


def _convert_free(node: yaml.Node, key: str) -> Any:
    """A value whose type no schema states: as YAML 1.2 reads it."""
    if isinstance(node, yaml.SequenceNode):
        return [_convert_free(item, key) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{_where(node)}: {key}: expected a value, got {_describe(node)}")
    if _is_null(node):
        return None
    for hint in (bool, int, float):
        with contextlib.suppress(UserError):
            return _convert_scalar(hint, node, key)
    return node.value


def _build(cls: type, prefix: str, settings: _Settings) -> Any:
    """An instance of `cls` from the settings under `prefix`; what is not set keeps its default."""
    values: dict[str, Any] = {}
    for name, hint in _field_types(cls).items():
        section = _dataclass_of(hint)
        if section is not None:
            values[name] = _build(section, f"{prefix}{name}.", settings)
        elif _is_free(hint):
            values[name] = _build_free(f"{prefix}{name}.", settings)
        elif prefix + name in settings:
            values[name] = _convert(hint, settings[prefix + name], prefix + name)
    return cls(**values)


def _convert(hint: Any, node: yaml.Node, key: str) -> Any:
    """The node's value as the type `hint` of the setting `key`."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        members = typing.get_args(hint)
        if type(None) in members and _is_null(node):
            return None
        (inner,) = [member for member in members if member is not type(None)]
        return _convert(inner, node, key)
    if origin is list:
        if not isinstance(node, yaml.SequenceNode):
            raise _wrong_type(hint, node, key)
        (item_type,) = typing.get_args(hint)
        return [_convert(item_type, item, f"{key}[{i}]") for i, item in enumerate(node.value)]
    section = _dataclass_of(hint)
    if section is not None:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong_type(hint, node, key)
        settings: _Settings = {}
        _flatten(section, node, f"{key}.", settings)
        return _build(section, f"{key}.", settings)
    return _convert_scalar(hint, node, key)


def _convert_scalar(hint: Any, node: yaml.Node, key: str) -> Any:
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise _wrong_type(hint, node, key)
    text = node.value
    plain = node.style is None
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if text in choices:
            return text
        nearest = _nearest(text, choices)
        raise UserError(f"{_where(node)}: {key}: expected one of {', '.join(choices)}; got {text!r}{nearest}")
    if hint is str:
        return text
    if hint is bool and plain and text in _BOOL:
        return _BOOL[text]
    if hint is int and plain and (number := _integer(text)) is not None:
        return number
    if hint is float and plain and _FLOAT.fullmatch(text):
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    raise _wrong_type(hint, node, key)


def _integer(text: str) -> int | None:
    """`12`, `1_000` and whole numbers in exponent form: `4e11` tokens is an integer to its writer."""
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text) and "e" in text.lower():
        number = float(text.replace("_", ""))
        if math.isfinite(number) and number.is_integer():
            return int(number)
    return None


# ---------------------------------------------------------------- messages


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and bool(_NULL.fullmatch(node.value))


def _where(node: yaml.Node) -> str:
    return _where_mark(node.start_mark)


def _where_mark(mark: yaml.Mark) -> str:
    return mark.name if mark.name.startswith("override ") else f"{mark.name}:{mark.line + 1}"


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing (null)" if _is_null(node) else repr(node.value)


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        plural = {int: "integers", float: "numbers", str: "strings"}
        return f"a list of {plural.get(item, 'mappings')}"
    section = _dataclass_of(hint)
    if section is not None:
        return f"a mapping of {', '.join(_field_types(section))}"
    return names.get(hint, "one of " + ", ".join(map(str, typing.get_args(hint))))


def _wrong_type(hint: Any, node: yaml.Node, key: str) -> UserError:
    return UserError(f"{_where(node)}: {key}: expected {_type_name(hint)}, got {_describe(node)}")


def _nearest(word: str, choices: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _field_types(cls).items():
        section = _dataclass_of(hint)
        keys.extend(_all_keys(section, f"{prefix}{name}.") if section else [prefix + name])
    return keys


def _unknown_key(where: str, cls: type, prefix: str, key: str) -> UserError:
    """Names the nearest key of the same section, else the same or nearest name in any other section."""
    siblings = list(_field_types(cls))
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    candidates = [prefix + close[0]] if close else []
    if not close or difflib.SequenceMatcher(None, key, close[0]).ratio() < 0.8:
        elsewhere = {full.rpartition(".")[2]: full for full in reversed(_all_keys(RunConfig))}
        match = difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=0.8)
        candidates = [elsewhere[match[0]]] if match else candidates
    hint = f"did you mean {candidates[0]}?" if candidates else f"known here: {', '.join(siblings)}"
    return UserError(f"{where}: unknown key {prefix}{key}; {hint}")


# ---------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Indents lists under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # type: ignore[no-untyped-call]
