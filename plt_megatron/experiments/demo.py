"""The demo: everything once, on this machine's CPU.

A corpus out of text the machine has, a tokenizer, tokenized data, a small PLT of two loops, the same model
with one loop on the same tokens, and a table that compares them. Finished steps are not done again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.demo_corpus import write_demo_corpus
from plt_megatron.errors import UserError
from plt_megatron.estimate.parameters import count_parameters
from plt_megatron.experiments.plots import plot_losses
from plt_megatron.experiments.run_metrics import RunMetrics, load_run
from plt_megatron.experiments.steps import Stamp, Step, format_seconds, run_step

# Relative to the project's root, where all of the demo runs. configs/data/demo.yaml names the same files.
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
    def folder(self) -> Path:
        return RUNS / self.name

    def all_overrides(self) -> list[str]:
        return [f"name={self.name}", f"output_dir={RUNS}", *self.overrides]


DEMO_RUNS = (
    DemoRun("plt2", "PLT, 2 loops", ("model.loop_count=2", "validation.loop_counts=[1, 2]")),
    DemoRun("plt1", "1 loop (plain)", ("model.loop_count=1", "validation.loop_counts=[1]")),
)


@dataclass(frozen=True)
class ResultRow:
    """One run's line of the final table. Losses in nats per token."""

    label: str
    parameters: int
    tokens: int
    train_loss: float
    validation_losses: dict[int, float]
    seconds: float


def run_demo() -> None:
    """Do what is not done yet, and print the table. The current directory must be the project's root.

    Raises `UserError` when a step fails; what was finished before is kept.
    """
    begun = time.monotonic()
    stamps = {}
    steps = _steps()
    for number, step in enumerate(steps, start=1):
        stamps[step.name] = run_step(step, FOLDER / "stamps", number, len(steps))
    metrics = [load_run(run.folder) for run in DEMO_RUNS]
    plot = FOLDER / "loss.png"
    plot_losses([run.folder for run in DEMO_RUNS], plot, [run.label for run in DEMO_RUNS])
    rows = [_result(run, stamps[run.name], values) for run, values in zip(DEMO_RUNS, metrics, strict=True)]
    print()
    print(format_table(rows))
    print()
    print(f"losses plotted   {plot}")
    for run in DEMO_RUNS:
        print(f"{run.label:<16} {run.folder} (checkpoint: {run.folder / 'checkpoints'})")
    print(f"{'exported':<16} {EXPORT}; a sample, its loops decoded in parallel:")
    print(flush=True)
    run_tool("tools/generate.py", "--model", str(EXPORT), "--prompt", PROMPT, "--max-new-tokens", "60")
    print()
    print(f"whole demo       {format_seconds(time.monotonic() - begun)}")


def format_table(rows: Sequence[ResultRow]) -> str:
    """Aligned columns; validation at a loop count that a model was not validated at is a dash."""
    loop_counts = sorted({loops for row in rows for loops in row.validation_losses})
    header = ["model", "parameters", "tokens", "train loss"]
    header += [f"val. loss, {loops} loop{'s' if loops > 1 else ''}" for loops in loop_counts]
    table = [[*header, "time"]]
    for row in rows:
        losses = [row.validation_losses.get(loops) for loops in loop_counts]
        table.append(
            [
                row.label,
                f"{row.parameters:,}",
                f"{row.tokens:,}",
                f"{row.train_loss:.3f}",
                *("-" if loss is None else f"{loss:.3f}" for loss in losses),
                format_seconds(row.seconds),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        first, *rest = (cell for cell in cells)
        aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _steps() -> list[Step]:
    corpus, tokenizer = list(CORPUS.values()), TOKENIZER_FILES[0]
    tokens = [prefix.with_name(prefix.name + suffix) for prefix in DATA.values() for suffix in (".bin", ".idx")]
    return [
        Step(
            name="corpus",
            title="corpus: the Python sources of the standard library",
            settings=sys.version,
            inputs=[],
            outputs=corpus,
            run=_write_corpus,
        ),
        Step(
            name="tokenizer",
            title=f"tokenizer: sentencepiece, {VOCAB_SIZE:,} pieces",
            settings=str(VOCAB_SIZE),
            inputs=corpus,
            outputs=TOKENIZER_FILES,
            run=_train_tokenizer,
        ),
        Step(
            name="data",
            title="tokenized data in megatron-core's indexed format",
            settings="",
            inputs=[*corpus, tokenizer],
            outputs=tokens,
            run=_tokenize,
        ),
        *(_training_step(run, [*tokens, tokenizer]) for run in DEMO_RUNS),
        Step(
            name="export",
            title="export of the two-loop model to Hugging Face",
            settings="",
            inputs=[DEMO_RUNS[0].folder / "checkpoints" / "latest", DEMO_RUNS[0].folder / "metrics.jsonl"],
            outputs=[EXPORT],
            run=_export,
        ),
    ]


def _write_corpus() -> None:
    corpus = write_demo_corpus(CORPUS["train"].parent)
    print(f"      {corpus.documents:,} files, {corpus.bytes / 1e6:.1f} MB", flush=True)


def _train_tokenizer() -> None:
    run_tool(
        "tools/train_tokenizer.py",
        *("--input", str(CORPUS["train"]), "--output", str(FOLDER), "--overwrite"),
        *("--vocab-size", str(VOCAB_SIZE)),
    )


def _tokenize() -> None:
    for part, corpus in CORPUS.items():
        run_tool(
            "tools/preprocess_data.py",
            *("--input", str(corpus), "--output-prefix", str(DATA[part]), "--overwrite"),
            *("--tokenizer", str(TOKENIZER_FILES[0])),
        )


def _export() -> None:
    run_tool("tools/convert_to_hf.py", "--checkpoint", str(DEMO_RUNS[0].folder), "--output", str(EXPORT), "--verify")


def _training_step(run: DemoRun, inputs: Sequence[Path]) -> Step:
    config = load_config(CONFIG, run.all_overrides())
    tokens = derived.train_iters(config) * derived.tokens_per_step(config)
    return Step(
        name=run.name,
        title=f"training: {run.label}, {tokens:,} tokens, {derived.required_world_size(config)} processes",
        settings=dump_config(config),
        inputs=inputs,
        outputs=[run.folder],
        run=lambda: run_tool("launch/local.py", str(CONFIG), *run.all_overrides()),
    )


def _result(run: DemoRun, stamp: Stamp, metrics: RunMetrics) -> ResultRow:
    config: RunConfig = load_config(run.folder / "config.yaml")
    return ResultRow(
        label=run.label,
        parameters=count_parameters(config.model, VOCAB_SIZE, config.parallel.tensor_model_parallel_size).total,
        tokens=metrics.train[-1].tokens,
        train_loss=metrics.final_train_loss(),
        validation_losses=metrics.final_validation_losses(),
        seconds=stamp.seconds,
    )


def run_tool(script: str, *arguments: str) -> None:
    """Run one of the project's commands with its output shown here.

    Raises `UserError` if it fails and `KeyboardInterrupt` after it has ended on one.
    """
    process = subprocess.Popen([sys.executable, script, *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the whole group: the command ends by itself, and cleanly if we let it.
        process.wait()
        raise
    if status != 0:
        command = " ".join([script, *arguments])
        raise UserError(f"{command} ended with status {status}: see above, then run the demo again")
