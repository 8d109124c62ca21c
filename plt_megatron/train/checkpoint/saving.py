"""Saving: every rank writes its part into a temporary folder, and rank 0 publishes it once it is complete.

An error on any rank, such as a full disk, is an error on all of them, and leaves the last checkpoint intact.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from plt_megatron.config.layout import layout_of
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.model.parameters import find
from plt_megatron.run_folder import checkpoints, resuming
from plt_megatron.run_folder.files import write_text
from plt_megatron.train.checkpoint import state
from plt_megatron.train.checkpoint.collective import describe, first_of_all_ranks, on_rank_0, say
from plt_megatron.train.checkpoint.state import sharded_tensors
from plt_megatron.train.engine import Engine

Place = tuple[str, tuple[int, ...]]  # a tensor's key, and its offset in the whole tensor
_AT_ONCE = 1 << 22  # elements summed at a time as integers, 8 bytes each
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def begin_save(
    engine: Engine, directory: Path, progress: dict[str, Any], kept: state.Kept | None = None, *, staged: bool = False
) -> PendingSave:
    """Plan a save of the engine's whole state and collect its data. Collective.

    Args:
        directory: the run's folder of checkpoints, the same on all ranks; created if needed.
        progress: `step`, and whatever else the trainer needs to resume, as JSON (tokens, fingerprints, ...).
        kept: other tensors kept of the model's parameters, see `state.Kept`.
        staged: copy the data, so that training can continue while `PendingSave.write` runs in a thread.

    Raises:
        AttemptFailed: on all ranks, if it cannot be written, or if ranks that should hold equal copies do not; the last
            checkpoint is intact.
    """
    kept = kept or {}
    saved = _state(engine, kept)
    different = replica_difference(engine, saved)
    if different is not None:
        reason = f"{different}, of which a checkpoint stores one: they drifted apart, or a device is faulty"
        raise _cannot_save(progress["step"], reason, directory)
    try:
        temporary = on_rank_0(lambda: checkpoints.prepare(directory, progress["step"]))
    except UserError as error:
        raise _cannot_save(progress["step"], str(error), directory) from error
    strategy = _PlanOnly()
    data_parallel = engine.groups.dp_cp
    # Replicas share the writing.
    shared = FullyParallelSaveStrategyWrapper(strategy, data_parallel) if data_parallel.size() > 1 else strategy
    dist_checkpointing.save(
        saved,
        str(temporary),
        shared,
        async_sharded_save=True,
        async_strategy="mcore",
        content_metadata={"distrib_optim_sharding_type": "fully_reshardable"},
    )
    # Not pinned: torch rounds pinned blocks up to a power of two, and keeps them for the whole run.
    buckets = FileSystemWriterAsync.preload_tensors(strategy.writer.write_buckets, non_blocking=False)
    if staged:
        buckets = _copy_live(buckets, engine, kept)
    text = json.dumps(describe_run(engine, progress), indent=1)
    return PendingSave(temporary, strategy.writer, strategy.global_metadata, buckets, progress["step"], text)


@dataclass
class PendingSave:
    """A save between its plan and its publication.

    Attributes:
        writer: megatron-core's writer, which turns all ranks' results into the checkpoint's metadata.
        global_metadata: all ranks' plans, on rank 0.
        buckets: the data that this rank writes, by file.
        progress: the content of progress.json, fixed when the save began.
    """

    temporary: Path
    writer: Any
    global_metadata: Any
    buckets: list[Any]
    step: int
    progress: str
    results: list[Any] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def write(self) -> None:
        """Write this rank's files. Not collective: `publish` raises its error. May run in a thread of its own."""
        try:
            for index, bucket in enumerate(self.buckets):
                path, name, _ = bucket
                _, outcome = FileSystemWriterAsync.write_preloaded_data(
                    [self.writer.transforms], index, bucket, results_queue=None, count_queue=None, use_fsync=False
                )
                if isinstance(outcome, Exception):
                    raise outcome
                self.results += outcome
                self.checksums[name] = checkpoints.sha256(Path(path), sync=True)  # flush to the disk
        except Exception as error:  # of any kind: the other ranks must know of it
            self.error = f"{describe(error)} (rank {dist.get_rank()})"
        self.buckets = []

    def publish(
        self, keep_last: int, keep_every: int, on_publish: Callable[[Path], Any] = lambda checkpoint: None
    ) -> Path:
        """Make the save the run's latest checkpoint, and return its folder. Collective; raises as `begin_save` does.

        Then remove those that `superseded` names. `on_publish` is called before: a removal may take long, and a kill
        would leave the call undone.
        """
        try:
            error = first_of_all_ranks(self.error)
            if error is not None:
                raise UserError(error)
            everything: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((self.results, self.checksums), everything, dst=0)
            published = on_rank_0(lambda: self._publish(everything or []))
        except UserError as reason:
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # its disk space may be needed
            raise _cannot_save(self.step, str(reason), self.temporary.parent) from reason
        on_publish(published)
        if dist.get_rank() == 0:
            _prune(published, keep_last, keep_every)
        return published

    def _publish(self, everything: list[Any]) -> Path:
        self.writer.finish(self.global_metadata, [results for results, _ in everything])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.temporary))
        write_text(self.temporary / checkpoints.PROGRESS, self.progress)
        checksums = {name: digest for _, digests in everything for name, digest in digests.items()}
        return checkpoints.publish(self.temporary, checksums)


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Plans the save and stops there: `PendingSave` writes and publishes.

    The rest of megatron-core's own save leaves the other ranks waiting if rank 0 cannot write its part, and hands
    results over through a process that outlives a killed rank and keeps its sockets open.
    """

    writer: Any
    global_metadata: Any

    def async_save(self, *args: Any, **kwargs: Any) -> AsyncRequest:
        """Plan the save; the returned request does nothing."""
        # Only planning needs the queue, and an existing one keeps it from starting that process.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        return super().async_save(*args, **kwargs)

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str
    ) -> AsyncRequest:
        self.writer, self.global_metadata, _ = save_state_dict_ret
        return AsyncRequest(None, (), [])


def _state(engine: Engine, kept: state.Kept) -> dict[str, Any]:
    engine.gather_parameters()
    return {
        **engine.state.to_save(),
        "scheduler": engine.scheduler.state_dict(),
        "rng": state.random_state(),
        "kept": {name: state.kept_tensors(engine.stage, name, tensors) for name, tensors in kept.items()},
    }


def _copy_live(buckets: list[Any], engine: Engine, kept: state.Kept) -> list[Any]:
    """Return the buckets with copies of the tensors that training will change: on a CPU nothing else copies them."""
    tensors = (*engine.state.live_tensors(), *nested_values(dict(kept)))  # some of the latter are sharded tensors
    live = {tensor.data.untyped_storage().data_ptr() for tensor in tensors}

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor

    return [
        (path, name, (blobs, [(item, copy(tensor)) for item, tensor in tensors]))
        for path, name, (blobs, tensors) in buckets
    ]


def describe_run(engine: Engine, progress: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's progress, and what readers need to know about the run."""
    return {
        **progress,
        "format": checkpoints.FORMAT,
        checkpoints.REPLICAS_COMPARED: True,
        "config": dataclasses.asdict(engine.config),
        "schedule": resuming.schedule(engine.config, engine.scheduler.step_tokens),
        "schedule_step_tokens": engine.scheduler.step_tokens,
        "vocab_size": engine.stage.vocab_size,
        "layout": layout(engine),
        "versions": checkpoints.versions(),
    }


def layout(engine: Engine) -> dict[str, int]:
    """Return the model's layout over the processes. Random states are restored only in the same layout."""
    return layout_of(engine.config, dist.get_world_size()).sizes


def _cannot_save(step: int, reason: str, directory: Path) -> AttemptFailed:
    last = checkpoints.latest_checkpoint(directory, verify=False)
    intact = f"the last checkpoint is intact: {last}" if last else "there is no earlier checkpoint"
    return AttemptFailed(f"cannot save step {step}: {reason}; {intact}")


def _prune(published: Path, keep_last: int, keep_every: int) -> None:
    try:
        removed = checkpoints.prune(published, keep_last, keep_every)
    except OSError as error:  # the new checkpoint is safe anyway
        say(f"cannot remove an old checkpoint: {describe(error)}", logging.WARNING)
        return
    given_up = [path.name for path in removed if checkpoints.step_of(path) > checkpoints.step_of(published)]
    if given_up:
        say(f"removed {', '.join(given_up)}: later than {published.name}, and training was rolled back")


# Comparison of copies that several ranks hold and of which a checkpoint stores one: parameters replicated over
# tensor-parallel ranks, and a tied embedding, which a pipeline's first and last stages have. Data-parallel ranks are
# not compared, since they get their weights from one another in every step.


def replica_difference(engine: Engine, saved: dict[str, Any]) -> str | None:
    """Return in one line which ranks hold different copies of a tensor to be saved, or None if none do. Collective."""
    groups, model = engine.groups, engine.config.model
    if groups.tp.size() == groups.pp.size() == 1:
        return None
    state, found = {name: saved[name] for name in ("model", "optimizer")}, None
    # Training uses the same groups. Stages between the first and the last are not in the embedding's group.
    embedding = groups.embd if model.share_embeddings_and_output_weights else None
    for group, is_held in (
        (groups.tp, lambda key: find(model, key).is_replicated),
        (embedding, lambda key: find(model, key).component == "embedding"),
    ):
        if group is not None and group.size() > 1:
            found = _difference(dict(_checksums(state, is_held)), group) or found
    return first_of_all_ranks(found)


def _checksums(state: dict[str, Any], is_held: Callable[[str], bool]) -> Iterator[tuple[Place, int]]:
    """Yield (place, checksum) of the state's tensors whose keys satisfy `is_held`."""
    held: list[ShardedTensor] = [tensor for tensor in sharded_tensors(state) if is_held(tensor.key)]
    if held:
        sums = torch.stack([_checksum(tensor.data) for tensor in held]).tolist()
        yield from zip(((tensor.key, tuple(tensor.global_offset)) for tensor in held), sums, strict=True)


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the elements' bits as integers, int64; any single change changes it."""
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_AT_ONCE)]).sum()


def _difference(own: dict[Place, int], group: dist.ProcessGroup) -> str | None:
    everyones: list[dict[Place, int]] = [{}] * group.size()
    dist.all_gather_object(everyones, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    for number, checksums in enumerate(everyones):
        for place in sorted(checksums.keys() & everyones[0].keys()):
            if checksums[place] != everyones[0][place]:
                return f"ranks {ranks[0]} and {ranks[number]} hold different copies of {place[0]}"
    return None
