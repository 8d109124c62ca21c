"""Checkpoints: megatron-core's distributed format, published atomically, loadable in any layout.

`publishing` turns a folder into a checkpoint (`run_folder.checkpoints` finds it), `state` is the engine's state as
sharded tensors, `saving` and `loading` convert between the two, `reading` is for programs without an engine, `store`
for a training run.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# For callers outside the package, imported on demand: importing megatron-core takes seconds, and reading weights does
# not need it.
_HOMES = {
    "CheckpointStore": "store",
    "load_checkpoint": "loading",
    "load_weights": "loading",
    "read_weights": "reading",
    "save_checkpoint": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
