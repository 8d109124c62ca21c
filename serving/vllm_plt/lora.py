"""LoRA adapters for decode steps whose loops are rows of one batch.

vLLM's LoRA kernels expect one row per token of the step, since they map tokens to adapters.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vllm_plt.vllm_internals import BaseLinearLayerWithLoRA


class LoopKernels:
    """vLLM's LoRA kernels (its `PunicaWrapper`), called once for each of `loops`.

    Only the adapters' small products are split; the base weights' product stays one over all rows.
    """

    def __init__(self, kernels):
        self.kernels = kernels
        self.loops = 1

    def __getattr__(self, name: str):
        return getattr(self.kernels, name)

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *args, **kwargs) -> None:
        """Add the adapters' output for x [loops * T, n] to y [loops * T, m], in place."""
        if self.loops == 1:
            self.kernels.add_lora_linear(y, x, *args, **kwargs)
            return
        outputs, inputs = y.view(self.loops, -1, y.shape[-1]), x.view(self.loops, -1, x.shape[-1])
        for output, rows in zip(outputs.unbind(), inputs.unbind(), strict=True):
            self.kernels.add_lora_linear(output, rows, *args, **kwargs)


class RowAdapters:
    """LoRA adapters of layers whose loops may be rows: row l * T + t is loop l + 1 of token t."""

    def __init__(self, layers: Iterable[nn.Module], loops: int):
        self.layers, self.loops = tuple(layers), loops
        self._kernels: LoopKernels | None = None

    @contextmanager
    def over_rows(self) -> Iterator[None]:
        """Apply the adapters to the rows of all loops within this context."""
        if self._kernels is None:  # vLLM adds adapters after it has built the model
            self._kernels = self._wrap()
        self._kernels.loops = self.loops
        try:
            yield
        finally:
            self._kernels.loops = 1

    def _wrap(self) -> LoopKernels:
        adapted = [part for layer in self.layers for part in layer.modules()]
        adapted = [part for part in adapted if isinstance(part, BaseLinearLayerWithLoRA)]
        # Shared by all layers. --lora-target-modules may name nothing in them.
        kernels = LoopKernels(adapted[0].punica_wrapper if adapted else None)
        for part in adapted:
            assert part.punica_wrapper is kernels.kernels
            part.punica_wrapper = kernels
        return kernels
