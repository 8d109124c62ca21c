"""Named parameterisations of the loop (`model.loop_preset`): input of loops >= 2, gate, scales, initial weights.

A preset expands to its settings in the file or on the command line that names it; settings beside it or later win.
A preset sets neither the switches of the ablation nor the loop count or window size.
"""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "input_injection": False,
    "gate_input": "query",
    "gate_side": "local",
    "gate_activation": "sigmoid",
    "loop_norm": "none",
    "embedding_scale": 1.0,
    "hidden_scale": 1.0,
    "learned_hidden_scale": "none",
    "residual_scaling": "none",
    "residual_scale": 1.0,
}
LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "loopcoder": {
        **_PAPER,
        "gate_input": "hidden",
        "gate_side": "global",
        "loop_norm": "final",
        "embedding_scale": 0.707,
        "hidden_scale": 0.053,
    },
    # Chosen by measurements (docs/decisions.md): h is normalized, with a learned scale per channel that starts at 0.
    "recommended": {
        **_PAPER,
        "input_injection": True,
        "loop_norm": "rms",
        "learned_hidden_scale": "channel",
        "hidden_scale": 0.0,
        "residual_scaling": "layers",
        "residual_scale": 4.0,
    },
}
