"""Steps of a longer job that run once: each leaves a stamp, and is skipped as long as the stamp is valid.

A stamp is valid while everything that the step depends on (its settings, the content of its input files) is unchanged
and its outputs exist with the same sizes. An interrupted step runs again on what it left, so that it can continue where
it stopped; if something that it depends on has changed, its outputs are removed first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.text import format_duration

_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Step:
    """One piece of work.

    Attributes:
        name: of its stamp.
        title: what the user reads.
        settings: whatever the result depends on besides the inputs, as text.
        inputs: files whose content it depends on; they exist when the step's turn comes.
        outputs: files or folders that it makes and nothing else does.
        run: does the work. It may be called again after an interruption.
    """

    name: str
    title: str
    settings: str
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    run: Callable[[], None]


@dataclass
class Stamp:
    """What is known of a step's last run. `seconds` is its working time, interrupted attempts included."""

    key: str
    finished: bool
    seconds: float
    sizes: dict[str, int]


def run_step(step: Step, stamps: Path, number: int, total: int) -> Stamp:
    """Run the step unless it has a valid stamp in the folder `stamps`; print which of the two.

    Raises whatever `step.run` raises, and `UserError` if it made less than it should have.
    """
    path = stamps / f"{step.name}.json"
    key, stamp = _key(step), _read(path)
    print(f"[{number}/{total}] {step.title}", flush=True)
    if stamp is not None and stamp.key == key and stamp.finished and stamp.sizes == _sizes(step):
        print("      already done", flush=True)
        return stamp
    if stamp is None or stamp.key != key or stamp.finished:
        _remove(step.outputs)
        stamp = Stamp(key, finished=False, seconds=0.0, sizes={})
    _write(path, stamp)
    begun = time.monotonic()
    try:
        step.run()
    finally:
        stamp.seconds += time.monotonic() - begun
        _write(path, stamp)
    missing = [str(output) for output in step.outputs if not output.exists()]
    if missing:
        raise UserError(f"step {step.name} did not make {', '.join(missing)}")
    stamp.finished, stamp.sizes = True, _sizes(step)
    _write(path, stamp)
    print(f"      done in {format_duration(stamp.seconds)}", flush=True)
    return stamp


def _key(step: Step) -> str:
    digest = hashlib.sha256(step.settings.encode())
    for path in step.inputs:
        digest.update(f"\0{path.name}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _sizes(step: Step) -> dict[str, int]:
    """Bytes of each output; a folder counts as the sum of its files. What is missing is left out."""
    sizes = {}
    for output in step.outputs:
        if output.is_dir():
            sizes[str(output)] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        elif output.exists():
            sizes[str(output)] = output.stat().st_size
    return sizes


def _remove(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.is_dir() and not output.is_symlink():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def _read(path: Path) -> Stamp | None:
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):  # none, or not one of this version
        return None


def _write(path: Path, stamp: Stamp) -> None:
    write_json(path, asdict(stamp), indent=None)
