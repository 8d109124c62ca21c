"""The worker side of preprocessing: encodes one shard of the input as one shard of tokens.

A shard is three files in the work folder: `KEY.bin` (tokens), `KEY.len` (int32 tokens per document) and `KEY.json`
(counts, bad lines), and a fourth for conversations, `KEY.mask` (see `loss_mask`). `KEY.json` is published by renaming
after the others are on disk: a shard whose `KEY.json` exists is complete, no matter when the process was killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.data.compressed import BrokenStream
from plt_megatron.data.encoders import ChatEncoder, Encoder, TextEncoder
from plt_megatron.data.formats import LEFT_OUT, Document, Span
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.run_folder.files import replacing, write_bytes, write_text

_BATCH_BYTES = 1 << 20  # of text encoded at once
_BAD_LINES_KEPT = 1000  # per shard, with file, line and reason; all are counted


@dataclass(frozen=True)
class Settings:
    """Settings that the tokens depend on, besides the input."""

    tokenizer: str
    eod_token: str | None
    append_eod: bool
    chat: bool
    fail_on_bad_line: bool


@dataclass(frozen=True)
class Shard:
    """A unit of work: spans that are read in order. `files` has the index of each span's file among all inputs."""

    key: str
    spans: tuple[Span, ...]
    files: tuple[int, ...]
    spool_start: int | None = None  # the (only) span is a temporary copy of the decompressed bytes from this offset on
    broken: str = ""  # why the input ends after this shard


@dataclass
class SpanReport:
    """Contents of one span, in numbers.

    `lines` counts all lines, `bad` the bad ones by kind, `left_out` those that the options leave out; `counted` are the
    tokens that count in the loss, where not all do.
    """

    file: int
    lines: int = 0
    text_bytes: int = 0
    disk_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    counted: int = 0
    left_out: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)  # (line within the span, reason)


class FatalBadLine(Exception):
    """Raised for a bad line where bad lines are fatal: (span's index in the shard, line in the span, reason)."""


_worker: dict[str, Any] = {}


def start_worker(settings: Settings, work: str, counters: Any) -> None:
    """Set up a worker process. It exits when its parent is gone, however that happened."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of the parallel ones
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    kind = ChatEncoder if settings.chat else TextEncoder
    encoder = kind(tokenizer, append_eod=settings.append_eod)
    _worker.update(settings=settings, work=Path(work), counters=counters, encoder=encoder)


def run_in_worker(shard: Shard) -> str:
    """Encode a shard in a process set up by `start_worker`; return its key."""
    encode_shard(shard, _worker["settings"], _worker["encoder"], _worker["work"], _worker["counters"])
    return shard.key


def encode_shard(shard: Shard, settings: Settings, encoder: Encoder, work: Path, counters: Any = None) -> None:
    """Read, encode and publish a shard. `counters` [3] int64: text bytes, tokens and disk bytes so far."""
    target = work / shard.key
    lengths: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    reports = []
    with replacing(target.with_suffix(".bin"), "wb") as output:
        for place, span in enumerate(shard.spans):
            report = SpanReport(shard.files[place])
            writer = _SpanWriter(report, settings, encoder, output, lengths, masks)
            try:
                _read_into(writer, span, shard.broken, counters)
            except FatalBadLine as error:
                raise FatalBadLine(place, *error.args) from None
            reports.append(report)
    write_bytes(target.with_suffix(".len"), np.concatenate([np.empty(0, np.int32), *lengths]).tobytes())
    if settings.chat:
        write_bytes(target.with_suffix(".mask"), np.concatenate([np.empty(0, np.uint8), *masks]).tobytes())
    publish_json(target.with_suffix(".json"), [vars(report) for report in reports])
    if shard.spool_start is not None:
        os.unlink(shard.spans[0].reader.path)


def publish_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, in ASCII: file names in it need not be UTF-8."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _read_into(writer: _SpanWriter, span: Span, broken: str, counters: Any) -> None:
    """Feed a span to a writer, in batches, counting as it goes."""
    report = writer.report
    report.disk_bytes = left = span.disk_bytes
    for documents in _batches(_with_breakage(span.documents(), broken)):
        before = report.text_bytes, report.tokens
        writer.write(documents)
        # Documents have the size of their text, which in a compressed file exceeds the bytes on disk.
        read = min(left, sum(document.size for document in documents))
        left -= read
        _count(counters, report.text_bytes - before[0], report.tokens - before[1], read)
    _count(counters, 0, 0, left)


def _with_breakage(documents: Iterator[Document], broken: str) -> Iterator[Document]:
    """Yield documents; turn damage of a compressed file, found now or before (`broken`), into a last bad line."""
    line = 0
    try:
        for document in documents:
            line = document.line
            yield document
    except BrokenStream as error:
        broken = str(error)
    if broken:
        yield Document(line + 1, 0, None, "broken file", f"{broken}: the rest of the file is lost")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size + 64
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(counters: Any, *amounts: int) -> None:
    if counters is not None:
        with counters.get_lock():
            for place, amount in enumerate(amounts):
                counters[place] += amount


class _SpanWriter:
    """Encodes a span's documents to an open file and keeps its report."""

    def __init__(
        self,
        report: SpanReport,
        settings: Settings,
        encoder: Encoder,
        output: Any,
        lengths: list[np.ndarray],
        masks: list[np.ndarray],
    ) -> None:
        self.report = report
        self._settings = settings
        self._encoder = encoder
        self._output = output
        self._lengths = lengths
        self._masks = masks

    def write(self, documents: list[Document]) -> None:
        self.report.lines += len(documents)
        for document in documents:
            if document.kind == LEFT_OUT:
                self.report.left_out += 1
            elif document.text is None:
                self._bad(document.line, document.kind, document.reason)
        good = [document for document in documents if document.text is not None]
        texts = [document.text for document in good if document.text is not None]
        flat, lengths, mask, bad = self._encoder(texts)
        for place, (kind, reason) in bad.items():
            self._bad(good[place].line, kind, reason)
        self._output.write(flat.tobytes())
        self._lengths.append(lengths.astype(np.int32))
        self._masks.append(mask)
        self.report.documents += len(lengths)
        self.report.tokens += flat.size
        self.report.counted += int(mask.sum())
        self.report.text_bytes += sum(document.size for document in documents)

    def _bad(self, line: int, kind: str, reason: str) -> None:
        if self._settings.fail_on_bad_line:
            raise FatalBadLine(line, reason)
        self.report.bad[kind] += 1
        if len(self.report.bad_lines) < _BAD_LINES_KEPT:
            self.report.bad_lines.append((line, reason))
