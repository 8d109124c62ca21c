"""Choice of the engine that a configuration names."""

from __future__ import annotations

from plt_megatron.config.schema import RunConfig
from plt_megatron.train.engine import Engine


def build_engine(config: RunConfig, vocab_size: int) -> Engine:
    """Build the engine; DeepSpeed is imported only if configured."""
    if config.deepspeed is None:
        from plt_megatron.train.megatron_engine import MegatronEngine

        return MegatronEngine(config, vocab_size)
    from plt_megatron.train.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, vocab_size)
