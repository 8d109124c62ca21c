"""The training loop: what happens to a run between its first step and its last."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from plt_megatron.config import derived
from plt_megatron.config.layout import num_microbatches
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.data.datasets import Samples, build_datasets
from plt_megatron.data.mix import consumed_epochs, describe_mix, fingerprint, index_folder, mix_shares, required_samples
from plt_megatron.data.sampling import batches as sample_batches
from plt_megatron.data.sampling import micro_batch_indices
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.model.expert_statistics import ExpertStatistics
from plt_megatron.model.loop_statistics import LoopStatistics
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.train.checkpoint import CheckpointStore
from plt_megatron.train.engine import build_engine
from plt_megatron.train.guard import StepGuard, write_incident
from plt_megatron.train.megatron_engine import StepResult
from plt_megatron.train.metrics import MetricsWriter
from plt_megatron.train.progress import ProgressBar
from plt_megatron.train.step_times import StepProfiler
from plt_megatron.train.stop import StopRequest
from plt_megatron.train.throughput import Throughput, peak_memory_bytes

logger = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and what is intact."""


class Trainer:
    """A run: its model, its data, and how far it has come. Process groups exist.

    Args:
        config: validated.
        heartbeat: told at every turn what this rank does, and the step it has come to.
    """

    def __init__(self, config: RunConfig, heartbeat: Callable[[str, int], Any] | None = None) -> None:
        self._heartbeat, self._phase = heartbeat, "starting"
        self.config = config
        self.folder = Path(derived.run_folder(config))
        self.train_iters = derived.train_iters(config)
        self.step = 0
        self.consumed_samples = 0
        self.guard = StepGuard(config.training)
        self.stop = StopRequest(self.folder)
        self.tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self.vocab_size = self._vocab_size()
        self._build_data()
        self.engine = build_engine(config, self.vocab_size)
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config, self.data_fingerprint)
        self.throughput = Throughput(config, self.vocab_size)
        self.rank = dist.get_rank()
        self.is_first_rank = self.rank == 0
        self.metrics = MetricsWriter(self.folder, config, enabled=self.is_first_rank)
        self.progress = ProgressBar(self.train_iters, enabled=self.is_first_rank)
        self.profiler = StepProfiler(config.logging, self.folder, self.rank)
        self.times = self.engine.times
        self.engine.on_progress = self._beat

    def run(self) -> bool:
        """Train to the end, or until asked to stop. Returns whether the run is finished."""
        self._resume()
        self._report_start()
        with contextlib.closing(self._training_batches()) as data:
            self._train(data)
        self._profile(end=True)
        self._beat("saving")
        self.checkpoints.close()
        return self.step >= self.train_iters

    def _train(self, data: Iterator[list[MicroBatch]]) -> None:
        while self.step < self.train_iters and not self.stop.requested:
            self._beat("training")
            self._profile()
            started = time.perf_counter()
            with self.times.measure("data"):
                batches, statistics = self._next_batches(data)
            result = self.engine.train_step(batches, self.guard.accept)
            self._count(result, time.perf_counter() - started)
            if not result.updated and self._handle_incident(result) == "rollback":
                continue
            if self._due(self.config.logging.log_interval):
                self._log(result, statistics)
            if self._due(self.config.validation.interval):
                self._validate()
            self.checkpoints.poll()
            asked = self.stop.agree()
            if asked or self._due(self.config.checkpoint.save_interval):
                self._save()

    def _beat(self, phase: str | None = None) -> None:
        """Sign of life; without a `phase`, still in the one that was named last."""
        self._phase = phase or self._phase
        if self._heartbeat is not None:
            self._heartbeat(self._phase, self.step)

    def _profile(self, end: bool = False) -> None:
        trace = self.profiler.close() if end else self.profiler.at_step(self.step)
        if trace is not None:
            self.progress.say(f"wrote the profiler's trace {trace}")

    def _due(self, interval: int) -> bool:
        """Whether something done every `interval` steps (0: never) and after the last one is due now."""
        return self.step == self.train_iters or (interval > 0 and self.step % interval == 0)

    # Before the first step.

    def _vocab_size(self) -> int:
        given = self.config.model.vocab_size
        if self.tokenizer is None:
            assert given is not None, "validate() asks for a tokenizer or model.vocab_size"
            return given
        if given is not None and given < self.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size: {given} is smaller than the tokenizer's {self.tokenizer.vocab_size} ids "
                f"({self.config.data.tokenizer}); leave it out to use the tokenizer's"
            )
        return given or self.tokenizer.vocab_size

    def _build_data(self) -> None:
        config, data = self.config, self.config.data
        samples, seed = required_samples(config), config.training.seed
        train, self.validation_data, _ = build_datasets(
            data, num_samples=samples, seed=seed, cache_dir=index_folder(config), tokenizer=self.tokenizer
        )
        assert train is not None
        self.train_data = train
        self.data_fingerprint = fingerprint(data, self.tokenizer, seed=seed, num_samples=samples[0])
        self.source_shares = mix_shares(data, samples) if dist.get_rank() == 0 else []

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * derived.tokens_per_step(self.config)

    def _resume(self) -> None:
        self._beat("loading")
        progress = self.checkpoints.load(self.engine)
        if progress is not None:
            self.step, self.consumed_samples = progress["step"], progress["consumed_samples"]
            self.guard.restore(progress["guard"])
        self.metrics.rewind(self.step)
        self.progress.start(self.step)

    def _report_start(self) -> None:
        if self.is_first_rank:
            tokens = self.train_iters * derived.tokens_per_step(self.config)
            for line in describe_mix(self.config.data, tokens, self.source_shares):
                self.progress.say(line)
            self.progress.say(self.throughput.describe())

    # Data.

    def _training_batches(self) -> Generator[list[MicroBatch]]:
        # More samples than there are: only after a rollback has passed over some.
        return self._global_batches(self.train_data, self.consumed_samples, wrap=True)

    def _global_batches(
        self, dataset: Samples, consumed_samples: int, wrap: bool = False
    ) -> Generator[list[MicroBatch]]:
        """This rank's microbatches of one global batch after another."""
        training = self.config.training
        micro_batches = sample_batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            wrap=wrap,
            prefetch=2,
        )
        count = num_microbatches(self.config, dist.get_world_size())
        with contextlib.closing(micro_batches):
            while batch := [to_microbatch(part) for part in itertools.islice(micro_batches, count)]:
                yield batch

    def _next_batches(self, data: Iterator[list[MicroBatch]]) -> tuple[list[MicroBatch], LoopStatistics | None]:
        """The next step's microbatches; where the step will be logged, the first one collects loop statistics."""
        batches = next(data)
        if (self.step + 1) % self.config.logging.log_interval and self.step + 1 != self.train_iters:
            return batches, None
        batches[0].statistics = loop_statistics(self.config.model)
        return batches, batches[0].statistics

    # In the loop.

    def _count(self, result: StepResult, seconds: float) -> None:
        self.step += 1
        self.consumed_samples += self.config.training.global_batch_size
        self.throughput.add(derived.tokens_per_step(self.config), seconds)
        self.times.count_step()
        self.progress.advance(self.step, result.loss)

    def _handle_incident(self, result: StepResult) -> str:
        """A step that was not accepted: report it, then skip it, roll back or end the run. Returns which."""
        action, problem = self.guard.action, self.guard.problem
        report = {"step": self.step, "problem": problem, "action": action, **dataclasses.asdict(result)}
        report["recent_losses"] = self.guard.statistics()
        report["microbatches"] = self._describe_microbatches()
        if self.is_first_rank:
            path = write_incident(self.folder, self.step, report)
            self.progress.say(f"step {self.step}: {problem}; {action}; see {path}")
        if action == "rollback":
            self._roll_back()
        elif action == "fail":
            raise TrainingFailed(f"step {self.step}: {problem}. {self.what_is_saved()}")
        return action

    def _roll_back(self) -> None:
        """Back to the last checkpoint's weights; the data goes on after the bad step."""
        self._beat("loading")
        progress = self.checkpoints.load(self.engine)
        if progress is None:
            raise TrainingFailed(f"step {self.step}: there is no checkpoint to roll back to yet")
        self.step = progress["step"]
        self.metrics.rewind(self.step)

    def _describe_microbatches(self) -> list[dict[str, Any]]:
        """Loss and documents of each microbatch of the last step, all data-parallel ranks'. Collective."""
        training = self.config.training
        indices = micro_batch_indices(
            len(self.train_data),
            consumed_samples=self.consumed_samples - training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            wrap=True,
        )
        own = []
        for microbatch, (loss, tokens) in enumerate(self.engine.microbatch_losses):
            samples = [self.train_data.documents(index) for index in next(indices)]
            documents = [{"source": source, "documents": documents} for source, documents in samples]
            row = {"rank": dist.get_rank(), "microbatch": microbatch, "loss": loss / max(tokens, 1), "tokens": tokens}
            own.append(row | {"samples": documents})
        if parallel_state.get_tensor_model_parallel_rank() > 0 or parallel_state.get_context_parallel_rank() > 0:
            own = []  # the same rows as its first tensor-parallel and context-parallel rank
        rows: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(rows, own)
        return [row for part in rows for row in part]

    def _log(self, result: StepResult, statistics: LoopStatistics | None) -> None:
        record = {"kind": "train", "step": self.step, "tokens": self.tokens, **dataclasses.asdict(result)}
        record |= self.throughput.take()
        record |= {"peak_memory_bytes": peak_memory_bytes(), "step_seconds": self.times.take()}
        if statistics is not None:
            record |= statistics.reduce()
        samples = required_samples(self.config)[0]
        record["source_epochs"] = consumed_epochs(self.source_shares, self.consumed_samples, samples)
        self.metrics.write(record)
        self.progress.report(record)

    def _validate(self) -> None:
        """Loss of the same weights on the same held-out text, at each of the configured loop counts."""
        if self.validation_data is None or self.config.validation.iters == 0:
            return
        self._beat("validating")
        with self.times.measure("validation"):
            self._validate_loop_counts()

    def _validate_loop_counts(self) -> None:
        assert self.validation_data is not None
        for loop_count in derived.validation_loop_counts(self.config):
            loss_sum, tokens = 0.0, 0
            with contextlib.closing(self._global_batches(self.validation_data, 0)) as data:
                for _ in range(self.config.validation.iters):
                    losses, counted = self.engine.evaluate(next(data), loop_count)
                    loss_sum, tokens = loss_sum + losses, tokens + counted
            record = {"kind": "validation", "step": self.step, "tokens": self.tokens}
            record |= {"loop_count": loop_count, "loss": loss_sum / max(tokens, 1)}
            self.metrics.write(record)
            self.progress.report(record)

    def _save(self) -> None:
        if self.config.checkpoint.enabled:
            progress = {"step": self.step, "consumed_samples": self.consumed_samples, "guard": self.guard.state()}
            self._beat("saving")
            with self.times.measure("checkpoint"):
                path = self.checkpoints.save(self.engine, progress)
            self.progress.say(f"saved {path}")

    def what_is_saved(self) -> str:
        """One sentence for an error message."""
        latest = self.checkpoints.latest()
        return f"The last checkpoint is intact: {latest}" if latest else "There is no checkpoint yet"

    def close(self) -> None:
        """Give back what the run holds: trackers, the terminal, signals."""
        self.metrics.close()
        self.progress.close()
        self.stop.close()


def loop_statistics(model: ModelConfig) -> LoopStatistics:
    """Empty ones of a model, for a microbatch of this rank."""
    loops, layers, device = model.loop_count, model.num_layers, torch.cuda.current_device()
    if model.num_moe_experts is None:
        return LoopStatistics(loops, layers, device)
    parts = parallel_state.get_tensor_and_context_parallel_world_size()
    experts = ExpertStatistics(loops, layers, model.num_moe_experts, device, parts)
    return LoopStatistics(loops, layers, device, experts)


def to_microbatch(batch: dict[str, torch.Tensor]) -> MicroBatch:
    """A collated microbatch of the data set, on this rank's device."""
    device = torch.cuda.current_device()
    moved = {name: tensor.to(device=device, non_blocking=True) for name, tensor in batch.items()}
    return MicroBatch(
        tokens=moved["tokens"],
        position_ids=moved.get("position_ids"),
        labels=moved["labels"],
        loss_mask=moved.get("loss_mask"),
        document_starts=moved.get("document_starts"),
    )
