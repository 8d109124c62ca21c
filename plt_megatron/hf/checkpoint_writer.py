"""Writes a training checkpoint from weights alone, one tensor at a time, without process groups or megatron.

The counterpart of `train.checkpoint.reading`. A run in any layout can start from the checkpoint: it has whole tensors
under megatron-core's names, with the layers stacked.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.parameters import is_buffer
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.files import write_json
from plt_megatron.train.checkpoint.reading import PADDED, stored_at

_COMMON = "common_state/shard_0_1"  # megatron-core's key for everything that is not a tensor
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of the checkpoint, by our name in the whole model: `make` returns it, on the CPU, when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def dtype(self, checkpoints: torch.dtype) -> torch.dtype:
        """Return the tensor's dtype on disk, in a checkpoint of dtype `checkpoints`: a buffer's is fp32 in any."""
        return torch.float32 if is_buffer(self.name) else checkpoints


def padded(tensor: LazyTensor, rows: int) -> LazyTensor:
    """Return the tensor, padded to `rows` rows if it has a row per vocabulary entry."""
    if tensor.name not in PADDED:
        return tensor
    return LazyTensor(tensor.name, (rows, *tensor.shape[1:]), lambda: with_rows(tensor.make(), rows))


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Pad a matrix to `rows` rows with zeros at the end."""
    return F.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))


def write_checkpoint(
    directory: Path,
    tensors: Iterable[LazyTensor],
    config: RunConfig | dict[str, Any],
    vocab_size: int,
    dtype: torch.dtype,
    progress: dict[str, Any],
    step: int = 0,
) -> Path:
    """Publish a checkpoint of weights without optimizer state, as `<directory>/step_00000000`.

    Args:
        tensors: all tensors of the model, with the vocabulary padded.
        config: configuration of a run with these weights, or the one stored in another checkpoint; `model` and
            `training.precision` matter.
        dtype: dtype of the tensors on disk.
        progress: further information for readers.
        step: step that the weights are from.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the checkpoint cannot be written. Errors from making a tensor are raised unchanged.
    """
    temporary = checkpoints.prepare(directory, step)
    writer = FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
            save({}, storage_writer=writer, planner=_Planner(list(tensors), dtype), no_dist=True)
    except CheckpointException as error:  # torch's wrapper of the error, not an Exception
        cause: BaseException | None
        cause = failure = next(iter(error.failures.values()))[0]
        while isinstance(cause, RuntimeError):  # torch's, where a file could not be written
            cause = cause.__context__
        raise (cause if isinstance(cause, OSError) else failure) from None
    (temporary / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    write_json(temporary / checkpoints.PROGRESS, _described(config, vocab_size, progress, step))
    return checkpoints.publish(temporary, {})


def _described(
    config: RunConfig | dict[str, Any], vocab_size: int, progress: dict[str, Any], step: int
) -> dict[str, Any]:
    return {
        "step": step,
        **progress,
        "format": checkpoints.FORMAT,
        "weights_only": True,
        "config": config if isinstance(config, dict) else dataclasses.asdict(config),
        "schedule": {},
        "vocab_size": vocab_size,
        "layout": {},
        "versions": checkpoints.versions(),
    }


class _Planner(DefaultSavePlanner):
    """Plans from names and shapes, and makes each tensor when the writer reaches it."""

    def __init__(self, tensors: list[LazyTensor], dtype: torch.dtype) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._dtype = dtype
        self._tensors = tensors
        self._made: dict[tuple[str, tuple[int, ...]], LazyTensor] = {}

    def create_local_plan(self) -> SavePlan:
        index = MetadataIndex(_COMMON)
        self.plan = SavePlan([*self._items(), WriteItem(index=index, type=WriteItemType.BYTE_IO)])
        return self.plan

    def _items(self) -> Iterator[WriteItem]:
        places = self._places()
        sizes: dict[str, tuple[int, ...]] = {}
        for key, place in places:
            sizes[key] = tuple(max(size, 1 + index) for size, index in zip(sizes.get(key, place), place, strict=True))
        for tensor, (key, place) in zip(self._tensors, places, strict=True):
            shape, part = (*sizes[key], *tensor.shape), (*[1] * len(place), *tensor.shape)
            offsets = (*place, *[0] * len(tensor.shape))
            self._made[key, offsets] = tensor
            yield WriteItem(
                index=MetadataIndex(key, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(part)),
                    properties=TensorProperties(dtype=tensor.dtype(self._dtype)),
                    size=torch.Size(shape),
                ),
            )

    def _places(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return key and offsets of each tensor. Tensors that only some layers have are not stacked."""
        places = [stored_at(tensor.name) for tensor in self._tensors]
        layers: dict[str, set[int]] = {}
        for key, place in places:
            if place:
                layers.setdefault(key, set()).add(place[0])
        most = max(map(len, layers.values()), default=0)
        return [
            stored_at(tensor.name, in_all_layers=not place or len(layers[key]) == most)
            for tensor, (key, place) in zip(self._tensors, places, strict=True)
        ]

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([{"content_metadata": {}}], stream)
            return stream
        assert write_item.tensor_data is not None and write_item.index.offset is not None
        tensor = self._made[write_item.index.fqn, tuple(write_item.index.offset)]
        made = tensor.make()
        assert tuple(made.shape) == tensor.shape, (tensor.name, made.shape, tensor.shape)
        return made.to(tensor.dtype(self._dtype)).contiguous().view(write_item.tensor_data.chunk.sizes)
