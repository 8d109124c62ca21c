"""The callbacks of every run, called in this order.

To add one, write a `Callback` (`base`) in its own file and list it here. Callbacks that change a step come before those
that report on it, and `TrainLog` after those whose `after_step` prepares what their `on_log` returns.
"""

from __future__ import annotations

from plt_megatron.train.callbacks.base import Callback
from plt_megatron.train.callbacks.exports import Exports
from plt_megatron.train.callbacks.incidents import Incidents
from plt_megatron.train.callbacks.metrics import Metrics
from plt_megatron.train.callbacks.profiling import Profiling
from plt_megatron.train.callbacks.progress import ProgressBar
from plt_megatron.train.callbacks.stragglers import Stragglers
from plt_megatron.train.callbacks.throughput import Throughput
from plt_megatron.train.callbacks.train_log import DataProgress, LoopLosses, LoopMeasures, OptimizerSettings, TrainLog
from plt_megatron.train.callbacks.uploads import Uploads
from plt_megatron.train.callbacks.validation import Validation
from plt_megatron.train.callbacks.weight_ema import WeightEMA

CALLBACKS: tuple[type[Callback], ...] = (
    Profiling,
    Stragglers,
    ProgressBar,
    DataProgress,
    OptimizerSettings,
    Throughput,
    Incidents,
    WeightEMA,
    LoopMeasures,
    LoopLosses,
    Metrics,
    TrainLog,
    Validation,
    Exports,
    Uploads,
)
