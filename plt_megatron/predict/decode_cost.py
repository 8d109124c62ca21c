"""The cost of a decoded token: a roofline over the bytes and FLOPs of one step for a batch of sequences.

With cross-loop parallelism a step is one forward pass with L rows per sequence: weights are read once, so extra loops
are free while reading dominates. Without it the loops run one after another, and each reads the weights of the looped
layers again. Weights and cache are bf16, on one card.

In a mixture of experts, a step reads each expert that any row of the batch is routed to, assuming that rows choose
independently and uniformly: extra loops then read extra experts, and are free only if the batch reaches all of them
anyway.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.predict.cards import GPUSpec, find_gpu_spec
from plt_megatron.predict.flops import forward_flops
from plt_megatron.predict.layout import BYTES
from plt_megatron.predict.parameters import Weights, count_parameters

ELEMENT = BYTES["bf16"]
MAX_BATCH = 1 << 16
FREE = 0.05  # loops count as free while a step takes at most this much longer than with one loop


@dataclass(frozen=True)
class DecodeCost:
    """One decode step of a batch.

    Attributes:
        bytes, flops: bytes moved and FLOPs computed in the step, for the whole batch.
        milliseconds: the longer of reading and computing.
        bound: `memory` or `compute`, whichever takes longer.
        kv_cache_bytes: KV cache of the whole context, per sequence.
        state_bytes: other state per sequence: windows of later loops, and the carried hidden states.
        loops_stop_being_free_at: first batch size whose step takes more than 5 % longer than with one loop;
            None: no batch size up to 65,536 does, or the model has one loop.
    """

    bytes: float
    flops: float
    milliseconds: float
    bound: str
    kv_cache_bytes: int
    state_bytes: int
    loops_stop_being_free_at: int | None


def decode_cost(
    model: ModelConfig, *, vocab_size: int, context_length: int, batch_size: int, gpu: str = "h100"
) -> DecodeCost:
    """Return the cost of one more token for `batch_size` sequences of `context_length` tokens each.

    Raises `UserError` if the card is unknown.
    """
    card = find_gpu_spec(gpu)
    read, computed = _step(model, vocab_size, context_length, batch_size)
    seconds, bound = _seconds(card, read, computed)
    return DecodeCost(
        bytes=read,
        flops=computed,
        milliseconds=1e3 * seconds,
        bound=bound,
        kv_cache_bytes=kv_cache_bytes(model, context_length),
        state_bytes=state_bytes(model, context_length),
        loops_stop_being_free_at=_first_batch(model, vocab_size, context_length, card),
    )


def decode_milliseconds(model: ModelConfig, vocab_size: int, context_length: int, batch_size: int, gpu: str) -> float:
    """Return only the time of `decode_cost`, for searches over many shapes."""
    return 1e3 * _seconds(find_gpu_spec(gpu), *_step(model, vocab_size, context_length, batch_size))[0]


def kv_cache_bytes(model: ModelConfig, context_length: int) -> int:
    """Return the bytes of K and V over the whole context, per sequence: the first loop's, every loop's if not shared,
    or the last loop's alone."""
    once, each = model.num_layers, derived.layer_runs(model)
    stores = once if derived.windows_earlier_loops(model) else each  # of loops that share nothing
    keys, values = once if model.share_kv else stores, once if derived.shares_values(model) else stores
    return context_length * (_token_kv(model, keys) + _token_kv(model, values)) // 2


def state_bytes(model: ModelConfig, context_length: int) -> int:
    """Return the bytes per sequence of L - 1 windows of K and V in every looped layer, and of L - 1 carried hidden
    states; without the last token's part that shifted keys carry."""
    later = model.loop_count - 1
    runs = derived.layer_runs(model) - model.num_layers if derived.has_windows(model) else 0
    windows = min(model.window_size, context_length) * _token_kv(model, runs)
    carries = later * model.hidden_size * ELEMENT if model.cross_loop_parallel else 0
    return windows + carries


def _token_kv(model: ModelConfig, layers: int) -> int:
    return 2 * layers * derived.num_query_groups(model) * derived.head_dim(model) * ELEMENT


def _step(model: ModelConfig, vocab_size: int, context: int, batch: int) -> tuple[float, float]:
    """Return (bytes read and written, FLOPs) of one step."""
    counted = count_parameters(model, vocab_size)
    vocab = derived.padded_vocab_size(model, vocab_size)
    looped = derived.looped_layers(model)
    reads = 1 if model.cross_loop_parallel else model.loop_count
    rows = batch * (model.loop_count if model.cross_loop_parallel else 1)
    stack = reads * _read_layers(model, looped, rows)
    stack += _read_layers(model, [layer for layer in range(model.num_layers) if layer not in looped], batch)
    weights = ELEMENT * (stack + vocab * model.hidden_size + counted.loop_input + counted.final_norm)
    caches = kv_cache_bytes(model, context) + state_bytes(model, context)
    if model.share_kv and not model.cross_loop_parallel:  # the shared cache is read once per loop
        again = context * _token_kv(model, derived.layer_runs(model) - model.num_layers)
        caches += again if model.share_values else again // 2  # only the keys
    # Windows keep every loop's K and V.
    written = _token_kv(model, derived.layer_runs(model)) if derived.has_windows(model) else kv_cache_bytes(model, 1)
    flops = forward_flops(Weights(model), context, min(model.window_size, context), vocab).total
    return weights + batch * float(caches + written + vocab * ELEMENT), batch * flops


def _read_layers(model: ModelConfig, layers: Iterable[int], rows: int) -> float:
    """Count the parameters of these layers that a step with `rows` rows reads: of the experts, those that at least one
    row is routed to."""
    counted = Weights(model).by_component(layers)
    read = 0.0 if model.moe is None else 1.0 - (1.0 - model.moe.router_topk / model.moe.num_experts) ** rows
    return sum(counted.values()) - counted["experts"] * (1.0 - read)


def _seconds(card: GPUSpec, read: float, computed: float) -> tuple[float, str]:
    reading = read / (card.memory_bandwidth * card.memory_efficiency)
    computing = computed / (card.flops_per_second("bf16") * card.matmul_efficiency)
    return max(reading, computing), "memory" if reading >= computing else "compute"


def _first_batch(model: ModelConfig, vocab_size: int, context: int, card: GPUSpec) -> int | None:
    """Return the smallest batch at which all loops take over `FREE` longer than one loop, by bisection: the ratio grows
    with the batch while reading bounds both, and stays above the limit once computing bounds the looped model."""
    if model.loop_count == 1:
        return None
    single = dataclasses.replace(model, loop_count=1)

    def costs(batch: int) -> bool:
        looped, _ = _seconds(card, *_step(model, vocab_size, context, batch))
        plain, _ = _seconds(card, *_step(single, vocab_size, context, batch))
        return looped > (1 + FREE) * plain

    high = 1
    while not costs(high):
        high *= 2
        if high > MAX_BATCH:
            return None
    return bisect_left(range(high), True, lo=high // 2 + 1, key=costs)
