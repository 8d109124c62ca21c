"""Check that a run resumes with the data that its checkpoint was trained on."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.mix import fingerprint, fingerprint_differences, required_samples
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import UserError
from plt_megatron.run_folder.checkpoints import candidates, order_samples, read_verified_progress


def training_fingerprint(config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fingerprint of the run's training samples, before its index is built."""
    seed, samples = config.training.seed, training_samples(config)
    return fingerprint(config.data, tokenizer, seed=seed, num_samples=samples)


def check_data(source: Path, progress: dict[str, Any], own: dict[str, Any], config: RunConfig) -> None:
    """Raise `UserError` if a checkpoint was trained on data with a fingerprint other than `own`, unless allowed."""
    saved, own = progress.get("data_fingerprint") or {}, json.loads(json.dumps(own))
    if config.checkpoint.allow_other_data or saved == own:
        return
    raise UserError(
        f"{source}: step {progress['step']} was trained on other data ({', '.join(fingerprint_differences(saved, own))}"
        "); restore it, or continue with this data: checkpoint.allow_other_data=true"
    )


def training_samples(config: RunConfig) -> int:
    """Return the number of samples that the run's order is drawn from. A run whose length is given in tokens keeps its
    initial number, since another batch size would change it slightly, and with it the order."""
    own = required_samples(config)[0]
    if config.training.train_tokens is None or config.data.order_samples is not None:
        return own
    return _recorded_samples(config) or own


def _recorded_samples(config: RunConfig) -> int | None:
    """Return `order_samples` of the checkpoint that the run resumes from, if the run's length was the same."""
    settings = config.checkpoint
    places = [derived.run_folder(config)] if settings.enabled else []
    places += [Path(settings.load)] if settings.load is not None and not settings.weights_only else []
    for checkpoint in itertools.chain.from_iterable(map(candidates, places)):
        with contextlib.suppress(OSError, ValueError):  # damaged: loading will skip it too, and log it
            progress = read_verified_progress(checkpoint)
            if progress["config"]["training"]["train_tokens"] != config.training.train_tokens:
                return None
            return order_samples(progress)
    return None
