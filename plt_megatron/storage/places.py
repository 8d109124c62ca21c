"""A folder anywhere that fsspec reaches: in a bucket, or on another file system."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.config.rules.uploads import packages_for, protocol_of
from plt_megatron.errors import UserError
from plt_megatron.extras import require

# Of what a file system knows of a file, what changes with its content: the first that there is.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "created")
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|KEY|SAS", re.IGNORECASE)
# Tokens of a hub, users and passwords in a URL, and its query, in which signatures are.
_SECRET = re.compile(r"hf_\w{8,}|(?<=://)[^/\s@]+@|(?<=\w)\?\S*[=&]\S*")
_SHORTEST = 6  # characters of a secret: shorter words are in every message
_LONGEST = 300  # characters of a message


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
        from fsspec.implementations.dirfs import DirFileSystem

        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # no such protocol, or a package that the extra does not install
            raise UserError(f"{self.url}: {reason(error)}") from error
        # Where paths do not begin with a slash the first part is a bucket, in which folders are not made; some file
        # systems would make the bucket.
        self._has_folders = fs.root_marker == "/"
        self._fs = DirFileSystem(root, fs)

    def __truediv__(self, name: str) -> Place:
        """The folder `name` in this one."""
        return Place(f"{self.url}/{name}")

    def read_text(self, name: str) -> str | None:
        """A file's text; None: there is no such file."""
        with failing(f"{self.url}/{name} cannot be read"):
            try:
                return self._fs.cat_file(name).decode()
            except FileNotFoundError:
                return None

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a small file."""
        with failing(f"{self.url}/{name} cannot be written"):
            self._make_folder_of(name)
            self._fs.pipe_file(name, text.encode())

    def put(self, local: Path, name: str) -> Stored:
        """Copy a file there."""
        with failing(f"{self.url}/{name} cannot be written"):
            self._make_folder_of(name)
            self._fs.put_file(str(local), name)
            self._fs.invalidate_cache()
            return _stored(self._fs.info(name))

    def get(self, name: str, local: Path) -> None:
        """Copy a file from there."""
        with failing(f"{self.url}/{name} cannot be read"):
            self._fs.get_file(name, str(local))

    def sha256(self, name: str) -> str:
        """SHA-256 of a remote file; reads all of it."""
        with failing(f"{self.url}/{name} cannot be read"):
            with self._fs.open(name, "rb") as source:
                return hashlib.file_digest(source, "sha256").hexdigest()

    def files(self) -> dict[str, Stored]:
        """All files, also those in folders of the folder, by relative path."""
        with failing(f"{self.url} cannot be read"):
            self._fs.invalidate_cache()
            found = self._fs.find("", detail=True) if self._fs.exists("") else {}
            return {path: _stored(info) for path, info in found.items()}

    def folders(self) -> list[str]:
        """Names of the folders in the folder."""
        with failing(f"{self.url} cannot be read"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls("", detail=True)
            except FileNotFoundError:
                return []
            return sorted(info["name"].rstrip("/") for info in found if info["type"] == "directory")

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with failing(f"{self.url}/{name} cannot be removed"):
            self._fs.invalidate_cache()
            if self._fs.exists(name):
                self._fs.rm_file(name)

    def remove_all(self) -> None:
        """Remove the folder."""
        with failing(f"{self.url} cannot be removed"):
            self._fs.invalidate_cache()
            if self._fs.exists(""):
                self._fs.rm("", recursive=True)

    def _make_folder_of(self, name: str) -> None:
        if self._has_folders:
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)


def _stored(info: dict[str, Any]) -> Stored:
    mark = next((info[name] for name in _MARKS if info.get(name) is not None), None)
    return Stored(int(info["size"]), None if mark is None else str(mark))


# What libraries say when they fail, in one line and without secrets.


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Any error of a library in the block becomes a `UserError`: "`what`: reason"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own, and they share no class
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in one line, without the secrets that this process has been given in its environment."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, KeyError | IndexError | AttributeError | TypeError):  # says little without its class
        text = f"{type(error).__name__}: {text}"
    return redacted(text)[:_LONGEST]


def redacted(text: str) -> str:
    """A text without secrets."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _SECRET.sub("***", text)
