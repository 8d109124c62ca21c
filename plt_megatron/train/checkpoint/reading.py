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
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from plt_megatron.errors import UserError
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

    Tensors that only some layers have (gates of looped layers, a dense FFN or experts with
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

    `part`: `weights`, in the dtype that the model was trained in; or, in fp32, the optimizer's `main weights` or `ema`,
    their moving average. Parameters that were not trained have neither: they are read from the model. So are buffers,
    in fp32, for every part.

    Attributes:
        names: names of all parameters; empty if the checkpoint lacks the part.
    """

    def __init__(self, checkpoint: Path, part: Part = "weights") -> None:
        self._vocab_size = read_verified_progress(checkpoint)["vocab_size"]
        self._prefix = _PREFIXES[part]
        self._files = FileSystemReader(checkpoint)
        metadata: Metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._stack: tuple[str, int, Tensor] | None = None  # a layer's experts
        has_part = any(key.startswith(self._prefix) for key in self._tensors)
        model = sorted(key for key in self._tensors if not key.startswith(_NO_WEIGHTS))
        self.names = [name for key in model for name in self._names_of(key)] if has_part else []
        self._known = frozenset(self.names)

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU. Raises `KeyError` if there is none of that name."""
        key, place = self._stored_at(name)
        if not place:
            read = self._read(key, 0, self._vocab_size if name in PADDED else self._tensors[key].size[0])
        elif len(place) == 1:
            read = self._read(key, place[0], 1)[0]
        else:
            if self._stack is None or self._stack[:2] != (key, place[0]):
                self._stack = None  # free it before reading the next
                self._stack = (key, place[0], self._read(key, place[0], 1)[0])
            read = self._stack[2][place[1]]
        return read if key.startswith(self._prefix) else read.float()

    def _stored_at(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return `stored_at` of the part's tensor or, if it lacks one, of the model's."""
        for prefix in (self._prefix, "") if name in self._known else ():
            for in_all_layers in (True, False):
                key, place = stored_at(name, in_all_layers=in_all_layers)
                if prefix + key in self._tensors:
                    return prefix + key, place
        raise KeyError(name)

    def _names_of(self, key: str) -> Iterator[str]:
        match, shape = _LAYERS.fullmatch(key), self._tensors[key].size
        names = [key]
        if match is not None and _LAYER.fullmatch(key) is None:
            names, shape = [f"{match[1]}{layer}.{match[2]}" for layer in range(shape[0])], shape[1:]
        for name in names:
            if STACKED_EXPERTS in name:
                yield from (name.replace(STACKED_EXPERTS, f".mlp.experts.{each}.") for each in range(shape[0]))
            else:
                yield name

    def _read(self, key: str, start: int, length: int) -> Tensor:
        """Read rows `start` .. `start + length` of a tensor."""
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
