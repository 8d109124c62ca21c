"""The optimizers of `optimizer.name`, and rules for their settings, rates and schedule.

An entry of `OPTIMIZERS` and its settings in `schema.OptimizerConfig` suffice for training, checkpoints, estimates,
validation and the model card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.rules import find_obstacle_problems
from plt_megatron.config.schema import OptimizerConfig, RunConfig

FP32 = 4
WHOLE_MATRICES = "whole_matrices"  # marks a parameter group of hidden matrices that are updated as a whole
Settings = Callable[[OptimizerConfig], dict[str, Any]]


def _none(settings: OptimizerConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class OptimizerSpec:
    """Registry entry of an optimizer.

    Attributes:
        title: name in messages.
        state: state of each parameter, in its shape: name in checkpoints -> bytes per element. Besides `step` it must
            be all: with a class that keeps more, such as NAdam, runs could not resume.
        settings: fields of `OptimizerConfig` that it reads but not every optimizer does.
        megatron: megatron-core's settings, if its distributed optimizer supports it: only Adam.
        matrix_state: state of hidden matrices (model/parameters.py), if a class of their own (train/muon.py) updates
            them as a whole: each is then on one data-parallel rank. Adam updates the other parameters.
        package: package of an extra (extras.py) that must be installed for it.
        torch_class: if megatron-core lacks it, the class that replaces Adam in the distributed optimizer, such as
            `torch.optim.SGD`. It must treat each element separately, since a rank holds pieces that are not aligned
            with rows or columns.
        arguments: keyword arguments of that class, besides the parameters, `lr` and `weight_decay`.
        counts_steps: whether it counts its updates.
        deepspeed: DeepSpeed's settings for it, by dotted keys; None: not supported with that engine.
    """

    title: str
    state: Mapping[str, int]
    settings: tuple[str, ...]
    megatron: Settings = _none
    matrix_state: Mapping[str, int] | None = None
    package: str | None = None
    torch_class: str | None = None
    arguments: Settings = _none
    counts_steps: bool = True
    deepspeed: Settings | None = None

    def state_of(self, *, hidden_matrix: bool) -> Mapping[str, int]:
        """Return a parameter's state besides the main weights: name in checkpoints -> bytes per element."""
        return self.matrix_state if hidden_matrix and self.matrix_state is not None else self.state


_ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_eps")


def _megatron_adam(settings: OptimizerConfig) -> dict[str, Any]:
    return {"optimizer": "adam", **{name: getattr(settings, name) for name in _ADAM_SETTINGS}}


_ADAM_STATE = {"exp_avg": FP32, "exp_avg_sq": FP32}


def _deepspeed_adam(settings: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer.type": "AdamW",
        "optimizer.params.lr": settings.lr,
        "optimizer.params.betas": [settings.adam_beta1, settings.adam_beta2],
        "optimizer.params.eps": settings.adam_eps,
        "optimizer.params.weight_decay": settings.weight_decay,
        "optimizer.params.torch_adam": True,  # the others are compiled when first used
    }


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adam": OptimizerSpec(
        title="AdamW", state=_ADAM_STATE, settings=_ADAM_SETTINGS, megatron=_megatron_adam, deepspeed=_deepspeed_adam
    ),
    "muon": OptimizerSpec(
        title="Muon (matrices of the layers) and AdamW (everything else)",
        state=_ADAM_STATE,
        matrix_state={"momentum_buffer": FP32},
        settings=(
            *_ADAM_SETTINGS,
            "muon_momentum",
            "muon_nesterov",
            "muon_num_ns_steps",
            "muon_coefficient_type",
            "muon_scale_mode",
            "muon_extra_scale_factor",
        ),
        megatron=_megatron_adam,
        package="emerging_optimizers",
    ),
    "sgd": OptimizerSpec(
        title="SGD with momentum",
        state={"momentum_buffer": FP32},
        settings=("sgd_momentum",),
        torch_class="torch.optim.SGD",
        arguments=lambda settings: {"momentum": settings.sgd_momentum},
        counts_steps=False,
    ),
}


def optimizer_spec(settings: OptimizerConfig) -> OptimizerSpec:
    """Return the registry entry of a configuration's optimizer."""
    return OPTIMIZERS[settings.name]


def settings_of_others(settings: OptimizerConfig) -> set[str]:
    """Return the fields that the chosen optimizer does not read."""
    return {field for spec in OPTIMIZERS.values() for field in spec.settings} - {*optimizer_spec(settings).settings}


MAX_SAMPLES = 2**40


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    yield from _find_state_problems(config)
    yield from _find_schedule_problems(config)


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
    steps = optimizer.muon_num_ns_steps
    if optimizer.name == "muon" and optimizer.muon_coefficient_type == "quintic" and steps > 5 and steps % 5:
        yield (
            f"optimizer.muon_num_ns_steps {steps}: quintic's five polynomials are used in turn, and a round that ends "
            "early shrinks updates; set a multiple of 5, or optimizer.muon_coefficient_type=polar_express"
        )
    if width is not None and config.model.loop_norm == "final" and config.model.loop_count > 1:
        yield (
            "model.mup_base_hidden_size: the final norm's weight carries muP's multiplier of the logits, but with "
            "model.loop_norm final loops read it; set model.loop_norm=rms"
        )
    if config.model.share_embeddings_and_output_weights:
        for name in ("lr_mult", "wd_mult"):
            if getattr(optimizer, name).head != 1:
                yield (
                    f"optimizer.{name}.head: the head is the embedding (model.share_embeddings_and_output_weights); "
                    f"set optimizer.{name}.embedding"
                )


def _find_schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    samples = derived.run_tokens(config) // config.data.sequence_length
    order = config.data.order_samples
    # Steps before a checkpoint may have been smaller: `resuming.check_schedule` knows what a run that continues reads.
    if order is not None and not (1 if derived.continues(config) else samples) <= order <= MAX_SAMPLES:
        yield f"data.order_samples {order:,} must be between the {samples:,} that the run reads and {MAX_SAMPLES:,}"
    if samples > MAX_SAMPLES:
        yield (
            f"training: {derived.train_iters(config):,} steps of training.global_batch_size "
            f"{config.training.global_batch_size} are {samples:,} samples, but an index holds at most {MAX_SAMPLES:,}"
        )
    if optimizer.lr < optimizer.min_lr:
        yield f"optimizer.lr {optimizer.lr:g} is below optimizer.min_lr {optimizer.min_lr:g}"
    if config.training.train_tokens is None or not derived.continues(config):  # it counts steps of its first batch size
        yield from find_decay_problems(config)


def find_decay_problems(config: RunConfig, step_tokens: int | None = None) -> Iterator[str]:
    """Yield why the learning rate cannot decay after its warm-up. `step_tokens`: see `derived.lr_iters`."""
    optimizer, is_wsd = config.optimizer, config.optimizer.lr_decay_style == "WSD"
    steps, warmup = derived.lr_decay_iters(config, step_tokens), optimizer.lr_warmup_iters
    decay = derived.lr_wsd_decay_iters(config, step_tokens) if is_wsd else 1
    if warmup + decay > steps:
        least = f"optimizer.lr_wsd_decay_iters {decay}" if is_wsd else "one"
        yield f"optimizer.lr_warmup_iters {warmup} must leave {least} of the schedule's {steps} steps to decay"
