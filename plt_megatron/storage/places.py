"""A folder anywhere that fsspec reaches: in a bucket, or on another file system."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.config.rules.uploads import packages_for, protocol_of
from plt_megatron.errors import UserError
from plt_megatron.extras import require
from plt_megatron.storage.failures import failing, reason

_CHUNK = 1 << 22
# Of what a file system knows of a file, what changes with its content: the first that there is.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class Stored:
    """A stored file: its size in bytes, and what tells that it has not changed since (None: nothing does)."""

    bytes: int
    mark: str | None


class Place:
    """A folder by its URL. All its methods raise `UserError`, one line without secrets.

    Folders need not exist, and appear with their first file.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        require(f"{protocol_of(url)}://...", *packages_for(protocol_of(url)))
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # no such protocol, or a package that the extra does not install
            raise UserError(f"{self.url}: {reason(error)}") from error

    def __truediv__(self, name: str) -> Place:
        """The folder `name` in this one."""
        return Place(f"{self.url}/{name}")

    def read_text(self, name: str) -> str | None:
        """A file's text; None: there is no such file."""
        with failing(f"{self.url}/{name} cannot be read"):
            try:
                return self._fs.cat_file(self._path(name)).decode()
            except FileNotFoundError:
                return None

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a small file."""
        with failing(f"{self.url}/{name} cannot be written"):
            self._make_folder_of(name)
            self._fs.pipe_file(self._path(name), text.encode())

    def put(self, local: Path, name: str) -> Stored:
        """Copy a file there."""
        with failing(f"{self.url}/{name} cannot be written"):
            self._make_folder_of(name)
            self._fs.put_file(str(local), self._path(name))
            self._fs.invalidate_cache()
            return _stored(self._fs.info(self._path(name)))

    def get(self, name: str, local: Path) -> str:
        """Copy a file from there; returns its SHA-256."""
        with failing(f"{self.url}/{name} cannot be read"), local.open("wb") as target:
            return self._read(name, target)

    def sha256(self, name: str) -> str:
        """SHA-256 of a remote file; reads all of it."""
        with failing(f"{self.url}/{name} cannot be read"):
            return self._read(name)

    def files(self) -> dict[str, Stored]:
        """All files, also those in folders of the folder, by relative path."""
        with failing(f"{self.url} cannot be read"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True) if self._fs.exists(self._root) else {}
            prefix = self._root.rstrip("/") + "/"
            return {path.removeprefix(prefix): _stored(info) for path, info in found.items()}

    def folders(self) -> list[str]:
        """Names of the folders in the folder."""
        with failing(f"{self.url} cannot be read"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(info["name"].rstrip("/").split("/")[-1] for info in found if info["type"] == "directory")

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with failing(f"{self.url}/{name} cannot be removed"):
            self._fs.invalidate_cache()
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def remove_all(self) -> None:
        """Remove the folder."""
        with failing(f"{self.url} cannot be removed"):
            self._fs.invalidate_cache()
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _make_folder_of(self, name: str) -> None:
        # Where paths do not begin with a slash the first part is a bucket, in which folders are not made; some file
        # systems would make the bucket.
        if self._fs.root_marker == "/":
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _read(self, name: str, target: Any = None) -> str:
        digest = hashlib.sha256()
        with self._fs.open(self._path(name), "rb") as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                if target is not None:
                    target.write(chunk)
        return digest.hexdigest()


def _stored(info: dict[str, Any]) -> Stored:
    mark = next((info[name] for name in _MARKS if info.get(name) is not None), None)
    return Stored(int(info["size"]), None if mark is None else str(mark))
