"""The state of the megatron engine: a model on megatron-core's distributed optimizers.

This module allocates an optimizer's state, cuts it into sharded tensors for checkpoints, and restores it. Keys and
shapes are those of the whole model, so that any layout can load what any other has saved, as with megatron-core's
`fully_reshardable`, but without its gathering. A data-parallel rank owns a flat range of each buffer. Within a matrix
the range is at most three boxes: the end of a row, whole rows, the start of a row. Each box is a sharded tensor that
shares the optimizer's memory, so that saving copies only what a rank writes and loading reads in place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from plt_megatron.config.rules.optimizer import WHOLE_MATRICES, optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.model.build import global_names, initial_value
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import only_in_loops
from plt_megatron.train.checkpoint import state
from plt_megatron.train.checkpoint.state import Reader

_STACKED = re.compile(r"(.*\.decoder\.layers\.)(\D.*)")


class OptimizerPart:
    """One of the distributed optimizers that an engine's optimizer consists of.

    `matrices`: parameters that are updated as whole matrices, with state of their own and no step count.
    """

    def __init__(self, config: RunConfig, optimizer: DistributedOptimizer, matrices: Collection[Tensor]) -> None:
        self.optimizer = optimizer
        self.inner: Any = optimizer.optimizer  # torch's, or an object with its attributes
        self._spec, self._matrices = optimizer_spec(config.optimizer), {*matrices}
        # By the layer's name, not stacked over all layers: some are not trained.
        self._by_layer = bool(config.training.trainable)
        # Transformer Engine's optimizers count steps per parameter group.
        self._torchs = type(getattr(self.inner, "adam", self.inner)).__module__.startswith("torch.")

    # Steps.

    def set_step(self, step: int, later: Collection[Tensor] = (), later_step: int = 0) -> None:
        """Set the number of updates to `step`, or to `later_step` for the model parameters `later`.

        If steps are counted per group, `later_step` is for groups that have no other parameters.
        """
        if not self._spec.counts_steps:
            return
        own = {id(main) for main in self.main_parameters(later)}
        for group in self.inner.param_groups:
            if WHOLE_MATRICES in group:
                continue
            if not self._torchs:
                group["step"] = later_step if {id(main) for main in group["params"]} <= own else step
                continue
            for main in group["params"]:
                # One tensor each: megatron-core's own loading lets all parameters share one, which then advances once
                # per parameter in every step.
                self.inner.state[main]["step"] = torch.tensor(float(later_step if id(main) in own else step))

    def allocate(self) -> None:
        """Allocate zero state for an optimizer that has not made a step yet.

        megatron-core itself would make a step with zero gradients for torch's AdamW, which decays the weights.
        """
        if self.inner.state:
            return
        for _, parameter, _ in self._owned():
            main = self.main_parameter(parameter)
            self.inner.state[main] = {key: torch.zeros_like(main) for key in self._keys(parameter)}
        self.set_step(0)

    # Main parameters and their state.

    def sharded(self, model: dict[str, Any]) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
        """Return this data-parallel rank's part of the main parameters and their state, as sharded tensors that share
        its memory: by the parameter's index in its buffers, the state's name (`param`, `exp_avg`, ...) and the box.

        Parameter groups are not included: they follow from the configuration.
        """
        self.allocate()
        if self._spec.torch_class is not None:
            self._check_state()
        wholes, prefix = state.by_tensor(model), state.OPTIMIZER_PREFIX
        return {
            index: {
                name: self._boxes(wholes[parameter], parameter, part.start, f"{prefix}{name}.", flat)
                for name, flat in self._tensors(parameter).items()
            }
            for index, parameter, part in self._owned()
        }

    def _check_state(self) -> None:
        """Raise `UserError` if torch's class keeps state that checkpoints lack, with which no run could resume."""
        for _, parameter, _ in self._owned():
            kept = self.inner.state[self.main_parameter(parameter)].keys()
            if others := sorted(kept - {*self._keys(parameter), "step"}):
                raise UserError(
                    f"{self._spec.torch_class} keeps {', '.join(others)}, which its OptimizerSpec.state lacks"
                )

    def sharded_beside(
        self, model: dict[str, Any], pieces: Mapping[int, Tensor], prefix: str
    ) -> dict[int, dict[int, ShardedTensor]]:
        """Return other tensors kept of the main parameters, in the shapes of the method `pieces`, as sharded tensors
        that share their memory: by the parameter's index in its buffers and the box. Its key follows `prefix`."""
        wholes = state.by_tensor(model)
        return {
            index: self._boxes(wholes[parameter], parameter, part.start, prefix, pieces[index])
            for index, parameter, part in self._owned()
        }

    def _boxes(
        self, whole: ShardedTensor | ShardedTensorFactory, parameter: Tensor, start: int, prefix: str, flat: Tensor
    ) -> dict[int, ShardedTensor]:
        """Return `flat`, the part of a parameter's state that begins at element `start`, as numbered boxes of the whole
        model's tensor. `whole` is the parameter's sharded tensor; its key follows `prefix` in the state's."""
        found: list[ShardedTensor] = []
        for tensor in state.sharded_tensors({"": whole}):
            # The parameter, or the gate's or the up projection's half of it.
            first = tensor.data.storage_offset() - parameter.storage_offset()
            assert tensor.data.is_contiguous() and 0 <= first <= parameter.numel() - tensor.data.numel()
            shift = start - first
            low, high = max(shift, 0), min(shift + flat.numel(), tensor.data.numel())
            ones = (1,) * tensor.prepend_axis_num
            for offset, shape in boxes(tensor.local_shape, low, high):
                elements = math.prod(shape)
                box = replace(
                    tensor,
                    key=f"{prefix}{tensor.key}",
                    data=flat[low - shift : low - shift + elements].view(ones + shape),
                    dtype=flat.dtype,
                    local_shape=ones + shape,
                    global_offset=tuple(map(sum, zip(tensor.global_offset, (0,) * len(ones) + offset, strict=True))),
                    axis_fragmentations=None,  # not a regular grid
                    prepend_axis_num=0,
                    replica_id=(*tensor.replica_id[:-1], 0),  # no other data-parallel rank has it
                )
                found.append(_of_its_layer(box) if self._by_layer else box)
                low += elements
        return dict(enumerate(found))

    def pieces(self) -> dict[int, Tensor]:
        """Return this rank's parts of the main parameters, flat, in fp32, by the parameter's index in its buffers."""
        return {index: self.main_parameter(parameter) for index, parameter, _ in self._owned()}

    def model_pieces(self) -> dict[int, Tensor]:
        """Return the same parts of the model's parameters, as views in the model's precision."""
        return {index: parameter.detach().view(-1)[part.start : part.end] for index, parameter, part in self._owned()}

    def _owned(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Yield (index in its buffers, parameter, range) of the parameters that this rank owns a part of."""
        for index, (parameter, part) in enumerate(self.parameter_parts()):
            if part is not None:
                yield index, parameter, part

    @torch.no_grad()
    def reset_others(self, loaded: dict[int, Any]) -> None:
        """Reset what was not loaded (`loaded` is by the parameter's index) to the model's values and zero state."""
        self.allocate()
        for index, parameter, part in self._owned():
            if index in loaded:
                continue
            main, *kept = self._tensors(parameter).values()
            main.copy_(parameter.reshape(-1)[part.start : part.end])
            for tensor in kept:
                tensor.zero_()

    def tensors(self) -> Iterator[Tensor]:
        """Yield this rank's parts of all main parameters and of their state."""
        for _, parameter, _ in self._owned():
            yield from self._tensors(parameter).values()

    def _tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return this rank's part of a main parameter and of its state, flat."""
        main = self.main_parameter(parameter)
        return {"param": main, **{key: self.inner.state[main][key] for key in self._keys(parameter)}}

    def _keys(self, parameter: Tensor) -> Collection[str]:
        """Return the names of a model parameter's state."""
        return self._spec.state_of(hidden_matrix=parameter in self._matrices)

    def main_parameter(self, parameter: Tensor) -> Tensor:
        """Return this rank's part of a model parameter, flat, in fp32."""
        group, order = self.optimizer.model_param_group_index_map[parameter]
        return self.inner.param_groups[group]["params"][order]

    def main_parameters(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return `main_parameter` of those model parameters of which this rank's optimizer has a part."""
        own = self.optimizer.model_param_group_index_map
        return [self.main_parameter(parameter) for parameter in parameters if parameter in own]

    def parameter_parts(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield (parameter, the range of it that this rank owns, or None), in the order of `sharded`."""
        for buffer, ranges in zip(self.optimizer.buffers, self.optimizer.gbuf_ranges, strict=True):
            owned = {
                parameter: parts["param"]
                for buckets in ranges.values()
                for bucket in buckets
                for parameter, parts in bucket["param_map"].items()
            }
            for parameter in buffer.param_index_map:
                yield parameter, owned.get(parameter)


def _of_its_layer(box: ShardedTensor) -> ShardedTensor:
    """Convert a box of a tensor stacked over all layers to a box of its layer's own tensor."""
    stacked = _STACKED.fullmatch(box.key)
    if stacked is None:
        return box
    layer, shape = box.global_offset[0], box.local_shape[1:]
    return replace(
        box,
        key=f"{stacked[1]}{layer}.{stacked[2]}",
        data=box.data.view(shape),
        local_shape=shape,
        global_shape=box.global_shape[1:],
        global_offset=box.global_offset[1:],
    )


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, shape) of the boxes that make up elements `start` .. `stop` of a row-major tensor, in order."""
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        rows = 0 if inside else (stop - start) // row
        if rows:
            yield (index, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * row
        else:
            end = min(stop, (index + 1) * row)
            for offset, size in boxes(shape[1:], inside, end - index * row):
                yield (index, *offset), (1, *size)
            start = end


class MegatronState:
    """The `EngineState` of `MegatronEngine`.

    Attributes:
        parts: the optimizers' states.
        step: updates made: fewer than the run's steps if some were skipped. The optimizer of a rank without trained
            parameters does not count them.
        later_step: updates of the parameters that only later loops use.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: LoopedGPT,
        optimizers: Sequence[DistributedOptimizer],
        matrices: Collection[Tensor],
    ) -> None:
        self._stage, self._seed = stage, config.training.seed
        self.parts = [OptimizerPart(config, optimizer, matrices) for optimizer in optimizers]
        self.step = self.later_step = 0

    def to_save(self) -> dict[str, Any]:
        model = state.model_state(self._stage)
        return {
            "model": model,
            "optimizer": self._optimizer(model),
            "optimizer_step": self.step,
            "optimizer_later_step": self.later_step,
        }

    def _optimizer(self, model: dict[str, Any]) -> dict[int, Any]:
        return {index: part.sharded(model) for index, part in enumerate(self.parts)}

    def live_tensors(self) -> Iterator[Tensor]:
        yield from (*self._stage.parameters(), *self._stage.buffers())
        for part in self.parts:
            yield from part.tensors()

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        model = state.model_state(self._stage, is_loading=True)
        return {"model": model} | ({"optimizer": self._optimizer(model)} if optimizer else {})

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        loaded = read({key: part for key, part in request.items() if key != "optimizer"})
        self._build_gates(loaded["model"])
        # Transformer Engine's layers distrust pickled scales and histories of FP8, but megatron-core has unpickled the
        # whole checkpoint anyway, after its checksums were compared.
        with mock.patch.dict(os.environ, NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="1"):
            self._stage.load_state_dict(loaded["model"], strict=False)  # what is missing is known to be a gate
        if "optimizer" in request:  # after the model, whose weights may be rounded: in fp32 both are the same memory
            loaded |= read({"optimizer": request["optimizer"]})
        for index, part in enumerate(self.parts):
            part.reset_others(loaded.get("optimizer", {}).get(index, {}))
        return loaded

    def set_step(self, step: int, later_step: int) -> None:
        self.step, self.later_step = step, later_step
        for part in self.parts:
            part.set_step(step, state.later_parameters(self._stage), later_step)

    @torch.no_grad()
    def _build_gates(self, loaded: dict[str, Any]) -> None:
        """Reset gates that were not loaded to their initial values: the engine may have trained already."""
        stage = self._stage
        for own_name, (name, parameter) in zip(dict(stage.named_parameters()), global_names(stage), strict=True):
            if only_in_loops(name) and own_name not in loaded:
                parameter.copy_(initial_value(stage, name, self._seed))
