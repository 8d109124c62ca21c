"""The files that a run names, as small as they can be."""

from __future__ import annotations

import struct
from pathlib import Path

# A sentencepiece model of three pieces: their texts, score 0, and the types of an unknown and of a control token.
TOKENIZER = (
    b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    b"\x0a\x08\x0a\x01a\x15\x00\x00\x00\x00"
    b"\x0a\x0d\x0a\x04</s>\x15\x00\x00\x00\x00\x18\x03"
)
# megatron-core's index of one document of four 16-bit ids: its length and place, and where documents end.
INDEX = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 4, 0, 0, 1)


def write_run_files(folder: Path) -> None:
    """`corpus.bin` and `corpus.idx`, one short document, and `tokenizer.model`."""
    (folder / "corpus.bin").write_bytes(struct.pack("<4H", 1, 1, 1, 2))
    (folder / "corpus.idx").write_bytes(INDEX)
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
