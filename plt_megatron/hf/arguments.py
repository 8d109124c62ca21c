"""Arguments, setup and output folders of the commands on Hugging Face models.

The checks are cheap: they run before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from plt_megatron.errors import UserError, clean_up_when_terminated, output_cannot_be_written, quiet_streams
from plt_megatron.run_folder.checkpoints import candidates
from plt_megatron.run_folder.files import publish
from plt_megatron.runtime.environment import FLASH_FIRST, quiet_imports

CONFIG = "config.json"  # of a Hugging Face folder
_SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


def check_target(target: Path) -> None:
    """Raise `UserError` if the target exists, or cannot be read by tokenizers and safetensors."""
    if str(target).encode(errors="ignore").decode() != str(target):  # it has bytes that are no text
        raise UserError(f"{target}: not UTF-8, which libraries need to read a model: choose another --output")
    if os.path.lexists(target):
        raise UserError(f"{target} exists: remove it, or choose another --output")


@contextlib.contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that gets its name at the end, or is removed on any error.

    Raises:
        UserError: `target` exists, or the disk cannot be written to.
        OSError: the standard output cannot be written to.
    """
    check_target(target)
    _remove_leftovers(target)
    # Random, too: a writer in another container may have our id.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_target(target)
        publish(temporary, target)
    except OSError as error:
        if output_cannot_be_written():
            raise
        where = error.filename2 or error.filename or target  # where both files are told, the disk of the second is full
        raise UserError(f"{where}: {error.strerror or error}; nothing is written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed while they wrote `target` left; in a container one may have had our id."""
    own = re.compile(rf"\.{re.escape(target.name)}\.(?:[0-9a-f]{{8}}\.)?(\d+)\.partial")
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = own.fullmatch(path.name)  # not those of a target with a longer name
        if process and (int(process[1]) == os.getpid() or not psutil.pid_exists(int(process[1]))):
            doomed = path.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}.partial")
            with contextlib.suppress(OSError):
                path.rename(doomed)  # a writer on another machine fails, instead of going on with half of its files
            shutil.rmtree(doomed, ignore_errors=True)


def check_model(path: Path) -> None:
    """Raise `UserError` unless `path` is a Hugging Face folder, a checkpoint, or a run that has one."""
    if (path / CONFIG).is_file():
        return
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if not path.is_dir() or not candidates(path):
        raise UserError(f"{path}: no complete checkpoint there")


def check_hf_folder(folder: Path) -> None:
    """Raise `UserError` if a folder does not exist, or has no config.json."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}" if folder.is_dir() else f"{folder}: no such folder")


def is_gguf(path: Path) -> bool:
    """Whether the file's name says that it is a GGUF file."""
    return path.suffix.lower() == ".gguf"


def check_export(folder: Path) -> None:
    """Raise `UserError` unless the folder looks like a Hugging Face folder."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no exported model there ({CONFIG} is missing); plt export makes one")


def check_file(option: str, path: Path | None) -> None:
    """Raise `UserError` if the file or folder that an option names does not exist."""
    if path is not None and not path.exists():
        raise UserError(f"{option} {path}: no such file")


def check_device(device: str) -> None:
    """Raise `UserError` unless this is a device name; whether the machine has the device is left to torch."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: give cpu, cuda or cuda:N")


def parse_size(text: str) -> int:
    """Parse `5GB`, `500MB`, `2GiB` or a plain number into bytes. Raises `UserError`."""
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        power = " KMGT".index((match[2] or " ").upper())
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise UserError(f"{text!r} is not a size: give bytes, or something like 5GB")
    return size


def prepare_conversion() -> None:
    """Prepare the imports of a command that leaves no partial output when it is terminated."""
    prepare_imports()
    quiet_streams()
    clean_up_when_terminated()


def prepare_imports() -> None:
    """Silence torch, megatron-core and transformers, keep them off the network, and have attention decode quickly."""
    os.environ.setdefault(*FLASH_FIRST)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_imports(logging.WARNING)
