"""Copy a folder to a place so that the copy can be interrupted at any time and no reader takes an incomplete one.

An index has the names, sizes and SHA-256 of all files: for a checkpoint its manifest.json; other folders get an
upload.json in their copy. The index is written last, and removed first when a copy is replaced: a folder without it is
an incomplete copy. Until then a journal at the place lists the files that have arrived, with the mark the place had for
each: files that have not changed since are not sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.storage.places import Place, Stored

INDEX = "upload.json"
FORMAT = 1
JOURNAL = "upload.partial.json"
_JOURNAL_EVERY_S = 5.0  # files sent since the last write may have to be sent again
_TRIES = 2  # attempts to fetch a file


@dataclass(frozen=True)
class Entry:
    """A file's size in bytes, and the hex digest of its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The index file of a folder. `files`: by path relative to the folder, with slashes; without the index file."""

    name: str
    text: str
    files: dict[str, Entry]

    def uploaded(self, sent: Collection[str]) -> Uploaded:
        """Return the result of an upload that had to send these files."""
        total = sum(entry.bytes for entry in self.files.values())
        return Uploaded(len(self.files), total, len(sent), sum(self.files[name].bytes for name in sent))


def index_of(folder: Path) -> Index:
    """Return the index of a folder; reads all of its files.

    Raises:
        UserError: there is no such folder, it is empty, a checkpoint is damaged, or a file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifest = folder / checkpoints.MANIFEST
    try:
        if manifest.is_file():
            damage = checkpoints.damage(folder)
            if damage is not None:
                raise UserError(damage)
            return read_index(str(folder), manifest.name, manifest.read_text(encoding="utf-8"))
        # Links that lead nowhere or to a folder are refused below rather than left out.
        paths = {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
        files = {
            path.relative_to(folder).as_posix(): Entry(path.stat().st_size, checkpoints.sha256(path))
            for path in sorted(paths - {folder / INDEX, folder / JOURNAL})  # of the copy that this folder may be
        }
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read, {error.strerror or error}") from error
    if not files:
        raise UserError(f"{folder}: the folder is empty")
    entries: dict[str, Any] = {name: vars(entry) for name, entry in files.items()}
    return Index(INDEX, json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n", files)


def read_index(where: str, name: str, text: str) -> Index:
    """Parse an index file's text. Raises `UserError`, which begins with `where`, if it is not a valid index."""
    try:
        content = json.loads(text)
        newer = content["format"] > FORMAT
        entries = {} if newer else content["files"]
        files = {file: Entry(int(entry["bytes"]), str(entry["sha256"])) for file, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: {name} is damaged") from error
    if newer:
        raise UserError(f"{where}: {name}: its format {content['format']} is newer than this program")
    outside = next((file for file in files if file.startswith("/") or ".." in file.split("/")), None)
    if outside is not None:
        raise UserError(f"{where}: {name} names a file outside its folder: {outside}")
    return Index(name, text, files)


def files_in(name: str, text: str | None) -> dict[str, Entry]:
    """Return the files that an index's text lists; none if there is no text, or if it is damaged."""
    try:
        return {} if text is None else read_index("", name, text).files
    except UserError:
        return {}


@dataclass(frozen=True)
class Uploaded:
    """Result of an upload: files and bytes of the folder, and how many of them had to be sent."""

    files: int
    bytes: int
    sent_files: int
    sent_bytes: int


def upload(folder: Path, place: Place, *, verify: bool = False, owned: bool = False) -> Uploaded:
    """Make `place` a copy of a folder; files that are already there are not sent again.

    Args:
        verify: read back the files that are there, rather than trust their sizes and marks.
        owned: the place belongs to this copy, and all other files in it are removed. Otherwise only those that an
            earlier upload has left are.

    Raises:
        UserError: the folder is damaged, or the place has files of someone else or cannot be written; the next attempt
            continues from there.
    """
    index = index_of(folder)
    there = place.files()
    text = place.read_text(index.name) if index.name in there else None
    before = files_in(index.name, text)  # all of them have arrived
    journal = _read_journal(place) if JOURNAL in there else {}
    if there and not owned and text is None and JOURNAL not in there:
        raise UserError(f"{place.url} is not empty and does not hold an upload ({min(there)}); give another folder")

    def has_arrived(name: str, entry: Entry) -> bool:
        stored = there.get(name)
        if stored is None or stored.bytes != entry.bytes:
            return False
        if verify:
            return place.sha256(name) == entry.sha256
        return before.get(name) == entry or (stored.mark is not None and journal.get(name) == _noted(entry, stored))

    arrived = {name: there[name] for name, entry in index.files.items() if has_arrived(name, entry)}
    missing = [name for name in index.files if name not in arrived]
    stale = there.keys() - index.files.keys() - {index.name, JOURNAL}
    if not owned:
        stale &= journal.keys() | before.keys()
    if text != index.text or missing or stale:
        _replace(folder, place, index, arrived, missing, stale)
    elif JOURNAL in there:
        place.remove(JOURNAL)
    return index.uploaded(missing)


def _replace(
    folder: Path, place: Place, index: Index, arrived: dict[str, Stored], missing: list[str], stale: set[str]
) -> None:
    """Bring the place up to date in an order in which a reader never finds an index with files other than its own."""
    journal = {name: _noted(index.files[name], stored) for name, stored in arrived.items()}
    place.write_text(JOURNAL, json.dumps(journal))  # also marks the place as an upload from now on
    place.remove(index.name)
    for name in sorted(stale):
        place.remove(name)
    _send(folder, place, index, missing, journal)
    place.write_text(index.name, index.text)
    place.remove(JOURNAL)


def _send(folder: Path, place: Place, index: Index, names: list[str], journal: dict[str, Any]) -> None:
    noted = time.monotonic()
    try:
        for name in names:
            stored, entry = place.put(folder / name, name), index.files[name]
            if stored.bytes != entry.bytes:
                raise UserError(f"{place.url}/{name}: {stored.bytes} bytes arrived instead of {entry.bytes}")
            journal[name] = _noted(entry, stored)
            if time.monotonic() - noted >= _JOURNAL_EVERY_S:
                place.write_text(JOURNAL, json.dumps(journal))
                noted = time.monotonic()
    except BaseException:  # also on a signal
        with contextlib.suppress(UserError):
            place.write_text(JOURNAL, json.dumps(journal))
        raise


def _noted(entry: Entry, stored: Stored) -> dict[str, Any]:
    return asdict(entry) | {"mark": stored.mark}


def _read_journal(place: Place) -> dict[str, Any]:
    content = place.read_json(JOURNAL)
    return content if isinstance(content, dict) else {}


# Downloads of checkpoints.


def read_manifest(place: Place) -> Index:
    """Return the index of a complete checkpoint. Raises `UserError` if there is none."""
    text = place.read_text(checkpoints.MANIFEST)
    if text is None:
        raise UserError(f"{place.url}: no complete checkpoint there, {checkpoints.MANIFEST} is missing")
    return read_index(place.url, checkpoints.MANIFEST, text)


def read_progress(url: str) -> tuple[str, dict[str, Any]]:
    """Read the progress record of the checkpoint that a URL refers to (see `find_checkpoint`); returns its own URL too.

    Raises:
        UserError: there is no checkpoint, or its record is damaged or from a newer version of this program.
    """
    place = find_checkpoint(url)
    text, entry = place.read_text(checkpoints.PROGRESS), read_manifest(place).files.get(checkpoints.PROGRESS)
    if text is None or entry is None or hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
        raise UserError(f"{place.url}/{checkpoints.PROGRESS} is damaged, its SHA-256 is not the manifest's")
    return place.url, checkpoints.parse_progress(text, place.url)


def find_checkpoint(url: str) -> Place:
    """Find the checkpoint that a URL refers to: a checkpoint, or a folder of checkpoints or a run's folder, in which it
    is the one that `latest` names or the last complete one before it.

    Raises:
        UserError: there is none.
    """
    place = Place(url)
    if checkpoints.NAME.fullmatch(place.url.rpartition("/")[2]):
        read_manifest(place)
        return place
    folder = place / checkpoints.FOLDER if checkpoints.FOLDER in place.folders() else place
    last = latest_step(folder)
    # Later steps belong to a course of training that was rolled back.
    for step in sorted((step for step in steps_in(folder) if last is None or step <= last), reverse=True):
        candidate = folder / checkpoints.folder_name(step)
        if has_manifest(candidate):
            return candidate
    raise UserError(f"{url}: no complete checkpoint there")


def has_manifest(checkpoint: Place) -> bool:
    """Return whether a checkpoint is complete: its manifest is there, and not one whose writing was cut short."""
    return bool(checkpoint.read_json(checkpoints.MANIFEST))


def steps_in(folder: Place) -> list[int]:
    """List the steps of a folder's checkpoints, complete or not."""
    return [checkpoints.step_of(Path(name)) for name in folder.folders() if checkpoints.NAME.fullmatch(name)]


def latest_step(folder: Place) -> int | None:
    """Return the step that a folder's `latest` file names, if any."""
    named = (folder.read_text(checkpoints.LATEST) or "").strip()
    return checkpoints.step_of(Path(named)) if checkpoints.NAME.fullmatch(named) else None


def download_part(place: Place, index: Index, folder: Path, part: int = 0, parts: int = 1) -> None:
    """Fetch every `parts`-th file, starting with the `part`-th; files that are already there and intact are skipped.

    Raises:
        UserError: a file cannot be read, or twice does not match the index.
    """
    for name in sorted(index.files)[part::parts]:
        entry, local = index.files[name], folder / name
        if local.is_file() and local.stat().st_size == entry.bytes and checkpoints.sha256(local) == entry.sha256:
            continue
        local.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            place.get(name, local)
            if checkpoints.sha256(local) == entry.sha256:
                break
        else:
            local.unlink()
            raise UserError(
                f"{place.url}/{name} is damaged, its SHA-256 is not that of {index.name}; "
                "give another step's checkpoint (checkpoint.load=.../checkpoints/step_...)"
            )
