"""Sweeps for tests: a base run whose data is two files of noise, and runs that look finished without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config import derived
from plt_megatron.data.indexed import write_index
from plt_megatron.experiments.files import read_sweep
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, make_plan, save_plan

FINGERPRINT = {"tokenizer": None, "split": None, "sequence_length": 32, "sources": {"train": [["abc", 1.0]]}}

BASE = """
model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 256, window_size: 8}
data:
  train_sources: [{path: DATA/text}]
  validation_sources: [{path: DATA/text}]
  sequence_length: 32
training: {micro_batch_size: 2, global_batch_size: 2, train_iters: 100, precision: fp32}
optimizer: {lr_warmup_iters: 2}
validation: {interval: 50, iters: 1}
"""

LOOPS = """
base: base.yaml
axes: {model.loop_count: [1, 2, 3]}
seeds: [1, 2, 3]
match_budget: tokens
"""


def write_sweep(folder: Path, text: str = LOOPS) -> Path:
    """The sweep file, its base run and the data it reads, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".bin", ".idx"):
        (folder / f"text{suffix}").write_bytes(bytes(range(256)))
    (folder / "base.yaml").write_text(BASE.replace("DATA", str(folder)))
    path = folder / "loops.yaml"
    path.write_text(text)
    return path


def write_text_data(folder: Path) -> None:
    """Write complete tokenized text in place of the noise: 20 documents of 200 ids below 256."""
    np.tile(np.arange(200, dtype=np.uint16), 20).tofile(folder / "text.bin")
    write_index(folder / "text.idx", np.uint16, lambda: [np.full(20, 200, dtype=np.int32)])


def plan_of(folder: Path, text: str = LOOPS, settings: tuple[str, ...] = ()) -> SweepPlan:
    """A plan, not saved, with its folder below `folder`."""
    sweep = read_sweep(write_sweep(folder, text), [f"output_dir={folder / 'sweeps'}", *settings])
    return make_plan(sweep)


def answers(results, timings=None):
    """The verdicts by question, of a sweep of one group."""
    from plt_megatron.experiments.verdicts import make_rows, verdicts  # slow, and stand-ins for runs need none

    return {verdict.question: verdict for verdict in verdicts(results, make_rows(results, timings))}


def saved_plan(folder: Path, text: str = LOOPS, settings: tuple[str, ...] = ()) -> SweepPlan:
    plan = plan_of(folder, text, settings)
    plan.folder.mkdir(parents=True, exist_ok=True)
    save_plan(plan)
    return plan


def planned(plan: SweepPlan, name: str) -> PlannedRun:
    return next(run for run in plan.runs if run.name == name)


def finish(run: PlannedRun, loss: float, upto: float = 1.0, fingerprint: dict[str, Any] | None = None) -> None:
    """Make the run's folder look as after training to `upto` of its steps: a falling curve that ends at `loss`."""
    steps, per_step = derived.train_iters(run.config), derived.tokens_per_step(run.config)
    records: list[dict[str, Any]] = []
    last = int(steps * upto)
    for step in sorted({*range(10, last + 1, 10), last}):
        now = loss + (steps - step) / steps
        record = {"kind": "train", "step": step, "tokens": step * per_step, "loss": now + 0.01}
        records.append({**record, "tokens_per_second": 1000.0})
        if step % 50 == 0 or step == steps:
            loops = run.config.model.loop_count
            records.append({**record, "kind": "validation", "loop_count": loops, "loss": now})
    run.folder.path.mkdir(parents=True, exist_ok=True)
    write_records(run.folder.metrics_file, records)
    checkpoint = run.folder.checkpoints / f"step_{last:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    data = {**(fingerprint or FINGERPRINT), "sampling": {"seed": run.seed}, "sha256": f"{run.name:0<64}"}
    (checkpoint / "progress.json").write_text(json.dumps({"format": 1, "step": last, "data_fingerprint": data}))
    (run.folder.checkpoints / "latest").write_text(f"{checkpoint.name}\n")


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def edit_records(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write_records(path, [change(json.loads(line)) for line in path.read_text().splitlines()])


def note_scores(run: PlannedRun, scores: dict[str, float]) -> None:
    """An evaluation of the run's last step, after the records that are there."""
    steps = derived.train_iters(run.config)
    tokens = steps * derived.tokens_per_step(run.config)
    with run.folder.metrics_file.open("a") as file:
        file.write(json.dumps({"kind": "evaluation", "step": steps, "tokens": tokens, "scores": scores}) + "\n")
