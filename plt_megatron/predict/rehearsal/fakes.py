"""CUDA tensors without memory or a GPU, and torch.distributed for one rank of a world that does not exist.

torch's FakeTensorMode computes only shapes. On a machine without a GPU autograd still asks a CUDA tensor's device for
its stream, and fails. So C++ is told that the tensor is on the `meta` device, which has no streams, and Python that it
is on `cuda:0`. Tensors that C++ then creates on `meta` are put back on `cuda:0`.

torch's `fake` process group completes every collective at once. Groups without this rank are counted, not created:
creating those of 8,192 ranks would take minutes and change nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import bias
from torch.optim.optimizer import _foreach_supported_types as foreach_types
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from plt_megatron.predict.rehearsal.observer import Observer, plausible_value
from plt_megatron.predict.rehearsal.record import Log
from plt_megatron.runtime.cpu_runtime import Event, Stream, pretend_one_device

_A_GROUP = [(None, False)]  # megatron-core's key of parameters that are no experts, with the rates of all
# Number of groups the world creates, by megatron-core's description.
groups_made: Counter[str] = Counter()
_new_group = dist.new_group


def join_fake_world(rank: int, world_size: int, log: Log) -> None:
    """Become `rank` of `world_size` ranks, in a process that does nothing else. `log` records exchanges of Python
    objects, to which all ranks are assumed to contribute the same.

    An empty list is what a stage without trained parameters has of the keys of megatron-core's parameter groups: the
    others have some, so that its optimizer has groups too, without parameters.
    """

    def all_gather_object(found: list[Any], given: Any, group: Any = None) -> None:
        log.add_objects("all_gather_object", group)
        found[:] = [_A_GROUP if given == [] else given] * len(found)

    def gather_object(given: Any, found: list[Any] | None = None, dst: Any = None, group: Any = None, **_: Any) -> None:
        log.add_objects("gather_object", group)
        if found is not None:
            found[:] = [given] * len(found)

    def broadcast_object_list(objects: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
        log.add_objects("broadcast_object_list", group)

    for function in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, function.__name__, function)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    _note_waits(log)
    dist.new_group = _new_fake_group  # type: ignore[assignment]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@dataclass
class _Message:
    """Work handle that isend and irecv return."""

    log: Log
    position: int
    work: Any

    def wait(self, *args: Any) -> bool:
        self.log.add_wait(self.position)
        return True


def _note_waits(log: Log) -> None:
    for name in ("isend", "irecv"):
        stock = getattr(dist, name)

        def message(*args: Any, stock: Any = stock, **kwargs: Any) -> _Message:
            work = stock(*args, **kwargs)
            return _Message(log, len(log.calls) - 1, work)

        setattr(dist, name, message)

    def batch_isend_irecv(p2p_op_list: list[dist.P2POp]) -> list[Any]:
        return [each.op(each.tensor, each.peer, each.group, each.tag) for each in p2p_op_list]

    dist.batch_isend_irecv = batch_isend_irecv


def share_rank_lists() -> None:
    """Cache megatron-core's lists of ranks, so that processes forked after the first computation reuse them."""
    from megatron.core import parallel_state

    stock = parallel_state.generate_masked_orthogonal_rank_groups

    @lru_cache
    def cached(world_size: int, parallel_size: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
        return stock(world_size, list(parallel_size), list(mask))

    parallel_state.generate_masked_orthogonal_rank_groups = lambda world_size, parallel_size, mask: cached(
        world_size, tuple(parallel_size), tuple(mask)
    )


class _Parts:
    """A buffer's equal parts, one per data-parallel rank, each created when asked for. megatron-core builds a list of
    all, though a rank uses only its own, and a thousand views of a fake tensor take seconds."""

    def __init__(self, buffer: Tensor, data_parallel_world_size: int) -> None:
        assert buffer.numel() % data_parallel_world_size == 0
        self._buffer, self._size = buffer, buffer.numel() // data_parallel_world_size

    def __getitem__(self, rank: int) -> Tensor:
        return self._buffer[rank * self._size : (rank + 1) * self._size]


def share_out_lazily() -> None:
    """Create buffers' parts on demand, in this process and all forked from it."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer.shard_buffer = _Parts


def _new_fake_group(ranks: list[int] | None = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
    description = kwargs.get("group_desc") or "undefined"
    groups_made[description] += 1
    if ranks is not None and dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    return _new_group(ranks, backend="fake", group_desc=description)


CUDA = torch.device("cuda", 0)
_stock_subclass = Tensor._make_subclass
_stock_tensor = torch.tensor
_stock_attention = F.scaled_dot_product_attention


@contextlib.contextmanager
def fake_gpu(observer: Observer) -> Iterator[None]:
    """Make all tensors fake and `cuda` a device, and let `observer` see every operation. For a process that does
    nothing else: replaced functions are not restored."""
    _replace_cuda_queries(observer)
    _replace_tensor_queries(observer)
    torch.tensor = _tensor_of  # type: ignore[assignment]
    bias.causal_lower_right = _LowerRight  # type: ignore[assignment]
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True), _OnFakeGpu(observer):
        yield


class _OnFakeGpu(TorchDispatchMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and device.type == "meta":
            kwargs = {**kwargs, "device": CUDA}
        answer = self.observer.before(func, args, kwargs)
        if answer is not None:
            return answer
        if func is torch.ops.aten.index_put.default:  # a table's gradient: without fakes, autograd writes it in place
            func = torch.ops.aten.index_put_.default
        out = func(*args, **kwargs)
        self.observer.after(func, args, kwargs, out)
        return out


def _replace_cuda_queries(observer: Observer) -> None:
    class WaitedEvent(Event):
        def synchronize(self) -> None:
            observer.waits_for_device("Event.synchronize")

    class EventStream(Stream):
        def record_event(self, event: Any = None) -> Event:
            return event or WaitedEvent()

    pretend_one_device(EventStream, WaitedEvent)
    cuda = torch.cuda
    cuda.is_available = lambda: False  # else torch makes some constants on a real GPU, which a forked process cannot
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.synchronize = lambda device=None: observer.waits_for_device("torch.cuda.synchronize")
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.empty(16, dtype=torch.uint8)  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, device=None: None  # type: ignore[attr-defined]
        module.manual_seed = module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None


def _replace_tensor_queries(observer: Observer) -> None:
    stock_type = Tensor.type

    def tolist(self: FakeTensor) -> Any:  # one wait; the stock method reads element by element
        observer.waits_for_device("tolist")
        values = plausible_value(self.dtype)
        for size in reversed(self.shape):
            values = [values] * size
        return values

    def make_subclass(cls: Any, tensor: Tensor, require_grad: bool = False, **kwargs: Any) -> Any:
        keys = kwargs.get("device_for_backend_keys")
        if keys is not None and keys.type == "cuda":
            kwargs["dispatch_device"] = False  # C++ sees the inner tensor's device: meta
        return _stock_subclass(cls, tensor, require_grad, **kwargs)

    def type_of(self: FakeTensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # megatron-core's optimizer compares type names
            return stock_type(self).replace("torch.meta.", "torch.cuda.", 1)
        return stock_type(self, dtype, *args, **kwargs)

    FakeTensor.type = type_of  # type: ignore[method-assign,assignment]
    FakeTensor.tolist = tolist  # type: ignore[method-assign,assignment]
    Tensor._make_subclass = staticmethod(make_subclass)  # type: ignore[method-assign,assignment]
    foreach_types.append(FakeTensor)  # as on a GPU, the optimizer updates all parameters at once
    torch.nn.Module._apply = _convert_module  # type: ignore[method-assign,assignment]
    FakeTensor.is_cuda = property(lambda self: self.fake_device.type == "cuda")  # type: ignore[assignment]


def _tensor_of(data: Any, *, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    """`torch.tensor` for lists that contain tensors; ignores `pin_memory`, which needs a GPU."""
    return _stock_tensor(_read(data), **kwargs)


def _read(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_read(each) for each in data]
    return data.item() if isinstance(data, FakeTensor) and data.dim() == 0 else data


def _convert_module(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` as it treats real parameters; the stock one replaces fake parameters, which others refer to."""
    for module in self.children() if recurse else ():
        module._apply(fn)
    with torch.no_grad():
        for parameter in filter(lambda each: each is not None, self._parameters.values()):
            assert parameter is not None
            parameter.data = fn(parameter.data)
    self._buffers.update({name: None if each is None else fn(each) for name, each in self._buffers.items()})
    return self


@dataclass
class _LowerRight:
    """Stand-in for `torch.nn.attention.bias.causal_lower_right`, a tensor that cannot be fake."""

    queries: int
    keys: int


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Run causal attention as flash attention, which torch would choose on a GPU in half precision, but not for a fake
    tensor. It stands in for other precisions too; attention that is not causal is left to torch."""
    if not isinstance(attn_mask, _LowerRight) and not kwargs.get("is_causal", False):
        return _stock_attention(query, key, value, attn_mask, *args, **kwargs)
    scale = kwargs.get("scale")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)[0]


# Experts: all are assumed to get the same number of tokens. megatron-core's dispatchers count tokens per expert on the
# GPU and read the counts on the host, as the splits of an all-to-all and the sizes of the experts' inputs. Only these
# counts are replaced.


def balance_routing(observer: Observer) -> None:
    """Make the dispatchers read the counts of an even load. For a process that does nothing else."""
    stock_init = Router.__init__
    stock_counts = MoEAlltoAllTokenDispatcher.preprocess
    stock_postprocess = MoEAllGatherTokenDispatcher.dispatch_postprocess

    def make_router(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device(CUDA):  # the stock router is built on the host, and a fake parameter cannot be moved
            stock_init(self, *args, **kwargs)

    def preprocess(self: Any, routing_map: Tensor) -> Any:
        stock_counts(self, routing_map)
        by_rank = even_load(routing_map.shape[0], self.config).reshape(self.ep_size, self.num_local_experts)
        own = by_rank[self.ep_rank]  # every rank sends the same counts
        if self.config.moe_expert_capacity_factor is not None:
            self.num_out_tokens = int(by_rank.sum())
        if self.ep_size > 1:
            self.input_splits = by_rank.sum(axis=1)
            self.output_splits = np.full(self.ep_size, own.sum())
            self.output_splits_tp = None  # experts are never split over tensor-parallel ranks
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = np.tile(own, (self.ep_size, 1))
            chunks = np.arange(self.num_experts)
            self.sort_input_by_local_experts = chunks.reshape(-1, self.num_local_experts).T.ravel()
            self.restore_output_by_local_experts = chunks.reshape(self.num_local_experts, -1).T.ravel()
        return own * self.ep_size

    def dispatch_postprocess(self: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Any, Tensor]:
        by_rank = even_load(hidden_states.shape[0] // self.ep_size, self.config)
        counts = self.ep_size * by_rank.reshape(self.ep_size, self.num_local_experts)[self.ep_rank]
        with observer.counted(int(counts.sum())):
            tokens, _, weights = stock_postprocess(self, hidden_states, probs)
        return tokens, counts, weights

    Router.__init__ = make_router  # type: ignore[method-assign]
    MoEAlltoAllTokenDispatcher.preprocess = preprocess  # type: ignore[method-assign]
    MoEAllGatherTokenDispatcher.dispatch_postprocess = dispatch_postprocess  # type: ignore[method-assign]


def even_load(tokens: int, config: TransformerConfig) -> np.ndarray:
    """Return how many of a rank's tokens go to each expert, int64 [experts]: evenly, and within their capacity."""
    experts, topk, factor = config.num_moe_experts, config.moe_router_topk, config.moe_expert_capacity_factor
    assert experts is not None
    each, left = divmod(tokens * topk, experts)
    counts = np.full(experts, each)
    counts[np.arange(left) * experts // max(left, 1)] += 1  # spread over the ranks that share the experts
    if factor is None:
        return counts
    return counts.clip(max=get_capacity(num_tokens=tokens * topk, num_experts=experts, capacity_factor=factor))
