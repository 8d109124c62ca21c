"""Layers of settings: those of a file or the command line override those of earlier layers."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import yaml

from plt_megatron.config.fields import either, field_types, section_of
from plt_megatron.config.yaml_nodes import is_null, where
from plt_megatron.errors import UserError

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
