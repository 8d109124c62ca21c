"""Reads and changes files whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def contents(folder: Path) -> dict[str, bytes]:
    """What each file below a folder holds, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def update_json(path: Path, **changes: Any) -> None:
    """Change values of a file's object."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
