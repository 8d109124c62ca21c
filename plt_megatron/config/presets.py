"""Named forms of the loop (`model.loop_preset`): how loops >= 2 are parameterised, and what they attend to.

A preset expands to its settings in the file or on the command line that names it; settings beside it or later win.
A preset sets neither the loop count nor the window size, nor `cross_loop_parallel`.
"""

from __future__ import annotations

from typing import Any

# Input of loops >= 2, gate and scales.
_PARAMETERISATION: dict[str, Any] = {
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
PARAMETERISATION = frozenset(_PARAMETERISATION)  # what `plt import` takes of a preset for new loops
OF_ONE_LOOP = ("key_shift", "residual_scaling", "residual_scale")  # settings of presets that one loop has too
ATTENTION = ("share_kv", "gated_window", "full_attention")  # what each loop attends to
_PAPER: dict[str, Any] = {
    **_PARAMETERISATION,
    "key_shift": "none",
    "share_kv": True,
    "gated_window": True,
    "full_attention": "every_loop",
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
    # Chosen by measurements (docs/decisions.md): h is normalized, with a learned scale per channel that starts at 0; at
    # the end of training full attention in the last loop is worth more than the paper's sharing (results/depth_gain).
    "recommended": {
        **_PAPER,
        "input_injection": True,
        "loop_norm": "rms",
        "learned_hidden_scale": "channel",
        "hidden_scale": 0.0,
        "residual_scaling": "layers",
        "residual_scale": 4.0,
        "key_shift": "heads",
        "share_kv": False,
        "gated_window": False,
        "full_attention": "last_loop",
    },
}
