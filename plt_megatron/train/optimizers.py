"""A configuration's optimizer on megatron-core's distributed optimizer, and its learning-rate schedule."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamGroupOverride, ParamKey, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.rules.optimizer import WHOLE_MATRICES, OptimizerSpec, optimizer_spec
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import OptimizerConfig, RunConfig
from plt_megatron.model.parameters import Kind, Parameter, hidden_matrix, only_in_loops, parameters_of
from plt_megatron.model.transformer_config import DTYPES
from plt_megatron.predict.parameters import Weights


def build_optimizer(config: RunConfig, ddp: DistributedDataParallel) -> Any:
    """Build megatron-core's optimizer, which consists of one or several distributed optimizers."""
    optimizer = get_megatron_optimizer(
        megatron_settings(config), [ddp], group_overrides(config), use_gloo_process_groups=False
    )
    parts, spec = distributed_parts(optimizer), optimizer_spec(config.optimizer)
    for part in parts[:-1]:
        # Each would gather all weights, experts' and others', after its own step: leave that to the last one.
        part._defer_param_sync = True
    for part in parts:
        if spec.torch_class is not None:
            _exchange(part, spec, config.optimizer)
        if spec.matrix_state is not None:
            from plt_megatron.train.muon import give_matrices_to_muon  # needs an extra

            give_matrices_to_muon(part, ddp.module, config)
    check_groups(config, ddp.module, _groups_built(parts))
    return optimizer


def distributed_parts(optimizer: Any) -> list[DistributedOptimizer]:
    """Return the distributed optimizers that megatron-core's optimizer consists of, without stubs: if only experts are
    trained, the other parameters' optimizer has nothing but its name."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def _groups_built(parts: list[DistributedOptimizer]) -> Iterator[tuple[nn.Parameter, dict[str, Any] | None]]:
    """Yield (parameter of the model, the group in which this rank updates its part of it, or None)."""
    for part in parts:
        for parameter in (own for buffer in part.buffers for own in buffer.param_index_map):
            group, _ = part.model_param_group_index_map.get(parameter, (None, None))
            yield parameter, None if group is None else part.optimizer.param_groups[group]


@torch.no_grad()
def squared_grad_norm(optimizer: Any) -> Tensor:
    """Return the square of the whole model's gradient norm, float64 [1] on the device. Collective over all ranks.

    With Transformer Engine it is megatron-core's own; without it, megatron-core would read each parameter's norm on the
    host.
    """
    if clip_grads.multi_tensor_scale_tensor_impl is not None:
        return optimizer.get_grad_norm().double().square().reshape(1)
    parts = distributed_parts(optimizer)
    gradients = [gradient for part in parts for gradient in part.get_grads_for_grad_norm()]
    total = torch.zeros(1, device=torch.cuda.current_device())
    if gradients:
        total += torch.stack(torch._foreach_norm(gradients)).norm().square()
    dist.all_reduce(total, group=parts[0].get_grad_stats_parallel_group())
    return total.double()


def _exchange(part: DistributedOptimizer, spec: OptimizerSpec, settings: OptimizerConfig) -> None:
    """Replace Adam with another torch optimizer over the same pieces of parameters.

    megatron-core builds its distributed optimizer only around Adam, but uses nothing of it except its step.
    """
    module, _, name = (spec.torch_class or "").rpartition(".")
    build = getattr(import_module(module), name)
    # Built over a dummy: pieces of fp32 parameters are views, which torch's constructors reject.
    inner = build([torch.empty(0)], lr=settings.lr, **spec.arguments(settings))
    inner.param_groups = part.optimizer.param_groups
    for group in inner.param_groups:  # each group keeps its current rate
        group |= {key: value for key, value in inner.defaults.items() if key not in ("lr", "weight_decay")}
    part.optimizer = inner


def megatron_settings(config: RunConfig) -> MegatronOptimizerConfig:
    """Return megatron-core's optimizer settings."""
    optimizer, training = config.optimizer, config.training
    return MegatronOptimizerConfig(
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        bf16=training.precision == "bf16",
        params_dtype=DTYPES[training.precision],
        use_distributed_optimizer=True,
        **optimizer_spec(optimizer).megatron(optimizer),
    )


@dataclass(frozen=True)
class Group:
    """Parameters with the same rates."""

    name: str  # in messages
    parameters: tuple[Parameter, ...]
    rate: float  # factors: of the learning rate,
    decay: float  # of weight decay,
    eps: float  # and of Adam's epsilon

    def has(self, name: str) -> bool:
        """Return whether the parameter of this name is in the group."""
        return any(parameter.is_named(name) for parameter in self.parameters)

    def override(self, settings: OptimizerConfig) -> dict[str, float]:
        """Return the settings that megatron-core's parameter group overrides."""
        override: dict[str, float] = {}
        if self.rate != 1:
            override |= {"max_lr": self.rate * settings.lr, "min_lr": self.rate * settings.min_lr}
        if self.decay != 1:
            override["wd_mult"] = self.decay
        if self.eps != 1:
            override["eps"] = self.eps * settings.adam_eps
        return override


def groups(config: RunConfig) -> list[Group]:
    """Group a model's parameters by kind, matrices and vectors separately.

    With muP, also by whether its rules apply to them (arXiv 2203.03466, table 3; 2505.01618, table 1): parameters that
    sum over a width m times the base's get 1 / m of the rate and m times the decay, so that rate x decay stays the
    base's. Unlike in the latter, Adam's epsilon follows the width in matrices alone, and never the depth.
    megatron-core's `use_mup` has the same rates except for an untied head, and multiplies the logits in the forward
    pass; here the final norm's weight does that.
    """
    has_mup = config.model.mup_base_hidden_size is not None
    found = defaultdict(list)
    for parameter in parameters_of(config.model):
        found[parameter.kind, parameter.is_matrix, has_mup and parameter.follows_width].append(parameter)
    kinds = get_args(Kind)
    return [
        _group(config, *key, tuple(found[key])) for key in sorted(found, key=lambda key: (kinds.index(key[0]), key))
    ]


def _group(
    config: RunConfig, kind: Kind, is_matrix: bool, follows_width: bool, parameters: tuple[Parameter, ...]
) -> Group:
    settings = config.optimizer
    width = derived.mup_width_mult(config.model) if follows_width else 1.0
    if (
        kind == "hidden"
        and optimizer_spec(settings).matrix_state is not None
        and settings.muon_scale_mode != "spectral"
    ):
        width = 1.0  # these updates already have the sizes muP requires; spectral makes them as large as Adam's
    decay = getattr(settings.wd_mult, kind) if is_matrix or kind == "norms" else 0.0  # a gate's bias does not decay
    name = kind if is_matrix or kind == "norms" else f"{kind} (vectors)"
    return Group(
        name if is_matrix or not follows_width else "final norm",
        parameters,
        rate=getattr(settings.lr_mult, kind) / width,
        decay=decay * width,
        eps=1 / width if is_matrix else 1.0,
    )


def check_groups(
    config: RunConfig, stage: nn.Module, built: Iterable[tuple[nn.Parameter, dict[str, Any] | None]]
) -> None:
    """Assert that each trained parameter of a stage is in exactly one group of the optimizer, with its kind's rates.
    `built`: (parameter, its group, or None if another rank updates it)."""
    settings, own, of = config.optimizer, groups(config), list(built)
    trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert Counter(id(parameter) for parameter, _ in of) == Counter(map(id, trained.values()))
    group_of = {id(parameter): group for parameter, group in of}
    for name, parameter in trained.items():
        kinds = [group for group in own if group.has(name)]
        assert len(kinds) == 1, f"{name} is in the groups {[group.name for group in kinds]}"
        group = group_of[id(parameter)]
        if group is not None:
            expected = {"max_lr": settings.lr, "min_lr": settings.min_lr, "wd_mult": 1.0, **kinds[0].override(settings)}
            wrong = {key: group.get(key) for key, value in expected.items() if group.get(key) != value}
            assert not wrong, f"{name} of {kinds[0].name} has {wrong} instead of {expected}"


def described(config: RunConfig) -> str:
    """Describe the optimizer and each kind's peak learning rate and weight decay, in one line."""
    settings, trained = config.optimizer, Weights.trained(config)
    parts = [
        f"{group.name} {group.rate * settings.lr:.3g}, {group.decay * settings.weight_decay:.3g}"
        for group in groups(config)
        if any(map(trained.layers, group.parameters))
    ]
    return f"{optimizer_spec(settings).title}; learning rate, weight decay: {'; '.join(parts)}"


def group_overrides(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return what megatron-core's parameter groups override: the rates of `groups`.

    Parameters that only later loops use get groups of their own, with the same settings: they may have had fewer
    updates, and DeepSpeed and Transformer Engine step a group as a whole. So do hidden matrices, if they are updated as
    whole matrices.
    """
    settings = config.optimizer
    overrides: dict[ParamKey, Any] = {}
    for group in groups(config):
        if override := group.override(settings):
            overrides[_key(group.name, group.has)] = override
    overrides[_key("later loops", only_in_loops)] = {
        "start_wd": settings.weight_decay,
        "end_wd": settings.weight_decay,
    }
    if optimizer_spec(settings).matrix_state is not None:
        overrides[_key("hidden matrices", lambda name: hidden_matrix(name) is not None)] = {WHOLE_MATRICES: True}
    return overrides


def _key(name: str, has: Callable[[str], bool]) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name, lambda tensor, own_name: has(own_name)))


class LearningRate(OptimizerParamScheduler):
    """Learning-rate schedule over an optimizer's parameter groups, starting at step 0.

    It counts steps. If the run's length is given in tokens, these are steps of the `training.global_batch_size` that
    the run began with (`step_tokens`), whatever the batch size is now, so that a rate belongs to a number of tokens.
    """

    def __init__(self, config: RunConfig, optimizer: Any, step_tokens: int | None = None) -> None:
        self.step_tokens = step_tokens or derived.tokens_per_step(config)
        self._in_tokens = config.training.train_tokens is not None
        self._batches, self._run_step, self._run_tokens = BatchSchedule(config), 0, 0
        settings = config.optimizer
        wsd, steps = settings.lr_decay_style == "WSD", derived.lr_decay_iters(config, self.step_tokens)
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=min(settings.lr_warmup_iters, steps - 1),  # fewer until a checkpoint says what it counts
            lr_decay_steps=steps,
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=derived.lr_iters(config, self.step_tokens),
            wd_incr_style="constant",
            wsd_decay_steps=derived.lr_wsd_decay_iters(config, self.step_tokens) if wsd else None,
            lr_wsd_decay_style=settings.lr_wsd_decay_style if wsd else None,
        )

    @property
    def lr(self) -> float:
        """The learning rate at this step, without any kind's factor."""
        return float(self.get_lr({}))

    def count_step(self) -> None:
        """Advance the schedule by one step of the run."""
        self.go_to(self._run_step + 1, self._run_tokens + self._batches.step_tokens(self._run_tokens))

    def go_to(self, step: int, tokens: int) -> None:
        """Move the schedule to the run's given number of steps and tokens."""
        self._run_step, self._run_tokens = step, tokens
        self.num_steps = tokens / self.step_tokens if self._in_tokens else step
        self.step(0)
