"""Observer of what one rank does: communication, memory, matrix products, and waits of the host for the GPU."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from plt_megatron.predict.rehearsal.record import Log

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.is_nonzero.default}
# Score-sized products that the kernel computes, and that the model has: flash recomputes one in its backward pass.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default: (2, 2),
    _aten._scaled_dot_product_flash_attention_backward.default: (5, 4),
}


class Observer:
    """Sees every operation of a rehearsed rank.

    Attributes:
        log: the communication; its phase applies to everything here.
        held, peak: bytes on the device by what holds them, now and when their sum was largest.
        peak_phase: phase of that peak.
        flops: FLOPs of matrix products by kind: `linear`, `batched`, `attention` (the causal half), `recomputed` and
            `optimizer`.
        waits: how often the host waited for the device, by phase and place in the code.
    """

    def __init__(self) -> None:
        self.log = Log()
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_phase = ""
        self.flops: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._count: int | None = None
        self._recomputing = 0
        self._most = 0
        self._total = 0
        self._live: dict[int, tuple[str, int]] = {}

    # Operations.

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle an operation before it runs; a result other than None replaces the operation's."""
        if func.namespace == "c10d":
            self.log.add(func, args)
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func in _READS and args[0].constant is None:
            if args[0].fake_device.type == "cuda":
                self.waits_for_device(func._schema.name)
            return plausible_value(args[0].dtype) if self._count is None else self._count
        if func is _aten.masked_select.default and self._count is not None:
            self.waits_for_device(func._schema.name)
            return args[0].new_empty(self._count)
        return None

    @contextlib.contextmanager
    def counted(self, count: int) -> Iterator[None]:
        """Use `count` for everything that depends on values: numbers that are read, sizes of what a mask selects."""
        self._count = count
        yield
        self._count = None

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self._count_flops(func, args, counted(*args, **kwargs, out_val=out))
        elif func in (_aten._to_copy.default, _aten.copy_.default) and _leaves_device(args, out):
            self.waits_for_device("copy to the host")

    def _count_flops(self, func: Any, args: Any, flops: int) -> None:
        self.log.work += flops
        if self.log.phase == "optimizer":
            self.flops["optimizer"] += flops
        elif self._recomputing:
            self.flops["recomputed"] += flops
        elif func in _ATTENTION:
            self.flops["attention"] += _of_model(func, args, flops)
        else:
            self.flops["batched" if "bmm" in func._schema.name else "linear"] += flops

    def enter_layer(self) -> None:
        """Note that a layer's forward, or its core attention's or FFN's, starts; in a backward pass this is
        recomputation."""
        self._recomputing += self.log.phase.startswith("backward")

    def leave_layer(self) -> None:
        self._recomputing -= self.log.phase.startswith("backward")

    def waits_for_device(self, what: str) -> None:
        self.waits[self.log.phase, f"{_place()}: {what}"] += 1

    # Memory.

    def _hold(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0 or tensor.fake_device.type != "cuda":
            return
        name = self.log.phase
        self._live[key] = name, size
        weakref.finalize(storage, self._release, key)
        self.held[name] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak, self.peak_phase = self._total, self.held.copy(), name

    def _release(self, key: int) -> None:
        name, size = self._live.pop(key)
        self.held[name] -= size
        self._total -= size

    def name_held(self, name: str, tensors: Any) -> None:
        """Count the memory of the tensors among these under `name`."""
        for tensor in filter(torch.is_tensor, tensors):
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                before, size = self._live[key]
                self._live[key] = name, size
                self.held[before] -= size
                self.held[name] += size

    def forget_peak(self) -> None:
        """Restart the search for the peak from the current state."""
        self._most, self.peak = self._total, self.held.copy()


def plausible_value(dtype: torch.dtype) -> Any:
    """Return a value with which a step can proceed: a finite loss, no overflow, one token."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _of_model(func: Any, args: Any, flops: int) -> int:
    """Return the model's part of a flash kernel's FLOPs: only pairs that the causal mask allows, nothing twice."""
    made, needed = _ATTENTION[func]
    query, key = args[1:3] if made == 5 else args[:2]  # the backward pass gets the output's gradient first
    n, m = query.shape[2], key.shape[2]  # the last n of m tokens
    return round(flops * needed / made * (m - (n - 1) / 2) / m)


def _leaves_device(args: Any, out: Any) -> bool:
    source = args[-1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return source.fake_device.type == "cuda" and out.fake_device.type == "cpu"


def _place() -> str:
    """Return the innermost line of our code or megatron-core's on the stack."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("plt_megatron.", "megatron.")) and ".rehearsal." not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
