"""Differences between two configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

from plt_megatron.config.schema import RunConfig


def config_differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Return dotted key -> the difference in words, for every setting that differs."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    keys = dict.fromkeys((*old, *new))  # a section may be missing in one of them
    return {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if new.get(key) != old.get(key)}


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
