"""Whether a run's uploads have somewhere to go, before anything is computed."""

from __future__ import annotations

import subprocess
import sys

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.callbacks.beside import environment
from plt_megatron.train.checkpoint.collective import on_rank_0

_SHARE = 0.8  # of the time that the other ranks wait at most


def check_destinations(config: RunConfig) -> None:
    """Raise `UserError` on all ranks if a destination of uploads cannot be written. Collective.

    Another process looks: libraries of remote storage bring threads and connections, which training need not have.
    """
    settings = config.checkpoint
    if settings.upload_to is not None or settings.export_upload_to is not None:
        on_rank_0(lambda: _check(config))


def _check(config: RunConfig) -> None:
    folder = RunFolder.of(config)
    if not folder.config_file.is_file():  # training was started without plt train; the uploads read it
        folder.save_config(config)
    command = [sys.executable, "-m", "plt_megatron", "upload", str(folder.path), "--check"]
    minutes = _SHARE * config.parallel.distributed_timeout_minutes
    try:
        found = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the destination of uploads has not answered in {minutes:g} minutes") from error
    if found.returncode != 0:
        words = found.stderr.strip().splitlines() or [f"plt upload --check: exit status {found.returncode}"]
        raise UserError(words[-1].removeprefix("error: "))
