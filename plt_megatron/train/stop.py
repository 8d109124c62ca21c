"""Requests to stop or save: by a signal, or by a file named STOP or SAVE in the run folder.

Ranks receive a signal at different times, so they agree at the step boundary: if any rank was asked, all save at the
same step. STOP saves and exits, SAVE saves and continues; rank 0 looks for the files and removes them.
"""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

import torch
import torch.distributed as dist

from plt_megatron.run_folder.folder import RunFolder

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOTHING, _SAVE, _STOP = 0, 1, 2


class StopRequest:
    """Listens for requests to stop or to save.

    Attributes:
        requested: whether the ranks have agreed to stop.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.requested = False
        self._folder = folder
        self._signaled = False  # never reset: a signal during a collective counts at the next step boundary
        self._previous = {number: signal.signal(number, self._hear) for number in _SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signaled = True

    def agree(self) -> bool:
        """Agree with all ranks at a step boundary; return True if a checkpoint is due now. Collective."""
        asked = _STOP if self._signaled else _NOTHING
        if dist.get_rank() == 0:
            asked = max(asked, self._look_for_files())
        flag = torch.tensor(asked, dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed = int(flag)
        self.requested = agreed == _STOP
        return agreed != _NOTHING

    def _look_for_files(self) -> int:
        for file, meaning in ((self._folder.stop_file, _STOP), (self._folder.save_file, _SAVE)):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
                return meaning
        return _NOTHING

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
