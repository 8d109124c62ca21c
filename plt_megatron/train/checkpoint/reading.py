"""Reads a checkpoint's weights in one process, without process groups or megatron, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from plt_megatron.errors import UserError
from plt_megatron.model.parameters import is_buffer
from plt_megatron.model.trainable import is_trained
from plt_megatron.run_folder.checkpoints import EMA, latest_checkpoint, read_verified_progress

Part = Literal["weights", "main weights", "ema"]
_PREFIXES: dict[Part, str] = {"weights": "", "main weights": "optimizer.state.param.", "ema": f"kept.{EMA}."}
_LAYERS = re.compile(r"(decoder\.layers\.)(.+)")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.)(\d+)\.(.+)")
STACKED_EXPERTS = ".mlp.experts.experts."  # megatron-core's name for them, within a key
_NO_WEIGHTS = ("optimizer.", "kept.")
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def read_weights(path: Path | str, verify: bool = True, *, part: Part = "weights") -> Iterator[tuple[str, Tensor]]:
    """Yield (global name, tensor) of each of the model's parameters, on the CPU, whatever layout saved them.

    Args:
        path: a checkpoint, or a run's folder for its last complete one. Unpickles metadata: read only what you trust.
        verify: check every file's SHA-256 first; not needed for a checkpoint just verified.
        part: see `Weights`.

    Raises:
        UserError: there is no complete checkpoint at `path`, or no such part in it.
    """
    found = latest_checkpoint(path, verify)
    if found is None:
        raise UserError(f"{path}: no complete checkpoint there")
    weights = Weights(found, part)
    if not weights.names:
        raise UserError(f"checkpoint {found} has no {part}")
    yield from ((name, weights.read(name)) for name in weights.names)


def stored_at(name: str, *, in_all_layers: bool = True) -> tuple[str, tuple[int, ...]]:
    """Return (key on disk, index in the tensor stacked under it: the layer and, for an expert, its number).

    Tensors that only some layers have (gates with `model.loop_span`, a dense FFN or experts with
    `model.moe.first_k_dense_replace`) are not stacked over layers: their keys name the layer.
    """
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name, ()
    prefix, place = (layer[1], (int(layer[2]),)) if in_all_layers else (f"{layer[1]}{layer[2]}.", ())
    expert = _EXPERT.fullmatch(layer[3])
    if expert is None:
        return prefix + layer[3], place
    return f"{prefix}{expert[1]}experts.{expert[3]}", (*place, int(expert[2]))


class Weights:
    """A model's parameters in a checkpoint, each read on demand.

    Names are megatron-core's, layers and experts numbered over the whole model from 0:
    `decoder.layers.3.mlp.linear_fc1.weight`, `decoder.layers.3.mlp.experts.7.linear_fc2.weight`.
    Tensors are whole (`linear_fc1`: all gate rows, then all up rows; `linear_qkv`: by query group its queries, key and
    value), the vocabulary without its padding rows.

    Args:
        checkpoint: a complete checkpoint.
        part: `weights`, in the dtype that the model was trained in; or, in fp32, the optimizer's `main weights` or
            `ema`, their moving average. Parameters that were not trained (`training.trainable`) have neither: they are
            read from the model. So are buffers, in fp32, for every part.

    Attributes:
        names: names of all parameters; empty if the checkpoint lacks the part.
    """

    def __init__(self, checkpoint: Path, part: Part = "weights") -> None:
        progress = read_verified_progress(checkpoint)
        self._vocab_size = progress["vocab_size"]
        self._reader = _Reader(checkpoint, _PREFIXES[part])
        self._patterns = progress["config"]["training"].get("trainable", []) if _PREFIXES[part] else []
        self._model = _Reader(checkpoint) if self._patterns and self._reader.keys else self._reader
        self._stack: tuple[str, int, Tensor] | None = None  # a layer's experts
        self.names = [name for key in self._model.keys for name in self._names_of(key)]

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU. Raises `KeyError` if there is none of that name."""
        is_kept = is_trained(self._patterns, name)
        reader = self._reader if is_kept else self._model
        key, place = stored_at(name)
        if key not in reader.keys:
            key, place = stored_at(name, in_all_layers=False)
        if not place:
            read = reader.read(key, 0, self._vocab_size if name in PADDED else reader.shape(key)[0])
        elif len(place) == 1:
            read = reader.read(key, place[0], 1)[0]
        else:
            if self._stack is None or self._stack[:2] != (key, place[0]):
                self._stack = None  # free it before reading the next
                self._stack = (key, place[0], reader.read(key, place[0], 1)[0])
            read = self._stack[2][place[1]]
        return read if is_kept else read.float()

    def _names_of(self, key: str) -> Iterator[str]:
        match, shape = _LAYERS.fullmatch(key), self._model.shape(key)
        names = [key]
        if match is not None and _LAYER.fullmatch(key) is None:
            names, shape = [f"{match[1]}{layer}.{match[2]}" for layer in range(shape[0])], shape[1:]
        for name in names:
            if STACKED_EXPERTS in name:
                yield from (name.replace(STACKED_EXPERTS, f".mlp.experts.{each}.") for each in range(shape[0]))
            else:
                yield name


class _Reader:
    """Reads ranges of rows of a checkpoint's tensors.

    Args:
        prefix: prefix of their keys; empty: the model's.

    Attributes:
        keys: keys without the prefix. Layers are stacked (`decoder.layers.mlp.linear_fc1.weight` is [layers, ...]),
            except for tensors that only some have. Buffers have no prefix and are included with any.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._files = FileSystemReader(path)
        metadata: Metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        model = [key for key in self._tensors if not key.startswith(_NO_WEIGHTS)]
        own = [key for key in self._tensors if key.startswith(prefix)] if prefix else model
        self._stored = {key.removeprefix(prefix): key for key in own}
        if own:
            self._stored |= {key: key for key in model if is_buffer(key)}
        self.keys = sorted(self._stored)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[self._stored[key]].size

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Read rows `start` .. `start + length` of a tensor."""
        key = self._stored[key]
        entry = self._tensors[key]
        sizes = torch.Size((length, *entry.size[1:]))
        offsets = torch.Size((start, *[0] * (len(sizes) - 1)))
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        self._files.read_data(LoadPlan(items), _Into(target)).wait()
        return target


class _Into(DefaultLoadPlanner):
    """Load planner that reads everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: object) -> Tensor:
        return self.target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.transform_tensor(read_item, self.target)
