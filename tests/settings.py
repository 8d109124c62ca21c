"""Sections of a configuration from flat settings: `{"num_layers": 2, "moe.num_experts": 4}`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from plt_megatron.config.fields import from_plain

# LoopCoder-v2's loops (arXiv 2606.18023) and its untied head.
LOOPCODER: dict[str, Any] = {
    "gate_input": "hidden",
    "gate_side": "global",
    "loop_norm": "final",
    "embedding_scale": 0.707,
    "hidden_scale": 0.053,
    "share_embeddings_and_output_weights": False,
}


def make(section: type, settings: Mapping[str, Any]) -> Any:
    """An instance of a section. A dotted name is a setting of an optional section in it, which is then there; a later
    setting wins over an earlier one."""
    return from_plain(section, _nested({}, settings))


def changed[T](section: T, settings: Mapping[str, Any]) -> T:
    """A section with other settings."""
    return make(type(section), _nested(dataclasses.asdict(section), settings))  # type: ignore[call-overload,arg-type]


def _nested(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = values
        for name in sections:
            inner = place.get(name) or {}
            place[name] = dataclasses.asdict(inner) if dataclasses.is_dataclass(inner) else inner
            place = place[name]
        place[last] = value
    return values
