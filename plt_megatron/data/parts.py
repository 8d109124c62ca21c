"""Sources in parts: one index over the `.bin` files of other sources, which stay where they are.

Next to `<prefix>.idx`, such a source has `<prefix>.parts.json` instead of `<prefix>.bin`, with the path prefixes of its
parts, in order, relative to its folder. Everything that reads a source finds its bytes through this module.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config.derived import SOURCE_PARTS
from plt_megatron.errors import UserError


def part_prefixes(prefix: str | os.PathLike[str]) -> list[str]:
    """Return the path prefixes of a source's parts, in order; for an ordinary source, its own.

    Raises `UserError` if the list of parts cannot be read, or a part is missing or has changed its size.
    """
    prefix = os.fspath(prefix)
    path = Path(prefix + SOURCE_PARTS)
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else None
        if listed is None:
            return [prefix]
        parts = {os.path.normpath(path.parent / part["prefix"]): part["bin_bytes"] for part in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): join the parts again (plt preprocess --join)") from error
    for part, size in parts.items():
        if not os.path.isfile(part + ".bin") or os.path.getsize(part + ".bin") != size:
            raise UserError(
                f"{part}.bin, a part of {prefix}, is missing or not of {size} bytes: restore it, or tokenize it again"
            )
    return list(parts)


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
