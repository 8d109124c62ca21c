"""Load YAML files and `key=value` overrides into any dataclass of `fields`: runs, sweeps, clusters, jobs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from plt_megatron.config import fields, yaml_nodes
from plt_megatron.config.fields import RenamedFrom, field_types, find_type_problems, leaves, plain_type, section_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.upgrade import UPGRADE, new_name, new_section, upgrade
from plt_megatron.config.yaml_nodes import Tree, describe, is_null, join, merge, supersede, where
from plt_megatron.errors import UserError
from plt_megatron.installation import find_config

INCLUDE = "include"
WRITTEN = "config.yaml"  # name of the configuration in a run folder, written by `dump_config`
_PLACES = "_places"  # attribute of loaded settings: dotted key -> file and line, or override
_KEY = re.compile(r"^\w+(?:\.\w+|\[\d+\])*|\w+(?:\.\w+|\[\d+\])+")


def setting(key: str, text: object) -> str:
    """Return the override `key=text`, quoted, so that it stays a string whatever characters it has."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, accept_old_names: bool | None = None
) -> RunConfig:
    """Load a run configuration as `load` does; `validation.validate` checks its values.

    Args:
        accept_old_names: None: only in a run folder's `config.yaml`, which an earlier version may have written.
    """
    accept = Path(path).name == WRITTEN if accept_old_names is None else accept_old_names
    return load(RunConfig, path, overrides, accept_old_names=accept)


def load[T](
    schema: type[T], path: str | os.PathLike[str], overrides: Sequence[str] = (), *, accept_old_names: bool = False
) -> T:
    """Load a file into the dataclass `schema` and apply `key=value` overrides (dotted keys, values in YAML).

    Args:
        accept_old_names: accept settings under their names in earlier versions, for files written by programs.

    Raises:
        UserError: a file is missing or malformed, a key is unknown, missing or renamed, or a value has the wrong type.
            Numbers out of range are left to `fields.find_type_problems`.
    """
    found = find_config(path)
    reader = _Reader(schema, found, accept_old_names)
    reader.read_file(found)
    reader.read_overrides(overrides)
    loaded = reader.build(schema, reader.tree, "")
    object.__setattr__(loaded, _PLACES, reader.places)
    return typing.cast(T, loaded)


def place(settings: Any, problems: Iterable[str]) -> list[str]:
    """Prefix each problem of loaded settings with the file and line of the first key that it names."""
    places: dict[str, str] = getattr(settings, _PLACES, {})
    found = []
    for problem in problems:
        at = next((places[key] for key in _KEY.findall(problem) if key in places), yaml_nodes.OVERRIDE)
        found.append(problem if at.startswith(yaml_nodes.OVERRIDE) else f"{at}: {problem}")
    return found


def check(settings: Any, problems: Iterable[str] = ()) -> None:
    """Raise `UserError` with one line for each out-of-range number of loaded settings and for each of `problems`."""
    found = place(settings, [*find_type_problems(settings), *problems])
    if found:
        raise UserError("\n".join(found))


def dump_config(config: RunConfig) -> str:
    """Return YAML text that `load_config` reads back to an equal configuration."""
    return yaml_nodes.dump(dataclasses.asdict(config))


# ---------------------------------------------------------------- reading


class _Reader:
    """Collects layers in a tree shaped like `schema`, and builds the dataclass from it.

    Attributes:
        tree: settings of the layers so far.
        places: dotted key -> where it was last set.
    """

    def __init__(self, schema: type, path: Path, accept_old_names: bool) -> None:
        self._schema, self._path, self._accept_old_names = schema, path, accept_old_names
        self.tree: Tree = {}
        self.places: dict[str, str] = {}

    def read_file(self, path: Path, including: tuple[Path, ...] = ()) -> None:
        """Add a file to the tree as a layer, after the files it includes."""
        if path.resolve() in [other.resolve() for other in including]:
            raise UserError(f"{including[-1]}: {INCLUDE} of {path} leads back to itself")
        try:
            text = yaml_nodes.read_text(path)
        except UserError as error:
            hint = f": a run's folder, give {path / WRITTEN}" if (path / WRITTEN).is_file() else ""
            raise type(error)(f"{including[-1]}: {INCLUDE}: {error}" if including else f"{error}{hint}") from error
        root = yaml_nodes.compose(text, str(path))
        if self._accept_old_names and self._schema is RunConfig and isinstance(root, yaml.MappingNode):
            root = upgrade(root)
        entries = [] if root is None else yaml_nodes.items(root)
        for key, node, _ in entries:
            if key == INCLUDE:
                for included in _include_paths(node):
                    self.read_file(_beside(path, included), (*including, path))
        layer = self._section(self._schema, [entry for entry in entries if entry[0] != INCLUDE], "")
        self._add_layer(layer)

    def read_overrides(self, overrides: Sequence[str]) -> None:
        """Add `key=value` texts to the tree as one layer."""
        layer: Tree = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            at = f"{yaml_nodes.OVERRIDE}{override!r}"
            if not equals or not key.strip():
                raise UserError(f"{at}: expected key=value, as in model.loop_count=1")
            null = yaml.ScalarNode("", "", yaml.Mark(at, 0, 0, 0, None, 0))
            node = yaml_nodes.compose(text, at) or null
            merge(layer, self._path_to(self._schema, key.strip().split("."), node, at, ""))
        self._add_layer(layer)

    def _add_layer(self, layer: Tree) -> None:
        self._expand_presets(self._schema, layer, "")
        supersede(self._schema, self.tree, layer, "")
        merge(self.tree, layer)

    def _expand_presets(self, cls: type, layer: Tree, section: str) -> None:
        for name, presets in getattr(cls, "PRESETS", {}).items():
            chosen = layer.get(name)
            if not isinstance(chosen, yaml.ScalarNode):
                continue
            before = self._chosen_before(join(section, name)) if is_null(chosen) else None
            if before is not None and (kept := sorted(presets.get(before, {}).keys() - layer.keys())):
                at, key = self.places[join(section, name)], join(section, name)
                raise UserError(f"{at}: {key} null would keep what {before} sets: set {', '.join(kept)} beside it")
            settings = presets.get(chosen.value, {})
            if all(2 * len(known.keys() & layer.keys()) > len(known) for known in (settings, field_types(cls))):
                continue  # a program gives all settings of its version: what is missing is newer, not the preset's
            for other in settings.keys() - layer.keys():
                layer[other] = yaml.ScalarNode("", yaml_nodes.text_of(settings[other]), chosen.start_mark)
                at = self.places[join(section, name)]
                self.places[join(section, other)] = f"{at} ({join(section, name)} {chosen.value})"
        for name, value in layer.items():
            inner = section_of(field_types(cls).get(name))
            if inner is not None and isinstance(value, dict):
                self._expand_presets(inner, value, join(section, name))

    def _chosen_before(self, key: str) -> str | None:
        """Return the value of a key in the layers so far; None if it has none."""
        found: Any = self.tree
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found.value if isinstance(found, yaml.ScalarNode) and not is_null(found) else None

    def _section(self, cls: type, entries: Iterable[tuple[str, yaml.Node, str]], key: str) -> Tree:
        """Return the tree of a mapping, its keys checked against the dataclass `cls`."""
        section: Tree = {}
        for name, node, at in entries:
            for current, value in self._item(cls, name, node, at, key).items():
                if current in section:
                    raise UserError(f"{at}: {join(key, current)} is given twice: {name} is its old name")
                section[current] = value
        return section

    def _item(self, cls: type, name: str, node: yaml.Node, at: str, section: str) -> Tree:
        """Return the tree of one key of a section."""
        name = self._current_name(cls, name, at, section)
        key = join(section, name)
        plain, _, optional = plain_type(field_types(cls)[name])
        inner = section_of(plain)
        self.places[key] = at
        if (optional and is_null(node)) or not (inner or typing.get_origin(plain) is dict):
            return {name: node}
        if is_null(node):  # an empty section sets nothing
            return {}
        if inner is None:
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{at}: {key} is a section of its own keys, got {describe(node)}")
            return {name: self._mapping(typing.get_args(plain)[1], node, key)}
        if not isinstance(node, yaml.MappingNode):
            names = ", ".join(join(key, field) for field in list(field_types(inner))[:3])
            now = new_section(key, str(node.value)) if self._schema is RunConfig else None
            moved = f"; {key}={node.value} is now {now}{_hint(at)}" if now else ""
            raise UserError(f"{at}: {key} is a section ({names}, ...), got {describe(node)}{moved}")
        return {name: self._section(inner, yaml_nodes.items(node, key), key)}

    def _mapping(self, value_type: Any, node: yaml.Node, key: str) -> Tree:
        """Return the tree of a section with keys of the user's or another program's (`Any`: nested to any depth)."""
        section: Tree = {}
        for name, value, at in yaml_nodes.items(node, key):
            if not name or (value_type is Any and "." in name):
                raise UserError(f"{at}: expected a setting's name below {key}, got {name!r}")
            self.places[join(key, name)] = at
            if value_type is not Any or not isinstance(value, yaml.MappingNode):
                section[name] = value
            elif value.value:
                section[name] = self._mapping(Any, value, join(key, name))
        return section

    def _path_to(self, cls: type, names: Sequence[str], node: yaml.Node, at: str, section: str) -> Tree:
        """Return the tree in which only one dotted key is set."""
        name, *rest = names
        if not rest:
            return self._item(cls, name, node, at, section)
        plain = plain_type(field_types(cls).get(name))[0]
        key, inner = join(section, name), section_of(plain)
        self.places[key] = at
        if inner is not None:
            return {name: self._path_to(inner, rest, node, at, key)}
        if typing.get_origin(plain) is not dict:
            raise self._unknown_key(at, cls, section, name, join(section, ".".join(names)))
        value_type = typing.get_args(plain)[1]
        if value_type is not Any:
            rest = [".".join(rest)]
        self.places[join(key, ".".join(rest))] = at
        nested = value_type is Any and isinstance(node, yaml.MappingNode)
        tree: Tree | yaml.Node = self._mapping(Any, node, join(key, ".".join(rest))) if nested else node
        for step in reversed([name, *rest]):
            tree = {step: tree}
        return typing.cast(Tree, tree)

    # ------------------------------------------------------------ the schema's types

    def build(self, cls: type, tree: Tree, key: str) -> Any:
        """Build an instance of `cls` from a tree; unset fields keep their defaults."""
        values = {name: self._value(field_types(cls)[name], value, join(key, name)) for name, value in tree.items()}
        for field in dataclasses.fields(cls):
            missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if field.init and missing and field.name not in values:
                raise UserError(f"{self.places.get(key, self._path)}: {join(key, field.name)} is missing")
        return cls(**values)

    def _value(self, hint: Any, value: Tree | yaml.Node, key: str) -> Any:
        if not isinstance(value, dict):
            return self._convert(hint, value, key)
        plain = plain_type(hint)[0]
        section = section_of(plain)
        if section is not None:
            return self.build(section, value, key)
        inner = Any if plain is Any else typing.get_args(plain)[1]
        return {name: self._value(inner, item, join(key, name)) for name, item in value.items()}

    def _convert(self, hint: Any, node: yaml.Node, key: str) -> Any:
        """Convert a node to the type `hint` of the setting `key`. A type with `from_node` reads nodes itself."""
        plain, _, optional = plain_type(hint)
        if optional and is_null(node):
            return None
        if plain is Any:
            return _convert_untyped(node, key)
        if plain is Path:
            return self._file_path(node, key)
        if hasattr(plain, "from_node"):
            return plain.from_node(node, key)
        section = section_of(plain)
        if section is not None and isinstance(node, yaml.MappingNode):
            return self.build(section, self._section(section, yaml_nodes.items(node, key), key), key)
        if typing.get_origin(plain) is list and isinstance(node, yaml.SequenceNode):
            (item_type,) = typing.get_args(plain)
            places = {f"{key}[{index}]": where(item) for index, item in enumerate(node.value)}
            self.places |= places
            return [self._convert(item_type, item, at) for item, at in zip(node.value, places, strict=True)]
        if typing.get_origin(plain) is Literal:
            return _choose(typing.get_args(plain), node, key)
        value = yaml_nodes.scalar(plain, node)
        if value is None:
            raise UserError(f"{where(node)}: {key}: expected {_type_name(plain)}, got {describe(node)}")
        return value

    def _file_path(self, node: yaml.Node, key: str) -> Path:
        """Return a path relative to the file that gives it (`_beside`); on the command line, the current directory."""
        text = self._convert(str, node, key)
        name = node.start_mark.name
        return Path(text) if name.startswith(yaml_nodes.OVERRIDE) else _beside(Path(name), text)

    # ------------------------------------------------------------ names

    def _current_name(self, cls: type, name: str, at: str, section: str) -> str:
        if name in field_types(cls):
            return name
        for current, hint in field_types(cls).items():
            if RenamedFrom(name) in plain_type(hint)[1]:
                if self._accept_old_names:
                    return current
                raise UserError(f"{at}: {join(section, name)} is now called {join(section, current)}")
        raise self._unknown_key(at, cls, section, name)

    def _unknown_key(self, at: str, cls: type, section: str, name: str, whole: str = "") -> UserError:
        """Return an error that suggests the nearest key of the section, else the nearest name in any other section."""
        if "." in name and self._schema is RunConfig:
            nested = ": {".join(name.split(".")) + ": ..." + "}" * name.count(".")
            return UserError(f"{at}: {join(section, name)}: in a file, sections contain their keys: write {nested}")
        refused = getattr(self._schema, "REFUSED", {}).get(name)
        if refused is not None:
            return UserError(f"{at}: {join(section, name)} is not supported: {refused}; leave it out")
        former = whole or join(section, name)
        now = new_name(former) if self._schema is RunConfig else None
        if now is not None:
            return UserError(f"{at}: {former} is now {now}{_hint(at)}")
        siblings = list(field_types(cls))
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
        candidates = [join(section, close[0])] if close else []
        if not close or difflib.SequenceMatcher(None, name, close[0]).ratio() < 0.8:
            elsewhere = {key.rpartition(".")[2]: key for key in reversed(list(all_keys(self._schema)))}
            match = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.8)
            candidates = [elsewhere[match[0]]] if match else candidates
        hint = f"did you mean {candidates[0]}?" if candidates else f"known here: {', '.join(siblings)}"
        kinds = "" if section else fields.kinds_with(name)
        return UserError(f"{at}: unknown key {join(section, name)}; {f'it is a setting of {kinds}' if kinds else hint}")


def _hint(at: str) -> str:
    """Return a hint at the command that renames settings, if they are in a file."""
    return "" if at.startswith(yaml_nodes.OVERRIDE) else f" ({UPGRADE})"


def _beside(path: Path, included: str) -> Path:
    """Resolve a path given in the file `path`: relative to that file, without `..` where that names the same file.

    If nothing is there, `configs/...` is resolved as on the command line: in the current folder, else the shipped file.
    """
    whole = path.parent / included
    short = Path(os.path.normpath(whole))
    beside = short if short.resolve() == whole.resolve() else whole
    others = [find_config(path) for path in (beside, Path(included)) if path.parts[:1] == ("configs",)]
    return next((found for found in [beside, *others] if found.exists()), beside)


def _include_paths(node: yaml.Node) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) and item.value for item in items):
        raise UserError(f"{where(node)}: {INCLUDE}: expected a path or a list of paths")
    return [item.value for item in items]


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a schema's settings, such as `model.loop_count`."""
    for name, hint in field_types(cls).items():
        section = section_of(hint)
        if section is None:
            yield join(prefix, name)
        else:
            yield from all_keys(section, join(prefix, name))


# ---------------------------------------------------------------- values


def _choose(choices: Sequence[str], node: yaml.Node, key: str) -> str:
    if isinstance(node, yaml.ScalarNode) and node.value in choices:
        return str(node.value)
    close = difflib.get_close_matches(str(node.value), choices, n=1, cutoff=0.5)
    nearest = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"{where(node)}: {key}: expected one of {', '.join(choices)}; got {describe(node)}{nearest}")


def _convert_untyped(node: yaml.Node, key: str) -> Any:
    """Convert a value without a type in the schema; it may not have mappings in it."""
    if isinstance(node, yaml.SequenceNode):
        return [_convert_untyped(item, key) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        raise UserError(f"{where(node)}: {key}: expected a value, got {describe(node)}")
    return yaml_nodes.plain(node)


def _type_name(plain: Any) -> str:
    if typing.get_origin(plain) is list:
        item = plain_type(typing.get_args(plain)[0])[0]
        return f"a list of { {int: 'integers', float: 'numbers', str: 'strings'}.get(item, 'mappings') }"
    if section_of(plain) is not None:
        return f"a mapping of {', '.join(field_types(plain))}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[plain]


def config_differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Return dotted key -> the difference in words, for every setting that differs."""
    old, new = (
        {key: value for key, value in leaves(dataclasses.asdict(config)) if value != {}} for config in (before, now)
    )
    keys = dict.fromkeys((*old, *new))  # a section may be missing in one of them
    return {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if new.get(key) != old.get(key)}
