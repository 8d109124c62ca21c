"""Saves and reads checkpoints without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plt_megatron.run_folder.checkpoints import latest_checkpoint, read_verified_progress


def save_checkpoint(
    engine: Any, directory: Path | str, progress: dict[str, Any], *, kept: Any = None, keep_last: int = 2
) -> Path:
    """Save the engine's whole state at once; its folder comes back. Collective."""
    from plt_megatron.train.checkpoint.saving import begin_save

    save = begin_save(engine, Path(directory), progress, kept)
    save.write()
    return save.publish(keep_last, keep_every=0)


def read_progress(path: Path | str) -> dict[str, Any]:
    """The record of the last complete checkpoint at `path`."""
    found = latest_checkpoint(path)
    assert found is not None, f"no complete checkpoint in {path}"
    return read_verified_progress(found)
