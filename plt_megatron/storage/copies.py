"""Copies a folder to a place, so that it can be interrupted anywhere and no reader takes half of it.

Its index has the names, sizes and SHA-256 of all files: a checkpoint's is its manifest.json, other folders get one,
upload.json, in their copy. The index is written last, and removed first where another copy is replaced: without it, a
folder is half a copy. Until then a journal there says which files have arrived, and what the place knew of them: what
has not changed since is not sent again.
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
from plt_megatron.run_folder.files import write_text
from plt_megatron.storage.places import Place, Stored

INDEX = "upload.json"
FORMAT = 1
JOURNAL = "upload.partial.json"
_JOURNAL_EVERY_S = 5.0  # what is sent in between would be sent again
_TRIES = 2  # to fetch a file


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


@dataclass(frozen=True)
class Uploaded:
    """What an upload has done: files and bytes of the folder, and of those what had to be sent."""

    files: int
    bytes: int
    sent_files: int
    sent_bytes: int


def upload(folder: Path, place: Place, *, verify: bool = False, owned: bool = False) -> Uploaded:
    """Make `place` a copy of a folder; what is there already is not sent again.

    Args:
        verify: read back what is there, rather than trust its size and what the place says of it.
        owned: nothing else may be there, and what is goes. Otherwise only what an earlier upload has left.

    Raises:
        UserError: the folder is damaged, the place has files of somebody else, or cannot be written; the next try goes
            on from there.
    """
    index = index_of(folder)
    there = place.files()
    text = place.read_text(index.name) if index.name in there else None
    complete = text == index.text
    journal = _read_journal(place) if JOURNAL in there else {}
    if there and not owned and text is None and JOURNAL not in there:
        raise UserError(f"{place.url} is not empty, and what is there is no upload ({min(there)}); give another folder")
    good = _good_files(place, index, there, {} if complete or verify else journal, complete=complete, verify=verify)
    missing = [name for name in index.files if name not in good]
    stale = there.keys() - index.files.keys() - {index.name, JOURNAL}
    if not owned:
        stale &= journal.keys() | _names_in(index.name, text)
    if not complete or missing or stale:
        _replace(folder, place, index, missing, stale, {name: there[name] for name in good})
    elif JOURNAL in there:
        place.remove(JOURNAL)
    sent = [index.files[name].bytes for name in missing]
    return Uploaded(len(index.files), index.total_bytes, len(sent), sum(sent))


def _replace(
    folder: Path, place: Place, index: Index, missing: Collection[str], stale: Collection[str], good: dict[str, Stored]
) -> None:
    """In an order in which a reader never finds an index over other files than its own."""
    journal = {name: _noted(index.files[name], stored) for name, stored in good.items()}
    place.write_text(JOURNAL, json.dumps(journal))  # from now on it is known to be an upload
    place.remove(index.name)
    for name in sorted(stale):
        place.remove(name)
    _send(folder, place, index, missing, journal)
    place.write_text(index.name, index.text)
    place.remove(JOURNAL)


def _names_in(name: str, text: str | None) -> Collection[str]:
    try:
        return set() if text is None else read_index(name, text).files.keys()
    except ValueError:  # half of it
        return set()


def _good_files(
    place: Place,
    index: Index,
    there: dict[str, Stored],
    journal: dict[str, Any],
    *,
    complete: bool,
    verify: bool,
) -> Collection[str]:
    """Files that have arrived as they are to be."""

    def is_good(name: str, entry: Entry) -> bool:
        stored = there.get(name)
        if stored is None or stored.bytes != entry.bytes:
            return False
        if verify:
            return place.sha256(name) == entry.sha256
        return complete or (stored.mark is not None and journal.get(name) == _noted(entry, stored))

    return {name for name, entry in index.files.items() if is_good(name, entry)}


def _send(folder: Path, place: Place, index: Index, names: Collection[str], journal: dict[str, Any]) -> None:
    noted = time.monotonic()
    try:
        for name in names:
            stored, entry = place.put(folder / name, name), index.files[name]
            if stored.bytes != entry.bytes:
                raise UserError(f"{place.url}/{name}: {stored.bytes} bytes have arrived instead of {entry.bytes}")
            journal[name] = _noted(entry, stored)
            if time.monotonic() - noted >= _JOURNAL_EVERY_S:
                place.write_text(JOURNAL, json.dumps(journal))
                noted = time.monotonic()
    except BaseException:  # a signal too
        with contextlib.suppress(UserError):
            place.write_text(JOURNAL, json.dumps(journal))
        raise


def _noted(entry: Entry, stored: Stored) -> dict[str, Any]:
    return asdict(entry) | {"mark": stored.mark}


def _read_journal(place: Place) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(JOURNAL) or "{}")
    except ValueError:  # it was being written
        return {}
    return content if isinstance(content, dict) else {}


# Downloads of checkpoints.


def read_manifest(place: Place) -> Index:
    """The index of a complete checkpoint. Raises `UserError` if it is none."""
    text = place.read_text(checkpoints.MANIFEST)
    if text is None:
        raise UserError(f"{place.url}: no complete checkpoint there, {checkpoints.MANIFEST} is missing")
    try:
        return read_index(checkpoints.MANIFEST, text)
    except ValueError as error:
        raise UserError(f"{place.url}: {error}") from error


def read_progress(url: str) -> dict[str, Any]:
    """The record of its run of the checkpoint that a URL means (see `find_checkpoint`).

    Raises:
        UserError: there is none, or its record is damaged or a newer program's.
    """
    place = find_checkpoint(url)
    text, entry = place.read_text(checkpoints.PROGRESS), read_manifest(place).files.get(checkpoints.PROGRESS)
    if text is None or entry is None or hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
        raise UserError(f"{place.url}/{checkpoints.PROGRESS} is damaged, its SHA-256 is not the manifest's")
    return checkpoints.parse_progress(text, place.url)


def find_checkpoint(url: str) -> Place:
    """The checkpoint that a URL means: one, or of a folder of them, or of a run's folder, the one `latest` names or the
    last complete one before it.

    Raises:
        UserError: there is none.
    """
    place = Place(url)
    if checkpoints.NAME.fullmatch(place.url.rpartition("/")[2]):
        read_manifest(place)
        return place
    folder = place / checkpoints.FOLDER if checkpoints.FOLDER in place.folders() else place
    last = latest_step(folder)
    for step in sorted(steps_in(folder), reverse=True):
        candidate = folder / checkpoints.folder_name(step)
        if last is not None and step > last:
            continue  # of a course of training that was rolled back
        if candidate.read_text(checkpoints.MANIFEST) is not None:
            return candidate
    raise UserError(f"{url}: no complete checkpoint there")


def steps_in(folder: Place) -> list[int]:
    """Steps whose checkpoints a folder has, complete or not."""
    return [checkpoints.step_of(Path(name)) for name in folder.folders() if checkpoints.NAME.fullmatch(name)]


def latest_step(folder: Place) -> int | None:
    """The step that a folder's `latest` names, if it does."""
    named = (folder.read_text(checkpoints.LATEST) or "").strip()
    return checkpoints.step_of(Path(named)) if checkpoints.NAME.fullmatch(named) else None


def download_part(place: Place, index: Index, folder: Path, part: int = 0, parts: int = 1) -> None:
    """Fetch every `parts`-th file, from the `part`-th on; those that are there and right are not fetched again.

    Raises:
        UserError: a file cannot be read, or is not what the index says, twice.
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


def finish_download(index: Index, partial: Path, folder: Path) -> None:
    """Give a checkpoint that was fetched whole its name. Raises `OSError`."""
    write_text(partial / index.name, index.text)
    partial.rename(folder)
