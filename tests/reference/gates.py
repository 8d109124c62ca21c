"""Every gate but the default one, as settings: what is listed here is compared with the references in every layout and
converted both ways, so that a new gate is tested as soon as the schema has it."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from plt_megatron.config.schema import ModelConfig

GATES: dict[str, dict[str, Any]] = {
    f"{kind} gate": {"gate_input": kind}
    for kind in get_args(get_type_hints(ModelConfig)["gate_input"])
    if kind != ModelConfig().gate_input
}
