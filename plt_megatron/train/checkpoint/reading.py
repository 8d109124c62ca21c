"""Reads a checkpoint's weights in one process, without process groups or megatron, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from plt_megatron.errors import UserError
from plt_megatron.run_folder.checkpoints import latest_checkpoint, read_verified_progress

_LAYERS = re.compile(r"(decoder\.layers\.)(.+)")
STACKED_EXPERTS = ".mlp.experts.experts."  # megatron-core's, within a key
_KEPT = "kept."
_NO_WEIGHTS = ("optimizer.", _KEPT)
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def read_weights(path: Path | str, verify: bool = True, *, average: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """(global name, tensor) of each of the model's parameters, on the CPU, whatever layout saved them.

    Names are megatron-core's, layers and experts numbered over the whole model from 0:
    `decoder.layers.3.mlp.linear_fc1.weight`, `decoder.layers.3.mlp.experts.7.linear_fc2.weight`.
    Tensors are whole (`linear_fc1`: all gate rows, then all up rows; `linear_qkv`: by query group its queries, key and
    value), in the dtype the model was trained in, the vocabulary without its padding rows.

    Args:
        path: a checkpoint, or a run's folder for its last complete one. Unpickles metadata: read only what you trust.
        verify: check every file's SHA-256 first; not needed for a checkpoint just verified.
        average: instead of the weights, what this callback keeps of them, in fp32: `ema`, their moving average.

    Raises:
        UserError: there is no complete checkpoint at `path`, or no such average in it.
    """
    found = latest_checkpoint(path, verify)
    if found is None:
        raise UserError(f"{path}: no complete checkpoint there")
    vocab_size = read_verified_progress(found)["vocab_size"]
    reader = _Reader(found, "" if average is None else f"{_KEPT}{average}.")
    if not reader.keys:
        raise UserError(f"checkpoint {found} has no {average} of its weights")
    for key in reader.keys:
        match = _LAYERS.fullmatch(key)
        if match:
            for layer in range(reader.shape(key)[0]):
                yield from _of_experts(f"{match[1]}{layer}.{match[2]}", reader.read(key, layer, 1)[0])
        else:
            rows = vocab_size if key in _PADDED else reader.shape(key)[0]
            yield key, reader.read(key, 0, rows)


def _of_experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensor or, where a mixture's experts are stacked in it, each expert's."""
    if STACKED_EXPERTS not in name:
        yield name, tensor
        return
    for expert, part in enumerate(tensor):
        yield name.replace(STACKED_EXPERTS, f".mlp.experts.{expert}."), part


class _Reader:
    """Reads ranges of rows of a checkpoint's tensors.

    Args:
        prefix: of their keys; none: the model's.

    Attributes:
        keys: without the prefix; layers are stacked, `decoder.layers.mlp.linear_fc1.weight` is [layers, ...].
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._files = FileSystemReader(path)
        metadata: Metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and (key.startswith(prefix) if prefix else not key.startswith(_NO_WEIGHTS))
        }
        self._prefix = prefix
        self.keys = sorted(key.removeprefix(prefix) for key in self._tensors)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[self._prefix + key].size

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Rows `start` .. `start + length` of the tensor."""
        key = self._prefix + key
        entry = self._tensors[key]
        sizes = torch.Size((length, *entry.size[1:]))
        offsets = torch.Size((start, *[0] * (len(sizes) - 1)))
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        self._files.read_data(LoadPlan(items), _Into(target)).wait()
        return target


class _Into(DefaultLoadPlanner):
    """Collects everything read in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: object) -> Tensor:
        return self.target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.transform_tensor(read_item, self.target)
