"""Shared by the two conversion commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable

from plt_megatron.errors import run_command


def run_conversion(convert: Callable[[], None]) -> int:
    """Run a conversion, which never leaves partial output; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run_command(convert)
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130


def quiet_imports() -> None:
    """Silence torch's, megatron-core's and transformers' routine messages, and keep them off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\..*")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("megatron", "torch", "torch.utils.cpp_extension", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
