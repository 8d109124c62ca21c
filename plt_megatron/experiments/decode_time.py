"""Measure the decoding time of a sweep's final checkpoints: export and load them, and decode in turns.

As in benchmarks/decode.py, the rows take turns of one slice of tokens, so that a busy moment of the machine hits all of
them; ratios are taken within a slice, and the median slice is reported. The measurement is saved in the sweep's
`decode.json` for later reports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.experiments.records import RunResult, SweepResults
from plt_megatron.experiments.turns import in_turn
from plt_megatron.experiments.verdicts import Row, Timing, baseline_of, make_rows
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.text import plural

FILE_NAME = "decode.json"
EXPORTS = "exports"
_WARM_UP = 4  # warm-up tokens, not timed


@dataclass(frozen=True)
class DecodeProtocol:
    """The workload to time: `decode` tokens in slices, for `batch` sequences with `prefill` tokens in the cache.

    `decode` is a multiple of `slice`.
    """

    batch: int = 4
    prefill: int = 128
    decode: int = 96
    slice: int = 8


@dataclass(frozen=True)
class Measurement:
    """Timings by row name, and the conditions under which they hold."""

    conditions: str
    rows: dict[str, Timing]


def read_measurement(folder: Path) -> Measurement | None:
    """Read the measurement of an earlier report; None without one. Raises `UserError` on a broken file."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(content["conditions"], {name: Timing(**row) for name, row in content["rows"].items()})
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: broken ({error!r}); remove it and measure again") from error


def measure(results: SweepResults, protocol: DecodeProtocol) -> Measurement:
    """Export a finished run of every row, time them, and write `decode.json`.

    Raises `UserError` if no run is finished, or one cannot be exported.
    """
    import torch

    planned = make_rows(results)
    rows = [row for row in planned if row.losses]
    chosen = _choose(results, rows)
    models = {name: _load(result, _export_of(result, results)) for name, result in chosen.items()}
    with torch.inference_mode():
        slices, cache_bytes = _take_turns(models, protocol)
    timings = {}
    for row in rows:
        baseline = baseline_of([other for other in planned if other.group == row.group], results.plan.baseline)
        own, relative = slices[row.name], None
        if baseline.name in slices:
            relative = statistics.median(a / b for a, b in zip(own, slices[baseline.name], strict=True))
        timings[row.name] = Timing(statistics.median(own), relative, cache_bytes[row.name])
    dtype = str(next(iter(models.values())).dtype).removeprefix("torch.")
    conditions = (
        f"batch {protocol.batch}, {protocol.prefill} tokens in the cache, {protocol.decode} decoded in slices of "
        f"{protocol.slice}, {dtype}, eager, {platform.processor() or platform.machine()} CPU, "
        f"{plural(torch.get_num_threads(), 'thread')}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"
    )
    measurement = Measurement(conditions, timings)
    write_json(results.plan.folder / FILE_NAME, dataclasses.asdict(measurement))
    return measurement


def _choose(results: SweepResults, rows: Sequence[Row]) -> dict[str, RunResult]:
    """Choose each row's first used run that has weights. Raises `UserError` if a row with a used run has none."""
    chosen: dict[str, RunResult] = {}
    for row in rows:
        for result in row.results:
            is_exported = (_export_of(result, results) / "config.json").exists()
            if result.status == "used" and (is_exported or result.run.folder.latest_checkpoint(verify=False)):
                chosen.setdefault(row.name, result)
    without = [row.name for row in rows if row.name not in chosen]
    if without:
        raise UserError(
            f"{results.plan.folder}: decoding cannot be measured, no run of {', '.join(without)} has a checkpoint "
            f"(in a copy without checkpoints, {FILE_NAME} has earlier measurements)"
        )
    if not chosen:
        raise UserError(f"{results.plan.folder}: no finished run to measure decoding with")
    return chosen


def _export_of(result: RunResult, results: SweepResults) -> Path:
    return results.plan.folder / EXPORTS / result.run.name


def _load(result: RunResult, folder: Path) -> Any:
    """Load the run's last checkpoint from its export in `folder`, which is made unless it exists."""
    from transformers.utils import logging

    from plt_megatron.hf.exporting import ExportOptions, export
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    if not (folder / "config.json").exists():
        export(ExportOptions(checkpoint=result.run.folder.path, output=folder))
    logging.disable_progress_bar()
    return PLTForCausalLM.from_pretrained(str(folder), dtype="auto").eval()


def _take_turns(models: Mapping[str, Any], protocol: DecodeProtocol) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the milliseconds per token step of every slice, by row, and each row's cache in bytes per sequence."""
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
    for turn in range(protocol.decode // protocol.slice):
        for name in in_turn(models, turn):
            slices[name].append(_decode(*steps[name], protocol.slice))
    return slices, {name: steps[name][1].memory_bytes() // protocol.batch for name in models}


def _decode(model: Any, cache: Any, tokens: Any, count: int) -> float:
    """Decode `count` steps; return the milliseconds per step."""
    started = time.perf_counter()
    for _ in range(count):
        model(tokens, cache=cache)
    return (time.perf_counter() - started) / count * 1e3
