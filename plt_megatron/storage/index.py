"""What a folder holds, so that its copy can be told to be complete: names, sizes and SHA-256 of its files.

A checkpoint's manifest.json is its index; other folders get one, upload.json, in their copy. It is the last file to be
written there: a folder without it is half a copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.run_folder import checkpoints

INDEX = "upload.json"
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A file's size in bytes, and the hex digest of its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The files of a folder.

    Attributes:
        name: of its file.
        text: the content of that file.
        files: by path relative to the folder, with slashes; its own file is not one of them.
    """

    name: str
    text: str
    files: dict[str, Entry]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files.values())


def index_of(folder: Path) -> Index:
    """The index of a folder, all of whose files are read.

    Raises:
        UserError: there is no such folder, it is empty, a checkpoint is damaged, or a file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if (folder / checkpoints.MANIFEST).is_file():
        damage = checkpoints.damage(folder)
        if damage is not None:
            raise UserError(damage)
        return read_index(checkpoints.MANIFEST, (folder / checkpoints.MANIFEST).read_text(encoding="utf-8"))
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX)
        files = {path.relative_to(folder).as_posix(): _entry(path) for path in paths}
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read, {error.strerror or error}") from error
    if not files:
        raise UserError(f"{folder}: it is empty")
    entries: dict[str, Any] = {name: vars(entry) for name, entry in files.items()}
    return Index(INDEX, json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n", files)


def read_index(name: str, text: str) -> Index:
    """An index from its file's text. Raises `ValueError` if it is none."""
    try:
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise ValueError(f"{name}: its format {content['format']} is newer than this program")
        files = {file: Entry(int(entry["bytes"]), str(entry["sha256"])) for file, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is damaged") from error
    outside = next((file for file in files if file.startswith("/") or ".." in file.split("/")), None)
    if outside is not None:
        raise ValueError(f"{name} names a file outside its folder: {outside}")
    return Index(name, text, files)


def _entry(path: Path) -> Entry:
    return Entry(path.stat().st_size, checkpoints.sha256(path))
