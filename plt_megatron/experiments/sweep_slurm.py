"""Hands a sweep's runs to a Slurm cluster as one job array, through launch/submit.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.config.loader import save_config
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, config_path

ROOT = Path(__file__).resolve().parents[2]
LIST = "array.txt"


def submit(plan: SweepPlan, runs: Sequence[PlannedRun], cluster: str, more: Sequence[str] = ()) -> None:
    """Submit `runs`; the list of their configurations stays in the sweep's folder. `more`: the command's other options.

    Raises `UserError` if the submit command refuses or fails; what it said stands above.
    """
    _submit_list([config_path(plan, run) for run in runs], plan.folder, plan.name, cluster, more)


def submit_dry(plan: SweepPlan, runs: Sequence[PlannedRun], cluster: str, more: Sequence[str] = ()) -> None:
    """Have the submit command check `runs` and show the job script; nothing is written or submitted.

    Raises `UserError` if it refuses.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-dry-run-") as folder:
        paths = [Path(folder) / f"{run.name}.yaml" for run in runs]
        for run, path in zip(runs, paths, strict=True):
            save_config(run.config, path)
        _submit_list(paths, Path(folder), plan.name, cluster, [*more, "--dry-run"])


def _submit_list(configs: Sequence[Path], folder: Path, name: str, cluster: str, more: Sequence[str]) -> None:
    listing = folder / LIST
    listing.write_text("".join(f"{path.resolve()}\n" for path in configs), encoding="utf-8")
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--array", str(listing), "--cluster", cluster]
    sys.stdout.flush()
    status = subprocess.run([*command, "--name", name, *more], check=False).returncode
    if status != 0:
        raise UserError(f"launch/submit.py ended with status {status}, see above: nothing more was submitted")
