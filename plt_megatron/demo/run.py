"""The demo: every step of the project once, on this machine's CPU.

Makes a corpus of text on this machine, a tokenizer and tokenized data; trains a small PLT of two loops, and the same
model with one loop on the same tokens; prints a table that compares them. Finished steps are skipped.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.demo.steps import TOKENIZER_FILES, Stamp, Step, data_steps, run_steps
from plt_megatron.errors import UserError
from plt_megatron.extras import require
from plt_megatron.installation import own_python, python_path
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.run_folder.checkpoints import LATEST
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import format_duration, format_table, plural
from plt_megatron.runtime.local_processes import die_with_parent, local_gpus

# Relative to the current folder. configs/data/demo.yaml names the same files.
FOLDER = Path(".demo")
CORPUS = {part: FOLDER / "corpus" / f"{part}.jsonl" for part in ("train", "validation")}
DATA = {part: FOLDER / "data" / f"{part}_text_document" for part in CORPUS}
TOKENIZER = FOLDER / TOKENIZER_FILES[0]
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
        alone = ["parallel.data_parallel_size=1"] if len(local_gpus()) == 1 else []
        return [f"name={self.name}", f"output_dir={RUNS}", *alone, *self.overrides]


DEMO_RUNS = (
    DemoRun("plt2", "PLT, 2 loops", ("model.loop_count=2", "validation.loop_counts=[1, 2]")),
    DemoRun("plt1", "1 loop (plain)", ("model.loop_count=1", "validation.loop_counts=[1]")),
)


def run_demo() -> None:
    """Run the unfinished steps in the current folder and print the table.

    Raises `UserError` when a step fails; finished steps are kept.
    """
    begun = time.monotonic()
    package = optimizer_spec(load_config(CONFIG).optimizer).package
    require("the demo", "transformers", *([package] if package else []))
    from plt_megatron.experiments.plots import plot_metrics

    stamps = run_steps(_steps(), FOLDER / "stamps")
    plot = FOLDER / "loss.png"
    plot_metrics([run.folder.path for run in DEMO_RUNS], plot, [run.label for run in DEMO_RUNS], ["loss"])
    print()
    print(results_table(stamps))
    print()
    print(f"losses plotted   {plot}")
    for run in DEMO_RUNS:
        print(f"{run.label:<16} {run.folder.path} (checkpoint: {run.folder.checkpoints})")
    print(f"{'exported':<16} {EXPORT}; a sample, its loops decoded in parallel:")
    print(flush=True)
    start("generate", "--model", str(EXPORT), "--prompt", PROMPT, "--max-new-tokens", "60")
    print()
    print(f"whole demo       {format_duration(time.monotonic() - begun)}")


def results_table(stamps: Mapping[str, Stamp]) -> str:
    """Format the runs' results, with a dash where a model was not validated at a loop count. `stamps`: by step."""
    metrics = [run.folder.trained_metrics() for run in DEMO_RUNS]
    loop_counts = sorted({loops for own in metrics for loops in own.final_validation_losses()})
    header = ["model", "parameters", "tokens", "train loss"]
    header += [f"val. loss, {plural(loops, 'loop')}" for loops in loop_counts]
    table = []
    for run, own in zip(DEMO_RUNS, metrics, strict=True):
        config, losses = run.folder.config(), own.final_validation_losses()
        parameters = count_parameters(config.model, VOCAB_SIZE, config.parallel.tensor_model_parallel_size).total
        row = [run.label, f"{parameters:,}", f"{own.tokens:,}", f"{own.final_train_loss():.3f}"]
        row += [f"{losses[loops]:.3f}" if loops in losses else "-" for loops in loop_counts]
        table.append([*row, format_duration(stamps[run.name].seconds)])
    return format_table(table, header=[*header, "time"])


def _steps() -> list[Step]:
    data = data_steps(CORPUS["train"].parent, FOLDER, DATA["train"].parent, vocab_size=VOCAB_SIZE)
    read = [*data[-1].outputs, TOKENIZER]
    return [
        *data,
        *(_training_step(run, read) for run in DEMO_RUNS),
        Step(
            name="export",
            title="export of the two-loop model to Hugging Face",
            settings="",
            inputs=[DEMO_RUNS[0].folder.checkpoints / LATEST, DEMO_RUNS[0].folder.metrics_file],
            outputs=[EXPORT / "config.json", EXPORT / "model.safetensors"],
            folder=EXPORT,
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
        outputs=[run.folder.metrics_file, run.folder.checkpoints / LATEST],
        folder=run.folder.path,
        run=lambda: start("train", str(CONFIG), *run.all_overrides()),
    )


def start(command: str, *arguments: str) -> None:
    """Run a command of `plt` in a process of its own, since it sets up torch, with its output shown here.

    Raises `UserError` if it fails and `KeyboardInterrupt` after it has ended on one.
    """
    process = subprocess.Popen(
        [*own_python(), "-m", "plt_megatron", command, *arguments],
        env=os.environ | {"PYTHONPATH": python_path()},
        preexec_fn=die_with_parent,
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
