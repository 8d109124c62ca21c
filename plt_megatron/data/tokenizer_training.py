"""Train a sentencepiece tokenizer, and write it as a Hugging Face `tokenizer.json` that encodes identically.

To make that possible, text is not normalized (no NFKC, no dummy prefix, no removal of spaces) and characters that the
vocabulary lacks fall back to bytes, so decoding restores every text exactly.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plt_megatron.data.compressed import BrokenStream
from plt_megatron.data.formats import LEFT_OUT, Reader, ReadOptions, Span, open_inputs
from plt_megatron.data.hf_tokenizer import build_tokenizer_json, first_difference
from plt_megatron.data.tokenizer import TOKENIZER_FILES, UNIGRAM_SCORE_STEP, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import LOCK, locked, replacing, writing
from plt_megatron.run_folder.text import format_bytes, plural
from plt_megatron.runtime.local_processes import usable_cores

_SPAN = 1 << 20  # bytes read at one place of a file when sampling
_PART = 1 << 12  # characters read at one place of a file that is one document
_LINE = 4000  # sentencepiece silently drops longer sentences (4192 bytes), counted in UTF-8 bytes
_UNIGRAM_THREADS = 16  # sentencepiece's default; the pieces depend on it, since each thread sums floats of its own
_NAMED_THREADS = 2  # in every model, however many trained it; the models of `results/` have this number
_CHECKED = 8 << 20  # characters of the sample on which both tokenizers are compared


@dataclass(frozen=True)
class TrainingOptions:
    """Options of tokenizer training. See `plt train-tokenizer --help`."""

    inputs: Sequence[str | Path]
    output_dir: str
    vocab_size: int
    model_type: str = "bpe"  # or "unigram"
    control_symbols: Sequence[str] = ()
    user_defined_symbols: Sequence[str] = ()
    character_coverage: float = 0.9995
    split_digits: bool = True
    max_sample_bytes: int = 200 << 20
    seed: int = 1234
    threads: int | None = None  # None: all cores for BPE, and for unigram a number that is the same on every machine
    format: str | None = None
    overwrite: bool = False
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class TrainingResult:
    """The sentencepiece model, and a line about it and the text it was trained on."""

    model: Path
    summary: str


def train_tokenizer(options: TrainingOptions) -> TrainingResult:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` to a folder.

    Both are compared on the sample and on hostile strings before anything is written. Raises `UserError`.
    """
    _check_symbols((*options.control_symbols, *options.user_defined_symbols))
    folder = Path(options.output_dir)
    _check_new(folder, options)
    sample = Sample(open_inputs(options.inputs, options.read, options.format), options)
    with _alone_in(folder):
        _check_new(folder, options)  # another training may just have ended
        temporary = folder / f".tokenizer.{os.getpid()}.model"
        try:
            with writing(folder):
                temporary.touch()  # detect an unwritable folder before the work
                compared = _train_and_publish(sample, options, folder, temporary)
        finally:
            temporary.unlink(missing_ok=True)
    model = folder / "tokenizer.model"
    return TrainingResult(
        model,
        f"{model}: {load_tokenizer(model).vocab_size:,} pieces from {plural(sample.documents, 'document')} "
        f"({format_bytes(sample.bytes)}, {sample.bad_lines:,} bad lines skipped); tokenizer.json encodes identically "
        f"on {compared:,} texts",
    )


def _check_new(folder: Path, options: TrainingOptions) -> None:
    for existing in () if options.overwrite else (folder / name for name in TOKENIZER_FILES):
        if existing.exists():  # one is enough, as a tokenizer.json of another program
            raise UserError(f"{existing} exists: choose another --output or pass --overwrite")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Create and lock the folder; remove a new one again if nothing was written to it."""
    is_new = not folder.exists()
    with locked(folder, "tokenizer training"):
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _check_symbols(symbols: Sequence[str]) -> None:
    for symbol in symbols:
        if not symbol or any(character.isspace() or character == "\u2581" for character in symbol):
            raise UserError(f"special token {symbol!r} is empty or contains a space: choose another name")
        if symbol in ("<unk>", "<s>", "</s>", "<pad>"):
            raise UserError(f"special token {symbol!r} is built in: leave it out")
    if len(set(symbols)) < len(symbols):
        raise UserError("a special token is given twice")


def _train_and_publish(sample: Sample, options: TrainingOptions, folder: Path, temporary: Path) -> int:
    """Train to the file `temporary` and publish if both formats encode alike; return the number of texts compared."""
    content = _train(sample, options)
    temporary.write_bytes(content)
    files = build_tokenizer_json(temporary)
    texts = sample.kept + hostile_strings((*options.control_symbols, *options.user_defined_symbols))
    different = first_difference(load_tokenizer(temporary), content, files["tokenizer.json"], texts)
    if different is not None:
        raise UserError(f"tokenizer.json would not encode like the sentencepiece model: {different}")
    with contextlib.ExitStack() as stack:  # renames all of them once all are on the disk, the model last
        for name, data in [("tokenizer.model", content), *((name, text.encode()) for name, text in files.items())]:
            file = stack.enter_context(replacing(folder / name, "wb"))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return len(texts)


def _train(sample: Sample, options: TrainingOptions) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample.lines(),
            model_writer=model,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=options.split_digits,
            character_coverage=options.character_coverage,
            # All of ASCII, so that code and markup never fall back to bytes; a newline is encoded as a byte.
            required_chars="".join(map(chr, range(33, 127))),
            control_symbols=list(options.control_symbols),
            user_defined_symbols=list(options.user_defined_symbols),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=options.threads or (usable_cores() if options.model_type == "bpe" else _UNIGRAM_THREADS),
            minloglevel=2,
        )
    except RuntimeError as error:
        if sample.bytes:
            raise UserError(_explain(str(error), options)) from error
    if not sample.bytes:
        raise UserError("the input has no usable text to train a tokenizer on")
    return _settle(model.getvalue(), options.model_type)


def _explain(message: str, options: TrainingOptions) -> str:
    if limit := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        most = limit.group(1)
        return f"--vocab-size {options.vocab_size} is too high for this text: give more text or use at most {most}"
    if limit := re.search(r"Vocabulary size is smaller than required_chars. \d+ vs (\d+)", message):
        return f"--vocab-size {options.vocab_size} is too low: characters and bytes alone need {limit.group(1)}"
    return f"sentencepiece cannot train: {' '.join(message.split())}"


def _settle(content: bytes, model_type: str) -> bytes:
    """Return the model without what differs between machines or formats.

    The number of threads is one constant, since runs tell tokenizers apart by their bytes; BPE models do not depend on
    it. Unigram scores are rounded, so that sums are the same in sentencepiece's float32 and in Hugging Face's float64.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(content)
    proto.trainer_spec.num_threads = _NAMED_THREADS
    for piece in proto.pieces if model_type == "unigram" else ():
        piece.score = round(piece.score / UNIGRAM_SCORE_STEP) * UNIGRAM_SCORE_STEP
    return proto.SerializeToString(deterministic=True)


class Sample:
    """A sample of the corpus of about `max_sample_bytes` at most, taken evenly from all of every file.

    While `lines` is read, fills `bytes`, `documents`, `bad_lines`, and `kept`, the texts to compare on.
    """

    def __init__(self, readers: Sequence[Reader], options: TrainingOptions) -> None:
        self._readers = readers
        self._options = options
        self._random = random.Random(options.seed)
        self.bytes = 0
        self.documents = 0
        self.bad_lines = 0
        self.kept: list[str] = []
        self._kept_size = 0

    def lines(self) -> Iterator[str]:
        """Yield the lines of the sampled documents, long ones in parts, none empty."""
        for text in self._texts():
            self.documents += 1
            self._keep(text)
            for line in text.splitlines():
                for start in range(0, len(line), _LINE // 4):
                    part = line[start : start + _LINE // 4]
                    self.bytes += len(part.encode("utf-8"))
                    yield part.replace("\0", " ")

    def _keep(self, text: str) -> None:
        """Keep some documents, truncated if long, for a quick comparison that covers the whole sample."""
        if self._kept_size < _CHECKED and (self.documents % 8 == 1 or self._kept_size < _CHECKED // 4):
            self.kept.append(text[: 1 << 16])
            self._kept_size += len(self.kept[-1])

    def _texts(self) -> Iterator[str]:
        sizes = [reader.text_size for reader in self._readers]
        share = min(1.0, self._options.max_sample_bytes / max(1, sum(sizes)))
        for reader, size in zip(self._readers, sizes, strict=True):
            # Text may be larger than assumed, as in Parquet: no file takes the share of those after it.
            most = self.bytes + self._options.max_sample_bytes * size / max(1, sum(sizes))
            for text in (text for span, keep in self._spans(reader, share) for text in self._read(span, keep)):
                yield text
                if self.bytes >= most:
                    break

    def _spans(self, reader: Reader, share: float) -> Iterator[tuple[Span, float]]:
        """Yield the spans to read for `share` of a file, with the share of their documents to keep."""
        if share >= 1.0 or reader.compressed or not reader.by_line or reader.size <= _SPAN:
            yield Span(reader), share
            return
        stride = _SPAN / share
        place = self._random.random() * stride - _SPAN  # only a span at 0 has the line that it begins in
        while place < reader.size:
            start = int(place)
            yield Span(reader, max(0, start), min(start + _SPAN, reader.size)), 1.0
            place += stride

    def _read(self, span: Span, share: float) -> Iterator[str]:
        try:
            for document in span.documents():
                if document.text is None:
                    self.bad_lines += document.kind != LEFT_OUT
                elif share >= 1.0:
                    yield document.text
                elif not span.reader.by_line and document.size >= span.reader.size and len(document.text) > _PART:
                    if part := self._part(document.text, share * min(1.0, span.reader.text_size / document.size)):
                        yield part
                elif self._random.random() < share:
                    yield document.text
        except BrokenStream:
            self.bad_lines += 1

    def _part(self, text: str, share: float) -> str:
        """Return a share of a file that is one document, evenly from all of it: whole, it may exceed the sample."""
        stride, parts = _PART / share, []
        place = self._random.random() * stride - _PART  # so that its beginning is as likely as the rest
        while place < len(text):
            parts.append(text[max(0, int(place)) : int(place) + _PART])
            place += stride
        return "\n".join(parts)


def hostile_strings(symbols: Sequence[str] = ()) -> list[str]:
    """Return strings on which tokenizers tend to disagree; `symbols` are the tokenizer's own special tokens."""
    fixed = [
        "", " ", "   ", "\n", "\n\n\n", "\t", "\r\n", "\0", "a\0b", " a", "a ", " a  b   c ", "\n a\n  b\n",
        "</s>", "<s>", "<unk>", "<pad>", "a</s>b", "<0x0A>", "<0xFF>x", "<0x00><0x01>", "<|endoftext|>",
        "\u2581", "\u2581\u2581a", " \u2581 a", "a\u2581b c", "e\u0301", "\u00e9", "\ufb01 \u00bd \u212b", "\ufeffx",
        "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "\u0e20\u0e32\u0e29\u0e32",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u200b\u200d\u2028\u2029\u00a0",
        "\U0010ffff\ue000\ufffd",
        "a" * 1000, " " * 1000 + "x", "=" * 777, "-" * 333, "ab" * 500, "()" * 300, "0123456789" * 50, "\n" * 500,
        "\x1b[0m\x7f\x80", "1,234.567e-89", "CamelCaseHTTPServer_snake__case", "\\u00e9\\n", "{'a': [1, 2]}",
    ]  # fmt: skip
    around = [text for symbol in symbols for text in (symbol, f"a{symbol}b", f" {symbol} ", symbol * 2, symbol[:-1])]
    rng = random.Random(0)
    alphabet = "ab \n\u2581<>/s0x1=-\t\u00e9\u65e5\U0001f600"
    noise = ["".join(rng.choices(alphabet, k=rng.randrange(1, 120))) for _ in range(1000)]
    return fixed + around + noise
