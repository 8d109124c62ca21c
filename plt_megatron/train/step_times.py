"""Measures the parts of a step's time."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class StepTimes:
    """Adds up host seconds by name. What runs on a GPU counts where the host waits for it, once a step: loss and
    gradient norm are read after forward and backward, which are whole; the optimizer's kernels run on into the next."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block. Nested blocks each count their whole time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def count_step(self) -> None:
        """Count a finished step."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Mean seconds per step of each block since the last call."""
        steps = max(1, self._steps)
        means = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._steps = 0
        return means
