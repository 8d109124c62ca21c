"""Rules for the optimizer, its rates and their schedule."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.rules import find_obstacle_problems
from plt_megatron.config.schema import RunConfig

MAX_SAMPLES = 2**40


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    yield from _find_state_problems(config)
    yield from _find_mup_problems(config)
    yield from _find_schedule_problems(config)


def _find_mup_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.mup_base_hidden_size is None:
        return
    if model.loop_norm == "final" and model.loop_count > 1:
        yield (
            "model.mup_base_hidden_size: the final norm's weight carries muP's multiplier of the logits, but with "
            "model.loop_norm final loops read it; set model.loop_norm=rms"
        )


def _find_state_problems(config: RunConfig) -> Iterator[str]:
    optimizer, width = config.optimizer, config.model.mup_base_hidden_size
    groups, tensor = derived.num_query_groups(config.model), config.parallel.tensor_model_parallel_size
    whole = optimizer_spec(optimizer).matrix_state is not None
    obstacles = {
        "with model.mup_base_hidden_size, which has rules for adam and muon;": (
            width is not None and optimizer.name == "sgd"
        ),
        "is not verified with training.ema_decay, since ranks hold whole matrices; leave that out and average "
        "checkpoints with plt average, or": whole and config.training.ema_decay is not None,
        f"with model.num_query_groups {groups} and parallel.tensor_model_parallel_size {tensor}: ranks would hold "
        f"pieces of a head's matrices; set parallel.tensor_model_parallel_size={groups}, or": whole and groups < tensor,
    }
    yield from find_obstacle_problems(f"optimizer.name {optimizer.name}", obstacles, " set optimizer.name=adam")
    if config.model.share_embeddings_and_output_weights:
        for name in ("lr_mult", "wd_mult"):
            if getattr(optimizer, name).head != 1:
                yield (
                    f"optimizer.{name}.head: the head is the embedding (model.share_embeddings_and_output_weights); "
                    f"set optimizer.{name}.embedding"
                )


def _find_schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    steps, warmup = derived.lr_decay_iters(config), optimizer.lr_warmup_iters
    samples = derived.run_tokens(config) // config.data.sequence_length
    order = config.data.order_samples
    if order is not None and not samples <= order <= MAX_SAMPLES:
        yield f"data.order_samples {order:,} must be between the {samples:,} that the run reads and {MAX_SAMPLES:,}"
    if samples > MAX_SAMPLES:
        yield (
            f"training: {derived.train_iters(config):,} steps of training.global_batch_size "
            f"{config.training.global_batch_size} are {samples:,} samples, but an index holds at most {MAX_SAMPLES:,}"
        )
    if optimizer.lr < optimizer.min_lr:
        yield f"optimizer.lr {optimizer.lr:g} is below optimizer.min_lr {optimizer.min_lr:g}"
    decay = derived.lr_wsd_decay_iters(config) if optimizer.lr_decay_style == "WSD" else 1
    if warmup + decay > steps:
        least = f"optimizer.lr_wsd_decay_iters {decay}" if optimizer.lr_decay_style == "WSD" else "one"
        yield f"optimizer.lr_warmup_iters {warmup} must leave {least} of the schedule's {steps} steps to decay"
