"""Studies for tests: a file of three tiny sizes, and a stand-in for training that obeys a planted law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np

from plt_megatron.config import derived
from plt_megatron.experiments.records import data_fingerprint
from plt_megatron.experiments.study.grid import loop_parameters, start_step
from plt_megatron.experiments.sweep_plan import PlannedRun
from plt_megatron.predict.run_estimate import estimate_run
from tests.unit.experiments.sweep_helpers import edit_records, finish, write_sweep, write_text_data

STUDY = """
base: base.yaml
set: {optimizer.lr_warmup_iters: 4}
variants:
  PLT: {}
  naive loop: {model.cross_loop_parallel: false, model.share_kv: false, model.gated_window: false}
sizes:
  S: {model.hidden_size: 16, model.ffn_hidden_size: 32}
  M: {model.hidden_size: 32, model.ffn_hidden_size: 64}
  L: {model.hidden_size: 64, model.ffn_hidden_size: 128}
loops: [1, 2, 3]
horizons: [1280, 2560, 5120]
seeds: [1, 2]
budget: 0.12min
decide: {training_flops: 1e11, latency_ms: 0.0006, memory_gb: 0.001, context_length: 64, confidence: 0.999,
         indifference: 0}
"""
PHIS = {"PLT": 0.5, "naive loop": 0.3}


def write_study(folder: Path, text: str = STUDY) -> Path:
    """The study's file, its base run and the data that it reads."""
    write_sweep(folder)
    write_text_data(folder)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def planted_loss(run: PlannedRun, phi: float | None = None) -> float:
    """By a planted law, with the luck of the run's arm. `phi` None: the variant's."""
    model = run.config.model
    once, looped = loop_parameters(run.config, run.vocab)
    phi = PHIS.get(run.labels["variant"], 0.0) if phi is None else phi
    size = once + model.loop_count**phi * looped
    arm = run.name.rpartition("-")[0]
    draw = np.random.default_rng(sum(ord(c) * (n + 1) for n, c in enumerate(arm))).standard_normal()
    return 1.5 + 0.6 * (size / 3e4) ** -0.3 + 0.5 * (run.tokens / 2e3) ** -0.4 + 0.004 * draw


class PlantedTraining:
    """In the place of `LocalSweep`: "trains" by writing what training would leave.

    Attributes:
        killed_after: runs that this one still finishes before it is killed; None: all.
        diverging, failing: names of runs that go wrong.
        sources: of validation, with their phi, if runs are to be validated by source.
    """

    killed_after: ClassVar[int | None] = None
    diverging: ClassVar[set[str]] = set()
    failing: ClassVar[set[str]] = set()
    trained: ClassVar[list[str]] = []
    sources: ClassVar[dict[str, float]] = {}

    def __init__(self, plan, runs, jobs=1) -> None:
        self.runs, self.outcome = list(runs), {}

    def run(self) -> int:
        kind = type(self)
        for run in self.runs:
            if kind.killed_after is not None:
                if kind.killed_after == 0:
                    raise KeyboardInterrupt
                kind.killed_after -= 1
            kind.trained.append(run.name)
            if run.name in kind.failing:
                self.outcome[run.name] = "failed"
                continue
            train(run, math.log(256) + 1 if run.name in kind.diverging else planted_loss(run))
            note_sources(run, kind.sources)
            self.outcome[run.name] = "finished"
        return 0


def train(run: PlannedRun, loss: float) -> None:
    """What training would leave, with the checkpoints that branches start from."""
    finish(run, loss, fingerprint=data_fingerprint(run))
    estimate = estimate_run(run.config, gpu="cpu", vocab_size=run.vocab)
    speed = derived.tokens_per_step(run.config) / estimate.step_seconds
    edit_records(run.folder.metrics_file, lambda record: record | {"tokens_per_second": speed})
    every = run.config.checkpoint.keep_every
    for step in range(start_step(run) + every, derived.train_iters(run.config), every):
        (run.folder.checkpoints / f"step_{step:08d}").mkdir()


def note_sources(run: PlannedRun, sources: dict[str, float]) -> None:
    """Add bits per byte of each source, and of both together, to the run's validations."""
    if not sources:
        return
    bits = {name: planted_loss(run, phi=phi) for name, phi in sources.items()}
    added = {"source_bits_per_byte": bits, "bits_per_byte": sum(bits.values()) / len(bits)}
    edit_records(run.folder.metrics_file, lambda record: record | (added if record["kind"] == "validation" else {}))
