"""Checks, before a job is submitted, of what training would refuse about its data and its starting checkpoint.

Only headers and manifests of the data are read and, for a run that starts from a checkpoint, up to 4 MiB of each file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config.derived import missing_files
from plt_megatron.config.rules.uploads import destinations, is_url, protocol_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.data import fill_in_middle
from plt_megatron.data.indexed import check_mask, open_index, part_prefixes, read_manifest, total_size
from plt_megatron.data.mix import check_data, samples_after, source_paths, training_fingerprint
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.model import trainable
from plt_megatron.run_folder import resuming
from plt_megatron.run_folder.checkpoints import candidates
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.profile import Container
from plt_megatron.storage.copies import read_progress


def open_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, list[str]]:
    """Load the run's tokenizer, if it names one, and list the problems with it. Validation has accepted the file."""
    path = config.data.tokenizer
    if path is None:
        return None, []
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        return None, [f"data.tokenizer: {line}" for line in str(error).splitlines()]
    given, problems = config.model.vocab_size, []
    if given is not None and given < tokenizer.vocab_size:
        ids = f"{tokenizer.vocab_size} ids of data.tokenizer {path}"
        problems.append(f"model.vocab_size {given} is smaller than the {ids}")
    try:
        fill_in_middle.settings_of(config.data, tokenizer, config.training.seed)
    except UserError as error:
        problems.append(str(error))
    return tokenizer, problems


def data_problems(config: RunConfig, tokenizer: Tokenizer | None) -> list[str]:
    """List what is wrong with the sources whose files exist, one line each."""
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    sources = (path for path in source_paths(config.data) if not missing_files(path))
    return [problem for path in sources for problem in _source_problems(path, tokenizer, vocab_size)]


def _source_problems(prefix: str, tokenizer: Tokenizer | None, vocab_size: int | None) -> Iterator[str]:
    """Check that index, tokens, loss mask and manifest of a source fit each other and the tokenizer."""
    try:
        index = open_index(prefix)  # not `read_index`: a login node should not read all lengths of a large corpus
        if not index.documents:
            yield f"{prefix}.idx has no documents: tokenize the data again (plt preprocess)"
            return
        if index.dtype == np.uint16 and tokenizer is not None and tokenizer.dtype != np.uint16:
            # Ids are written with 16 bits only if every id of the tokenizer fits.
            ids = f"{prefix} holds 16-bit ids, data.tokenizer has {tokenizer.vocab_size} ids"
            yield f"{ids}: another tokenizer made it"
            return
        manifest = read_manifest(prefix)
        yield from _mismatch(prefix, manifest, tokenizer, vocab_size)
        check_mask(prefix, total_size(index.bins) // index.dtype.itemsize, manifest)
    except (UserError, OSError) as error:
        yield str(error)


def _mismatch(
    prefix: str, manifest: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int | None
) -> Iterator[str]:
    """Check that the manifest names the same tokenizer. Data, or its parts, without one were made elsewhere."""
    if not manifest or ("parts" in manifest and "tokenizer" not in manifest):
        return
    try:
        made = manifest["tokenizer"]
        sha256, ids = made["sha256"], made["vocab_size"]
    except (KeyError, TypeError) as error:
        yield f"{prefix}.manifest.json cannot be read ({error}): tokenize the data again (plt preprocess)"
        return
    if tokenizer is not None and sha256 != tokenizer.fingerprint:
        yield (
            f"{prefix} was tokenized with another tokenizer ({made.get('path')}, {ids} ids) than data.tokenizer "
            f"{tokenizer.path} ({tokenizer.vocab_size} ids)"
        )
    elif vocab_size is not None and ids > vocab_size:
        yield f"{prefix} was tokenized with {ids} ids, the model has a vocabulary of {vocab_size}"


def mount_problems(config: RunConfig, container: Container, mounted: Sequence[Path]) -> list[str]:
    """List the run's paths that the container cannot see, one line each. `mounted`: folders besides the profile's."""
    sources = dict.fromkeys(part for path in source_paths(config.data) for part in _parts(path))
    read = [(f"data source {path}", path) for path in sources]
    named = {
        "data.tokenizer": config.data.tokenizer,
        "data.index_cache": config.data.index_cache,
        "checkpoint.load": config.checkpoint.load,
        "evaluation.include_path": config.evaluation and config.evaluation.include_path,
    }
    read += [(f"{key} {value}", value) for key, value in named.items() if value and not is_url(value)]
    read += [(f"{key} {url}", url[7:]) for key, url in destinations(config) if protocol_of(url) == "file"]
    return unseen(read, container, mounted)


def unseen(paths: Iterable[tuple[str, str]], container: Container, mounted: Sequence[Path]) -> list[str]:
    """List those of the given paths, each after its name, that the container cannot see, one line each."""
    visible = [*mounted, *(Path(os.path.expandvars(mount.split(":")[:2][-1])) for mount in container.mounts)]
    return [
        f"{what} is not in a folder that the container sees: add one to container.mounts of the cluster's profile"
        for what, path in paths
        if not _is_seen(Path(os.path.abspath(path)), visible)
    ]


def _is_seen(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path is in one of the mounted folders, and where its links lead is too."""
    above = [folder for folder in folders if path.is_relative_to(folder)]
    reached = (*folders, *(folder.resolve() for folder in above))
    return bool(above) and any(path.resolve().is_relative_to(folder) for folder in reached)


def _parts(prefix: str) -> list[str]:
    """Return a source's parts, or the source itself if they cannot be read, which `data_problems` reports."""
    try:
        return part_prefixes(prefix)
    except UserError:
        return [prefix]


def start_problems(config: RunConfig, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[str]:
    """List why a valid configuration with existing data cannot start: unknown parameter names, or an unsuitable
    checkpoint, its own or that of `checkpoint.load`. `vocab_size` is without padding; None: unknown."""
    unknown = trainable.find_problems(config)
    if unknown:
        return unknown
    start = resuming.find_start(config) or _start_elsewhere(config)
    if start is None:
        return _find_nothing_there(config)
    settings = config.checkpoint
    if start.progress.get("weights_only") and not settings.weights_only:
        return [f"checkpoint {start.path} has only weights, no optimizer state; set checkpoint.weights_only=true"]
    problems = resuming.start_problems(start, config, vocab_size)
    if not problems and (start.is_own or not settings.weights_only):  # another schedule reads other data, and says so
        try:
            own = training_fingerprint(config, tokenizer, samples_after(config, start.progress))
            check_data(start.path, start.progress, own, config)
        except UserError as error:
            problems = str(error).splitlines()
    # As a path, a URL has lost one of its two slashes.
    url = settings.load if not start.is_own and settings.load and is_url(settings.load) else None
    return [line.replace(str(Path(url)), url) for line in problems] if url else problems


def _find_nothing_there(config: RunConfig) -> list[str]:
    """Tell if `checkpoint.load` names a folder without checkpoints, which the run, without any of its own, would read.
    The training loop reports damaged ones."""
    load, own = config.checkpoint.load, RunFolder.of(config).checkpoints
    if load is None or is_url(load) or candidates(own) or candidates(Path(load)):
        return []
    return [f"checkpoint.load: {load} holds no checkpoint"]


def _start_elsewhere(config: RunConfig) -> resuming.Start | None:
    """Return the checkpoint that the run will download, if any."""
    load = config.checkpoint.load
    if load is None or not is_url(load) or RunFolder.of(config).latest_checkpoint(verify=False) is not None:
        return None
    try:
        url, progress = read_progress(load)
    except UserError:  # reported by the forecast
        return None
    return resuming.Start(Path(url), progress, is_own=False)
