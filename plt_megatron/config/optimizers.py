"""Registry of the optimizers of `optimizer.name`: their state, settings, and names in other libraries.

An entry here and its settings in `schema.OptimizerConfig` suffice for training, checkpoints, estimates, validation and
the model card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plt_megatron.config.schema import OptimizerConfig

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
        state: state of each parameter, name in checkpoints -> bytes per element.
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


def _megatron_adam(settings: OptimizerConfig) -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
    }


_ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_eps")
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
        title="AdamW",
        state=_ADAM_STATE,
        settings=_ADAM_SETTINGS,
        megatron=_megatron_adam,
        deepspeed=_deepspeed_adam,
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
