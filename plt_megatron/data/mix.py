"""The data mix: tokens and epochs of each source, checks before training and on resuming, and its fingerprint.

Shares are computed from the indices alone. Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config import derived
from plt_megatron.config.schedules import all_sources, distinct_sources, stage_samples, stage_sources
from plt_megatron.config.schema import DataConfig, DataSource, RunConfig
from plt_megatron.data import indexed
from plt_megatron.data.fill_in_middle import ADDED_TOKENS, find_tokens
from plt_megatron.data.indexed import IndexedFile, files_of, flat_tokens, map_files, read_index, read_manifest
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import BadTokens, UserError, file_error
from plt_megatron.run_folder.checkpoints import (
    DOCUMENT_END,
    MADE_ELSEWHERE,
    candidates,
    order_samples,
    read_verified_progress,
    sequence_length,
)
from plt_megatron.run_folder.text import format_table

PARTS = ("train", "validation", "test")
_BLOCKS = 64  # blocks of a file that are hashed or checked
_BLOCK = 1 << 16  # bytes
_MOST_DOCUMENTS = 2**31 - 1  # of a source: megatron-core's numbers are int32


def required_samples(config: RunConfig) -> tuple[int, int, int]:
    """Return the numbers of train, validation and test samples a run draws; every validation reads the same ones."""
    return derived.order_samples(config), config.validation.iters * config.training.global_batch_size, 0


def index_folder(config: RunConfig) -> str:
    """Return the folder of a run's sample index."""
    return config.data.index_cache or str(derived.run_folder(config) / "index_cache")


@dataclass(frozen=True)
class SourceShare:
    """One source's share of one part of the data.

    `weight` is normalized over the part. The source's documents in [first, last) belong to the part and have `tokens`
    tokens. `samples` are drawn from it, which is `epochs` passes over its tokens, including those that
    fill-in-the-middle adds on average. With `data.stages`, a share belongs to one stage, which covers `stage_samples`
    of the part's samples; `epochs_before` are the epochs of earlier stages.
    """

    part: str
    name: str
    path: str
    weight: float
    first: int
    last: int
    tokens: int
    samples: int
    epochs: float
    max_epochs: float | None
    stage_samples: range | None = None
    epochs_before: float = 0.0

    @property
    def documents(self) -> int:
        return self.last - self.first


def part_sources(data: DataConfig) -> tuple[list[DataSource], list[DataSource], list[DataSource]]:
    """Return the sources of train, validation and test."""
    if data.sources:
        return data.sources, data.sources, data.sources
    return data.train_sources, data.validation_sources, data.test_sources


def sample_sources(data: DataConfig) -> tuple[list[DataSource], list[DataSource], list[DataSource]]:
    """Return the sources of train, validation and test samples, in the order of the numbers in `Samples.parts`."""
    train, validation, test = part_sources(data)
    return (distinct_sources(data) if data.stages else train), validation, test


def validation_alone(config: RunConfig) -> Iterator[tuple[DataSource, RunConfig]]:
    """Yield each validation source, with the run of which it is the only one (`validation.by_source`)."""
    data = config.data
    key = "sources" if data.sources else "validation_sources"
    for source in part_sources(data)[1]:
        # The others would be checked again.
        alone: dict[str, Any] = {"stages": [], "train_sources": [], "test_sources": [], key: [source]}
        yield source, dataclasses.replace(config, data=dataclasses.replace(data, **alone))


def split_matrix(data: DataConfig) -> list[tuple[float, float] | None]:
    """Return where each part begins and ends in every source, as fractions that megatron-core splits by; None for a
    part with no share."""
    if not data.sources:
        return [(0.0, 1.0) if sources else None for sources in part_sources(data)]
    shares = derived.split_shares(data.split)
    if shares is None:
        raise UserError(f"data.split must be three numbers >= 0 with a positive sum, got {data.split!r}")
    ends = [0.0]
    for share in shares:
        ends.append(ends[-1] + share)
    return [(begin, end) if end > begin else None for begin, end in zip(ends[:-1], ends[1:], strict=True)]


def mix_shares(data: DataConfig, num_samples: Sequence[int]) -> list[SourceShare]:
    """Return each source's share of each requested part (`num_samples` [3]; 0: not requested).

    Raises `UserError` if a file is missing or damaged, a part has no text, or `max_epochs` is exceeded.
    """
    matrix, index_of = split_matrix(data), functools.cache(read_index)
    shares: list[SourceShare] = []
    for part, sources, bounds, samples in zip(PARTS, part_sources(data), matrix, num_samples, strict=True):
        if not samples:
            continue
        if not sources or bounds is None:
            raise UserError(f"the data has no {part} part: give it a share in data.split, or set data.{part}_sources")
        found: list[SourceShare] = []
        stages = zip(stage_sources(data), stage_samples(data, samples), strict=True)
        for mix, among in stages if part == "train" else [(sources, range(samples))]:
            for source in mix if among else ():
                share = _share(data, part, source, mix, index_of(source.path), bounds, len(among))
                if part == "train" and data.stages:
                    path = os.path.abspath(share.path)
                    before = sum(earlier.epochs for earlier in found if os.path.abspath(earlier.path) == path)
                    share = dataclasses.replace(share, stage_samples=among, epochs_before=before)
                _check_share(share, data)
                found.append(share)
        shares += found
    return shares


def _share(
    data: DataConfig,
    part: str,
    source: DataSource,
    sources: Sequence[DataSource],
    index: IndexedFile,
    bounds: tuple[float, float],
    samples: int,
) -> SourceShare:
    if index.documents > _MOST_DOCUMENTS:
        raise UserError(
            f"{source.path}: {index.documents:,} documents, over the {_MOST_DOCUMENTS:,} that megatron-core numbers: "
            "list its parts as sources"
        )
    weight = source.weight / sum(other.weight for other in sources)
    first, last = (int(round(bound * float(index.documents))) for bound in bounds)
    tokens = int(index.lengths[first:last].sum(dtype=np.int64))
    rate = derived.fim_rate(data, source) if part == "train" else 0.0
    read = tokens + (ADDED_TOKENS * rate * int(np.count_nonzero(index.lengths[first:last] > 1)) if rate else 0)
    drawn = samples if len(sources) == 1 else math.ceil(samples * weight)
    return SourceShare(
        part=part,
        name=derived.source_name(source),
        path=source.path,
        weight=weight,
        first=first,
        last=last,
        tokens=tokens,
        samples=drawn,
        epochs=(drawn * data.sequence_length + 1) / read if tokens else math.inf,
        max_epochs=source.max_epochs if part == "train" else None,
    )


def _check_share(share: SourceShare, data: DataConfig) -> None:
    if share.tokens == 0:
        raise UserError(
            f"{share.path} has no text for the {share.part} part ({share.documents} documents are assigned to "
            "it): change data.split or use more data"
        )
    epochs = share.epochs_before + share.epochs
    if share.max_epochs is not None and epochs > share.max_epochs:
        before = f" after {share.epochs_before:.2f} in earlier stages" if share.epochs_before else ""
        raise UserError(
            f"data source {share.name}: {share.samples:,} {share.part} samples of {data.sequence_length} tokens are "
            f"{share.epochs:.2f} epochs of its {share.tokens:,} tokens{before}, over max_epochs {share.max_epochs:g}: "
            f"{'lower order_samples' if data.order_samples else 'train on fewer tokens'}, lower its weight, or raise "
            "max_epochs"
        )


def describe_mix(data: DataConfig, shares: Sequence[SourceShare]) -> str:
    """Format a table of `mix_shares`, with tokens, weights and epochs.

    With `data.stages`, a source has a row for each stage it is in, with its epochs at the end of that stage.
    """
    rows = [
        (
            f"train, to {share.stage_samples.stop * data.sequence_length:,} tokens"
            if share.stage_samples is not None
            else share.part,
            share.name,
            f"{share.documents:,}",
            f"{share.tokens:,}",
            f"{share.weight:.4g}",
            f"{share.samples * data.sequence_length:,}",
            f"{share.epochs_before + share.epochs:.2f}",
        )
        for share in shares
    ]
    return format_table(rows, header=("part", "source", "documents", "tokens", "weight", "to draw", "epochs"))


def consumed_epochs(shares: Sequence[SourceShare], consumed_samples: int, num_samples: int) -> dict[str, float]:
    """Return the epochs of each train source after `consumed_samples` of `num_samples`, for the log: by name, or by
    path where several have the name."""
    found: dict[str, float] = {}
    train = [share for share in shares if share.part == "train"]
    alike = Counter(name for name, _ in {(share.name, share.path) for share in train})
    for share in train:
        name = share.name if alike[share.name] == 1 else share.path
        among = share.stage_samples or range(num_samples)
        done = max(0, consumed_samples - among.start)
        if among.stop < num_samples:  # the last stage may go on past its end, as after a rollback
            done = min(len(among), done)
        found[name] = found.get(name, 0.0) + share.epochs * (done / max(1, len(among)))
    return found


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> None:
    """Raise `UserError` if a source was made with another tokenizer, by its manifest or by ids out of range: the
    tokenizer's, or without one that of `vocab_size`."""
    ids, owner = (vocab_size, "the model's vocabulary") if tokenizer is None else (tokenizer.vocab_size, tokenizer.path)
    for path in source_paths(data):
        made_with = read_manifest(path).get("tokenizer", {})
        if tokenizer is not None and made_with and made_with["sha256"] != tokenizer.fingerprint:
            raise UserError(
                f"{path} was tokenized with {made_with['path']}, not with {tokenizer.path} as it is now: tokenize it "
                "again or set data.tokenizer"
            )
        index = read_index(path)
        tokens, size = flat_tokens(index), _BLOCK // index.dtype.itemsize
        for start in _starts(len(tokens), size):
            if ids is not None:
                check_ids(path, tokens[start : start + size], ids, owner)


def check_ids(path: str, tokens: np.ndarray, vocab_size: int, owner: object = "the model's vocabulary") -> None:
    """Raise `BadTokens` if a source's tokens are not ids of a vocabulary of this size."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise BadTokens(
            f"{path} contains token {low if low < 0 else high}, but {owner} has {vocab_size} tokens: it was tokenized "
            "with another tokenizer, or is damaged"
        )


def document_record(data: DataConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what a checkpoint's record says of how documents begin and end, by the sources' manifests."""
    made = [read_manifest(path).get("tokenizer") for path in source_paths(data)]
    record: dict[str, Any] = {} if all(made) else {MADE_ELSEWHERE: True}
    ends = {each.get("eod") for each in made if each}
    if tokenizer is not None and len(ends) == 1 and not ends <= {None, tokenizer.eod}:
        record[DOCUMENT_END] = ends.pop()
    return record


def _starts(length: int, size: int) -> list[int]:
    """Return the offsets of up to `_BLOCKS` evenly spaced blocks, with the first and last; in a short file, of all."""
    if length <= _BLOCKS * size:
        return list(range(0, length, size))
    return [int(place) for place in np.linspace(0, length - size, _BLOCKS)]


def content_hash(prefix: str) -> str:
    """Return the SHA-256 over the sizes and up to 4 MiB of evenly spaced blocks of each file of a source."""
    digest = hashlib.sha256()
    try:
        for suffix in (".idx", ".bin", *([indexed.MASK_SUFFIX] if indexed.has_mask(prefix) else [])):
            files = [prefix + suffix] if suffix == ".idx" else files_of(prefix, suffix)
            content = map_files(files, np.uint8)
            digest.update(f"{suffix} {len(content)}\n".encode())
            for start in _starts(len(content), _BLOCK):
                digest.update(content[start : start + _BLOCK].tobytes())
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else prefix
        raise file_error(f"{name}: cannot be read ({error.strerror})", error) from error
    return digest.hexdigest()


def content_hashes(data: DataConfig) -> dict[str, str]:
    """Return the content hash of each source, by its path."""
    return {path: content_hash(path) for path in source_paths(data)}


def source_paths(data: DataConfig) -> Iterable[str]:
    """Return the paths of all sources, each once."""
    return dict.fromkeys(source.path for _, source in all_sources(data))


def fingerprint(
    data: DataConfig, tokenizer: Tokenizer | None, hashes: Mapping[str, str] | None = None, **sampling: Any
) -> dict[str, Any]:
    """Return what the sequence of samples depends on, for checkpoints: JSON-serializable, with a `sha256` of the rest.

    Paths and names are not part of it: data may move.

    Args:
        hashes: `content_hashes`, if they have been computed.
        sampling: other JSON-serializable values it depends on, such as `seed` and `num_samples`.
    """
    hashes = hashes or content_hashes(data)
    value: dict[str, Any] = {
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "split": data.split if data.sources else None,
        "sequence_length": data.sequence_length,
        "reset_at_document_boundaries": data.reset_at_document_boundaries,
        "sources": {
            part: [[hashes[source.path], source.weight] for source in sources]
            for part, sources in zip(PARTS, part_sources(data), strict=True)
        },
        "sampling": json.loads(json.dumps(sampling)),
    }
    value |= _rearranged(data, tokenizer)
    if data.stages:
        value["stages"] = [
            [stage.until // data.sequence_length, [[hashes[source.path], source.weight] for source in stage.sources]]
            for stage in data.stages
        ]
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return {**value, "sha256": digest}


def _rearranged(data: DataConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the settings that enter a fingerprint only if they are used, so that older fingerprints stay valid."""
    value: dict[str, Any] = {"eod_mask_loss": True} if data.eod_mask_loss else {}
    rates = [derived.fim_rate(data, source) for source in part_sources(data)[0]]
    if any(rates):
        tokens = list(find_tokens(data, tokenizer))
        value["fill_in_middle"] = {"rates": rates, "spm_rate": derived.fim(data).spm_rate, "tokens": tokens}
    return value


def fingerprint_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Describe the differences between two fingerprints; empty if there are none."""
    if saved.get("sha256") == current.get("sha256"):
        return []
    words = []
    for key in sorted((saved.keys() | current.keys()) - {"sha256"}):
        before, now = saved.get(key), current.get(key)
        if before == now:
            continue
        if key == "sources":
            parts = [part for part in PARTS if (before or {}).get(part) != (now or {}).get(part)]
            words.append(f"other {' and '.join(parts)} data or weights")
        elif key == "stages":
            words.append("other data.stages")
        elif key == "tokenizer":
            words.append("another tokenizer")
        elif key == "sampling" and before and now and before | {"num_samples": now["num_samples"]} == now:
            words.append(f"in the order drawn for {before['num_samples']} samples, not for {now['num_samples']}")
        else:
            words.append(f"{key} was {json.dumps(before)}, is {json.dumps(now)}")
    return words


def training_fingerprint(config: RunConfig, tokenizer: Tokenizer | None, samples: int) -> dict[str, Any]:
    """Return the fingerprint of the run's training samples, whose order is of `samples`, before its index is built."""
    return fingerprint(config.data, tokenizer, seed=config.training.seed, num_samples=samples)


def check_data(source: Path, progress: dict[str, Any], own: dict[str, Any], config: RunConfig) -> None:
    """Raise `UserError` if a checkpoint was trained on data with a fingerprint other than `own`, unless allowed."""
    saved, own = progress.get("data_fingerprint") or {}, json.loads(json.dumps(own))
    if config.checkpoint.allow_other_data or saved == own:
        return
    raise UserError(
        f"{source}: step {progress['step']} was trained on other data ({', '.join(fingerprint_differences(saved, own))}"
        "); restore it, or continue with this data: checkpoint.allow_other_data=true"
    )


def training_samples(config: RunConfig) -> int:
    """Return the number of samples that the run's order is drawn from. A run whose length is given in tokens keeps its
    initial number, since another batch size would change it slightly, and with it the order."""
    progress = _recorded_progress(config) if config.training.train_tokens is not None else None
    return required_samples(config)[0] if progress is None else samples_after(config, progress)


def drawn_samples(config: RunConfig) -> tuple[int, int, int]:
    """Return `required_samples` with `training_samples`: what the run's indices have."""
    return training_samples(config), *required_samples(config)[1:]


def samples_after(config: RunConfig, progress: dict[str, Any]) -> int:
    """Return `training_samples` of a run that starts from a checkpoint with this record. If its run had another length
    or rows of another length, nothing of its order is kept."""
    own = required_samples(config)[0]
    tokens, before = config.training.train_tokens, progress["config"]
    if tokens is None or config.data.order_samples is not None or before["training"].get("train_tokens") != tokens:
        return own
    length = config.data.sequence_length
    return (order_samples(progress) or own) if sequence_length(progress) in (None, length) else own


def _recorded_progress(config: RunConfig) -> dict[str, Any] | None:
    """Return the record of the checkpoint that the run starts from, if it has one on this machine."""
    settings = config.checkpoint
    places = [derived.run_folder(config)] if settings.enabled else []
    places += [Path(settings.load)] if settings.load is not None and not settings.weights_only else []
    for checkpoint in itertools.chain.from_iterable(map(candidates, places)):
        with contextlib.suppress(OSError, ValueError):  # damaged: loading will skip it too, and log it
            return read_verified_progress(checkpoint)
    return None
