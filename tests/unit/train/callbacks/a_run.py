"""A run for callbacks under test, of one process: what they may use of it, without an engine."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plt_megatron.config.schema import LoggingConfig, RunConfig
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.callbacks.base import Callback, Clock


def a_run(folder: Path, *, is_first_rank: bool = True, **logging: Any) -> Any:
    """`said` is what it has told people."""
    said: list[str] = []
    return SimpleNamespace(
        config=RunConfig(logging=LoggingConfig(**{"tensorboard": False, **logging})),
        folder=RunFolder(folder),
        clock=Clock(),
        is_first_rank=is_first_rank,
        callbacks=[],
        data=SimpleNamespace(fingerprint={"sha256": "0"}),
        said=said,
        say=said.append,
    )


def finish(callback: Callback) -> None:
    """Wait for what a callback works on, as after the last step."""
    while callback.is_working():
        time.sleep(0.01)
    callback.on_end()
