"""The callbacks of every run, called in this order.

To add one, write a `Callback` (`base`) in its own file and list it here. Callbacks that change a step come before those
that report on it, and `TrainLog` after those whose `after_step` prepares what their `on_log` returns.
"""

from __future__ import annotations

from collections.abc import Callable

from plt_megatron.config.rules.uploads import destinations
from plt_megatron.train.callbacks.base import Callback, Run
from plt_megatron.train.callbacks.exports import Exports
from plt_megatron.train.callbacks.incidents import Incidents
from plt_megatron.train.callbacks.performance import Profiling, Stragglers, Throughput
from plt_megatron.train.callbacks.train_log import LoopLosses, LoopMeasures, Metrics, ProgressBar, TrainLog
from plt_megatron.train.callbacks.uploads import Uploads
from plt_megatron.train.callbacks.validation import Validation
from plt_megatron.train.callbacks.weight_ema import WeightEMA

# Callback -> whether a rank of a run needs it; None: each does.
CALLBACKS: dict[type[Callback], Callable[[Run], bool] | None] = {
    Profiling: None,
    Stragglers: lambda run: run.config.logging.straggler is not None,
    ProgressBar: lambda run: run.is_first_rank,
    Throughput: None,
    Incidents: None,
    WeightEMA: lambda run: run.config.training.ema_decay is not None,
    LoopMeasures: None,
    LoopLosses: lambda run: bool(run.config.training.loop_schedule),
    Metrics: lambda run: run.is_first_rank,
    TrainLog: None,
    Validation: lambda run: run.config.validation.iters > 0 and run.data.validation is not None,
    Exports: lambda run: run.is_first_rank and run.config.checkpoint.exports is not None,
    Uploads: lambda run: run.is_first_rank and bool(destinations(run.config)),
}


def is_needed(callback: type[Callback], run: Run) -> bool:
    """Return whether this rank of the run has a callback of this class."""
    needed = CALLBACKS.get(callback)
    return needed is None or needed(run)
