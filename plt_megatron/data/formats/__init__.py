"""Raw formats: every module of this package is imported here, so that to add a format is to add a file."""

from __future__ import annotations

import glob
import importlib
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.data.compressed import COMPRESSIONS, compression_of
from plt_megatron.data.formats.reader import LEFT_OUT, READERS, Document, Quality, Reader, ReadOptions, Span
from plt_megatron.errors import UserError

__all__ = [
    "LEFT_OUT",
    "READERS",
    "Document",
    "Quality",
    "ReadOptions",
    "Reader",
    "Span",
    "describe_formats",
    "open_inputs",
]

_PACKED = (".tar", ".tgz", ".zip", ".7z", ".rar", ".xz", ".bz2", ".lz4", ".lzma", ".snappy")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def open_inputs(patterns: Sequence[str | Path], options: ReadOptions, format: str | None = None) -> list[Reader]:
    """Return readers of the files that paths and globs (`**` included) match.

    Each file occurs once, whatever its names, in the order given; those of a glob are sorted by name. The format
    follows from the suffix unless `format` is given; a file with an unknown suffix is plain text. Raises `UserError` if
    a pattern matches no file, a file cannot be read, or is packed by its suffix (unless `format` is given), or the
    package that reads it is missing.
    """
    paths: dict[str, str] = {}  # by the file itself, which may have several names
    for pattern in map(str, [patterns] if isinstance(patterns, str | Path) else patterns):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            what = "is neither a file nor a link to one" if found else "matches no file"
            if any(map(os.path.isdir, found)):
                what = "is a folder: name its files, as in folder/*.jsonl"
            raise UserError(f"input {pattern!r} {what}")
        for path in files:
            paths.setdefault(os.path.realpath(path), path)
    by_suffix = {suffix: reader for reader in READERS.values() for suffix in reader.suffixes}
    readers = []
    for path in paths.values():
        if format is None and _suffix(path) in _PACKED:
            read = ", ".join(COMPRESSIONS)
            raise UserError(f"input {path!r} is packed: unpack it, or give --format; only {read} are read as they are")
        kind = READERS[format] if format else by_suffix.get(_suffix(path), READERS["text"])
        readers.append(kind(path, os.path.getsize(path), options))
        readers[-1].check()
    return readers


def _suffix(path: str) -> str:
    """Return the suffix that names the format, ignoring that of a compression."""
    suffixes = Path(path.lower()).suffixes
    if compression_of(path):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def describe_formats() -> str:
    """List the formats and their suffixes, for a command's help."""
    known = (f"{name} ({', '.join(reader.suffixes)})" for name, reader in sorted(READERS.items()))
    return f"{', '.join(known)}; all but parquet may be compressed ({', '.join(COMPRESSIONS)})"
