"""The inputs of a diagnosis: a model, run by its export's code, and held-out text from a file or tokenized prefix."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plt_megatron.config.schema import DataConfig, DataSource
from plt_megatron.data.formats import ReadOptions, Span, open_inputs
from plt_megatron.data.indexed import flat_tokens, has_mask, open_mask, read_index
from plt_megatron.data.mix import check_ids, check_tokenizer
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import UserError
from plt_megatron.hf.sources import PRECISIONS, ModelSource, open_source
from plt_megatron.hf.tokenizer_files import check_vocabulary
from plt_megatron.hf.verification import export_of

# Of a text file, this many times the wanted sequences are tokenized and drawn from.
POOL = 32


def open_model(path: Path, tokenizer: Path | None = None) -> ModelSource:
    """Open a run, a checkpoint or a Hugging Face folder, and check its tokenizer against its vocabulary.

    Raises `UserError` if there is no complete model at `path`, its layers do not all loop, or the tokenizer belongs to
    another model.
    """
    source = open_source(path, tokenizer)
    model = source.model
    if model.loop_span is not None or model.loop_order != "stack":
        name = "loop_span" if model.loop_span is not None else "loop_order"
        raise UserError(
            f"{path}: model.{name} {getattr(model, name)}: diagnostics need a model whose layers all loop as one stack"
        )
    if source.tokenizer is not None:
        check_vocabulary(source.tokenizer, source.vocab_size, source.trained_tokenizer)
    return source


def build_model(source: ModelSource, *, precision: str, device: str) -> Any:
    """Build the source's `PLTForCausalLM` in evaluation mode.

    Args:
        precision: `fp32` or `bf16`; measures are always computed in fp32 and fp64.
        device: `cpu`, `cuda`, or `auto`: a GPU if there is one.

    Raises `UserError` if `cuda` is requested but not available, or the weights do not fit the settings.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")  # whatever the environment allows
    return export_of(source, PRECISIONS[precision]).eval().requires_grad_(False).to(device)


# ---------------------------------------------------------------- text as sequences


@dataclass(frozen=True)
class HeldOut:
    """Sequences drawn from a file.

    Attributes:
        tokens: int64 [n, S + 1], the last one only as a label.
        starts: bool [n, S + 1], where documents begin, including each sequence's first token.
        seen: number of sequences that these were drawn from.
        bad: number of documents of a text file left out because they are empty or cannot be read.
        mask: uint8 [n, S + 1], 0 for tokens that do not count in the loss; None: all count.
    """

    tokens: np.ndarray
    starts: np.ndarray
    seen: int
    bad: int = 0
    mask: np.ndarray | None = None


def draw_sequences(
    data: str, tokenizer: Tokenizer | None, vocab_size: int, *, length: int, max_tokens: int, seed: int
) -> HeldOut:
    """Draw at most `max_tokens` / `length` whole sequences without replacement, in the file's order.

    Documents follow one another, each ended by the end-of-document token, and are cut every `length` tokens; the
    remainder at the end is not used.

    Raises `UserError` if there is nothing to read, less than one sequence, or no tokenizer or that of another model.
    """
    count = max_tokens // length
    if count < 1:
        raise UserError(f"--max-tokens {max_tokens} is less than one sequence of {length} tokens (--sequence-length)")
    prefix = _tokenized_prefix(data)
    if prefix is not None:
        drawn = _from_index(prefix, tokenizer, length, count, seed)
    elif tokenizer is None:
        raise UserError(f"the model has no tokenizer to read {data} with: pass --tokenizer, or a .bin/.idx prefix")
    else:
        drawn = _from_text(data, tokenizer, length, count, seed)
    check_ids(data, drawn.tokens, vocab_size)
    drawn.starts[:, 0] = True
    return drawn


def _tokenized_prefix(data: str) -> str | None:
    prefix = data[:-4] if data.endswith((".bin", ".idx")) else data
    return prefix if prefix != data or Path(f"{data}.idx").is_file() else None


def _too_short(data: str, tokens: int, length: int) -> UserError:
    hint = f"give more text or --sequence-length {tokens - 1} or less" if tokens > 2 else "give more text"
    return UserError(f"{data} holds {tokens} tokens, too few for one sequence of {length} + 1: {hint}")


# ---------------------------------------------------------------- .bin and .idx


def _from_index(prefix: str, tokenizer: Tokenizer | None, length: int, count: int, seed: int) -> HeldOut:
    if tokenizer is not None:
        check_tokenizer(DataConfig(sources=[DataSource(path=prefix)]), tokenizer)
    index = read_index(prefix)
    available = max(0, (index.tokens - 1) // length)
    if not available:
        raise _too_short(f"{prefix}.bin", index.tokens, length)
    chosen = sorted(random.Random(seed).sample(range(available), min(count, available)))
    flat = flat_tokens(index)
    begins = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)[:-1]))
    begins = begins[index.lengths > 0]
    cuts = [slice(place * length, place * length + length + 1) for place in chosen]
    tokens = np.stack([flat[cut].astype(np.int64) for cut in cuts])
    starts = np.zeros(tokens.shape, dtype=bool)
    for row, place in enumerate(chosen):
        first, last = np.searchsorted(begins, (place * length, place * length + length + 1))
        starts[row, begins[first:last] - place * length] = True
    marked = open_mask(prefix, index.tokens) if has_mask(prefix) else None
    mask = None if marked is None else np.stack([np.asarray(marked[cut]) for cut in cuts])
    return HeldOut(tokens, starts, available, mask=mask)


# ---------------------------------------------------------------- text


def _documents(data: str, tokenizer: Tokenizer, bad: list[str]) -> Iterator[np.ndarray]:
    """Yield the ids of each document; add why to `bad` for each that is empty or cannot be read."""
    for reader in open_inputs([data], ReadOptions()):
        for document in Span(reader).documents():
            if document.text is None:
                bad.append(f"{reader.path}, line {document.line}: {document.reason}")
            else:
                ids, _ = tokenizer.encode_flat([document.text])
                yield np.append(ids.astype(np.int64), tokenizer.eod)


def _from_text(data: str, tokenizer: Tokenizer, length: int, count: int, seed: int) -> HeldOut:
    """Draw sequences by reservoir sampling: memory holds the sequences drawn and one document."""
    rng, bad = random.Random(seed), list[str]()
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    tokens, starts = np.empty(0, np.int64), np.empty(0, bool)
    total = seen = 0
    for ids in _documents(data, tokenizer, bad):
        total += len(ids)
        tokens = np.concatenate((tokens, ids))
        starts = np.concatenate((starts, np.arange(len(ids)) == 0))
        used = 0
        while len(tokens) - used > length and seen < POOL * count:
            cut = slice(used, used + length + 1)
            place = len(kept) if len(kept) < count else rng.randrange(seen + 1)
            if place < count:
                kept[place : place + 1] = [(seen, tokens[cut].copy(), starts[cut].copy())]
            seen += 1
            used += length
        tokens, starts = tokens[used:], starts[used:]
        if seen >= POOL * count:
            break
    if not total:
        raise UserError(f"{data} holds no text" + (f" ({bad[0]})" if bad else ""))
    if not kept:
        raise _too_short(data, total, length)
    kept.sort(key=lambda item: item[0])
    return HeldOut(np.stack([item[1] for item in kept]), np.stack([item[2] for item in kept]), seen, len(bad))
