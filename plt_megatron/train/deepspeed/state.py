"""The state of a DeepSpeed engine, in the format of the megatron engine's checkpoints.

ZeRO cuts a parameter's fp32 copy and its moments into flat pieces, regardless of rows and columns. Saving reassembles
each parameter and keeps it on one data-parallel rank; loading cuts it again. Both handle a few parameters at a time, so
that no rank holds the whole state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from plt_megatron.config.rules.deepspeed import zero_of
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.model.build import initial_value
from plt_megatron.model.parameters import find, only_in_loops
from plt_megatron.train.checkpoint import state
from plt_megatron.train.checkpoint.state import Reader

_ROUNDING = 0.005  # of the largest element: what rounding may move a copy between two saves
_MAIN = "param"  # the fp32 copy's name in checkpoints
_ELEMENTS_AT_ONCE = 100_000_000  # read in one go: 1.2 GB in fp32 with both moments


@dataclass
class _Entry:
    """One parameter, and where this tensor-parallel rank's part of it lies in the whole model."""

    parameter: nn.Parameter
    sharded: ShardedTensor | ShardedTensorFactory  # without data
    shape: torch.Size
    dtype: torch.dtype

    def with_data(self, data: Tensor) -> ShardedTensor | ShardedTensorFactory:
        return replace(self.sharded, data=data)

    def optimizer_tensor(self, key: str, data: Tensor) -> ShardedTensor | ShardedTensorFactory:
        """Return the sharded tensor of the optimizer's state `key`."""
        return make_sharded_optimizer_tensor(self.sharded, data, f"{state.OPTIMIZER_PREFIX}{key}")


class DeepSpeedState:
    """The `EngineState` of `DeepSpeedEngine`.

    Attributes:
        later_step: updates of the parameters that only later loops use.
    """

    def __init__(self, engine: Any) -> None:
        """`engine`: a `DeepSpeedEngine` under construction, while its stage's parameters are still whole."""
        self._engine = engine
        self._keys = tuple(optimizer_spec(engine.config.optimizer).state)
        self.later_step = 0
        names = {parameter: name for name, parameter in engine.stage.named_parameters()}
        self._entries: dict[str, _Entry] = {}
        for tensor, sharded in state.by_tensor(state.model_state(engine.stage)).items():
            if isinstance(tensor, nn.Parameter):
                without = replace(sharded, data=torch.empty_like(tensor, device="meta"))
                self._entries[names[tensor]] = _Entry(tensor, without, tensor.shape, tensor.dtype)
        assert self._entries.keys() == set(names.values()), "a parameter is not in the sharded state dict"

    # Saving.

    def to_save(self) -> dict[str, Any]:
        """Each data-parallel rank gets its share of the parameters, each whole, in CPU memory."""
        self._optimizer.allocate()
        self._share_replicas()
        model: dict[str, Any] = {}
        optimizer: dict[int, Any] = {}
        for number, (name, owner) in enumerate(self._owners()):
            entry = self._entries[name]
            whole = {key: self._optimizer.gather(entry.parameter, key) for key in (_MAIN, *self._keys)}
            if owner != self._engine.groups.dp.rank():
                continue
            replica_id = (*entry.sharded.replica_id[:-1], 0)  # no other data-parallel rank has a copy
            own = replace(entry, sharded=replace(entry.sharded, replica_id=replica_id))
            tensors = {key: tensor.cpu().view(entry.shape) for key, tensor in whole.items()}
            # DeepSpeed's weights are the rounded fp32 copy.
            model[name] = own.with_data(tensors[_MAIN].to(entry.dtype))
            optimizer[number] = {key: own.optimizer_tensor(key, tensor) for key, tensor in tensors.items()}
        steps = {"optimizer_step": self._optimizer.step, "optimizer_later_step": self.later_step}
        return {"model": model, "optimizer": {0: optimizer}, **steps}

    @torch.no_grad()
    def _share_replicas(self) -> None:
        """Give all tensor-parallel ranks the first one's copies of what each holds whole. They drift between saves:
        each has its own data-parallel group, and NCCL promises no order of summation that is the same in all. Copies
        that differ by more than rounding stay, and the save is refused."""
        group = self._engine.groups.tp
        if group.size() == 1:
            return
        for name, entry in self._entries.items():
            if not find(self._engine.config.model, name).is_replicated:
                continue
            for key in (_MAIN, *self._keys):
                own = self._optimizer.gather(entry.parameter, key).to(torch.cuda.current_device())
                first = own.clone()
                dist.broadcast(first, group=group, group_src=0)
                if key != _MAIN or (own - first).abs().max() <= _ROUNDING * first.abs().max():
                    self._optimizer.scatter(entry.parameter, key, first.view(entry.shape))
        self._optimizer.update_weights()

    def live_tensors(self) -> Iterator[Tensor]:
        """The tensors of `to_save` are gathered copies."""
        yield from (*self._engine.stage.parameters(), *self._engine.stage.buffers())

    def _owners(self) -> Iterator[tuple[str, int]]:
        """Yield (name, data-parallel rank that saves it): equal shares, the same on all ranks."""
        load = [0] * self._engine.groups.dp.size()
        for name, entry in self._entries.items():
            owner = load.index(min(load))
            load[owner] += entry.shape.numel()
            yield name, owner

    # Loading.

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        model = {name: entry.sharded for name, entry in self._entries.items()}
        if not optimizer:
            return {"model": model}
        parameters = {
            number: {key: entry.optimizer_tensor(key, _empty(entry, device="meta")) for key in (_MAIN, *self._keys)}
            for number, entry in enumerate(self._entries.values())
        }
        return {"model": model, "optimizer": {0: parameters}}

    @torch.no_grad()
    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """The returned dictionary has no weights and no optimizer state."""
        common = read({key: value for key, value in request.items() if key not in ("model", "optimizer")})
        self._optimizer.allocate()
        numbers = {name: number for number, name in enumerate(self._entries)}
        for names in self._portions():
            wanted: dict[str, Any] = {}
            for name in names:
                entry = self._entries[name]
                if numbers[name] in request.get("optimizer", {0: {}})[0]:
                    wanted[name] = {key: entry.optimizer_tensor(key, _empty(entry)) for key in (_MAIN, *self._keys)}
                elif name in request["model"]:
                    wanted[name] = {_MAIN: entry.with_data(_empty(entry, entry.dtype))}
            loaded = read(wanted)
            for name in names:
                self._put(name, loaded.get(name, {}))
        self._optimizer.update_weights()
        return common

    def _put(self, name: str, loaded: dict[str, Tensor]) -> None:
        entry = self._entries[name]
        if loaded:
            main = loaded[_MAIN]
        else:
            assert only_in_loops(name), f"{name} is neither loaded nor a gate"
            main = initial_value(self._engine.stage, name, self._engine.config.training.seed)
        self._optimizer.scatter(entry.parameter, _MAIN, main.float())
        for key in self._keys:
            moment = loaded.get(key)
            self._optimizer.scatter(entry.parameter, key, torch.zeros(entry.shape) if moment is None else moment)

    def _portions(self) -> Iterator[list[str]]:
        """Yield names of parameters, few enough at a time that every rank can read them whole."""
        names: list[str] = []
        elements = 0
        for name, entry in self._entries.items():
            if names and elements + entry.shape.numel() > _ELEMENTS_AT_ONCE:
                yield names
                names, elements = [], 0
            names.append(name)
            elements += entry.shape.numel()
        yield names

    def set_step(self, step: int, later_step: int) -> None:
        self.later_step = later_step
        self._optimizer.set_step(step, later_step, self.later_groups)

    def allocate(self) -> None:
        """Allocate zero state for a new optimizer."""
        self._optimizer.allocate()

    @property
    def later_groups(self) -> set[int]:
        """Numbers of the optimizer's groups whose parameters are all used by later loops only."""
        groups = self._optimizer.groups
        later = {id(parameter) for parameter in state.later_parameters(self._engine.stage)}
        return {number for number, group in enumerate(groups) if {id(parameter) for parameter in group} <= later}

    @property
    def _optimizer(self) -> _ZeroPieces:
        pieces = _Zero3Pieces if zero_of(self._engine.config).zero_stage == 3 else _Zero12Pieces
        return pieces(self._engine.optimizer, self._keys)


def _empty(entry: _Entry, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.empty(entry.shape, dtype=dtype, device=device)


# ZeRO's pieces.


class _ZeroPieces:
    """ZeRO's flat fp32 pieces of the parameters, the optimizer's state of them (`keys`), and its step."""

    GROUPS, FLAT = "", ""  # DeepSpeed's names for the groups of parameters, and for this rank's flat pieces of them

    def __init__(self, optimizer: Any, keys: tuple[str, ...]) -> None:
        self.optimizer, self.keys = optimizer, keys
        self.groups: list[list[nn.Parameter]] = getattr(optimizer, self.GROUPS)
        self.flat: list[Tensor] = getattr(optimizer, self.FLAT)
        self.inner = optimizer.optimizer  # torch's AdamW

    def allocate(self) -> None:
        """Allocate zero moments for an optimizer that has not made a step yet."""
        for piece in self.flat:
            if not self.inner.state[piece]:
                moments = {key: torch.zeros_like(piece) for key in self.keys}
                self.inner.state[piece] = {"step": torch.tensor(0.0), **moments}

    @property
    def step(self) -> int:
        """Updates made so far: some groups may have had fewer."""
        return max(int(self.inner.state[piece]["step"]) for piece in self.flat)

    def set_step(self, step: int, later_step: int, later_groups: set[int]) -> None:
        """Set the number of updates to `step`, or to `later_step` for `later_groups`."""
        for number, piece in enumerate(self.flat):
            self.inner.state[piece]["step"] = torch.tensor(float(later_step if number in later_groups else step))

    def gather(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return a parameter's whole fp32 copy or moment on every data-parallel rank. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key == _MAIN else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None
        return whole.detach()

    def scatter(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Keep this rank's piece of a parameter's fp32 copy or moment."""
        raise NotImplementedError

    def update_weights(self) -> None:
        """Update the weights from the fp32 copies. Collective."""
        raise NotImplementedError


class _Zero12Pieces(_ZeroPieces):
    """Stages 1 and 2: one flat piece per parameter group."""

    GROUPS, FLAT = "bit16_groups", "single_partition_of_fp32_groups"

    def allocate(self) -> None:
        super().allocate()
        # DeepSpeed links them after the first group's first step, when the other groups have no moments yet.
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def scatter(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == _MAIN:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)

    def update_weights(self) -> None:
        self.optimizer.update_lp_params()


class _Zero3Pieces(_ZeroPieces):
    """Stage 3: parameters are cut one by one, the last rank's piece padded."""

    GROUPS, FLAT = "fp16_groups", "fp32_partitioned_groups_flat"

    def scatter(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        first = size * self.optimizer._get_param_partition_rank(parameter)
        own = whole.flatten()[first : first + size]
        piece = torch.zeros(size)
        piece[: own.numel()] = own
        if key == _MAIN:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, key)

    def update_weights(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(self.groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones stay whole on every rank
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
