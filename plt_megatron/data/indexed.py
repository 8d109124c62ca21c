"""megatron-core's indexed format (`.bin` and `.idx`), written and read without importing megatron-core.

Layout of `.idx` (little endian): `MMIDIDX\0\0`, version 1 (uint64), dtype code (uint8), number of sequences and of
document ends (uint64 each), lengths (int32), byte offsets (int64), document ends (int64, starting with 0).
`.bin` is the tokens of all documents, one after the other.

Two more files may stand beside these:

- `<prefix>.parts.json` instead of `<prefix>.bin`: the path prefixes of the source's parts, in order, relative to its
  folder. Their `.bin` files stay where they are.
- `<prefix>.loss_mask.bin`, which `plt preprocess --chat` writes: one byte for each token, in the same order, 1 where
  the token counts as a label, else 0. A source without the file counts all of its tokens.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config.derived import SOURCE_PARTS
from plt_megatron.errors import UserError, file_error
from plt_megatron.run_folder.files import read_json_object


def part_prefixes(prefix: str | os.PathLike[str]) -> list[str]:
    """Return the path prefixes of a source's parts, in order; for an ordinary source, its own.

    Raises `UserError` if the list of parts cannot be read, or a part is missing or has changed its size.
    """
    prefix = os.fspath(prefix)
    parts = listed_parts(prefix)
    if parts is None:
        return [prefix]
    for part, size in parts.items():
        found = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = os.path.getsize(part + ".bin")
        if found != size:
            raise UserError(
                f"{part}.bin, a part of {prefix}, is missing or not {size} bytes long: restore it, or tokenize it again"
            )
    return list(parts)


def listed_parts(prefix: str) -> dict[str, int] | None:
    """Return the path prefixes of a source's parts with the bytes of their .bin, as listed; None for an ordinary
    source. Raises `UserError` if the list cannot be read."""
    path = Path(prefix + SOURCE_PARTS)
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["parts"]
        return {os.path.normpath(path.parent / part["prefix"]): part["bin_bytes"] for part in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise file_error(
            f"{path} cannot be read ({error}): join the parts again (plt preprocess --join)", error
        ) from error


def files_of(prefix: str | os.PathLike[str], suffix: str) -> list[str]:
    """Return the files with this suffix of all parts of a source."""
    return [part + suffix for part in part_prefixes(prefix)]


def total_size(files: Sequence[str]) -> int:
    """Return the total size of the files in bytes."""
    return sum(map(os.path.getsize, files))


class JoinedArrays:
    """Arrays end to end that are read like one, by `[number]` or `[first:last]`."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._starts = list(accumulate(map(len, arrays), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: int | slice) -> Any:
        """Return an element, or a copy of a range (a view if one array has all of it)."""
        if not isinstance(place, slice):
            place = int(place) + (len(self) if place < 0 else 0)
            which = bisect.bisect_right(self._starts, place) - 1
            return self._arrays[which][place - self._starts[which]]
        start, stop, step = place.indices(len(self))
        assert step == 1, "ranges must have step 1"
        found = []
        which = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[which]
            found.append(self._arrays[which][start - first : stop - first])
            which, start = which + 1, self._starts[which + 1]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, self._arrays[0].dtype if self._arrays else None)


def map_files(files: Sequence[str], dtype: Any) -> np.ndarray | JoinedArrays:
    """Memory-map the files' contents, end to end."""
    arrays = [np.memmap(file, dtype, "r") for file in files if os.path.getsize(file)]
    if len(arrays) > 1:
        return JoinedArrays(arrays)
    return arrays[0] if arrays else np.empty(0, dtype)


_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class IndexedFile:
    """The contents of a `.idx`. `lengths` is memory-mapped int32, tokens per document, and `offsets` int64, where each
    begins in bytes; `bins` are the files that hold the tokens: one, or one for each part of a source in parts."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: np.ndarray
    offsets: np.ndarray
    bins: Sequence[str]

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def start(self, document: int) -> int:
        """Return where a document starts among the source's tokens."""
        return int(self.offsets[document]) // self.dtype.itemsize


def open_index(prefix: str | os.PathLike[str]) -> IndexedFile:
    """Open `prefix`.idx and check its header and last entry against the files' sizes, without reading all of it.

    Raises `UserError` if they do not agree.
    """
    prefix = os.fspath(prefix)
    bins = files_of(prefix, ".bin")
    for path in (prefix + ".idx", *bins):
        if not Path(path).is_file():  # unlike os.path.isfile, raises where the disk does not answer
            raise UserError(f"{path} not found: tokenize the data with plt preprocess")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: no permission")
    try:
        with open(prefix + ".idx", "rb") as file:
            magic, header = file.read(len(_MAGIC)), file.read(_HEADER.size)
        if magic != _MAGIC or len(header) < _HEADER.size:
            raise UserError(f"{prefix}.idx is not an index of megatron-core's indexed format: tokenize the data again")
        version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1 or code not in _CODES:
            raise UserError(f"{prefix}.idx has an unknown version ({version}) or dtype code ({code})")
        offset = len(_MAGIC) + _HEADER.size
        size = os.path.getsize(prefix + ".idx")
        if size < offset + 12 * sequences + 8 * documents:
            raise UserError(f"{prefix}.idx is truncated at {size} bytes: tokenize the data again")
        dtype, lengths, offsets, end = np.dtype(_CODES[code]), np.empty(0, np.int32), np.empty(0, np.int64), 0
        if sequences:
            both = np.memmap(prefix + ".idx", np.uint8, "r", offset, (12 * sequences,))  # one open file for both
            lengths, offsets = both[: 4 * sequences].view(np.int32), both[4 * sequences :].view(np.int64)
            end = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    except OSError as error:
        raise file_error(f"{prefix}.idx cannot be read ({error.strerror})", error) from error
    index = IndexedFile(prefix, dtype, lengths, offsets, bins)
    _check_size(index, end)
    return index


def read_index(prefix: str | os.PathLike[str]) -> IndexedFile:
    """Like `open_index`, but also checks that all lengths add up to the size of `prefix`.bin."""
    index = open_index(prefix)
    if index.documents and index.lengths.min() < 0:
        raise UserError(
            f"{index.prefix}.idx is damaged (a document of {index.lengths.min()} tokens): tokenize it again"
        )
    _check_size(index, index.tokens * index.dtype.itemsize)
    return index


def _check_size(index: IndexedFile, expected: int) -> None:
    size = total_size(index.bins)
    if size != expected:
        expects = f"where its index expects {expected}: tokenize the data again"
        raise UserError(f"{index.prefix}.bin has {size} bytes {expects}")


def flat_tokens(index: IndexedFile) -> Any:
    """Memory-map all tokens of a source: one array, or several that are read like one."""
    return map_files(index.bins, index.dtype)


def read_manifest(prefix: str) -> dict[str, Any]:
    """Read the `prefix`.manifest.json that `plt preprocess` wrote; empty for a source that was made elsewhere."""
    with contextlib.suppress(FileNotFoundError):
        return read_json_object(Path(f"{prefix}.manifest.json"), ": delete or restore it")
    return {}


def write_index(path: Path, dtype: Any, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write a `.idx`. `lengths()` yields the int32 lengths part by part, each time from the start.

    Only one part of the lengths is in memory at a time.
    """
    code = next(code for code, kind in _CODES.items() if kind == dtype)
    count = sum(map(len, lengths()))
    item = np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        file.write(_MAGIC + _HEADER.pack(1, code, count, count + 1))
        for part in lengths():
            file.write(np.asarray(part, np.int32).tobytes())
        start = 0
        for part in lengths():
            ends = np.cumsum(part, dtype=np.int64)
            file.write((start + (ends - part) * item).tobytes())
            start += int(np.sum(part, dtype=np.int64)) * item
        for first in range(0, count + 1, 1 << 20):
            file.write(np.arange(first, min(first + (1 << 20), count + 1), dtype=np.int64).tobytes())


def concatenate(parts: Sequence[Path], target: Path) -> str:
    """Write the bytes of `parts`, one file after the other, to `target`; return their SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as output:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    output.write(block)
    return digest.hexdigest()


MASK_SUFFIX = ".loss_mask.bin"
_BLOCK = 1 << 24  # bytes read at once


def mask_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the mask of the source at `prefix`, whether or not it exists."""
    return Path(f"{os.fspath(prefix)}{MASK_SUFFIX}")


def has_mask(prefix: str | os.PathLike[str]) -> bool:
    """Return whether the source at `prefix` has a mask. A source in parts has one if all of its parts do."""
    return all(Path(file).is_file() for file in files_of(prefix, MASK_SUFFIX))


def open_mask(prefix: str | os.PathLike[str], tokens: int) -> Any:
    """Memory-map the mask of a source of `tokens` tokens: uint8 [tokens], read like an array.

    Raises `UserError` if the file is missing or of another size.
    """
    path = mask_path(prefix)
    try:
        files = files_of(prefix, MASK_SUFFIX)
        size = total_size(files)
        if size != tokens:
            raise UserError(
                f"{path} has {size:,} bytes, but the source has {tokens:,} tokens: tokenize the data again, or delete "
                "the mask to train on all of them"
            )
        return map_files(files, np.uint8)
    except OSError as error:
        raise file_error(f"{path} cannot be read ({error.strerror})", error) from error


def check_mask(prefix: str, tokens: int, manifest: Mapping[str, Any], *, values: bool = False) -> None:
    """Raise `UserError` if the source's mask has the wrong size, or is missing although its manifest records one.

    `values`: read all of it, too: it may have only 0 and 1, and must count a token.
    """
    if not has_mask(prefix):
        if manifest.get("loss_mask_tokens") is not None:
            raise UserError(
                f"{mask_path(prefix)} not found, but {prefix}.manifest.json says that the source was made with it: "
                "copy it too, or tokenize the data again"
            )
        return
    mask = open_mask(prefix, tokens)
    blocks = range(0, tokens if values else 0, _BLOCK)
    largest = max((int(mask[start : start + _BLOCK].max()) for start in blocks), default=0)
    if values and largest != 1:
        raise UserError(
            f"{mask_path(prefix)}: its largest byte is {largest}; bytes must be 1 for tokens that count in the loss "
            "and 0 for others, with at least one 1"
        )
