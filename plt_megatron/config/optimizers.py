"""The optimizers that `optimizer.name` may name: what each keeps, reads, and is called elsewhere.

An entry here, its settings in `schema.OptimizerConfig`, and it is known to training, checkpoints, estimates, validation
and the model card. docs/extending.md adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plt_megatron.config.schema import OptimizerConfig

FP32 = 4
Settings = Callable[[OptimizerConfig], dict[str, Any]]


def _none(settings: OptimizerConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        title: for people.
        state: what is kept of each parameter, by its name in checkpoints: bytes an element.
        settings: the fields of `OptimizerConfig` that no other optimizer reads.
        megatron: megatron-core's settings of it, where it has it with its distributed optimizer: Adam alone.
        torch_class: otherwise, the class that takes Adam's place there, as in `torch.optim.SGD`. It must treat each
            element by itself, since a rank holds pieces that follow no row or column.
        arguments: of that class, beside the parameters, `lr` and `weight_decay`.
        counts_steps: whether it keeps count of its updates.
        deepspeed: DeepSpeed's dotted settings of it; None: not with `engine: deepspeed`.
    """

    title: str
    state: Mapping[str, int]
    settings: tuple[str, ...]
    megatron: Settings = _none
    torch_class: str | None = None
    arguments: Settings = _none
    counts_steps: bool = True
    deepspeed: Settings | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes that it keeps of one parameter, beside the main weights."""
        return sum(self.state.values())


def _megatron_adam(settings: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
    }


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
        title="AdamW",
        state={"exp_avg": FP32, "exp_avg_sq": FP32},
        settings=("adam_beta1", "adam_beta2", "adam_eps"),
        megatron=_megatron_adam,
        deepspeed=_deepspeed_adam,
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
    """The optimizer of a configuration."""
    return OPTIMIZERS[settings.name]


def settings_of_others(settings: OptimizerConfig) -> set[str]:
    """The fields that the chosen optimizer does not read."""
    return {field for spec in OPTIMIZERS.values() for field in spec.settings} - {*optimizer_spec(settings).settings}
