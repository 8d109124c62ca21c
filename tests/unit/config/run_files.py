"""The files that a run names, as small as they can be."""

from __future__ import annotations

from pathlib import Path

# A sentencepiece model of two pieces: their texts, score 0, and the type of the unknown token.
TOKENIZER = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02" + b"\x0a\x08\x0a\x01a\x15\x00\x00\x00\x00"


def write_run_files(folder: Path) -> None:
    """`corpus.bin` and `corpus.idx`, which nobody reads, and `tokenizer.model`."""
    (folder / "corpus.bin").touch()
    (folder / "corpus.idx").touch()
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
