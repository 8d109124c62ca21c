"""What a job would refuse about the checkpoint it begins with, told before it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from plt_megatron.config.rules.uploads import is_url
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.resuming import check_data, training_fingerprint
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import UserError
from plt_megatron.run_folder import resuming
from plt_megatron.run_folder.checkpoints import PROGRESS, parse_progress
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.storage.copies import find_checkpoint


def start_problems(config: RunConfig, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[str]:
    """Why a run's own checkpoint, or that of `checkpoint.load`, does not go on with a sound configuration whose data is
    there; none if there is no checkpoint yet.

    Args:
        vocab_size: the run's, without padding; None: unknown.
    """
    start = resuming.find_start(config) or _start_elsewhere(config)
    if start is None:
        return []
    settings = config.checkpoint
    if start.progress.get("weights_only") and not settings.weights_only:
        return [f"checkpoint {start.path} has only weights, no optimizer state; set checkpoint.weights_only=true"]
    problems = _problem(lambda: resuming.check_model(start.path, start.progress, config, vocab_size))
    if start.is_own or not settings.weights_only:
        allow_other = settings.allow_other_schedule
        problems += _problem(
            lambda: resuming.check_schedule(start.path, start.progress, config, allow_other=allow_other)
        )
        problems += _problem(
            lambda: check_data(start.path, start.progress, training_fingerprint(config, tokenizer), config)
        )
    # A path has one slash where a URL has two.
    url = settings.load if not start.is_own and settings.load and is_url(settings.load) else None
    return [line.replace(str(Path(url)), url) for line in problems] if url else problems


def _start_elsewhere(config: RunConfig) -> resuming.Start | None:
    """The checkpoint that the job will download."""
    load = config.checkpoint.load
    if load is None or not is_url(load) or RunFolder.of(config).latest_checkpoint(verify=False) is not None:
        return None
    try:
        place = find_checkpoint(load)
    except UserError:  # which the forecast reports
        return None
    text = place.read_text(PROGRESS)
    return None if text is None else resuming.Start(Path(place.url), parse_progress(text, place.url), is_own=False)


def _problem(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except UserError as error:
        return str(error).splitlines()
    return []
