"""The worker side of preprocessing: encodes one shard of the input as one shard of tokens.

A shard is three files in the work folder: `KEY.bin` (tokens), `KEY.len` (int32 tokens per document) and `KEY.json`
(counts, bad lines), and a fourth for conversations, `KEY.mask` (see `indexed`). `KEY.json` is published by renaming
after the others are on disk: a shard whose `KEY.json` exists is complete, no matter when the process was killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.data.compressed import BrokenStream
from plt_megatron.data.encoders import ChatEncoder, Encoded, Encoder, TextEncoder
from plt_megatron.data.formats import LEFT_OUT, Document, ReadOptions, Span
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing, write_bytes, write_text

_BATCH_BYTES = 1 << 20  # of text encoded at once
_BAD_LINES_KEPT = 1000  # per shard, with file, line and reason; all are counted


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of a preprocessing job. See `plt preprocess --help`."""

    inputs: Sequence[str | Path]
    output_prefix: str
    tokenizer: str
    workers: int = 1
    format: str | None = None
    eod_token: str | None = None
    append_eod: bool = True
    fail_on_bad_line: bool = False
    overwrite: bool = False
    shard_bytes: int = 64 << 20
    shard: tuple[int, int] | None = None  # (number from 1, total): this machine's portion of the input
    read: ReadOptions = field(default_factory=ReadOptions)


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

    `lines` counts all lines, `bad` the bad ones by kind, `left_out` those that the options leave out; `text_bytes` are
    those of the documents' text, and `counted` the tokens that count in the loss, where not all do.
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

    def add(self, documents: Sequence[Document], encoded: Encoded, bad: Sequence[tuple[int, str, str]]) -> None:
        """Count a batch of documents. `bad`: line, kind and reason of each bad one."""
        self.lines += len(documents)
        self.left_out += sum(document.kind == LEFT_OUT for document in documents)
        refused = {line for line, _, _ in bad}
        texts = (document.text for document in documents if document.line not in refused)
        self.text_bytes += sum(len(text.encode()) for text in texts if text is not None)
        self.documents += len(encoded.lengths)
        self.tokens += encoded.flat.size
        self.counted += int(encoded.mask.sum())
        self.bad.update(kind for _, kind, _ in bad)
        kept = bad[: _BAD_LINES_KEPT - len(self.bad_lines)]
        self.bad_lines += [(line, reason) for line, _, reason in kept]


class FatalBadLine(Exception):
    """Raised for a bad line where bad lines are fatal: (span's index in the shard, line in the span, reason)."""


_worker: dict[str, Any] = {}
_refusals: list[UserError] = []  # why this worker encodes nothing


def start_worker(options: PreprocessOptions, work: Path, counters: Any, identity: dict[str, Any]) -> None:
    """Set up a worker process of the job of this identity. It exits when its parent is gone, however that happened."""
    _count(counters, 0, 0, 0, 1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of the parallel ones
    try:
        encoder = _load_encoder(options, identity)
    except UserError as error:
        _refusals.append(error)  # raised here, it would look like a worker that was killed
        return
    _worker.update(options=options, encoder=encoder, work=work, counters=counters)


def _load_encoder(options: PreprocessOptions, identity: dict[str, Any]) -> Encoder:
    """Load the tokenizer, as the parent process has done. Raises `UserError` if its files have changed since."""
    tokenizer = load_tokenizer(options.tokenizer, options.eod_token)
    encoder = (ChatEncoder if options.read.chat else TextEncoder)(tokenizer, append_eod=options.append_eod)
    template = encoder.fingerprint if isinstance(encoder, ChatEncoder) else None
    if (tokenizer.fingerprint, template) != (identity["tokenizer_sha256"], identity.get("chat_template_sha256")):
        raise UserError(f"{options.tokenizer} changed while this command was starting: run the command again")
    return encoder


def run_in_worker(shard: Shard) -> None:
    """Encode a shard in a process set up by `start_worker`. Raises `UserError` if its tokenizer is not the job's."""
    if _refusals:
        raise _refusals[0]
    encode_shard(shard, **_worker)


def encode_shard(shard: Shard, options: PreprocessOptions, encoder: Encoder, work: Path, counters: Any) -> None:
    """Read, encode and publish a shard.

    `counters`, a shared array of int64, is increased by the bytes read, tokens and disk bytes of each batch.
    """
    target = work / shard.key
    lengths, masks = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    reports: list[SpanReport] = []
    with replacing(target.with_suffix(".bin"), "wb") as output:
        for place, span in enumerate(shard.spans):
            report = SpanReport(shard.files[place], disk_bytes=span.disk_bytes)
            left = span.disk_bytes
            for documents in _batches(_with_breakage(span.documents(), shard.broken)):
                encoded, bad = _encode(documents, encoder)
                if bad and options.fail_on_bad_line:
                    raise FatalBadLine(place, bad[0][0], bad[0][2])
                report.add(documents, encoded, bad)
                output.write(encoded.flat.tobytes())
                lengths.append(encoded.lengths.astype(np.int32))
                masks.append(encoded.mask)
                # Documents have the size of their text, which in a compressed file exceeds the bytes on disk.
                size = sum(document.size for document in documents)
                _count(counters, size, encoded.flat.size, min(left, size))
                left -= min(left, size)
            _count(counters, 0, 0, left)
            reports.append(report)
    write_bytes(target.with_suffix(".len"), np.concatenate(lengths).tobytes())
    if options.read.chat:
        write_bytes(target.with_suffix(".mask"), np.concatenate(masks).tobytes())
    publish_json(target.with_suffix(".json"), [vars(report) for report in reports])
    if shard.spool_start is not None:
        os.unlink(shard.spans[0].reader.path)


def _encode(documents: Sequence[Document], encoder: Encoder) -> tuple[Encoded, list[tuple[int, str, str]]]:
    """Encode the documents that are not bad; return line, kind and reason of those that are."""
    bad = [(each.line, each.kind, each.reason) for each in documents if each.text is None and each.kind != LEFT_OUT]
    good = [(each.line, each.text) for each in documents if each.text is not None]
    encoded = encoder([text for _, text in good])
    return encoded, bad + [(good[place][0], *why) for place, why in encoded.bad.items()]


def publish_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, in ASCII: file names in it need not be UTF-8."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _with_breakage(documents: Iterator[Document], broken: str) -> Iterator[Document]:
    """Yield documents; turn damage, found now or, in a compressed file, before (`broken`), into a last bad line."""
    line = 0
    try:
        for document in documents:
            line = document.line
            yield document
    except BrokenStream as error:
        broken = str(error)
    if broken:
        yield Document(line + 1, 0, None, "broken file", f"{broken}: the rest is lost")


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
    with counters.get_lock():
        for place, amount in enumerate(amounts):
            counters[place] += amount
