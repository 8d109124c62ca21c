"""Building the sample index of a run ahead of time, in one process, so that the ranks find it ready."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import validate


def build_index(config_path: str, overrides: Sequence[str] = ()) -> None:
    """Print the data mix of a run configuration and build its sample index. Raises `UserError`."""
    config = load_config(config_path, overrides)
    validate(config)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)

    from plt_megatron.data.datasets import build_datasets, index_folder, required_samples
    from plt_megatron.data.mix import describe_mix, mix_shares
    from plt_megatron.data.tokenizer import load_tokenizer

    samples = required_samples(config)
    shares = mix_shares(config.data, samples)
    print("\n".join(describe_mix(config.data, 0, shares)))
    build_datasets(
        config.data,
        num_samples=samples,
        seed=config.training.seed,
        cache_dir=index_folder(config),
        tokenizer=load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None,
    )
    print(f"the sample index of {samples[0]:,} train and {samples[1]:,} validation samples is ready")
