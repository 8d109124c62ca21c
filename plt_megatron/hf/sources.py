"""The source of a conversion: a training checkpoint of any layout, or a Hugging Face folder."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.fields import from_plain, unknown_keys
from plt_megatron.config.schema import ModelConfig
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.hf import conversion
from plt_megatron.hf.arguments import CONFIG, check_model
from plt_megatron.hf.config_keys import HFModelConfig, read_config
from plt_megatron.hf.conversion import DERIVED_BUFFERS, ParamMapping, mappings_for
from plt_megatron.hf.safetensors_files import DTYPES, SafetensorsFolder
from plt_megatron.hf.tokenizer_files import (
    hf_tokenizer_file,
    load_hf_tokenizer,
    read_generation_config,
    special_tokens,
    token_ids,
)
from plt_megatron.model.parameters import is_buffer, only_in_loops
from plt_megatron.run_folder.checkpoints import (
    DOCUMENT_END,
    EMA,
    LONGEST_TEXT,
    latest_checkpoint,
    read_verified_progress,
    run_of,
    warn_of_doubt,
)
from plt_megatron.train.checkpoint.reading import read_weights

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$")  # in the hub's cache


def read_lineage(folder: Path) -> dict[str, str]:
    """Return `base_model`, by its name on the hub if the folder reveals it, and its card's license keys."""
    found = _SNAPSHOT.search(str(folder.absolute()))
    name = f"{found[1]}/{found[2]}" if found else folder.resolve().name
    return {"base_model": name, **read_license(folder)}


def read_license(folder: Path) -> dict[str, str]:
    """Return the license keys in the front matter of the folder's card, if it has one: it is between lines of `---`."""
    try:
        text = (folder / CARD).read_bytes().decode("utf-8-sig", "replace")
    except OSError:
        return {}
    front = re.match(r"\s*---[^\S\n]*\n(.*?)\n---[^\S\n]*(\n|$)", text, re.DOTALL)
    try:
        # Every scalar as text: nobody checks the dates and numbers of a card.
        values: Any = yaml.load(front[1], getattr(yaml, "CBaseLoader", yaml.BaseLoader)) if front else {}
    except (yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    known = {key: values[key] for key in _LICENSE if isinstance(values.get(key), str)}
    return {key: value for key, value in known.items() if value not in ("", "~", "null")}


def front_matter(lineage: dict[str, str]) -> list[str]:
    """Return the lines of a card's front matter."""
    known = {key: lineage[key] for key in (*_LICENSE, "base_model") if key in lineage}
    return yaml.safe_dump(known, sort_keys=False).splitlines() if known else []


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(kw_only=True)
class ModelSource(HFModelConfig):
    """A model to convert, which is described as in a config.json.

    Attributes:
        precision: precision of the weights, a key of `PRECISIONS`.
        weights: yields (our name, whole tensor) of each parameter; every call reads them again, one at a time.
        generation: further settings of generation_config.json.
        progress: a checkpoint's record of its run; otherwise empty.
        ema: whether the weights are a moving average of the run's.
        lineage: `read_lineage` of the model that this one was made from; for a Hugging Face folder, its own license.
    """

    path: Path
    precision: str
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: Tokenizer | None
    generation: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    ema: bool = False
    lineage: dict[str, str] = field(default_factory=dict)

    @property
    def trained_tokenizer(self) -> str | None:
        """Hash of the tokenizer that the checkpoint's run used, if that is known."""
        return (self.progress.get("data_fingerprint") or {}).get("tokenizer")


def open_source(path: Path, tokenizer: Path | None = None, *, ema: bool = False, verify: bool = True) -> ModelSource:
    """Open a run's folder (its last complete checkpoint), a checkpoint, or a Hugging Face folder.

    Args:
        tokenizer: overrides the one that the checkpoint names.
        ema: use the moving average of its weights (`training.ema_decay`) instead of the weights.
        verify: whether to read a checkpoint's files and compare their checksums.

    Raises:
        UserError: `path` is none of these, or broken.
    """
    if (path / CONFIG).is_file():
        if ema:
            raise UserError(f"{path}: a Hugging Face folder has one set of weights; leave --ema out")
        return _open_hf(path, tokenizer)
    return _open_checkpoint(path, tokenizer, ema, verify)


# ---------------------------------------------------------------- checkpoints


def _open_checkpoint(path: Path, tokenizer: Path | None, ema: bool, verify: bool) -> ModelSource:
    check_model(path)
    found = latest_checkpoint(path, verify=verify)
    if found is None:
        raise UserError(f"{path}: no complete checkpoint there")
    progress = read_verified_progress(found)
    warn_of_doubt(found, progress)
    if ema:
        check_ema(progress, found)
    config = progress["config"]
    model = saved_model(config["model"], found)
    loaded = _saved_tokenizer(config["data"], found, tokenizer)
    # Imports put a generation_config.json beside the tokenizer.
    generation = read_generation_config(loaded.path.parent) if loaded else {}
    tokens = special_tokens(loaded) if loaded else progress.get("special_tokens", {})
    tokens, generation = token_ids(tokens, generation)
    end, ends = progress.get(DOCUMENT_END), tokens.get("eos_token_id", [])
    if end is not None:  # plt preprocess --eod-token
        others = [other for other in (ends if isinstance(ends, list) else [ends]) if other != end]
        tokens["eos_token_id"] = [end, *others] if others else end
        loaded = _ending_with(loaded, end)
    return ModelSource(
        path=found,
        model=model,
        vocab_size=progress["vocab_size"],
        max_position_embeddings=max(config["data"]["sequence_length"], progress.get(LONGEST_TEXT, 0)),
        precision=config["training"]["precision"],
        weights=partial(read_weights, found, verify=False, part="ema" if ema else "weights"),
        tokenizer=loaded,
        tokens=tokens,
        generation=generation,
        progress=progress,
        ema=ema,
        lineage=progress,
    )


def first_end(ends: Any) -> int | None:
    """Return the token that ends documents: a config.json's `eos_token_id`, or the first of several."""
    return next(iter(ends), None) if isinstance(ends, list) else ends


def _ending_with(tokenizer: Tokenizer | None, end: int | None) -> Tokenizer | None:
    """Return the tokenizer with `end` as the token that ends documents, if it has such a token."""
    if tokenizer is None or end is None or end == tokenizer.eod or not 0 <= end < tokenizer.vocab_size:
        return tokenizer
    name = tokenizer.token_name(end)
    return load_tokenizer(tokenizer.path, name) if tokenizer.token_id(name) == end else tokenizer


def check_ema(progress: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise `UserError` unless a checkpoint has a moving average of its weights."""
    if progress.get(EMA, {}).get("updates", 0) == 0:
        raise UserError(
            f"checkpoint {checkpoint} has no moving average of its weights: its run had no training.ema_decay, or made "
            "no update with it yet"
        )


def saved_model(settings: Mapping[str, Any], checkpoint: Path) -> ModelConfig:
    """Return the model settings in a checkpoint; settings it lacks get their defaults.

    Raises:
        UserError: the checkpoint has settings that this program does not know.
    """
    unknown = sorted(unknown_keys(ModelConfig, settings))
    if unknown:
        raise UserError(
            f"checkpoint {checkpoint}: model.{unknown[0]} is a setting of a newer version; update this program"
        )
    return typing.cast(ModelConfig, from_plain(ModelConfig, settings))


def _saved_tokenizer(data: Mapping[str, Any], checkpoint: Path, given: Path | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given)
    if data["tokenizer"] is None:
        return None
    path = Path(data["tokenizer"])
    # A moved run keeps the tokenizer that an import put beside its checkpoints.
    beside = run_of(checkpoint) / path.parent.name / path.name
    for candidate in (path, beside):
        if candidate.exists():
            return load_tokenizer(candidate)
    raise UserError(
        f"tokenizer {path}, which the run used, is missing (seen from this directory): "
        "run this where the run was started, or pass --tokenizer (plt export, plt diagnose)"
    )


# ---------------------------------------------------------------- Hugging Face folders


def _open_hf(path: Path, tokenizer: Path | None) -> ModelSource:
    described = read_config(path)
    files = SafetensorsFolder(path)
    mappings = mappings_for(described.model, described.vocab_size, described.style)
    check_hf_tensors(files, mappings, described.model)
    found = tokenizer or hf_tokenizer_file(path, described.family)
    loaded = load_hf_tokenizer(found, described.tokens) if found else None
    tokens, generation = token_ids(described.tokens, read_generation_config(path))
    return ModelSource(
        **vars(described) | {"tokens": tokens},
        path=path,
        precision=hf_precision(files),
        weights=lambda: conversion.to_megatron(files.read, mappings),
        tokenizer=_ending_with(loaded, first_end(described.tokens.get("eos_token_id"))),  # also a sentencepiece model
        generation=generation,
        lineage=read_license(path),
    )


def hf_precision(files: SafetensorsFolder) -> str:
    """Return `fp32` if any tensor except buffers is, otherwise the common precision; mixed half precisions need fp32.

    Raises:
        UserError: a tensor has an unsupported type (integers, fp8); the message names it.
    """
    for name, dtype in files.dtypes.items():
        if dtype not in DTYPES:
            raise UserError(f"{files.folder}: {name} is of type {dtype}; only {', '.join(DTYPES)} can be converted")
    kinds = {DTYPES[dtype] for name, dtype in files.dtypes.items() if not is_buffer(name)}
    if len(kinds) != 1:  # none: what is missing is said where the tensors are checked
        return "fp32"
    return next(name for name, dtype in PRECISIONS.items() if dtype in kinds)


def check_hf_tensors(files: SafetensorsFolder, mappings: list[ParamMapping], model: ModelConfig) -> None:
    """Raise `UserError` unless the files contain exactly the model's tensors."""
    hf_precision(files)
    shapes = {name: shape for name, shape in files.shapes.items() if not name.endswith(DERIVED_BUFFERS)}
    if model.share_embeddings_and_output_weights and _HEAD in shapes:
        # Some files contain the tied matrix twice.
        if _EMBEDDING in shapes and not torch.equal(files.read(_HEAD), files.read(_EMBEDDING)):
            raise UserError(f"{files.folder}: tie_word_embeddings is true, but {_HEAD} is not {_EMBEDDING}")
        del shapes[_HEAD]
    if not derived.has_gates(model):
        wanted = {name for mapping in mappings for name, _ in mapping.hf}  # including a scale of the loops' input
        shapes = {name: shape for name, shape in shapes.items() if name in wanted or not only_in_loops(name)}
    conversion.check_tensors(shapes, mappings, str(files.folder))
