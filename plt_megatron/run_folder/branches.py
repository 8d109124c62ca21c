"""A decay branch of a run that lies in a folder: `--branch-from RUN@STEP`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from plt_megatron.config.branching import branch_settings, decay_steps
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.folder import RunFolder


def add_branch_options(parser: argparse._ActionsContainer) -> None:
    """--branch-from and --decay-steps, for `branch_config`."""
    parser.add_argument(
        "--branch-from",
        metavar="RUN@STEP",
        help="instead of CONFIG.yaml: a run of WSD that decays from this step's checkpoint, in a folder of its own",
    )
    parser.add_argument(
        "--decay-steps", type=int, metavar="N", help="with --branch-from: default, a tenth of the branch's whole length"
    )


def branch_config(source: str, settings: Sequence[str], decay: int | None = None) -> RunConfig:
    """The configuration of a decay branch of a run.

    Args:
        source: `RUN@STEP`, a run's folder and the step of one of its checkpoints.
        settings: `key=value`, over the run's own.
        decay: steps; None: a tenth of the branch's length.

    Raises:
        UserError: there is no such checkpoint, the run has no constant rate there, or a setting is none.
    """
    name, at, text = source.rpartition("@")
    if not at or not text.isdigit():
        raise UserError(f"--branch-from {source}: expected RUN@STEP, as in runs/trunk@2000")
    if settings and "=" not in settings[0]:
        raise UserError(f"--branch-from {source} takes its configuration from its run, not from {settings[0]}")
    if decay is not None and decay < 1:
        raise UserError(f"--decay-steps must be at least 1, got {decay}")
    folder, step = RunFolder(name), int(text)
    trunk = folder.config()
    checkpoint = folder.checkpoint_at(step)
    drawn = None
    with contextlib.suppress(OSError, ValueError):  # damaged: loading it will say so
        drawn = checkpoints.order_samples(checkpoints.read_verified_progress(checkpoint))
    own = branch_settings(trunk, str(checkpoint), step, decay or decay_steps(step), drawn)
    defaults = [f"name={trunk.name}_branch_{step}", f"output_dir={folder.path.parent}"]
    config = load_config(folder.config_file, [*defaults, *own, *settings], accept_old_names=True)
    if RunFolder.of(config).path.resolve() == folder.path.resolve():
        raise UserError(f"--branch-from {source}: the branch needs a name of its own: name=...")
    return config
