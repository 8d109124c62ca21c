"""What `MegatronEngine` and `DeepSpeedEngine` have in common, as the trainer and checkpoints use it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.build import build_stage
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
from plt_megatron.model.loss import sum_of_losses
from plt_megatron.train.checkpoint.state import EngineState
from plt_megatron.train.optimizers import LearningRate


def summed_over_tensor_parallel(name: str, parameter: nn.Parameter, stage: LoopedGPT) -> bool:
    """Return whether each tensor-parallel rank has a part of the gradient; the rule is megatron-core's own."""
    if stage.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return stage.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)


def leaves_later_loops_out(config: RunConfig, loop_count: int) -> bool:
    """Return whether a step of `loop_count` loops leaves parameters unused that the model may have."""
    return loop_count == 1 < config.model.loop_count


@dataclass
class StepResult:
    """The result of an optimizer step, equal on all ranks.

    Attributes:
        loss: mean cross-entropy over the step's tokens that count, in nats.
        grad_norm: norm of the whole model's gradient, before clipping.
        lr: the learning rate this step used.
        loss_tokens: tokens that counted in the loss.
        updated: whether the weights were updated.
        head_z_loss: with `training.z_loss_coeff`, the mean of log(Z)^2 over the same tokens, without the coefficient.
    """

    loss: float
    grad_norm: float
    lr: float
    loss_tokens: int
    updated: bool = True
    head_z_loss: float | None = None


def finite_step(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm)


def masked_loss(loss_mask: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of a microbatch's losses, to differentiate; tokens that count in it; both to log, float64 [2])."""
    loss_sum, tokens = sum_of_losses(output, loss_mask)
    # A copy: megatron-core's schedule may scale the loss in place.
    return loss_sum, tokens.int(), torch.stack((loss_sum.detach().double(), tokens.double()))


class Engine:
    """The model, its gradients and its optimizer on this rank: what trainer and checkpoints use of an engine. Process
    groups must exist, and the configuration be valid.

    Attributes:
        stage: this rank's part of the model.
        state: state of model and optimizer for checkpoints.
        times: host time spent in each part of a step.
        on_progress: called at every forward pass of a microbatch through a stage.
    """

    state: EngineState
    optimizer: Any
    scheduler: LearningRate

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.config = config
        self.stage = build_stage(config, vocab_size)
        self.groups: Any = self.stage.pg_collection
        self.times = StepTimes()
        self.on_progress: Callable[[], Any] = lambda: None
        self._results: list[Tensor] = []

    def train_step(
        self,
        batches: list[MicroBatch],
        accept: Callable[[float, float], bool] = finite_step,
        loop_count: int | None = None,
    ) -> StepResult:
        """Run forward and backward over this rank's microbatches, then the optimizer.

        Args:
            accept: decides from loss and gradient norm, equal on all ranks, whether the weights may be updated. A
                rejected step leaves weights and optimizer state unchanged; the learning-rate schedule continues.
            loop_count: loops of this step; None: the model's.
        """
        result = self._step(batches, accept, loop_count or self.config.model.loop_count)
        self.scheduler.count_step()
        self.times.count_step()
        return result

    def _step(self, batches: list[MicroBatch], accept: Callable[[float, float], bool], loop_count: int) -> StepResult:
        """Do what `train_step` says, apart from the learning rate's schedule."""
        raise NotImplementedError

    def evaluate(self, batches: list[MicroBatch], loop_count: int) -> tuple[float, int]:
        """Return (sum of token losses, tokens that count) of the current weights run for `loop_count` loops."""
        raise NotImplementedError

    def gather_parameters(self) -> None:
        """Complete the weights that the last step updated, before anything but a forward pass reads them. Collective;
        with `parallel.overlap_param_gather` a rank has only its own share of them until the next forward pass."""

    def share_parameters(self) -> None:
        """Send every rank the weights that their owners have changed outside of a step. Collective; call
        `gather_parameters` before the change."""

    def _count_tokens(self, batches: list[MicroBatch]) -> Tensor:
        """Return how many tokens of the step count in the loss, float64 [1] on the device, equal on all ranks."""
        counts = [
            batch.tokens.numel() if batch.loss_mask is None else batch.loss_mask.sum(dtype=torch.float64)
            for batch in batches
        ]
        counted = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device()) + sum(counts)
        dist.all_reduce(counted, group=self.groups.dp)
        return counted

    @property
    def microbatch_losses(self) -> list[tuple[float, int]]:
        """(sum of token losses, tokens that count) of each microbatch of the latest step or evaluation, on the last
        stage. Collective over the ranks that share a microbatch's sequences."""
        if not self._results:
            return []
        results = torch.stack(self._results)
        if self.groups.cp.size() > 1:
            dist.all_reduce(results, group=self.groups.cp)
        return [(loss, int(tokens)) for loss, tokens in results.tolist()]

    def _reduce(self, results: list[Tensor]) -> Tensor:
        """Return float64 [3] on the device, equal on all ranks: sums of losses, tokens that count in them, z-losses.

        `results`: (loss, tokens) of each of this rank's microbatches, float64 [2]; empty before the last stage.
        """
        self._results = results
        total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        if results:
            total[:2] = torch.stack(results).sum(dim=0)
        if self.stage.z_loss is not None:
            total[2] = self.stage.z_loss.take()
        dist.all_reduce(total, group=self.groups.dp_cp)
        dist.all_reduce(total, group=self.groups.pp)
        return total

    def _mean(self, sums: Sequence[float], grad_norm: float = math.nan) -> StepResult:
        """Divide `_reduce`'s sums by their tokens; `updated` is for the caller to set."""
        loss, tokens, z_loss = sums
        count = max(tokens, 1)
        head_z_loss = None if self.stage.z_loss is None else z_loss / count
        return StepResult(loss / count, grad_norm, self.scheduler.lr, int(tokens), False, head_z_loss)


class StepTimes:
    """Accumulates host seconds by name. GPU work counts where the host waits for it, once per step, when it reads loss
    and gradient norm after forward and backward: these are timed whole. The optimizer's kernels run on after its part
    has been timed; only the whole step's seconds (`Step.seconds`) have them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block. Nested blocks each count their whole time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def count_step(self) -> None:
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return the mean seconds per step of each block since the last call."""
        steps = max(1, self._steps)
        means = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._steps = 0
        return means
