"""Safetensors files, sharded, read and written one tensor at a time.

The library writes whole files from memory; this writer does not. A file consists of the length of its header (8 bytes,
little endian), the header (JSON: each tensor's dtype, shape and offsets) and the tensors' bytes. Names, shapes and
dtype of an export are known before its first tensor, so headers are written first and tensors in any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import read_json_object
from plt_megatron.run_folder.text import first_few

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class SafetensorsWriter:
    """Writes tensors of one dtype, some in fp32 instead, into files of at most `max_shard_size`.

    Args:
        folder: an existing folder.
        shapes: (name, shape) of every tensor, in the order of the files.
        in_fp32: names of the tensors to write in fp32.
        max_shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Iterable[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        max_shard_size: int,
        in_fp32: Container[str] = (),
    ) -> None:
        self.dtype, self._in_fp32 = dtype, in_fp32
        self.total_size = 0
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, shape in shapes:
            size = math.prod(shape) * self._dtype_of(name).itemsize
            if shards[-1] and filled + size > max_shard_size:
                shards.append({})
                filled = 0
            shards[-1][name] = shape
            filled += size
            self.total_size += size
        numbered = (f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1))
        self.files = [folder / name for name in ([SINGLE] if len(shards) == 1 else numbered)]
        self._left: dict[str, tuple[Path, int, tuple[int, ...]]] = {}  # (file, offset, shape)
        for path, shard in zip(self.files, shards, strict=True):
            self._begin(path, shard)
        if len(shards) > 1:
            weight_map = {name: path.name for path, shard in zip(self.files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._in_fp32 else self.dtype

    def _begin(self, path: Path, shard: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            dtype = self._dtype_of(name)
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        for name, shape in shard.items():
            self._left[name] = (path, 8 + len(text) + header[name]["data_offsets"][0], shape)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any floating dtype, on the CPU, to its place. Each must be written exactly once."""
        path, place, shape = self._left.pop(name)
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        values = tensor.detach().to(self._dtype_of(name)).contiguous()
        with path.open("r+b") as file:
            file.seek(place)
            file.write(values.reshape(-1).view(torch.uint8).numpy())


class SafetensorsFolder:
    """The tensors of a Hugging Face folder's `model.safetensors`, or of the files its index names.

    Attributes:
        shapes: shapes by tensor name.
        dtypes: dtypes by tensor name, as safetensors calls them (`BF16`).

    Raises:
        UserError: a file is missing or broken, or they are not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, tuple[Path, Any]] = {}  # by tensor name
        indexed = self._read_index()
        for path in sorted({folder / name for name in indexed.values()}) if indexed else [folder / SINGLE]:
            self._open(path)
        for name, file_name in indexed.items():
            if name not in self._files or self._files[name][0].name != file_name:
                raise UserError(f"{folder / INDEX}: {name} is not in {file_name}")

    def _read_index(self) -> dict[str, str]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if single.is_file():  # an index beside it is of a former save, as transformers has it
            return {}
        if not index.is_file():
            other = next(iter(sorted(self.folder.glob("*.bin"))), None)
            hint = f", only {other.name}: save the model as safetensors" if other else ""
            raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")
        try:
            weight_map = read_json_object(index)["weight_map"]
            assert all(isinstance(value, str) for value in weight_map.values())
        except (KeyError, AttributeError, AssertionError) as error:
            raise UserError(f"{index}: not a safetensors index") from error
        missing = sorted({name for name in weight_map.values() if not (self.folder / name).is_file()})
        if missing:
            raise UserError(f"{self.folder}: {first_few(missing, 1)} is missing, which {INDEX} names")
        return weight_map

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file, or a damaged one ({error})") from error
        for name in file.keys():
            if name in self._files:
                raise UserError(f"{path}: {name} is in {self._files[name][0].name} as well")
            described = file.get_slice(name)
            self.shapes[name], self.dtypes[name] = tuple(described.get_shape()), described.get_dtype()
            self._files[name] = (path, file)

    def read(self, name: str) -> Tensor:
        """Read a tensor in its own dtype, one of `DTYPES`."""
        tensor: Tensor = self._files[name][1].get_tensor(name)
        return tensor
