"""A folder anywhere that fsspec can reach: in a bucket, or on another file system."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.config.rules.uploads import packages_for, protocol_of
from plt_megatron.errors import UserError, file_error
from plt_megatron.extras import require
from plt_megatron.run_folder.files import write_bytes
from plt_megatron.run_folder.text import SECRET_NAME

# Attributes of a file that change with its content; the first that the file system has is used.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "last_modified", "created")
# Hub tokens, user and password in a URL, and a URL's query, which may contain signatures.
_SECRET = re.compile(r"hf_\w{8,}|(?<=://)(?:[^/\s@]*:(?!\d+/)\S*|[^/\s@]+)@|(?<=\w)\?\S*[=&]\S*")
_SHORTEST = 6  # minimum characters of a secret: shorter words occur in every message
_LONGEST = 300  # maximum characters of a message


@dataclass(frozen=True)
class Stored:
    """A stored file: its size in bytes, and a mark that changes with its content (None: the place has none)."""

    bytes: int
    mark: str | None


class Place:
    """A folder, given by its URL. All methods raise `UserError`, one line without secrets.

    Folders need not exist; they are created with their first file.
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
        # Where paths do not start with a slash, the first part is a bucket. Buckets need no folders, and on some file
        # systems making one would create the bucket.
        self._has_folders = root.startswith("/")
        self._fs = DirFileSystem(root, fs)
        self._local = Path(root) if protocol_of(url) in ("file", "local") else None

    def __truediv__(self, name: str) -> Place:
        """Return the folder `name` in this one."""
        return Place(f"{self.url}/{name}")

    def read_text(self, name: str) -> str | None:
        """Read a file's text; None if there is no such file."""
        with failing(f"{self.url}/{name} cannot be read"):
            content = self._read(name)
            return None if content is None else content.decode()

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if there is no such file, or one that is damaged (its writing was cut short)."""
        content = self._read(name) or b"null"  # its UserError is a ValueError too
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a small file. On this machine's file systems, one that cannot be written stays as it was."""
        with failing(f"{self.url}/{name} cannot be written"):
            if self._local is not None:
                write_bytes(self._local / name, text.encode())
                return
            self._make_folder_of(name)
            self._fs.pipe_file(name, text.encode())

    def put(self, local: Path, name: str) -> Stored:
        """Copy a local file to the place."""
        with failing(f"{self.url}/{name} cannot be written"):
            self._make_folder_of(name)
            self._fs.put_file(str(local), name)
            self._fs.invalidate_cache()
            return _stored(self._fs.info(name))

    def get(self, name: str, local: Path) -> None:
        """Copy a file from the place."""
        with failing(f"{self.url}/{name} cannot be read"):
            self._fs.get_file(name, str(local))

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a remote file; reads all of it."""
        with failing(f"{self.url}/{name} cannot be read"):
            with self._fs.open(name, "rb") as source:
                return hashlib.file_digest(source, "sha256").hexdigest()

    def files(self) -> dict[str, Stored]:
        """List all files, recursively, by relative path."""
        with failing(f"{self.url} cannot be read"):
            self._fs.invalidate_cache()
            return {path: _stored(info) for path, info in self._fs.find("", detail=True).items()}

    def folders(self) -> list[str]:
        """List the names of subfolders."""
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
        with failing(f"{self.url} cannot be removed"), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            found = self._fs.find("", withdirs=True, detail=True)
            # One by one: fsspec's recursive `rm` takes * ? [ in the path of the place itself for a pattern.
            for path in sorted(found, reverse=True):
                if found[path]["type"] != "directory":
                    self._fs.rm_file(path)
                elif self._has_folders:
                    self._fs.rmdir(path)

    def _read(self, name: str) -> bytes | None:
        with failing(f"{self.url}/{name} cannot be read"):
            try:
                return bytes(self._fs.cat_file(name))
            except FileNotFoundError:
                return None

    def _make_folder_of(self, name: str) -> None:
        if self._has_folders:
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)


def _stored(info: dict[str, Any]) -> Stored:
    mark = next((info[name] for name in _MARKS if info.get(name) is not None), None)
    return Stored(int(info["size"]), None if mark is None else str(mark))


# Errors of libraries, in one line and without secrets.


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn any library error in the block into a `UserError`: "`what`: reason"; see `file_error`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries' own errors have no common base class
        raise file_error(f"{what}: {reason(error)}", error) from error


def reason(error: BaseException) -> str:
    """Format an error in one line, without the secrets in this process's environment."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    elif isinstance(error, KeyError | IndexError | AttributeError | TypeError):  # unclear without the class name
        text = f"{type(error).__name__}: {text}"
    return redacted(text)[:_LONGEST]


def redacted(text: str) -> str:
    """Return the text with secrets replaced by asterisks."""
    secrets = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= _SHORTEST]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _SECRET.sub("***", text)
