"""Transformer Engine's Python on a CPU: `enter()` once in a process, before megatron is imported.

Needs the pure-Python wheel `transformer_engine` alone, in the environment or in `build/te` (`make test-te`). The
process then takes itself for one with a Hopper GPU. This proves wiring, FP8 state, what is quantized when,
communication and the choice of backends; it proves nothing about kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "build" / "te"
COMPLETE = FOLDER / ".complete"  # the installation's last file
_DEVICE = SimpleNamespace(major=9, minor=0, name="NVIDIA H100 (emulated)", multi_processor_count=132)


def find() -> str | None:
    """Why Transformer Engine's Python cannot be used; None if it can."""
    if COMPLETE.is_file() or importlib.util.find_spec("transformer_engine") is not None:
        return None
    return "Transformer Engine's Python is not installed (`make test-te` installs it and runs these tests)"


def enter() -> None:
    """Make `import transformer_engine.pytorch` work in this process, on its CPU."""
    os.environ.update(
        NVTE_PROJECT_BUILDING="1",
        NVTE_RELEASE_BUILD="0",
        NVTE_TORCH_COMPILE="0",
        TORCH_COMPILE_DISABLE="1",
        TRITON_INTERPRET="1",  # cross-entropy's kernels
    )
    if COMPLETE.is_file():
        sys.path.insert(0, str(FOLDER))
    _answer_for_a_gpu()
    from tests.te import extension, kernels_attention, kernels_layers, kernels_quantize

    extension.install(kernels_quantize.FUNCTIONS | kernels_layers.FUNCTIONS | kernels_attention.FUNCTIONS)
    import transformer_engine.common

    # The loader looks for a shared library; the stand-in is in its place already.
    transformer_engine.common.load_framework_extension = lambda framework: None
    from plt_megatron.runtime import cpu_runtime

    replace_device_queries = cpu_runtime._replace_device_queries

    def answer() -> None:
        replace_device_queries()
        _answer_for_a_gpu()  # the CPU runtime says that there is none

    cpu_runtime._replace_device_queries = answer
    cpu_runtime.enter_cpu_runtime(force=True)  # imports megatron, which imports Transformer Engine
    import transformer_engine.pytorch

    _take_the_cpus_random_state()
    _let_float32_be_attended()
    _let_requests_be_waited_for_twice()


def _answer_for_a_gpu() -> None:
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: _DEVICE  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda device=None: (_DEVICE.major, _DEVICE.minor)
    torch.cuda.get_device_name = lambda device=None: _DEVICE.name
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]


@contextlib.contextmanager
def card(major: int, minor: int = 0) -> Iterator[None]:
    """Within it, the process believes that it has a card of another generation."""
    from transformer_engine.pytorch import quantization, utils

    def become(generation: tuple[int, int]) -> None:
        _DEVICE.major, _DEVICE.minor = generation
        for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            setattr(quantization, name, None)
        for function in vars(utils).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    before = _DEVICE.major, _DEVICE.minor
    become((major, minor))
    try:
        yield
    finally:
        become(before)


def _take_the_cpus_random_state() -> None:
    """For recomputation, which restores it; as the CPU runtime does for megatron-core."""
    import torch
    from transformer_engine.pytorch import distributed

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = True) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = True) -> None:
        torch.set_rng_state(new_state)

    distributed._get_cuda_rng_state = get_state
    distributed._set_cuda_rng_state = set_state


class _TorchWithFloat32(ModuleType):
    """torch, in which float16 is another name for float32."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float32 if name == "float16" else getattr(torch, name)


def _let_float32_be_attended() -> None:
    """cuDNN's attention takes no float32; the stand-in does, where the checks before it ask for float16."""
    from transformer_engine.pytorch.attention import dot_product_attention as attention

    for module in (attention.backends, attention.utils, attention.context_parallel):
        module.torch = _TorchWithFloat32("torch")


class _Once:
    """A request of torch.distributed that waits once, however often `wait` is called."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.wait()


def _let_requests_be_waited_for_twice() -> None:
    """Attention with p2p context parallelism waits twice for the same messages in its backward pass: nothing on NCCL,
    forever on gloo."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate

    def communicate_once(*args: Any) -> list[_Once]:
        return [_Once(request) for request in communicate(*args)]

    context_parallel.flash_attn_p2p_communicate = communicate_once
