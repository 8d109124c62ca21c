"""Models that differ in what loops >= 2 read and in how branches are scaled; every pair of switches occurs."""

from __future__ import annotations

from typing import Any

NAIVE: dict[str, Any] = {"cross_loop_parallel": False, "share_kv": False, "gated_window": False}
LOOP_INPUTS: dict[str, dict[str, Any]] = {
    "naive loop with E": {**NAIVE, "input_injection": True, "loop_count": 3, "residual_scaling": "loops_sqrt_layers"},
    "scale per model": {"learned_hidden_scale": "model", "residual_scaling": "layers", "residual_scale": 1.5},
    "scale per channel": {
        "learned_hidden_scale": "channel",
        "loop_norm": "rms",
        "hidden_scale": 0.1,
        "loop_count": 3,
        "residual_scaling": "loops_sqrt_layers",
        "residual_scale": 3.0,
    },
    "naive loop, scale per channel": {
        **NAIVE,
        "input_injection": True,
        "loop_norm": "rms",
        "learned_hidden_scale": "channel",
        "residual_scaling": "layers",
    },
    "scaled": {"loop_norm": "rms", "hidden_scale": 0.07, "embedding_scale": 0.7, "loop_count": 3},
    "final norm, scale per model": {
        "loop_norm": "final",
        "learned_hidden_scale": "model",
        "hidden_scale": 0.4,
        "loop_count": 3,
    },
    "branches by layers": {"residual_scaling": "layers", "residual_scale": 3.0},
}
