"""A corpus that every machine has: the sources of Python's standard library, one document per file."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError, run_command
from plt_megatron.run_folder.files import write_bytes
from plt_megatron.run_folder.text import format_bytes, plural

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


@dataclass(frozen=True)
class DemoCorpus:
    """The two JSONL files (field `text`) and their size."""

    train: Path
    validation: Path
    documents: int
    bytes: int


def write_demo_corpus(folder: str | Path, max_bytes: int = 1 << 40) -> DemoCorpus:
    """Write `train.jsonl` and `validation.jsonl` to `folder`, at most `max_bytes` of text altogether.

    The same Python gives the same files in the same order: a hash of a file's name decides its place and part.
    Existing files with the right content are not touched.
    """
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    left = {"train": max_bytes - max_bytes // _HELD_OUT, "validation": max_bytes // _HELD_OUT}
    documents = size = 0
    for name, text in _documents(Path(sysconfig.get_path("stdlib"))):
        length = len(text.encode("utf-8"))
        part = "validation" if is_held_out(name) else "train"
        if length > left[part]:
            continue
        left[part] -= length
        parts[part].append((name, text))
        documents, size = documents + 1, size + length
    if not all(parts.values()):
        raise UserError(f"no text for the demo corpus in {sysconfig.get_path('stdlib')} (limit: {max_bytes} bytes)")
    folder = Path(folder)
    paths = {part: folder / f"{part}.jsonl" for part in parts}
    for part, found in parts.items():
        write_part(paths[part], found)
    return DemoCorpus(paths["train"], paths["validation"], documents, size)


def is_held_out(name: str) -> bool:
    """Return whether the document of this name belongs to the validation part."""
    return int(_hash(name)[:8], 16) % _HELD_OUT == 0


def write_part(path: Path, documents: Sequence[tuple[str, str]]) -> None:
    """Write documents, (name, text), as JSONL. A file that already has this content is not touched."""
    lines = (json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n" for name, text in documents)
    _write(path, "".join(lines).encode("utf-8"))


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


def _write(path: Path, content: bytes) -> None:
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m plt_megatron.data.demo_corpus", description=__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--max-mb", type=float, default=1e6, help="at most this much text, in MB (default: all)")
    arguments = parser.parse_args()
    corpus = write_demo_corpus(arguments.output, int(arguments.max_mb * 1e6))
    print(
        f"{corpus.train.parent}: {plural(corpus.documents, 'document')}, {format_bytes(corpus.bytes)} of Python sources"
    )


if __name__ == "__main__":
    sys.exit(run_command(_main))
