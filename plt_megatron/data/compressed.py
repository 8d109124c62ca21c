"""Read gzip and zstandard files as plain binary streams."""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from pathlib import Path
from typing import IO, Any

from plt_megatron.errors import UserError
from plt_megatron.extras import require

_READ = 1 << 20
_FEED = 1 << 11  # bytes for zstandard at once, of which it makes up to 64 MiB
_WINDOW = 1 << 31  # of zstd --long=31, as in Reddit's dumps; memory is taken only for what a file needs


class BrokenStream(Exception):
    """Raised when a compressed file is truncated or damaged; the message says which."""


def compression_of(path: str | Path) -> type[_Gzip | _Zstandard] | None:
    """Return what decompresses a file of this suffix, in small or capital letters; None if it is not compressed."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def open_stream(path: str | Path) -> io.BufferedReader:
    """Open a file, decompressing by suffix. Damage raises `BrokenStream` while reading."""
    try:
        raw = open(path, "rb", buffering=_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    decompress = compression_of(path)
    if decompress:
        return io.BufferedReader(decompress(raw), _READ)
    assert isinstance(raw, io.BufferedReader)
    return raw


class _Decompressing(io.RawIOBase):
    """A readable stream over a compressed file."""

    def __init__(self, compressed: IO[bytes]) -> None:
        self.compressed = compressed

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.compressed.close()
        super().close()


class _Gzip(_Decompressing):
    def __init__(self, compressed: IO[bytes]) -> None:
        super().__init__(compressed)
        self._file = gzip.GzipFile(fileobj=compressed, mode="rb")

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read1(len(buffer))  # `readinto` would lose the data before the damage
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenStream(f"broken gzip data ({error})") from error
        buffer[: len(content)] = content
        return len(content)


class _Zstandard(_Decompressing):
    """zstandard's own stream reader accepts truncated files, so frames are tracked here."""

    def __init__(self, compressed: IO[bytes]) -> None:
        super().__init__(compressed)
        require("reading .zst files", "zstandard")
        self._module = importlib.import_module("zstandard")
        self._frame: Any = None  # the decompressor of the frame being read
        self._pending = b""  # compressed bytes after the end of the last frame
        self._output = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            chunk = self._pending or self.compressed.read(_FEED)
            self._pending = b""
            if not chunk:
                if self._frame is not None:
                    raise BrokenStream("broken zstandard data (the file ends in the middle of a frame)")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(chunk))
            except self._module.ZstdError as error:
                raise BrokenStream(f"broken zstandard data ({error})") from error
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


COMPRESSIONS: dict[str, type[_Gzip | _Zstandard]] = {".gz": _Gzip, ".zst": _Zstandard}


def compressed_offset(stream: io.BufferedReader) -> int:
    """Return how many bytes of the compressed file behind a stream of `open_stream` have been read."""
    assert isinstance(stream.raw, _Decompressing)
    return stream.raw.compressed.tell()
