"""Publishes folders atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import check_target


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that gets its name at the end, or is removed on any error.

    Raises:
        UserError: `target` exists, or the disk cannot be written to.
    """
    check_target(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_target(target)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; nothing is written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
