"""Submits a sweep's runs to a Slurm cluster as one job array."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, config_path
from plt_megatron.installation import ROOT
from plt_megatron.run_folder.folder import save_config
from plt_megatron.slurm import submission

LIST = "array.txt"


def submit(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Submit `runs`; the list of their configurations stays in the sweep's folder.

    Raises `UserError` if the submission is refused or fails.
    """
    _submit_list([config_path(plan, run) for run in runs], plan.folder, plan.name, options)


def submit_dry(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Check `runs` as a submission does and show the job script; nothing is written or submitted.

    Raises `UserError` if the submission is refused.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-dry-run-") as folder:
        paths = [Path(folder) / f"{run.name}.yaml" for run in runs]
        for run, path in zip(runs, paths, strict=True):
            save_config(run.config, path)
        _submit_list(paths, Path(folder), plan.name, dataclasses.replace(options, dry_run=True))


def _submit_list(configs: Sequence[Path], folder: Path, name: str, options: submission.Options) -> None:
    listing = folder / LIST
    listing.write_text("".join(f"{path.resolve()}\n" for path in configs), encoding="utf-8")
    submission.submit(dataclasses.replace(options, config=None, array=str(listing), name=name), ROOT)
