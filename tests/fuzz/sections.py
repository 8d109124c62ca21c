"""Sections of a configuration that may be off."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from plt_megatron.config.fields import field_types, plain_type, section_of
from plt_megatron.config.schema import RunConfig


def value_of(config: Any, key: str) -> Any:
    """A setting by its dotted key, or what a section that is off would have of it by default."""
    value, section = config, type(config)
    for name in key.split("."):
        value = _default(section, name) if value is None else getattr(value, name)
        section = section_of(field_types(section)[name]) or type(None)
    return value


def _default(section: type, name: str) -> Any:
    (default,) = [field.default for field in dataclasses.fields(section) if field.name == name]
    return None if default is dataclasses.MISSING else default


@functools.cache
def optional_sections(cls: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """Dotted key of each section that may be off -> a setting that turns it on: one without a default, or its first."""
    found = {}
    for name, hint in field_types(cls).items():
        section, key = section_of(hint), prefix + name
        if section is None:
            continue
        if plain_type(hint)[2]:
            needed = [field.name for field in dataclasses.fields(section) if field.default is dataclasses.MISSING]
            found[key] = f"{key}.{[*needed, *field_types(section)][0]}"
        found |= optional_sections(section, f"{key}.")
    return found


def sections_of(key: str) -> list[str]:
    """The optional sections that a setting lies in, the outermost first."""
    return [section for section in optional_sections() if key.startswith(f"{section}.")]
