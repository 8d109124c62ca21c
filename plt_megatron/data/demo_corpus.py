"""A corpus that every machine has: the sources of Python's standard library, one document per file."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_bytes

# Neither prose nor code worth continuing: tests, generated tables, and what pip installed.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
_HELD_OUT = 16  # one document in this many is for validation


def write_demo_corpus(folder: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `validation.jsonl` to `folder`, in an order that only Python's version decides.

    Returns the number of documents and the bytes of their text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = {part: folder / f"{part}.jsonl" for part in ("train", "validation")}
    return write_parts(_documents(library), files, f"no text for the demo corpus in {library}")


def write_parts(documents: Iterable[tuple[str, str]], files: Mapping[str, Path], missing: str) -> tuple[int, int]:
    """Write documents, (name, text), as the JSONL files (fields `text`, `source`) of the parts train and validation.

    One document in 16 is held out for validation, by the hash of its name. A file that already has the right content
    is not touched. Returns the number of documents and the bytes of their text.

    Raises:
        UserError: `missing`, if a part has no document, or a file cannot be written.
    """
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    size = 0
    for name, text in documents:
        part = "validation" if int(_hash(name)[:8], 16) % _HELD_OUT == 0 else "train"
        lines[part].append(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
        size += len(text.encode("utf-8"))
    if not all(lines.values()):
        raise UserError(missing)
    for part, path in files.items():
        content = "".join(lines[part]).encode("utf-8")
        try:
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return sum(map(len, lines.values())), size


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def _documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of every usable source file, ordered by the hash of the name."""
    names = []
    for parent, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in _SKIPPED_FOLDERS]
        paths = [Path(parent, file) for file in files if file.endswith(".py")]
        names += [path.relative_to(root).as_posix() for path in paths]
    for name in sorted(names, key=lambda name: (_hash(name), name)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name, text
