"""Decoding time of a sweep's final checkpoints, measured: exported, loaded, and decoded in turns.

As in benchmarks/decode.py the rows take turns, a slice of tokens each, so that a busy moment of the machine hits all of
them; ratios are taken within a slice and the median slice is reported. The measurement is kept in the sweep's
`decode.json` for later reports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.experiments.report.results import RunResult, SweepResults
from plt_megatron.extras import require
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.text import plural

FILE_NAME = "decode.json"
EXPORTS = "exports"
_WARM_UP = 4  # warm-up tokens, not timed


@dataclass(frozen=True)
class DecodeProtocol:
    """What is timed: `decode` tokens in slices, for `batch` sequences with `prefill` tokens in the cache."""

    batch: int = 4
    prefill: int = 128
    decode: int = 96
    slice: int = 8


@dataclass(frozen=True)
class Timing:
    """One row's decoding: milliseconds per token step (median slice), the ratio to the baseline's, and its cache."""

    milliseconds: float
    relative: float
    cache_bytes: int  # of one sequence after the measurement, in the checkpoint's precision


@dataclass(frozen=True)
class Measurement:
    """Timings by row name, and under which conditions they hold."""

    rows: dict[str, Timing]
    conditions: str


def read_measurement(folder: Path) -> Measurement | None:
    """What an earlier report measured; None without one. Raises `UserError` on a broken file."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Measurement({name: Timing(**row) for name, row in content["rows"].items()}, content["conditions"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: broken ({error!r}); remove it and measure again") from error


def measure(results: SweepResults, protocol: DecodeProtocol) -> Measurement:
    """Export a finished run of every row, time them, and write `decode.json`.

    Raises `UserError` if no run is finished, one cannot be exported, or transformers is missing.
    """
    require("measuring decoding", "transformers")
    import torch

    chosen = _choose(results)
    models = {name: _load(_export(result, results.plan.folder)) for name, result in chosen.items()}
    with torch.inference_mode():
        slices, cache_bytes = _take_turns(models, protocol)
    rows = {}
    for name in models:
        reference = slices[_baseline_name(name, chosen, results)]
        ratios = [own / other for own, other in zip(slices[name], reference, strict=True)]
        rows[name] = Timing(statistics.median(slices[name]), statistics.median(ratios), cache_bytes[name])
    dtype = str(next(iter(models.values())).dtype).removeprefix("torch.")
    conditions = (
        f"batch {protocol.batch}, {protocol.prefill} tokens in the cache, {protocol.decode} decoded in slices of "
        f"{protocol.slice}, {dtype}, eager, {platform.processor() or platform.machine()} CPU, "
        f"{plural(torch.get_num_threads(), 'thread')}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"
    )
    measurement = Measurement(rows, conditions)
    content = {"conditions": conditions, "rows": {name: dataclasses.asdict(row) for name, row in rows.items()}}
    write_json(results.plan.folder / FILE_NAME, content)
    return measurement


def _choose(results: SweepResults) -> dict[str, RunResult]:
    """By row, the first used run whose weights are there. Raises `UserError` if a row with a used run has none."""
    chosen: dict[str, RunResult] = {}
    rows = dict.fromkeys(_row_name(result, results) for result in results.used())
    for result in results.used():
        if _is_exported(result, results.plan.folder) or result.run.folder.latest_checkpoint(verify=False):
            chosen.setdefault(_row_name(result, results), result)
    without = [name for name in rows if name not in chosen]
    if without:
        raise UserError(
            f"{results.plan.folder}: decoding cannot be measured, no run of {', '.join(without)} has a checkpoint (a "
            f"copy without checkpoints keeps what was measured before in {FILE_NAME})"
        )
    if not chosen:
        raise UserError(f"{results.plan.folder}: no finished run whose decoding could be measured")
    return chosen


def _is_exported(result: RunResult, folder: Path) -> bool:
    return (folder / EXPORTS / result.run.name / "config.json").exists()


def _row_name(result: RunResult, results: SweepResults) -> str:
    """As `rows.Row.name`: the compared axis last."""
    labels, compare = result.run.labels, results.plan.compare
    rest = [label for axis, label in labels.items() if axis != compare]
    return ", ".join([*rest, labels[compare] if compare is not None else "all"])


def _baseline_name(name: str, chosen: Mapping[str, RunResult], results: SweepResults) -> str:
    """The row of the same group that ratios are taken to: the baseline or, if it has no run, the group's first."""
    compare = results.plan.compare
    rest = {axis: label for axis, label in chosen[name].run.labels.items() if axis != compare}
    same = [
        other
        for other, result in chosen.items()
        if all(result.run.labels[axis] == label for axis, label in rest.items())
    ]
    wanted = results.plan.baseline
    return next((other for other in same if compare and chosen[other].run.labels[compare] == wanted), same[0])


def _export(result: RunResult, folder: Path) -> Path:
    """The run's last checkpoint as a Hugging Face folder; an existing one is reused."""
    from plt_megatron.hf.exporting import ExportOptions, export

    output = folder / EXPORTS / result.run.name
    if not _is_exported(result, folder):
        export(ExportOptions(checkpoint=result.run.folder.path, output=output))
    return output


def _load(folder: Path) -> Any:
    from transformers.utils import logging

    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    logging.disable_progress_bar()
    return PLTForCausalLM.from_pretrained(str(folder), dtype="auto").eval()


def _take_turns(models: Mapping[str, Any], protocol: DecodeProtocol) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds per token step of every slice, by row, and each row's cache in bytes a sequence."""
    import torch

    steps = {}
    for name, model in models.items():
        cache = model.new_cache(None)
        prompt = torch.arange(protocol.prefill)[None] % model.config.vocab_size
        model(prompt, cache=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(protocol.batch)
        steps[name] = (model, cache, torch.zeros(protocol.batch, 1, dtype=torch.long))
        _decode(*steps[name], _WARM_UP)
    slices: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(max(1, protocol.decode // protocol.slice)):
        for name in models:
            slices[name].append(_decode(*steps[name], protocol.slice))
    return slices, {name: steps[name][1].memory_bytes() // protocol.batch for name in models}


def _decode(model: Any, cache: Any, tokens: Any, count: int) -> float:
    """Milliseconds per step of `count` steps."""
    started = time.perf_counter()
    for _ in range(count):
        model(tokens, cache=cache)
    return (time.perf_counter() - started) / count * 1e3
