"""Build a run's sample index ahead of time in a single process, so that the ranks find it ready."""

from __future__ import annotations

import os
from collections.abc import Sequence

from plt_megatron.config.loader import load_config
from plt_megatron.config.schedules import all_sources
from plt_megatron.config.validation import validate
from plt_megatron.data.mix import describe_mix, mix_shares, required_samples
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError


def build_index(config_path: str, overrides: Sequence[str] = ()) -> None:
    """Print the data mix of a run configuration and build its sample index. Raises `UserError`."""
    config = load_config(config_path, overrides)
    validate(config)
    samples = required_samples(config)
    print(describe_mix(config.data, mix_shares(config.data, samples)), flush=True)
    from plt_megatron.data.datasets import build_datasets

    build_datasets(config, samples, load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None)
    print(f"the sample index of {samples[0]:,} train and {samples[1]:,} validation samples is ready")


def check_reads(config_path: str, overrides: Sequence[str], prefix: str) -> None:
    """Raise `UserError` if no run of the configuration reads the source `prefix`. Sources need not exist yet."""
    config = load_config(config_path, overrides)
    validate(config, check_files=False)
    if os.path.abspath(prefix) not in (os.path.abspath(source.path) for _, source in all_sources(config.data)):
        raise UserError(f"--build-index {config_path}: none of its data sources is {prefix}")
