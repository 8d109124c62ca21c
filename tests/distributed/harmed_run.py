"""`plt_megatron.train.main` with something wrong inside: `harmed_run.py HARM CONFIG.yaml`, for test_run_faults.py."""

from __future__ import annotations

import os
import sys
import threading
import time

from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import load_config
from plt_megatron.runtime.local_processes import run_processes
from plt_megatron.train import main as train_main


def before_step(step: int, harm) -> None:
    """Have `harm` called when the step after `step` asks for its data."""
    from plt_megatron.train.trainer import Trainer

    next_step = Trainer._next_step

    def harmed(self):
        if self.clock.step == step:
            harm()
        return next_step(self)

    Trainer._next_step = harmed  # type: ignore[method-assign]


def stuck() -> None:
    """Rank 1 never gets the data of its third step."""
    if os.environ["RANK"] == "1":
        before_step(2, threading.Event().wait)


def unreadable() -> None:
    """Rank 1's disk answers the third step's read with an error."""

    def fail() -> None:
        raise OSError(5, "Input/output error", "corpus.bin")

    if os.environ["RANK"] == "1":
        before_step(2, fail)


def clock() -> None:
    """The wall clock jumps back ten years, and then forward by twenty."""
    now = time.time

    def jump(years: float) -> None:
        time.time = lambda: now() + years * 365 * 86400  # type: ignore[method-assign]

    before_step(2, lambda: jump(-10))
    before_step(3, lambda: jump(10))


HARMS = {"stuck": stuck, "unreadable": unreadable, "clock": clock}

if __name__ == "__main__":
    harm, path = sys.argv[1:]
    if "RANK" in os.environ:
        HARMS[harm]()
        sys.exit(train_main.main([path]))
    world_size = layout_of(load_config(path, [])).world_size
    sys.exit(run_processes([sys.executable, *sys.argv], world_size, grace_seconds=2.0))
