"""The state of one of megatron-core's distributed optimizers: allocated, cut out for checkpoints, and put back.

Keys and shapes are those of the whole model (`fully_reshardable`), so that any layout can load what any other has
saved. Three things that megatron-core 0.19 gets wrong are put right here, each where it is marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from plt_megatron.config.optimizers import OptimizerSpec


class OptimizerPart:
    """One distributed optimizer, of which an engine's optimizer may have several.

    Args:
        optimizer: megatron-core's.
        spec: what it is.
    """

    def __init__(self, optimizer: DistributedOptimizer, spec: OptimizerSpec) -> None:
        self.optimizer = optimizer
        self.inner: torch.optim.Optimizer = optimizer.optimizer
        self._keys = optimizer.optimizer_state_keys
        # Transformer Engine's optimizers count the steps of a parameter group.
        self._torchs = type(self.inner).__module__.startswith("torch.")
        self._counts_steps = spec.counts_steps

    # Steps.

    @property
    def step(self) -> int:
        """How many updates it has made, where it keeps count: less than the run's steps where some were skipped."""
        counters = self.inner.state.values() if self._torchs else self.inner.param_groups
        return next((int(counter["step"]) for counter in counters if "step" in counter), 0)

    def set_step(self, step: int) -> None:
        """Go on from `step` updates."""
        if not self._counts_steps:
            return
        if not self._torchs:
            for group in self.inner.param_groups:
                group["step"] = step
            return
        for state in self.inner.state.values():
            # One tensor each: megatron-core's own loading lets all parameters share one, which then advances once per
            # parameter in every step.
            state["step"] = torch.tensor(float(step))

    def allocate(self) -> None:
        """Give an optimizer that has not made a step yet its state, zero.

        megatron-core's own way for torch's AdamW is a step with zero gradients, which decays the weights.
        """
        if self.inner.state:
            return
        if not self._torchs:
            self.optimizer.load_state_dict(self.optimizer.state_dict())
            for state in self.inner.state.values():
                for key in self._keys:
                    state[key].zero_()
            return
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                self.inner.state[parameter] = {key: torch.zeros_like(parameter) for key in self._keys}
        self.set_step(0)

    # Main parameters and what is kept beside them.

    def sharded(self, model: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool) -> dict[int, Any]:
        """Main parameters and state by the parameter's index in its buffers, as sharded tensors. Collective.

        Parameter groups are not part of it: they follow from the configuration.

        Args:
            model: the model's sharded tensors.
            metadata: what megatron-core's `sharded_state_dict` methods have to be told.
        """
        self.allocate()
        with self._offsets_without_padding():
            return self.optimizer.sharded_param_state_fully_reshardable(model, is_loading, metadata)

    @torch.no_grad()
    def load(self, loaded: dict[int, dict[str, Tensor]]) -> None:
        """Copy loaded main parameters and state into this data-parallel rank's part.

        Args:
            loaded: by the parameter's index, `param` and the state's tensors in the parameter's shape. A parameter that
                is not there starts with what the model holds and with state zero.
        """
        self.allocate()
        for index, (parameter, part) in enumerate(self.parameter_parts()):
            if part is None:  # another data-parallel rank's
                continue
            main = self.main_parameter(parameter)
            targets = {key: self.inner.state[main][key] for key in self._keys}
            if index in loaded:
                for key, target in {"param": main, **targets}.items():
                    target.copy_(loaded[index][key].reshape(-1)[part.start : part.end])
                continue
            main.copy_(parameter.reshape(-1)[part.start : part.end])
            for target in targets.values():
                target.zero_()

    def main_parameter(self, parameter: Tensor) -> Tensor:
        """This rank's part of a model parameter, flat, in fp32."""
        group, order = self.optimizer.model_param_group_index_map[parameter]
        return self.inner.param_groups[group]["params"][order]

    def parameter_parts(self) -> Iterator[tuple[Tensor, Any]]:
        """(parameter, the range of it that this rank owns, or None), in the order of `sharded`."""
        for buffer, ranges in zip(self.optimizer.buffers, self.optimizer.gbuf_ranges, strict=True):
            owned = {
                parameter: parts["param"]
                for buckets in ranges.values()
                for bucket in buckets
                for parameter, parts in bucket["param_map"].items()
            }
            for parameter in buffer.param_index_map:
                yield parameter, owned.get(parameter)

    @contextmanager
    def _offsets_without_padding(self) -> Iterator[None]:
        """Within it, `fully_reshardable` saves the right elements of every bucket.

        megatron-core gathers the buckets without the padding between them, then cuts the parameters out at offsets
        that count the padding: all buckets but the first would be saved shifted, silently. A tied embedding in a
        pipeline has a bucket of its own, and overlapped gradient reduction makes more.
        """
        saved = [buffer.param_index_map for buffer in self.optimizer.buffers]
        try:
            for buffer in self.optimizer.buffers:
                padding, packed = [], 0
                for bucket in buffer.buckets:
                    padding.append(bucket.offset - packed)
                    packed += bucket.numel_unpadded
                buffer.param_index_map = {
                    parameter: (start - padding[bucket], end - padding[bucket], bucket)
                    for parameter, (start, end, bucket) in buffer.param_index_map.items()
                }
            yield
        finally:
            for buffer, index_map in zip(self.optimizer.buffers, saved, strict=True):
                buffer.param_index_map = index_map
