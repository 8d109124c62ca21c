"""CPU runtime: run megatron-core without CUDA.

megatron-core asks `torch.cuda` for its device, its stream and its random state, and creates tensors with
`device="cuda"`. `enter_cpu_runtime` answers these few calls for a process that has no GPU, so that tensor, sequence,
pipeline and data parallelism and the distributed optimizer run for real, with gloo, on any machine.

Enter it once, before megatron-core is imported (some of its modules query the device on import). On a machine with a
working GPU it does nothing. The "CUDA" random state is the CPU's, so data code must use its own generators.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_FACTORIES = (
    "arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "as_tensor", "zeros", "zeros_like",
)  # fmt: skip
_TENSOR_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "new_empty_strided")

_GPU_PACKAGES = ("transformer_engine", "apex", "amp_C")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h

_entered = False


def enter_cpu_runtime(force: bool = False) -> bool:
    """Answer megatron-core's `torch.cuda` calls on the CPU, unless a GPU can be used; with `force` even then (for the
    parity tests). Return whether this process now runs on the CPU runtime."""
    global _entered
    if _entered:
        return True
    if torch.cuda.is_available() and not force:
        return False
    _entered = True
    hide_gpu_packages()
    _replace_device_queries()
    _replace_factories()  # before importing megatron-core, whose defaults (`init_fn=torch.empty`) bind what exists then
    _replace_tensor_methods()
    _replace_random_state()
    return True


def hide_gpu_packages() -> None:
    """Make megatron-core's imports of these packages fail, as where they are not installed: it would use their Adam,
    gradient norms and router product, which run on a GPU only. Call it before megatron-core is imported."""
    for name in _GPU_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def is_cpu_runtime() -> bool:
    """Check whether `enter_cpu_runtime` took effect in this process."""
    return _entered


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors, for processes that train.

    By default glibc returns a large free end of the heap, and every large block, to the kernel, which zeroes the pages
    again in the next step: a few percent of a PLT's CPU time in fp32. Loops free more at once than a plain stack's
    layers.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_MMAP_MAX, 0)


def patch_token_dispatcher() -> None:
    """Make megatron-core's token dispatchers convert their counts as if from a GPU, to numpy arrays where requested.
    Only models with experts import the dispatchers."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    if _entered:
        token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _to_cpu(device: Any) -> Any:
    kind = device.type if isinstance(device, torch.device) else device
    is_cuda = isinstance(kind, str) and kind.split(":")[0] == "cuda"
    return torch.device("cpu") if is_cuda else device


class _Done:
    """Stand-in for something on a device that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event(_Done):
    """Stand-in for a CUDA event."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class Stream(_Done):
    """Stand-in for a CUDA stream: everything queued has already run."""

    device = torch.device("cpu")
    cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...


def _replace_device_queries() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    # With PYTORCH_NVML_BASED_CUDA_CHECK=1, which importing DeepSpeed sets, torch would use the number of devices.
    torch.cuda.is_available = lambda: False
    pretend_one_device(Stream, Event)


def pretend_one_device(streams: type[Stream], events: type[Event]) -> None:
    """Let `torch.cuda` have one device, with streams and events of these types."""
    cuda, current = torch.cuda, streams()
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.current_stream = lambda device=None: current  # type: ignore[assignment,return-value]
    cuda.default_stream = lambda device=None: current  # type: ignore[assignment,return-value]
    cuda.Stream = streams  # type: ignore[assignment,misc]
    cuda.Event = events  # type: ignore[assignment,misc]
    cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    cuda.empty_cache = lambda: None


def _replace_random_state() -> None:
    # Without a GPU the stock setters do not raise: they silently queue a call that never runs.
    def get_rng_state(device: Any = "cpu") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cpu", graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        # Not torch.manual_seed, which in turn calls torch.cuda.manual_seed_all.
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_rng_state  # type: ignore[attr-defined]
        module.set_rng_state = set_rng_state  # type: ignore[attr-defined]
        module.manual_seed = manual_seed  # type: ignore[attr-defined]
        module.manual_seed_all = manual_seed  # type: ignore[attr-defined]

    with _compiled_when_called():
        import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = set_rng_state


@contextlib.contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Defer torch.compile, as megatron-core applies it on import, to the first call of a function. On a CPU none of
    them is called, and importing the compiler takes as long as importing torch."""
    stock = torch.compile

    def deferred(function: Callable) -> Callable:
        compiled = functools.cache(lambda: stock(function))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = deferred  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = stock


def _map_device_keyword(function: Callable) -> Callable:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # page-locked memory needs a GPU
        return function(*args, **kwargs)

    return on_cpu


def _replace_factories() -> None:
    # `with torch.device("meta")` (in which transformers builds models) records the factories on first use, which must
    # happen before they are replaced.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _map_device_keyword(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    tensor = torch.Tensor
    for name in _TENSOR_METHODS:
        setattr(tensor, name, _map_device_keyword(getattr(tensor, name)))
    to, type_of = tensor.to, tensor.type

    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return to(self, *(_to_cpu(argument) for argument in args), **kwargs)

    @functools.wraps(type_of)
    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # megatron-core's optimizer groups gradients by the names of CUDA tensor types.
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_of(self, dtype, *args, **kwargs)

    tensor.to = to_cpu  # type: ignore[method-assign,assignment]
    tensor.type = cuda_type  # type: ignore[method-assign,assignment]
    tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
