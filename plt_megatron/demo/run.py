"""The demo: every step of the project once, on this machine's CPU.

Makes a corpus of text on this machine, a tokenizer and tokenized data; trains a small PLT of two loops, and the same
model with one loop on the same tokens; prints a table that compares them. Finished steps are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.demo.steps import Stamp, Step, data_steps, run_step
from plt_megatron.errors import UserError
from plt_megatron.extras import require
from plt_megatron.installation import python_path
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.run_folder.checkpoints import LATEST
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.metrics import RunMetrics
from plt_megatron.run_folder.text import format_duration, format_table, plural

# Relative to the current folder. configs/data/demo.yaml names the same files.
FOLDER = Path(".demo")
CORPUS = {part: FOLDER / "corpus" / f"{part}.jsonl" for part in ("train", "validation")}
DATA = {part: FOLDER / "data" / f"{part}_text_document" for part in CORPUS}
TOKENIZER_FILES = [FOLDER / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")]
RUNS = FOLDER / "runs"
EXPORT = FOLDER / "hf"
PROMPT = "def __init__(self"
CONFIG = Path("configs/runs/plt2_demo.yaml")
VOCAB_SIZE = 8192


@dataclass(frozen=True)
class DemoRun:
    """One training run of the demo: CONFIG with these overrides."""

    name: str
    label: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(RUNS / self.name)

    def all_overrides(self) -> list[str]:
        return [f"name={self.name}", f"output_dir={RUNS}", *self.overrides]


DEMO_RUNS = (
    DemoRun("plt2", "PLT, 2 loops", ("model.loop_count=2", "validation.loop_counts=[1, 2]")),
    DemoRun("plt1", "1 loop (plain)", ("model.loop_count=1", "validation.loop_counts=[1]")),
)


@dataclass(frozen=True)
class ResultRow:
    """One run's row of the final table. Losses in nats per token."""

    label: str
    parameters: int
    tokens: int
    train_loss: float
    validation_losses: dict[int, float]
    seconds: float


def run_demo() -> None:
    """Run the unfinished steps in the current folder and print the table.

    Raises `UserError` when a step fails; finished steps are kept.
    """
    begun = time.monotonic()
    package = optimizer_spec(load_config(CONFIG).optimizer).package
    require("the demo", "transformers", *([package] if package else []))
    from plt_megatron.experiments.plots import plot_losses

    stamps = {}
    steps = _steps()
    for number, step in enumerate(steps, start=1):
        stamps[step.name] = run_step(step, FOLDER / "stamps", number, len(steps))
    metrics = [run.folder.trained_metrics() for run in DEMO_RUNS]
    plot = FOLDER / "loss.png"
    plot_losses([run.folder.path for run in DEMO_RUNS], plot, [run.label for run in DEMO_RUNS])
    rows = [_result(run, stamps[run.name], values) for run, values in zip(DEMO_RUNS, metrics, strict=True)]
    print()
    print(results_table(rows))
    print()
    print(f"losses plotted   {plot}")
    for run in DEMO_RUNS:
        print(f"{run.label:<16} {run.folder.path} (checkpoint: {run.folder.checkpoints})")
    print(f"{'exported':<16} {EXPORT}; a sample, its loops decoded in parallel:")
    print(flush=True)
    start("generate", "--model", str(EXPORT), "--prompt", PROMPT, "--max-new-tokens", "60")
    print()
    print(f"whole demo       {format_duration(time.monotonic() - begun)}")


def results_table(rows: Sequence[ResultRow]) -> str:
    """Format results in aligned columns, with a dash where a model was not validated at a loop count."""
    loop_counts = sorted({loops for row in rows for loops in row.validation_losses})
    header = ["model", "parameters", "tokens", "train loss"]
    header += [f"val. loss, {plural(loops, 'loop')}" for loops in loop_counts]
    table = []
    for row in rows:
        losses = [row.validation_losses.get(loops) for loops in loop_counts]
        table.append(
            [
                row.label,
                f"{row.parameters:,}",
                f"{row.tokens:,}",
                f"{row.train_loss:.3f}",
                *("-" if loss is None else f"{loss:.3f}" for loss in losses),
                format_duration(row.seconds),
            ]
        )
    return format_table(table, header=[*header, "time"])


def _steps() -> list[Step]:
    data = data_steps(CORPUS["train"].parent, FOLDER, DATA["train"].parent, vocab_size=VOCAB_SIZE)
    read = [*data[-1].outputs, TOKENIZER_FILES[0]]
    return [
        *data,
        *(_training_step(run, read) for run in DEMO_RUNS),
        Step(
            name="export",
            title="export of the two-loop model to Hugging Face",
            settings="",
            inputs=[DEMO_RUNS[0].folder.checkpoints / LATEST, DEMO_RUNS[0].folder.metrics_file],
            outputs=[EXPORT],
            run=lambda: start(
                "export", "--checkpoint", str(DEMO_RUNS[0].folder.path), "--output", str(EXPORT), "--verify"
            ),
        ),
    ]


def _training_step(run: DemoRun, inputs: Sequence[Path]) -> Step:
    config = load_config(CONFIG, run.all_overrides())
    tokens = derived.run_tokens(config)
    return Step(
        name=run.name,
        title=f"training: {run.label}, {tokens:,} tokens, {layout_of(config).world_size} processes",
        settings=dump_config(config),
        inputs=inputs,
        outputs=[run.folder.path],
        run=lambda: start("train", str(CONFIG), *run.all_overrides()),
    )


def _result(run: DemoRun, stamp: Stamp, metrics: RunMetrics) -> ResultRow:
    config = run.folder.config()
    return ResultRow(
        label=run.label,
        parameters=count_parameters(config.model, VOCAB_SIZE, config.parallel.tensor_model_parallel_size).total,
        tokens=metrics.tokens,
        train_loss=metrics.final_train_loss(),
        validation_losses=metrics.final_validation_losses(),
        seconds=stamp.seconds,
    )


def start(command: str, *arguments: str) -> None:
    """Run a command in a process of its own, since it sets up torch, with its output shown here.

    Args:
        command: a command of `plt`.

    Raises `UserError` if it fails and `KeyboardInterrupt` after it has ended on one.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "plt_megatron", command, *arguments],
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the whole process group: the command ends by itself, cleanly if we let it.
        process.wait()
        raise
    if status != 0:
        words = " ".join(["plt", command, *arguments])
        raise UserError(f"{words} ended with status {status}: see above, then run the demo again")
