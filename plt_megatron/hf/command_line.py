"""Setup shared by the commands on Hugging Face models."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from plt_megatron.errors import run_command
from plt_megatron.runtime.environment import quiet_imports


def run_conversion(convert: Callable[[], None]) -> int:
    """Run a conversion, which never leaves partial output, and return the exit status."""
    prepare_imports()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run_command(convert, "interrupted: nothing is written")


def prepare_imports() -> None:
    """Silence torch, megatron-core and transformers, and keep them off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_imports(logging.WARNING)
