"""A run's checkpoints on disk: names, damage, and the last complete one.

    checkpoints/
      step_00000100/               a complete checkpoint; manifest.json lists its files with size and SHA-256
      step_00000200.1a2b3c4d.tmp/  one being written, or what a crash left of it
      latest                       the name of the one published last

A checkpoint appears under its name only when it is complete, and old ones are removed. One process does all of this;
any `OSError` leaves the last checkpoint intact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import plt_megatron
from plt_megatron.config.upgrade import upgraded
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.installation import megatron_core_version
from plt_megatron.run_folder.files import write_json, write_text

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LATEST = "latest"
FORMAT = 1
REPLICAS_COMPARED = "replicas_compared"  # in progress.json: ranks' copies were compared before writing
EMA = "ema"  # name of the weights' moving average in progress.json and in tensor keys
# Entries of progress.json about the model that its run, or a run before that, started from.
ORIGIN = ("imported_from", "special_tokens", "base_model", "license", "license_name", "license_link")
DOCUMENT_END = "document_end"  # in progress.json: the token that ends documents in the data, if not the tokenizer's
MADE_ELSEWHERE = "made_elsewhere"  # in progress.json: other programs made data, perhaps with tokens around documents
LONGEST_TEXT = "max_position_embeddings"
NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp"  # being written, or being removed
_REPLACED = ".old"  # about to be replaced by a newer one of the same step
# What is between is a save's own: two starts of a run that both live have two folders.
_LEFT = re.compile(rf"({NAME.pattern})(\.[0-9a-f]+)?({_TEMPORARY}|{_REPLACED})")


def folder_name(step: int) -> str:
    """Return the folder name of a checkpoint: `step_00000100` for step 100."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named for."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def run_of(checkpoint: Path) -> Path:
    """Return the absolute path of the run's folder that a checkpoint is in, without following links."""
    return checkpoint.absolute().parent.parent


def checkpoint_folders(directory: Path) -> list[Path]:
    """List the published checkpoints of a run, by step. They may be damaged: see `damage`."""
    if not directory.is_dir():
        if directory.is_symlink():  # as where another file system is not mounted: a run would begin anew
            raise AttemptFailed(f"{directory} leads to {os.readlink(directory)}, which is not there: mount or make it")
        return []
    found = (path for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def candidates(path: Path) -> list[Path]:
    """List the checkpoints that `path` (a checkpoint, a folder of checkpoints, or a run's folder) may refer to, the
    preferred one first. In a folder the one `latest` names comes first, then the earlier ones: later ones belong to
    training that was rolled back."""
    if NAME.fullmatch(path.name) or (path / MANIFEST).is_file():
        return [path]
    own = path / FOLDER
    directory = own if own.is_dir() or own.is_symlink() else path
    found = checkpoint_folders(directory)[::-1]
    named = _pointed_at(directory) if found else None
    if named in found:
        return found[found.index(named) :]
    return found


def inherited(progress: Mapping[str, Any], sequence_length: int) -> dict[str, Any]:
    """Return the entries of a record that a run with rows of `sequence_length` inherits when it starts or resumes."""
    kept = {name: progress[name] for name in ORIGIN if name in progress}
    longest = max(progress.get(LONGEST_TEXT, 0), progress["config"]["data"]["sequence_length"])
    return kept | ({LONGEST_TEXT: longest} if longest > sequence_length else {})


def latest_checkpoint(path: Path | str, verify: bool = True) -> Path | None:
    """Return the last complete checkpoint that `path` may refer to (`candidates`); None if there is none.

    With `verify`, check every file's SHA-256, and log each damaged checkpoint; otherwise trust the names.
    """
    for candidate in candidates(Path(path)):
        problem = damage(candidate) if verify else None
        if problem is None:
            return candidate
        if candidate != Path(path) and not candidate.exists():  # its run has removed it, and has later ones
            return latest_checkpoint(path, verify)
        logger.warning("%s", problem)
    return None


def latest_of_full_size(path: Path) -> Path | None:
    """Return the last checkpoint whose files all have their full size, for when checksums would take too long."""
    for candidate in candidates(path):
        with contextlib.suppress(OSError):
            if damage(candidate, checksums=False) is None:
                return candidate
    return None


def latest_step(path: Path) -> int:
    """Return the step, by name, of the checkpoint that a run would resume from; 0 if there is none."""
    found = latest_checkpoint(path, verify=False)
    return step_of(found) if found is not None else 0


def superseded(steps: Collection[int], last: int, keep_last: int, keep_every: int) -> set[int]:
    """Return the steps whose checkpoints need not be kept; `last` is the run's newest.

    Kept are the last `keep_last` and, if `keep_every` > 0, those whose step is a multiple of it. Steps after `last` are
    not kept: they belong to training that was rolled back.
    """
    current = sorted(step for step in steps if step <= last)
    kept = set(current[-max(1, keep_last) :])
    if keep_every > 0:
        kept |= {step for step in current if step % keep_every == 0}
    return set(steps) - kept


def _pointed_at(directory: Path) -> Path | None:
    try:
        name = (directory / LATEST).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return directory / name if NAME.fullmatch(name) else None


# Damage.


def damage(path: Path, part: int = 0, parts: int = 1, *, checksums: bool = True) -> str | None:
    """Describe the damage of a published checkpoint in one line that names it; None if it is complete.

    With `checksums`, check files' SHA-256 besides their sizes: that of every `parts`-th file, from the `part`-th on, so
    that ranks can share the work. Raises `OSError` if a file cannot be read: that may pass, so it is no damage.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"checkpoint {path}: {name} is damaged, {size} bytes instead of {entry['bytes']}"
        for name in sorted(files)[part::parts] if checksums else ():
            if sha256(path / name) != files[name]["sha256"]:
                return f"checkpoint {path}: {name} is damaged, its SHA-256 is not the manifest's"
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return f"checkpoint {path}: {missing} is missing" if path.is_dir() else f"checkpoint {path}: not found"
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"checkpoint {path}: {MANIFEST} is damaged"
    return None


def sha256(path: Path, sync: bool = False) -> str:
    """Return the SHA-256 of a file in hex; `sync` also flushes the file to the disk."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sync:
            os.fsync(stream.fileno())
    return digest


def read_verified_progress(checkpoint: Path) -> dict[str, Any]:
    """Read a complete checkpoint's record of its run: `step`, the trainer's counters, `config`, `versions`, ..."""
    return parse_progress((checkpoint / PROGRESS).read_text(encoding="utf-8"), str(checkpoint))


def parse_progress(text: str, checkpoint: str) -> dict[str, Any]:
    """Parse the text of a checkpoint's progress.json; settings get their present names.

    Raises `UserError` if a newer program wrote it.
    """
    progress: dict[str, Any] = json.loads(text)
    if progress["format"] > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint}: its format {progress['format']} is newer than this program; update it"
        )
    return progress | {"config": upgraded(progress["config"])} if "config" in progress else progress


def doubt(checkpoint: Path, progress: dict[str, Any]) -> str | None:
    """Explain in one line why a checkpoint's weights may be wrong; None if there is no known reason.

    In versions that did not compare ranks' copies, a pipeline's last stage trained its copy of a tied embedding without
    the embedding's factors.
    """
    if progress.get(REPLICAS_COMPARED) or progress.get("weights_only"):
        return None
    config, stages = progress["config"], progress["layout"].get("pipeline_model_parallel_size", 1)
    factors = {name: config["optimizer"].get(name, {}).get("embedding", 1) for name in ("lr_mult", "wd_mult")}
    wrong = [f"optimizer.{name}.embedding {factor:g}" for name, factor in factors.items() if factor != 1]
    if stages == 1 or not wrong or not config["model"]["share_embeddings_and_output_weights"]:
        return None
    return (
        f"checkpoint {checkpoint} is from an earlier version, in which the last of {stages} pipeline stages trained "
        f"its copy of the tied embedding without {' and '.join(wrong)}; the first stage's copy, which was saved, may "
        "not fit the layers: if its validation loss is above the one that the run recorded, repeat the run"
    )


def warn_of_doubt(checkpoint: Path, progress: dict[str, Any]) -> None:
    """Log the result of `doubt`, if any."""
    reason = doubt(checkpoint, progress)
    if reason is not None:
        logger.warning("%s", reason)


def trained_tokens(progress: dict[str, Any]) -> int:
    """Return the number of tokens that a checkpoint's run was trained on."""
    if "consumed_tokens" in progress:
        return progress["consumed_tokens"]
    config = progress["config"]  # before tokens were counted, all steps had equally many
    return progress["step"] * config["training"]["global_batch_size"] * config["data"]["sequence_length"]


def sequence_length(progress: dict[str, Any]) -> int | None:
    """Return the tokens of a sample of a checkpoint's run; None if not recorded (old versions)."""
    length: int | None = progress.get("config", {}).get("data", {}).get("sequence_length")
    return length


def order_samples(progress: dict[str, Any]) -> int | None:
    """Return how many training samples the order of a checkpoint's run covers; None if not recorded (old versions)."""
    return (progress.get("data_fingerprint") or {}).get("sampling", {}).get("num_samples")


# Publication.


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    import torch

    return {
        "plt_megatron": plt_megatron.__version__,
        "megatron-core": megatron_core_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def leftovers(directory: Path) -> list[Path]:
    """Return folders left by a crash, partly written or partly removed."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _LEFT.fullmatch(path.name) and path.is_dir())


def prepare(directory: Path, step: int) -> Path:
    """Remove leftovers, except those that cannot be, and create a temporary folder for step `step`'s checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory)
    temporary = directory / f"{folder_name(step)}.{secrets.token_hex(4)}{_TEMPORARY}"
    for path in leftovers(directory):
        _remove(path, ignore_errors=True)  # NFS keeps a folder in which another process has a file open
    for path in directory.glob(f".{LATEST}.*"):
        path.unlink()
    temporary.mkdir()
    return temporary


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder or, if a user has moved it elsewhere, the link to it."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def recover(directory: Path) -> None:
    """Restore checkpoints that a crash left without a name while they were being replaced by one of the same step."""
    for path in leftovers(directory):
        if path.suffix == _REPLACED and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def publish(temporary: Path, checksums: dict[str, str]) -> Path:
    """Make a complete temporary folder the run's latest checkpoint. `checksums` has the SHA-256 of the files whose
    writers have computed it; it is computed here for the others."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksums.get(path.name) or sha256(path, sync=True)}
        for path in sorted(temporary.iterdir())
    }
    missing = checksums.keys() - files.keys()
    if missing:
        raise FileNotFoundError(
            2, "files written by another process are missing: is the folder shared by all nodes?", missing.pop()
        )
    write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
    published = temporary.with_name(temporary.name.partition(".")[0])
    if published.exists():
        replaced = published.with_suffix(_REPLACED)
        published.rename(replaced)
        temporary.rename(published)
        _remove(replaced, ignore_errors=True)
    else:
        temporary.rename(published)
    write_text(published.parent / LATEST, published.name + "\n")  # also flushes the renamed folder to the disk
    return published


def prune(published: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove the checkpoints that need not be kept (`superseded`), `published` being the newest; return those."""
    found = checkpoint_folders(published.parent)
    steps = superseded([step_of(path) for path in found], step_of(published), keep_last, keep_every)
    removed = [path for path in found if step_of(path) in steps]
    for path in removed:
        # Renamed first: a crash in between leaves no damaged folder under a checkpoint's name.
        doomed = path.rename(path.with_suffix(_TEMPORARY))
        _remove(doomed)
    return removed
