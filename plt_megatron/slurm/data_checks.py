"""Whether the data a run is to read is whole and made with its tokenizer: headers and manifests, no tokens."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plt_megatron.config.schema import DataConfig, RunConfig
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.slurm.profile import Container

# plt_megatron/data/indexed.py describes the format. It reads all lengths; a login node should not, of a large corpus.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_UINT16 = 8


def open_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, list[str]]:
    """The run's tokenizer, if it names one that exists, and the problems with it."""
    path = config.data.tokenizer
    if path is None or not Path(path).exists():
        return None, []  # validation says what is missing
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        return None, [f"data.tokenizer: {line}" for line in str(error).splitlines()]
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        return tokenizer, [
            f"model.vocab_size {given} is smaller than the {tokenizer.vocab_size} ids of data.tokenizer {path}"
        ]
    return tokenizer, []


def data_problems(config: RunConfig, tokenizer: Tokenizer | None) -> list[str]:
    """What is wrong with the sources whose files exist, one line each."""
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    problems = []
    for path in dict.fromkeys(_paths(config.data)):
        if Path(path + ".bin").is_file() and Path(path + ".idx").is_file():
            problems += _damage(path, tokenizer) or _mismatch(path, tokenizer, vocab_size)
    return problems


def _paths(data: DataConfig) -> Iterator[str]:
    for sources in (data.sources, data.train_sources, data.validation_sources, data.test_sources):
        yield from (source.path for source in sources)


def _damage(prefix: str, tokenizer: Tokenizer | None) -> list[str]:
    """Whether header, last entry, the size of .bin and the width of its ids fit together."""
    again = "tokenize the data again (tools/preprocess_data.py)"
    try:
        with open(prefix + ".idx", "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                return [f"{prefix}.idx is no index of tokenized data: {again}"]
            _, version, code, sequences, documents = _HEADER.unpack(header)
            if version != 1 or code not in _ITEM_BYTES:
                return [f"{prefix}.idx has version {version} and type {code}, which are unknown: {again}"]
            if sequences == 0:
                return [f"{prefix}.idx says that there are no documents: {again}"]
            expected = _HEADER.size + 12 * sequences + 8 * documents
            if Path(file.name).stat().st_size < expected:
                return [f"{prefix}.idx is cut short: {again}"]
            file.seek(_HEADER.size + 4 * (sequences - 1))
            (last_length,) = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
            (last_offset,) = struct.unpack("<q", file.read(8))
    except OSError as error:
        return [f"{prefix}.idx cannot be read: {error.strerror or error}"]
    size, needed = Path(prefix + ".bin").stat().st_size, last_offset + last_length * _ITEM_BYTES[code]
    if size != needed:
        return [f"{prefix}.bin has {size} bytes where its index expects {needed}: {again}"]
    if code == _UINT16 and tokenizer is not None and tokenizer.vocab_size > 1 << 16:
        # Written with 16 bits only where every id of the tokenizer fits.
        return [f"{prefix} holds 16-bit ids, data.tokenizer has {tokenizer.vocab_size} ids: made with another one"]
    return []


def _mismatch(prefix: str, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[str]:
    """Whether the manifest names another tokenizer. Data without a manifest was made elsewhere: nothing to compare."""
    path = Path(prefix + ".manifest.json")
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tokenizer"]
        sha256, ids = made["sha256"], made["vocab_size"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path} cannot be read ({error}): tokenize the data again (tools/preprocess_data.py)"]
    if tokenizer is not None and sha256 != tokenizer.fingerprint:
        return [
            f"{prefix} was tokenized with another tokenizer ({made.get('path')}, {ids} ids) than data.tokenizer "
            f"{tokenizer.path} ({tokenizer.vocab_size} ids)"
        ]
    if vocab_size is not None and ids > vocab_size:
        return [f"{prefix} was tokenized with {ids} ids, the model has a vocabulary of {vocab_size}"]
    return []


def mount_problems(config: RunConfig, container: Container, mounted: Sequence[Path]) -> list[str]:
    """What the run reads that the container would not see, one line each.

    Args:
        mounted: folders that are mounted besides the profile's.
    """
    visible = list(mounted)
    for mount in container.mounts:
        visible.append(Path(os.path.expandvars(mount.split(":")[1] if ":" in mount else mount)))
    read = [(f"data source {path}", path) for path in dict.fromkeys(_paths(config.data))]
    for key, value in (("data.tokenizer", config.data.tokenizer), ("checkpoint.load", config.checkpoint.load)):
        read += [(f"{key} {value}", value)] if value else []
    return [
        f"{what} lies in no folder that the container sees: add one to container.mounts in the cluster's profile"
        for what, path in read
        if not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in visible)
    ]
