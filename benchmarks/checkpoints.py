#!/usr/bin/env python3
"""Cost of checkpoints: the share of training time in a run of the demo's model that saves every 50 steps.

    python benchmarks/checkpoints.py            # `make demo`'s data and layout; exit status 1 if the bar is missed

The run is the demo's with Adam, whose checkpoints are larger: 3.2M parameters, two processes, 2,048 tokens per step.
The share is the saves' part of the training loop's time (data, forward and backward, optimizer, saves), from the run's
own records (`step_seconds` in metrics.jsonl). Asynchronous saving is measured too.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plt_megatron.config.loader import load_config  # noqa: E402
from plt_megatron.errors import UserError, run_command  # noqa: E402
from plt_megatron.run_folder.folder import RunFolder, save_config  # noqa: E402

BAR = 0.05
SAVE_INTERVAL = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 50 (default: 200)")
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: beside the demo's)")
    arguments = parser.parse_args()
    data = load_config(str(ROOT / "configs/runs/plt2_demo.yaml"), []).data
    if not (ROOT / f"{data.train_sources[0].path}.idx").exists():
        raise UserError("the demo's data is missing: run `make demo` first")
    missed = False
    with tempfile.TemporaryDirectory(dir=arguments.folder or ROOT / ".demo") as folder:
        for asynchronous in (False, True):
            share, seconds, size = measure(Path(folder), arguments.steps, asynchronous)
            name = "asynchronous" if asynchronous else "synchronous"
            print(
                f"{name}: {seconds:.2f} s a save of {size / 1e6:.0f} MB, {share:.1%} of the training loop's time",
                flush=True,
            )
            missed |= share > BAR and not asynchronous
    print(f"bar, synchronous: {BAR:.0%}{', MISSED' if missed else ''}")
    return int(missed)


def measure(folder: Path, steps: int, asynchronous: bool) -> tuple[float, float, int]:
    """Train and return (the saves' share of the training loop's time, seconds per save, bytes of a checkpoint)."""
    config = load_config(str(ROOT / "configs/runs/plt2_demo.yaml"), ["optimizer.name=adam"])  # the larger checkpoint
    config.output_dir, config.name = str(folder), "async" if asynchronous else "sync"
    config.training = dataclasses.replace(config.training, train_tokens=None, train_iters=steps + 1)
    config.validation.interval, config.validation.iters = 0, 0
    config.checkpoint.save_interval, config.checkpoint.async_save = SAVE_INTERVAL, asynchronous
    config.logging.log_interval = SAVE_INTERVAL
    save_config(config, folder / "run.yaml")
    started = time.monotonic()
    subprocess.run([sys.executable, "launch/train.py", str(folder / "run.yaml")], cwd=ROOT, check=True, stdout=2)
    run = folder / config.name
    # A save is recorded with the steps after it: the last line covers the save at `steps` and one more step.
    records = [record for record in RunFolder(run).records() if record["kind"] == "train"]
    saving = sum(record["step_seconds"].get("checkpoint", 0.0) * _steps(records, i) for i, record in enumerate(records))
    training = sum(
        sum(record["step_seconds"][part] for part in ("data", "forward_backward", "optimizer")) * _steps(records, i)
        for i, record in enumerate(records)
    )
    assert training + saving < time.monotonic() - started
    saves = steps // SAVE_INTERVAL
    latest = sorted((run / "checkpoints").glob("step_*"))[-1]
    size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file())
    shutil.rmtree(run)
    return saving / (saving + training), saving / saves, size


def _steps(records: list[dict], index: int) -> int:
    """Return the number of steps that a record's means cover."""
    return records[index]["step"] - (records[index - 1]["step"] if index else 0)


if __name__ == "__main__":
    sys.exit(run_command(main))
