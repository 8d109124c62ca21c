"""Loads a checkpoint into an engine of any layout, with one loop or several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.model.parameters import only_in_loops
from plt_megatron.run_folder import checkpoints, resuming
from plt_megatron.run_folder.text import first_few
from plt_megatron.train.checkpoint import saving, state
from plt_megatron.train.checkpoint.collective import describe, first_of_all_ranks, on_rank_0, say
from plt_megatron.train.engine import Engine
from plt_megatron.train.optimizers import LearningRate


def load_checkpoint(
    engine: Engine, path: Path | str, *, kept: state.Kept | None = None, allow_other_schedule: bool = False
) -> dict[str, Any]:
    """Restore the saved state in a new or used engine. Collective.

    In the layout that saved it the run resumes bit for bit; in another layout, with the same numbers but random states
    of its own. Gates missing from a one-loop checkpoint keep their initial values, with zero moments; gates that a
    one-loop model does not use are dropped. Both are logged.

    Args:
        path: a checkpoint; or a folder of checkpoints or a run's folder, for its last complete one. Damaged ones are
            logged.
        kept: as for `begin_save`: filled with what the checkpoint has of it, otherwise unchanged.
        allow_other_schedule: resume even if the optimizer's settings differ from the saved ones.

    Returns:
        The `progress` given to `begin_save`, plus `config`, `schedule`, `layout`, `versions`, `vocab_size`.

    Raises:
        UserError: on all ranks, if there is no complete checkpoint or it does not fit this engine; the message says
            why.
    """
    path, progress = _find(Path(path))
    if progress.get("weights_only"):
        raise UserError(f"checkpoint {path} has only weights, no optimizer state; set checkpoint.weights_only=true")
    resuming.check_vocabulary(path, progress, engine.stage.vocab_size)
    resuming.check_schedule(path, progress, engine.config, allow_other=allow_other_schedule)
    request = engine.state.request(optimizer=True)
    has_new = _fit(path, request)
    loaded = engine.state.load(request, partial(_read, path, sharing=engine.groups.dp_cp))
    if engine.config.training.precision == "fp32":  # they are exact, the checkpoint's model may be in bf16
        engine.share_parameters()
    step = loaded["optimizer_step"]
    # Older checkpoints lack the second number: every step used all parameters.
    engine.state.set_step(step, 0 if has_new else loaded.get("optimizer_later_step", step))
    engine.scheduler = LearningRate(engine.config, engine.optimizer, resuming.schedule_step_tokens(progress))
    engine.scheduler.go_to(progress["step"], checkpoints.trained_tokens(progress))
    _load_kept(engine, path, kept or {})
    _tell_differences(engine, progress)
    if {"context_parallel_size": 1, "expert_model_parallel_size": 1, **progress["layout"]} == saving.layout(engine):
        own = ShardedObject(state.RNG_KEY, None, (dist.get_world_size(),), (dist.get_rank(),))
        state.restore_random_state(_read(path, {"rng": own})["rng"])
    return progress


def load_weights(engine: Engine, path: Path | str) -> dict[str, Any]:
    """Start another run from a checkpoint's weights: optimizer, schedule and step stay new. Collective.

    See `load_checkpoint` for arguments, errors and return value.
    """
    path, progress = _find(Path(path))
    resuming.check_vocabulary(path, progress, engine.stage.vocab_size)
    request = engine.state.request(optimizer=False)
    _fit(path, request)
    engine.state.load(request, partial(_read, path, sharing=engine.groups.dp_cp))
    engine.state.set_step(0, 0)
    engine.scheduler = LearningRate(engine.config, engine.optimizer)
    _tell_differences(engine, progress)
    return progress


@torch.no_grad()
def _load_kept(engine: Engine, path: Path, kept: state.Kept) -> None:
    saved = on_rank_0(partial(_saved_entries, path))[0] if kept else {}
    for name, tensors in kept.items():
        request = _of_those(state.kept_tensors(engine.stage, name, tensors), saved)
        if not any(key.startswith(f"{state.KEPT_PREFIX}{name}.") for key in saved):
            say(f"{path} has no state of {name}: it is reset")
            continue
        # Entries without tensors of this rank are not returned.
        for own, value in _read(path, {"kept": request}, engine.groups.dp_cp).get("kept", {}).items():
            if isinstance(value, Tensor):  # sharded tensors are read in place
                tensors[own].copy_(value)


def _of_those(kept: dict[Any, Any], saved: Collection[str]) -> dict[Any, Any]:
    """Return the part of `kept` that a checkpoint with the keys `saved` has."""
    inside = {own: _of_those(value, saved) if isinstance(value, dict) else value for own, value in kept.items()}
    return {own: value for own, value in inside.items() if isinstance(value, dict) or value.key in saved}


# Finding the checkpoint.


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the last complete checkpoint that `path` refers to, and its progress. Ranks share the checking."""
    candidates = on_rank_0(partial(checkpoints.candidates, path))
    damages: list[str] = []
    for candidate in candidates:
        check = partial(checkpoints.damage, candidate, dist.get_rank(), dist.get_world_size())
        problem = first_of_all_ranks(_agree(candidate, check))
        if problem is None:
            if damages:
                say(f"using {candidate} instead")
            progress = on_rank_0(partial(checkpoints.read_verified_progress, candidate))
            if dist.get_rank() == 0:
                checkpoints.warn_of_doubt(candidate, progress)
            return candidate, progress
        if candidate != path and not on_rank_0(candidate.exists):
            raise AttemptFailed(f"{candidate} was removed by its run, which has later ones: try again")
        damages.append(problem)
        if len(candidates) > 1:
            say(problem, logging.WARNING)
    raise UserError(damages[0] if len(damages) == 1 else f"{path}: no complete checkpoint there")


def _tell_differences(engine: Engine, progress: dict[str, Any]) -> None:
    own = saving.describe_run(engine, {})["config"]
    saved = progress["config"]
    for section, name in [*(("model", key) for key in own["model"]), ("training", "precision")]:
        before, now = saved[section].get(name), own[section][name]
        if before != now and name not in ("backend", "vocab_size"):
            say(f"{section}.{name}: {before} in the checkpoint, now {now}")


# Checking that it fits.


def _fit(path: Path, request: dict[str, Any]) -> bool:
    """Compare the checkpoint's tensors with those the engine needs, and remove from `request` the gates that the
    checkpoint lacks: all of them, or none. Return whether it lacks them."""
    saved, objects = on_rank_0(partial(_saved_entries, path))
    saved = {key: shape for key, shape in saved.items() if not key.startswith(state.KEPT_PREFIX)}
    request["model"] = {
        name: value
        for name, value in request["model"].items()
        # Extra states depend on the backend.
        if not isinstance(value, ShardedObject) or value.unique_key in objects
    }
    needed = _needed_shapes(request)
    missing = sorted(needed.keys() - saved.keys(), key=_model_first)
    unexpected = sorted(saved.keys() - needed.keys(), key=_model_first)
    if "optimizer" not in request:
        unexpected = [key for key in unexpected if not key.startswith(state.OPTIMIZER_PREFIX)]
    for key in sorted(needed.keys() & saved.keys(), key=_model_first):
        if needed[key] is not None and needed[key] != saved[key]:
            raise UserError(
                f"checkpoint {path}: the tensor {key} has shape {saved[key]}, this model needs {needed[key]}"
            )
    for keys, others, fault in ((missing, saved, "lacks"), (unexpected, needed, "has")):
        both_loop = any(map(only_in_loops, others))  # gates of another kind, or a learned scale
        strange = [key for key in keys if both_loop or not only_in_loops(key)]
        if strange:
            other = "which this model needs" if fault == "lacks" else "which this model lacks"
            raise UserError(f"checkpoint {path} {fault} the tensor {first_few(strange, 1)}, {other}")
    if missing:
        _take_out(request, set(missing))
        say(f"{path} has no {_loop_parameters(missing)}: this model's are new, with fresh optimizer state")
    if unexpected:
        say(f"the {_loop_parameters(unexpected)} in {path} are dropped: this model has none")
    return bool(missing)


def _loop_parameters(keys: list[str]) -> str:
    return "gates and scales of loops" if any("hidden_scale" in key for key in keys) else "gates"


def _model_first(key: str) -> tuple[bool, str]:
    return key.startswith(state.OPTIMIZER_PREFIX), key


def _saved_entries(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return (shapes of the tensors by key, keys of the objects)."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return shapes, entries.keys() - shapes.keys()


def _needed_shapes(request: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return shapes by key over all ranks; None if padding may differ."""
    own = {
        tensor.key: None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
        for tensor in state.sharded_tensors(request)
    }
    everyones: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return {key: shape for shapes in everyones for key, shape in shapes.items()}


def _take_out(request: dict[str, Any], keys: set[str]) -> None:
    """Remove the model's tensors with these keys, and the parameters whose optimizer state has such a key."""
    request["model"] = {name: value for name, value in request["model"].items() if value.key not in keys}
    for index, parameters in request.get("optimizer", {}).items():
        request["optimizer"][index] = {
            number: tensors
            for number, tensors in parameters.items()
            if not any(tensor.key in keys for tensor in nested_values(tensors))
        }


# Reading.


def _read(path: Path, request: dict[str, Any], sharing: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Read each rank's request; a failure on any rank is an error on all. One of the `sharing` ranks, which request the
    same tensors, reads a tensor and sends it to the others."""
    strategy: Any = _AgreedLoad(path)
    if sharing:
        strategy = FullyParallelLoadStrategyWrapper(strategy, sharing)
    return _agree(path, lambda: dist_checkpointing.load(request, str(path), strategy))


class _AgreedLoad(TorchDistLoadShardedStrategy):
    """Reads files. If one rank cannot, raises an AttemptFailed on all before they wait for what it should send."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return _agree(self._path, partial(super().load, *args, **kwargs))


def _agree[T](path: Path, load: Callable[[], T]) -> T:
    """Return what `load` returns or, if it fails on any rank, raise an AttemptFailed on all."""
    loaded, problem = None, None
    try:
        loaded = load()
    except UserError:  # raised on all ranks
        raise
    except (Exception, CheckpointException) as error:  # whatever it is, the other ranks must hear of it
        problem = f"checkpoint {path}: cannot be loaded on rank {dist.get_rank()}, {describe(error)}"
    problem = first_of_all_ranks(problem)
    if problem is not None:
        raise AttemptFailed(problem)
    return cast(T, loaded)
