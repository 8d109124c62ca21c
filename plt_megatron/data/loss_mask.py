"""Loss masks: `<prefix>.loss_mask.bin` tells which tokens of a source count in the loss.

The file has one byte for each token of `<prefix>.bin`, in the same order: 1 where the token counts as a label, else 0.
A source without the file counts all of its tokens. `plt preprocess --chat` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.data.parts import files_of, map_files, total_size
from plt_megatron.errors import UserError

SUFFIX = ".loss_mask.bin"
_BLOCK = 1 << 24  # bytes read at once


def mask_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the mask of the source at `prefix`, whether or not it exists."""
    return Path(f"{os.fspath(prefix)}{SUFFIX}")


def has_mask(prefix: str | os.PathLike[str]) -> bool:
    """Return whether the source at `prefix` has a mask. A source in parts has one if all of its parts do."""
    return all(map(os.path.isfile, files_of(prefix, SUFFIX)))


def open_mask(prefix: str | os.PathLike[str], tokens: int) -> Any:
    """Memory-map the mask of a source of `tokens` tokens: uint8 [tokens], read like an array.

    Raises `UserError` if the file is missing or of another size.
    """
    path = mask_path(prefix)
    try:
        files = files_of(prefix, SUFFIX)
        size = total_size(files)
        if size != tokens:
            raise UserError(
                f"{path} has {size:,} bytes, but the source has {tokens:,} tokens: tokenize the data again, or delete "
                "the mask to train on all of them"
            )
        return map_files(files, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def check_mask(prefix: str, tokens: int, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` if the source's mask has the wrong size, or is missing although its manifest records one."""
    if has_mask(prefix):
        open_mask(prefix, tokens)
    elif manifest.get("loss_mask_tokens") is not None:
        raise UserError(
            f"{mask_path(prefix)} not found, but {prefix}.manifest.json says that the source was made with it: copy it "
            "too, or tokenize the data again"
        )


def check_values(prefix: str, tokens: int) -> None:
    """Raise `UserError` unless the source's mask, if any, has only 0 and 1 and counts a token. Reads all of it."""
    if not has_mask(prefix):
        return
    mask = open_mask(prefix, tokens)
    largest = max((int(mask[start : start + _BLOCK].max()) for start in range(0, tokens, _BLOCK)), default=0)
    if largest != 1:
        raise UserError(
            f"{mask_path(prefix)}: its largest byte is {largest}; bytes must be 1 for tokens that count in the loss "
            "and 0 for others, with at least one 1"
        )
