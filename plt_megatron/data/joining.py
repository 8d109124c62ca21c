"""Join several tokenized sources into one, in order, without copying their tokens (see `indexed`)."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plt_megatron.config.derived import SOURCE_PARTS
from plt_megatron.data import indexed
from plt_megatron.data.indexed import IndexedFile, listed_parts, read_index, read_manifest, write_index
from plt_megatron.data.preprocess import undated
from plt_megatron.data.shards import publish_json
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing, writing

_COUNTED = ("documents", "tokens", "text_bytes", "lines", "left_out", "loss_mask_tokens")


def join(patterns: Sequence[str], output_prefix: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the index, list of parts and manifest of a source that consists of others; return the manifest.

    Args:
        patterns: path prefixes, or globs of .idx files, which are sorted by name. Files written by megatron-core,
            datatrove or Megatron-LM work too.

    Raises:
        UserError: a part is missing or damaged, the parts differ in tokenizer or dtype, or the output exists.
    """
    prefixes = _prefixes(patterns)
    target = Path(os.path.abspath(output_prefix))
    check_output(target, overwrite=overwrite)
    indices = [read_index(prefix) for prefix in prefixes]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _check_alike(prefixes, indices, manifests)
    _check_complete(prefixes, manifests)
    listed = [
        {"prefix": os.path.relpath(prefix, target.parent), "bin_bytes": os.path.getsize(f"{prefix}.bin")}
        for prefix in prefixes
    ]
    manifest = _joined_manifest(indices, manifests, listed)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.idx.????????"):  # by a join that was killed
            left.unlink(missing_ok=True)
        with replacing(Path(f"{target}.idx"), "wb") as file:
            write_index(Path(file.name), indices[0].dtype, lambda: (index.lengths for index in indices))
        publish_json(Path(f"{target}.manifest.json"), manifest)
        publish_json(Path(f"{target}{SOURCE_PARTS}"), {"parts": listed})
    return manifest


def check_output(prefix: str | os.PathLike[str], *, overwrite: bool, parts: Sequence[str] = ()) -> None:
    """Raise `UserError` if a source in parts would replace an existing source, other than one of these `parts`, which
    may have been made again."""
    existing = [suffix for suffix in (".bin", ".idx") if os.path.exists(f"{prefix}{suffix}")]
    if not existing or (overwrite and ".bin" not in existing):
        return
    if existing == [".idx"] and not os.path.exists(f"{prefix}{SOURCE_PARTS}"):  # of a join that was cut short
        return
    if parts and list(listed_parts(os.fspath(prefix)) or ()) == list(map(os.path.abspath, parts)):
        return
    hint = "" if ".bin" in existing else " or pass --overwrite"
    found = ", ".join(f"{prefix}{suffix} exists" for suffix in existing)
    raise UserError(f"{found}: choose another --output-prefix{hint}")


def _prefixes(patterns: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        stem = pattern.removesuffix(".idx").removesuffix(".bin")
        matches = [stem] if os.path.exists(f"{stem}.idx") else [each[:-4] for each in sorted(glob.glob(f"{stem}.idx"))]
        if not matches:
            raise UserError(f"--join {pattern!r} matches no .idx: name the prefixes of tokenized sources")
        found.update(dict.fromkeys(matches))
    for prefix in found:
        if os.path.exists(prefix + SOURCE_PARTS):
            raise UserError(f"{prefix} is itself a source in parts: name its parts instead")
    return list(found)


def _check_alike(prefixes: Sequence[str], indices: Sequence[IndexedFile], manifests: Sequence[dict[str, Any]]) -> None:
    first = prefixes[0]
    tokenizers = {prefix: made["tokenizer"] for prefix, made in zip(prefixes, manifests, strict=True) if made}
    known = next(iter(tokenizers), None)
    for prefix, index, made in zip(prefixes, indices, manifests, strict=True):
        if index.dtype != indices[0].dtype:
            raise UserError(f"{prefix} has ids of type {index.dtype}, {first} of {indices[0].dtype}: they cannot join")
        if known and prefix in tokenizers and tokenizers[prefix]["sha256"] != tokenizers[known]["sha256"]:
            raise UserError(f"{prefix} was made with {tokenizers[prefix]['path']}, {known} with another tokenizer")
        if indexed.has_mask(prefix) != indexed.has_mask(first):
            raise UserError(f"{prefix} and {first}: only one of them has a loss mask")
        indexed.check_mask(prefix, index.tokens, made)


def _check_complete(prefixes: Sequence[str], manifests: Sequence[dict[str, Any]]) -> None:
    """Check that the portions of an input tokenized by several machines (`--shard`) are all there, in order."""
    made_from: list[dict[str, Any]] = [made.get("identity", {}) for made in manifests]
    shards = [identity.get("shard") for identity in made_from]
    of = next((shard[1] for shard in shards if shard), None)
    if of is None:
        return
    inputs = [{**undated(identity), "shard": None} for identity in made_from]
    other = next((prefix for prefix, made in zip(prefixes, inputs, strict=True) if made != inputs[0]), None)
    if other is not None:
        raise UserError(f"{other} was made from other inputs or settings than {prefixes[0]}")
    there = {number for number, _ in filter(None, shards)}
    missing = [f"{number}/{of}" for number in range(1, of + 1) if number not in there]
    if missing:
        raise UserError(f"not all of the input is tokenized: --shard {', '.join(missing)} is missing")
    if shards != [[number, of] for number in range(1, of + 1)]:
        raise UserError("the parts are not in the order of their --shard numbers: name them in that order")


def _joined_manifest(
    indices: Sequence[IndexedFile], manifests: Sequence[dict[str, Any]], listed: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the manifest of all parts together; what a part was made from stays in the part's own manifest."""
    made = next((each for each in manifests if each), {})
    totals = {name: sum(each.get(name, 0) for each in manifests) for name in _COUNTED if name in made}
    bad: Counter[str] = sum((Counter(each.get("bad_lines", {})) for each in manifests), Counter())
    return {
        "parts": list(listed),
        "bin_bytes": sum(part["bin_bytes"] for part in listed),
        "dtype": indices[0].dtype.name,
        **_shared_tokenizer(manifests),
        **totals,
        "documents": sum(index.documents for index in indices),
        "tokens": sum(index.tokens for index in indices),
        "bad_lines": bad,
    }


def _shared_tokenizer(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what holds for all parts: nothing if one was made elsewhere; no `eod` if documents end differently."""
    made = [each["tokenizer"] for each in manifests if each]
    if len(made) < len(manifests):
        return {}
    ends = {each.get("eod") for each in made}
    return {"tokenizer": {**made[0], "eod": ends.pop() if len(ends) == 1 else None}}
