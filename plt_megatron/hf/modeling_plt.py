"""Parallel Loop Transformer (PLT, arXiv 2510.24824) for transformers, with the loops decoded in parallel.

This file travels with every exported model: it imports torch and transformers, and its own configuration.

The layer stack f runs L times with the same weights (paper section 3). With E the token embeddings:

    h(1) = f(E)      h(l) = f(embedding_scale * E + hidden_scale * shift(h(l-1)))      logits = Head(norm(h(L)))

`shift` moves a sequence one token to the right and puts a zero vector at the first position, so that in
decoding every loop of a step can run at once: the L loops are rows of one batch through every linear layer.
With `loop_span`, f is the layers of that range. The layers before it run once, and E is their output; the layers after
it run once, on h(L). A step is still one pass: of one row, then L rows, then one.
Row 1 writes its keys and values to the cache before the other rows attend to them, each row l >= 2 keeps a ring
of `window_size` keys and values of its own, and h(1..L-1) of the last position are carried to the next step; with
`key_shift` so is what the next keys take from the last ones, for every layer and loop.
With `full_attention` "last_loop" the cache is row L's, and the rows before it have a ring and nothing else.

Shapes: B sequences, T new tokens (or rows, one per loop, in a parallel step), N cached and new tokens, H query
heads, K key/value heads, G = H / K, D the head dimension, d the hidden size, w the window, L the loop count.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.utils import can_return_tuple, is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from .configuration_plt import PLTConfig

# transformers 5.24 renamed `past_key_values`; an export must load in both.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Cached tokens are stored in buffers that grow by this many, so that a step copies only its own token.
CACHE_GROWTH = 128
NOT_RECORDED = "cannot remove {} tokens: call activate_past_recording() on the cache before they are added"
# Queries per block of the windowed attention over many tokens: it costs O(n * (block + w)).
WINDOW_BLOCK = 64


@dataclass
class PLTPass:
    """State that the layers need during one pass. Rows are tokens of loop `loop` or, if it is None, all loops.

    Tensors move with `to`, so that a pass can cross devices.
    """

    loop: int | None
    loop_count: int
    windows: range  # loops, from 0, that attend to a window
    cos: Tensor  # [B or 1, T or 1, 1, D]
    sin: Tensor  # [B or 1, T or 1, 1, D], its first half negated: see `rotate`
    start: Any = 0  # tokens cached before this pass: int, or a tensor in a static cache
    slots: Tensor | None = None  # [T] cache slots of the new tokens
    global_mask: Tensor | None = None  # [B or 1, 1, T, N]; [B, N] for flash attention
    window_mask: Tensor | None = None  # blocks, or [B or 1, 1, 1, w] in a step; [B, w-1+T] for flash
    window: int = 0  # w, or T if that is less and nothing is cached
    ring_slots: Tensor | None = None  # where the last tokens go in the rings
    once_mask: Tensor | None = None  # `global_mask` of one row, for layers that do not loop
    prefix_slots: Tensor | None = None  # where the w - 1 tokens before this pass are, oldest first
    position_ids: Tensor | None = None  # packed documents, for flash attention
    real: Tensor | None = None  # [B or 1, T, 1], False where a new token is padding; None: nowhere
    continues: Tensor | None = None  # [B or 1, T, 1], whether a token follows one of its text; None: all do
    records_past: bool = False  # the cache keeps what `crop` needs

    def once(self) -> "PLTPass":
        """Return the same pass for a layer that does not loop: like a first loop that nothing follows."""
        return replace(self, loop=0, windows=range(0), global_mask=self.once_mask)

    def to(self, device: Any, non_blocking: bool = False) -> "PLTPass":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items()})


class PLTCarry:
    """What a token hands on to the next in each of some loops, if they and `width` are above 0.

    last: [B, loops, width], the last token's; zero before the first token and after padding.
    past: while the past is recorded, the m last tokens' in each loop, [B, m, width].
    """

    def __init__(self, loops: int, width: int):
        self.loops, self.width = loops, width
        self.last: Tensor | None = None
        self.past: list[Tensor] | None = None

    def allocate(self, like: Tensor) -> None:
        if self.last is None and self.loops and self.width:
            self.last = like.new_zeros(like.shape[0], self.loops, self.width)

    def keep(self, states: Tensor, loops: slice, state: PLTPass) -> None:
        """Keep what m tokens hand on in these loops, states [B, m, l, width]."""
        if state.real is not None:
            states = states * state.real.unsqueeze(-1).to(states.dtype)
        if not state.records_past:
            self.past = None
        else:
            self.past = self.past or list(self.last.clone().split(1, 1))
            for row, loop in enumerate(range(self.loops)[loops]):
                self.past[loop] = torch.cat([self.past[loop], states[:, :, row]], 1)
        own = self.last if states.shape[2] == self.loops else self.last[:, loops]
        own.copy_(states[:, -1])

    def crop(self, removed: int) -> None:
        """Remove the last tokens'."""
        if self.last is None:
            return
        known = 1 if self.past is None else self.past[0].shape[1]
        if known <= removed:
            raise ValueError(NOT_RECORDED.format(removed))
        if self.past is not None:
            self.past = [past[:, known - removed - 1 : known - removed] for past in self.past]
            self.last.copy_(torch.cat(self.past, 1))

    def reset(self) -> None:
        self.past = None
        if self.last is not None:
            self.last.zero_()

    def map_batch(self, function: Callable[[Tensor], Tensor], static: bool) -> None:
        if self.last is not None:
            self.last = _replace(self.last, function(self.last), static)
        if self.past is not None:
            self.past = [function(past) for past in self.past]


def shift(states: Tensor, loop: int, state: PLTPass, carry: PLTCarry | None) -> Tensor:
    """Move states [B, T, width] of a loop one token to the right: the first token gets the carry, which keeps the last
    one's. A token that starts a text gets zero."""
    if carry is None:
        shifted = F.pad(states[:, :-1], (0, 0, 1, 0))
    else:
        loops = slice(loop, loop + 1)
        shifted = torch.cat([carry.last[:, loops], states[:, :-1]], 1)
        carry.keep(states.unsqueeze(2), loops, state)
    return shifted if state.continues is None else shifted * state.continues.to(shifted.dtype)


def overlap(kept: range, loops: slice) -> tuple[slice, slice]:
    """Return the places of the loops that are in both: among `loops`, and among those kept."""
    first = max(kept.start, loops.start)
    end = max(first, min(kept.stop, loops.stop))
    return slice(first - loops.start, end - loops.start), slice(first - kept.start, end - kept.start)


class PLTCacheLayer:
    """Keys and values of one layer.

    keys, values: [B, S, K, capacity, D], one store per loop of `key_loops` and `value_loops`; a single one serves all.
    window_keys, window_values: [B, W, K, w, D], one ring per loop of `window_loops`; token t is in slot t % w.
    carry: what the next token's keys take from the last one's (`PLTKeyShift`).
    """

    supports_early_init = True
    is_sliding = False

    def __init__(
        self,
        key_loops: range,
        value_loops: range,
        window_loops: range,
        window_size: int,
        carry: PLTCarry,
        max_cache_len: int | None,
    ):
        self.key_loops = key_loops
        self.value_loops = value_loops
        self.window_loops = window_loops
        self.carry = carry
        self.window_size = window_size
        self.static_length = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.is_croppable = max_cache_len is None
        self.is_initialized = False
        self.record_past = False
        self.keys = self.values = self.window_keys = self.window_values = None
        self.past: list[tuple[Tensor, Tensor]] | None = None

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        """Allocate for tensors like key and value, [B, K, T, D]."""
        batch, heads, _, dim = key.shape
        self.batch_size = batch
        capacity = self.static_length or 0
        self.keys = key.new_zeros(batch, len(self.key_loops), heads, capacity, dim)
        self.values = value.new_zeros(batch, len(self.value_loops), heads, capacity, dim)
        if self.window_loops:
            self.window_keys = key.new_zeros(batch, len(self.window_loops), heads, self.window_size, dim)
            self.window_values = value.new_zeros(batch, len(self.window_loops), heads, self.window_size, dim)
        self.carry.allocate(key)
        if self.static_length is not None and not is_torchdynamo_compiling():
            for tensor in self.tensors():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def tensors(self) -> list[Tensor]:
        candidates = (self.keys, self.values, self.window_keys, self.window_values, self.carry.last)
        return [tensor for tensor in candidates if tensor is not None]

    def write(self, key: Tensor, value: Tensor, loops: slice, state: PLTPass) -> None:
        """Append key and value [B, l, K, T, D] of these loops to their stores, if they have one."""
        if self.static_length is None:
            self._reserve(state.start, state.start + key.shape[3])
        for cached, new, kept in ((self.keys, key, self.key_loops), (self.values, value, self.value_loops)):
            rows, places = overlap(kept, loops)
            if rows.start == rows.stop:
                continue
            stores, new = cached[:, places], new[:, rows]
            if self.static_length is None:
                stores[:, :, :, state.start : state.start + new.shape[3]] = new
            else:
                stores.index_copy_(3, state.slots, new)

    def _reserve(self, used: int, needed: int) -> None:
        if needed <= self.keys.shape[3]:
            return
        capacity = -(-needed // CACHE_GROWTH) * CACHE_GROWTH
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            new[:, :, :, :used] = old[:, :, :, :used]
            setattr(self, name, new)

    def read(self, loops: slice, state: PLTPass, new_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, l, K, N, D] of these loops up to this pass's tokens (all slots of a static cache);
        l is 1 if there is one store."""
        end = self.static_length if self.static_length is not None else state.start + new_tokens
        keys, values = (x[:, loops if x.shape[1] > 1 else slice(1), :, :end] for x in (self.keys, self.values))
        return keys, values

    def write_window(self, key: Tensor, value: Tensor, loops: slice, state: PLTPass) -> None:
        """Put the last w tokens of key and value [B, l, K, T, D] of these loops into their rings, if they have one."""
        rows, rings = overlap(self.window_loops, loops)
        key, value = key[:, rows], value[:, rows]
        kept = state.ring_slots.shape[0]
        self.window_keys[:, rings].index_copy_(3, state.ring_slots, key[:, :, :, -kept:])
        self.window_values[:, rings].index_copy_(3, state.ring_slots, value[:, :, :, -kept:])
        if not self.record_past:
            self.past = None
            return
        if self.past is None:  # recording since before the first token
            nothing = (key[:, 0, :, :0], value[:, 0, :, :0])
            self.past = [nothing] * len(self.window_loops)
        for row, ring in enumerate(range(len(self.window_loops))[rings]):
            past_key, past_value = self.past[ring]
            self.past[ring] = (torch.cat([past_key, key[:, row]], 2), torch.cat([past_value, value[:, row]], 2))

    def read_window(self, loops: slice, state: PLTPass) -> tuple[Tensor, Tensor]:
        """Return the filled slots of these loops' rings, [B, s, K, <= w, D], in any order: softmax does not depend on
        it."""
        _, rings = overlap(self.window_loops, loops)
        full = self.static_length is not None
        end = self.window_size if full else min(state.start + 1, self.window_size)
        return self.window_keys[:, rings, :, :end], self.window_values[:, rings, :, :end]

    def read_prefix(self, loop: int, state: PLTPass) -> tuple[Tensor, Tensor] | None:
        """Return the tokens before this pass that its windows reach, [B, K, <= w-1, D], oldest first."""
        if state.prefix_slots is None:
            return None
        ring = loop - self.window_loops.start
        keys = self.window_keys[:, ring].index_select(2, state.prefix_slots)
        return keys, self.window_values[:, ring].index_select(2, state.prefix_slots)

    def start_recording(self, length: int) -> None:
        self.record_past = True
        if not self.window_loops or not self.is_initialized:
            return
        first = max(length - self.window_size, 0)
        slots = torch.arange(first, length, device=self.window_keys.device) % self.window_size
        keys, values = self.window_keys.index_select(3, slots), self.window_values.index_select(3, slots)
        self.past = list(zip(keys.unbind(1), values.unbind(1), strict=True))

    def crop_window(self, removed: int, length: int) -> None:
        """Remove the last tokens, leaving `length`, and keep no more of the past than the windows need."""
        if not self.window_loops or not self.is_initialized:
            return
        kept = min(length, self.window_size)
        if self.past is None or self.past[0][0].shape[2] - removed < kept:
            raise ValueError(NOT_RECORDED.format(removed))
        slots = torch.arange(length - kept, length, device=self.window_keys.device) % self.window_size
        for ring, (key, value) in enumerate(self.past):
            end = key.shape[2] - removed
            self.past[ring] = (key[:, :, end - kept : end], value[:, :, end - kept : end])
            self.window_keys[:, ring].index_copy_(2, slots, self.past[ring][0])
            self.window_values[:, ring].index_copy_(2, slots, self.past[ring][1])

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the batch dimension to everything stored; static buffers keep their address."""
        static = self.static_length is not None
        for name in ("keys", "values", "window_keys", "window_values"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, _replace(tensor, function(tensor), static))
        if self.past:
            self.past = [(function(key), function(value)) for key, value in self.past]
        self.carry.map_batch(function, static)
        if self.keys is not None:
            self.batch_size = self.keys.shape[0]


def _replace(old: Tensor, new: Tensor, static: bool) -> Tensor:
    if static and old.shape == new.shape:
        return old.copy_(new)
    return new


class PLTCache(Cache):
    """The decoding state of a PLT: keys and values, the window rings, and the carried hidden states.

    Per sequence it holds N tokens of K/V per layer (L times in layers that loop, if each loop attends to its own in
    full), (L - 1) rings of w tokens per layer that loops and has windows, and (L - 1) vectors h(1..L-1) of the last
    position; with `key_shift` also what the next keys take from the last position's, for every layer and loop. Copies
    (`copy.deepcopy`) are independent, so a stored prefix can be continued any number of times. `crop` removes tokens
    that were added after `activate_past_recording()`.

    Args:
        config: the model's `PLTConfig`.
        max_cache_len: tokens to allocate for; buffers then never move (torch.compile, CUDA graphs). None: they
            grow.
        loop_count: loops to keep state for; None: the configuration's.
    """

    def __init__(self, config: PLTConfig, max_cache_len: int | None = None, loop_count: int | None = None):
        self.loop_count = config.loop_count if loop_count is None else loop_count
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len must be positive, not {max_cache_len}")
        later = self.loop_count - 1
        full, windows = config.full_loops(self.loop_count), config.window_loops(self.loop_count)
        key_loops = range(1) if config.share_kv else full
        value_loops = range(1) if config.shares_values else full
        layers = []
        for index in range(config.num_hidden_layers):
            loops = index in config.looped_layers
            kept = (key_loops, value_loops, windows) if loops else (range(1), range(1), range(0))
            carry = PLTCarry(config.loops_with_keys(self.loop_count) if loops else 1, PLTKeyShift.width(config))
            layers.append(PLTCacheLayer(*kept, config.window_size, carry, max_cache_len))
        super().__init__(layers=layers)
        self.static_length = max_cache_len
        self.carry = PLTCarry(later if config.cross_loop_parallel else 0, config.hidden_size)
        # A tensor if static, so that a captured graph advances it.
        self.length: Any = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)

    def prepare(self, like: Tensor) -> None:
        """Allocate the state outside the layers, for hidden states like [B, T, d]."""
        if self.static_length is not None and self.length.device != like.device:
            self.length = self.length.to(like.device)
        self.carry.allocate(like)
        self._leave_inference_mode()
        if self.static_length is not None and not is_torchdynamo_compiling():
            for tensor in (self.length, self.carry.last):  # without cross-loop parallelism nothing is carried
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def _leave_inference_mode(self) -> None:
        """Copy what was filled in `torch.inference_mode`, which nothing outside may write to. A static cache, whose
        buffers stay in place, remains in the mode that it was filled in."""
        keys = self.layers[0].keys if self.static_length is None else None
        if keys is not None and not is_torchdynamo_compiling() and not torch.is_inference_mode_enabled():
            if keys.is_inference():
                self._map_batch(torch.clone)

    def advance(self, tokens: int) -> None:
        """Count the new tokens."""
        if self.static_length is None:
            self.length += tokens
        else:
            self.length.add_(tokens)

    @property
    def is_recording(self) -> bool:
        return self.layers[0].record_past

    def activate_past_recording(self, **kwargs: Any) -> None:
        """Keep what `crop` needs, from now on and until the next `crop`. Takes what transformers (5.25) says about
        recurrent states, of which there are none."""
        if self.static_length is not None:
            raise ValueError("a static PLT cache cannot record its past: use a dynamic one")
        for layer in self.layers:
            layer.start_recording(self.length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        removed = -tokens_to_remove
        recording = self.is_recording
        if removed == 0 and not recording:
            return
        if self.static_length is not None:
            raise ValueError("a static PLT cache cannot be cropped: use a dynamic one")
        length = self.length - removed
        if length < 0:
            raise ValueError(f"cannot remove {removed} of {self.length} tokens")
        self._leave_inference_mode()
        self.carry.crop(removed)
        for layer in self.layers:
            layer.carry.crop(removed)
            layer.crop_window(removed, length)
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.static_length if self.static_length is not None else self.length + query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.static_length is None else self.static_length

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device) -> None:
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)
        self.prepare(torch.zeros((batch_size, 0, 0), dtype=dtype, device=device))

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self._leave_inference_mode()
        for layer in self.layers:
            layer.record_past, layer.past = False, None
            layer.carry.reset()
        self.carry.reset()
        self.length = 0 if self.static_length is None else self.length.zero_()

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map_batch(function)
        self.carry.map_batch(function, self.static_length is not None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def memory_bytes(self, allocated: bool = False) -> int:
        """Return the bytes of state: of the tokens held (rings are always whole), or of everything allocated."""
        total = 0 if self.carry.last is None else self.carry.last.nbytes
        for layer in self.layers:
            for tensor in layer.tensors():
                by_token = tensor is layer.keys or tensor is layer.values
                held = int(self.length) / max(tensor.shape[3], 1) if by_token and not allocated else 1.0
                total += round(tensor.nbytes * held)
        return total

    def __iter__(self):
        for layer in self.layers:
            yield layer.keys, layer.values, None


def unit_rms(hidden_states: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) over the last dimension, computed in fp32."""
    x = hidden_states.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(hidden_states.dtype)


class PLTRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * unit_rms(hidden_states, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class PLTRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary position embeddings in Llama's half-rotation convention, the same position in every loop."""

    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B or 1, T, 1, D] of positions [B or 1, T], in x's dtype; half of sin is negated, see
        `rotate`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        cos = (angles.cos() * self.attention_scaling).to(x.dtype)
        sin = (angles.sin() * self.attention_scaling).to(x.dtype)
        return torch.cat([cos, cos], -1).unsqueeze(2), torch.cat([-sin, sin], -1).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, T, heads, D]. `sin` has the sign of (-x2, x1), so swapping the halves is enough."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class _FoldedHeads:
    """Module attributes that an attention interface reads, for queries folded into rows of their key/value head."""

    is_causal = False

    def __init__(self, attention: "PLTAttention", groups: int):
        self.config = attention.config
        self.layer_idx = attention.layer_idx
        self.training = attention.training
        self.num_key_value_groups = groups
        self.modules = attention.modules


class PLTGate(nn.Module):
    """One scalar per head and token, gate_activation of a linear function (paper section 3, G-SWA).

    gate_input "query": weight [H, D] against the query after RoPE.
    gate_input "hidden": weight [H, d] against RMSNorm of the layer's input residual stream.
    """

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.from_hidden = config.gate_input == "hidden"
        self.activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[config.gate_activation]
        width = config.hidden_size if self.from_hidden else config.head_dim
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, width))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        if self.from_hidden:
            self.gate_norm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, query: Tensor, residual: Tensor) -> Tensor:
        """Gates [B, T, H, 1] from query [B, T, H, D] and residual [B, T, d]; computed in fp32."""
        if self.from_hidden:
            logits = F.linear(self.gate_norm(residual).float(), self.weight.float(), self.bias.float())
        else:
            logits = (query.float() * self.weight.float()).sum(-1) + self.bias.float()
        return self.activation(logits).to(query.dtype).unsqueeze(-1)


class PLTKeyShift(nn.Module):
    """Keys that come in part from the previous token, before RoPE; zero for the first token of a text.

    key_shift "heads": the keys of the second half of the key/value heads.
    key_shift "channels": in every key, the half of the channels that RoPE rotates slowly.
    key_shift "learned": k_t + a (k_(t-1) - k_t) and v_t + b (v_(t-1) - v_t), with one a and b per key/value head.
    """

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.form = config.key_shift
        if self.form == "learned":
            self.key = nn.Parameter(torch.zeros(config.num_key_value_heads))
            self.value = nn.Parameter(torch.zeros(config.num_key_value_heads))

    @staticmethod
    def width(config: PLTConfig) -> int:
        """Return P, how many numbers the next token takes from a token."""
        heads, dim = config.num_key_value_heads, config.head_dim
        sizes = {"none": 0, "heads": (heads - heads // 2) * dim, "channels": heads * dim // 2}
        return sizes.get(config.key_shift, 2 * heads * dim)

    def taken(self, key: Tensor, value: Tensor) -> Tensor:
        """Return what tokens hand on to the next, [B, T, P], from key and value [B, T, K, D]."""
        if self.form == "heads":
            return key[:, :, key.shape[2] // 2 :].flatten(2)
        if self.form == "channels":
            return key.unflatten(-1, (2, 2, -1))[..., 1, :].flatten(2)
        return torch.cat([key, value], -1).flatten(2)

    def forward(self, key: Tensor, value: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Combine key and value [B, T, K, D] with what the tokens before hand on, [B, T, P]."""
        batch, tokens, heads, dim = key.shape
        if self.form == "heads":
            kept = heads // 2
            return torch.cat([key[:, :, :kept], before.view(batch, tokens, heads - kept, dim)], 2), value
        if self.form == "channels":
            fast = key.unflatten(-1, (2, 2, -1))[..., 0, :]  # RoPE rotates pairs (i, i + D / 2)
            return torch.stack([fast, before.view(fast.shape)], -2).flatten(-3), value
        before_key, before_value = before.view(batch, tokens, heads, 2 * dim).split(dim, -1)
        # Under autocast parameters, normed keys and values differ in dtype; `lerp` takes one.
        pairs = ((key, before_key, self.key), (value, before_value, self.value))
        key, value = (torch.lerp(x, y.to(x.dtype), share[:, None].to(x.dtype)) for x, y, share in pairs)
        return key, value


class PLTAttention(nn.Module):
    """Causal attention in loop 1; in loops >= 2 the gated blend of first-loop attention and their own window.

    With `full_attention` "last_loop", causal attention in the last loop, and in those before it within a window.
    """

    def __init__(self, config: PLTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.norm_heads = config.norm_placement == "pre"
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            sizes = (self.head_dim, self.head_dim) if self.norm_heads else (query_size, kv_size)
            self.q_norm = PLTRMSNorm(sizes[0], config.rms_norm_eps)
            self.k_norm = PLTRMSNorm(sizes[1], config.rms_norm_eps)
        self.key_shift = None if config.key_shift == "none" else PLTKeyShift(config)
        gated = config.gated_window and config.loop_count > 1 and layer_idx in config.looped_layers
        self.plt_gate = PLTGate(config) if gated else None

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        shared_key: Tensor | None,
        shared_value: Tensor | None,
        state: PLTPass,
        cache: PLTCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Compute attention over normed hidden_states [B, T, d]; `residual` is the layer's input, for the gate.

        Returns the output [B, T, d], weights or None, and this pass's keys and values [B, K, T, D], which a
        first loop without a cache hands to the later ones as `shared_key` and `shared_value`.
        """
        query = rotate(self._heads(self.q_proj(hidden_states), self.q_norm), state.cos, state.sin)
        kv_input = self._kv_input(hidden_states, state)
        key = value = None
        if kv_input is not None:
            key, value = self._heads(self.k_proj(kv_input), self.k_norm), self._split(self.v_proj(kv_input))
            if cache is not None and not cache.layers[self.layer_idx].is_initialized:
                cache.layers[self.layer_idx].lazy_initialization(key.transpose(1, 2), value.transpose(1, 2))
            if self.key_shift is not None:
                key, value = self._shifted(key, value, state, cache)
            key = rotate(key, state.cos, state.sin)
        if state.loop is None or (cache is not None and query.shape[1] == 1):
            out, weights = self._step(query, key, value, residual, state, cache)
        else:
            key, value = (None, None) if key is None else (key.transpose(1, 2), value.transpose(1, 2))
            shared = None if shared_key is None else (shared_key, shared_value)
            out, weights = self._sequence(query, key, value, shared, residual, state, cache)
        return self.o_proj(out.flatten(2)), weights, key, value

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)

    def _heads(self, x: Tensor, norm: PLTRMSNorm | None) -> Tensor:
        """[B, T, heads * D] to [B, T, heads, D], normed."""
        if norm is None:
            return self._split(x)
        return norm(self._split(x)) if self.norm_heads else self._split(norm(x))

    def _shifted(self, key: Tensor, value: Tensor, state: PLTPass, cache: PLTCache | None) -> tuple[Tensor, Tensor]:
        """Combine key and value [B, T, K, D] with what the tokens before hand on."""
        taken = self.key_shift.taken(key, value)
        carry = None if cache is None else cache.layers[self.layer_idx].carry
        rows, loop = taken.shape[1], state.loop
        if loop is not None and (carry is None or rows > 1 or state.continues is not None):
            return self.key_shift(key, value, shift(taken, loop, state, carry))
        # One token, in all loops at once or in one: with as few operations as it takes.
        loops = slice(0, rows) if loop is None else slice(loop, loop + 1)
        before = carry.last if rows == carry.loops else carry.last[:, loops]
        combined = self.key_shift(key, value, before)  # a copy, since the carry is overwritten next
        carry.keep(taken.unsqueeze(1), loops, state)
        return combined

    def _kv_input(self, hidden_states: Tensor, state: PLTPass) -> Tensor | None:
        """Return the rows whose own keys and values are attended to: without a window, only the first loop's."""
        if not self.config.shares_values or self.config.gated_window or state.loop == 0:
            return hidden_states
        return hidden_states[:, :1] if state.loop is None else None

    def _blend(self, query: Tensor, residual: Tensor, y_local: Tensor, y_global: Tensor) -> Tensor:
        # Under autocast a normed query is in fp32 and attention's output is not; `lerp` takes one dtype.
        gate = self.plt_gate(query, residual).to(y_global.dtype)
        if self.config.gate_side == "local":
            return torch.lerp(y_global, y_local, gate)
        return torch.lerp(y_local, y_global, gate)

    # Many tokens of one loop: training, scoring, prefill.

    def _sequence(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        shared: tuple[Tensor, Tensor] | None,
        residual: Tensor,
        state: PLTPass,
        cache: PLTCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, T, H, D], key and value [B, K, T, D]; returns [B, T, H, D]."""
        windowed = state.windows.start <= state.loop < state.windows.stop  # dynamo cannot look a symbol up in a range
        if windowed and self.config.windows_earlier_loops:
            return self._window(query, key, value, state, cache), None
        keys, values = self._global_kv(key, value, shared, query.shape[1], state, cache)
        y, weights = self._attend(query, keys, values, state.global_mask, state)
        if not windowed:
            return y, weights
        return self._blend(query, residual, self._window(query, key, value, state, cache), y), weights

    def _window(self, query: Tensor, key: Tensor, value: Tensor, state: PLTPass, cache: PLTCache | None) -> Tensor:
        """Attend to the loop's own last w keys: query [B, T, H, D], key and value [B, K, T, D] to [B, T, H, D]."""
        prefix = None
        if cache is not None:
            layer, loops = cache.layers[self.layer_idx], slice(state.loop, state.loop + 1)
            prefix = layer.read_prefix(state.loop, state)
            layer.write_window(key.unsqueeze(1), value.unsqueeze(1), loops, state)
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
        if not _is_flash(self.config):
            return self._blocked_window(query, key, value, state)
        width = self.config.window_size
        return self._attend(query, key, value, state.window_mask, state, sliding_window=width)[0]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, state: PLTPass, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, T, H, D] against key and value [B, K, N, D], causal unless masked; returns [B, T, H, D]."""
        dropout = self.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling, "position_ids": state.position_ids}
        return self._interface()(self, query.transpose(1, 2), key, value, mask, **kwargs)

    def _global_kv(
        self,
        key: Tensor | None,
        value: Tensor | None,
        shared: tuple[Tensor, Tensor] | None,
        tokens: int,
        state: PLTPass,
        cache: PLTCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, K, N, D] that loop `state.loop` attends to in full."""
        if cache is None:
            if state.loop == 0 or not self.config.share_kv:
                return key, value
            return shared if self.config.share_values else (shared[0], value)
        layer = cache.layers[self.layer_idx]
        loops = slice(state.loop, state.loop + 1)
        if key is not None:
            layer.write(key.unsqueeze(1), value.unsqueeze(1), loops, state)
        keys, values = layer.read(loops, state, tokens)
        return keys[:, 0], values[:, 0]

    def _blocked_window(self, query: Tensor, key: Tensor, value: Tensor, state: PLTPass) -> Tensor:
        """Windowed attention in O(T * (block + w)): each block of queries against the keys it can reach.

        query [B, T, H, D]; key and value [B, K, <= w-1 + T, D]; window_mask [B, blocks, block, block + w - 1].
        """
        batch, tokens, heads, dim = query.shape
        mask, groups, kv_heads = state.window_mask, self.num_key_value_groups, key.shape[1]
        blocks, block, reach = mask.shape[1:]
        before = state.window - 1 - (key.shape[2] - tokens)
        after = blocks * block - tokens
        query = F.pad(query, (0, 0, 0, 0, 0, after)).view(batch, blocks, block, kv_heads, groups, dim)
        query = query.permute(0, 1, 3, 4, 2, 5).reshape(batch * blocks, kv_heads, groups * block, dim)

        def cut(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, before, after)).unfold(2, reach, block)
            return x.permute(0, 2, 1, 4, 3).reshape(batch * blocks, kv_heads, reach, dim)

        mask = mask[:, :, None].expand(batch, blocks, groups, block, reach)
        mask = mask.reshape(batch * blocks, 1, groups * block, reach)
        y, _ = self._attend_rows(query, cut(key), cut(value), mask)
        y = y.view(batch, blocks, kv_heads, groups, block, dim).permute(0, 1, 4, 2, 3, 5)
        return y.reshape(batch, blocks * block, heads, dim)[:, :tokens]

    # One token: all loops as rows, or one loop.

    def _step(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, residual: Tensor, state: PLTPass, cache: PLTCache
    ) -> tuple[Tensor, Tensor | None]:
        """One token of R loops: query [B, R, H, D], key and value [B, R, K, D]; returns [B, R, H, D].

        With shared KV the queries of all loops and heads of a group are rows against one read of the cache.
        """
        layer = cache.layers[self.layer_idx]
        first, rows = state.loop or 0, query.shape[1]
        loops = slice(first, first + rows)
        if key is not None:
            key, value = key.unsqueeze(3), value.unsqueeze(3)
            layer.write(key, value, loops, state)
        windowed, _ = overlap(state.windows, loops)
        own = self.config.windows_earlier_loops  # those rows attend to their window only
        full = windowed.stop if own else 0
        y = weights = None
        if full < rows:
            keys, values = layer.read(slice(first + full, loops.stop), state, 1)
            y, weights = self._full_rows(query[:, full:], keys, values, state.global_mask)
        if windowed.start == windowed.stop:
            return y, weights
        layer.write_window(key, value, loops, state)
        y_local, _ = self._own_rows(query[:, windowed], *layer.read_window(loops, state), state.window_mask)
        if own:
            return (y_local if y is None else torch.cat([y_local, y], 1)), weights
        blended = self._blend(query[:, windowed], residual[:, windowed], y_local, y[:, windowed])
        return (torch.cat([y[:, :1], blended], 1) if windowed.start else blended), weights

    def _full_rows(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, R, H, D] against keys and values [B, R or 1, K, N, D]."""
        if self.config.shares_values:
            return self._shared_rows(query, keys[:, 0], values[:, 0], mask)
        return self._own_rows(query, keys.expand(-1, query.shape[1], -1, -1, -1), values, mask)

    def _shared_rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, R, H, D] against one key and value [B, K, N, D]."""
        batch, rows, heads, dim = query.shape
        kv_heads, groups = key.shape[1], self.num_key_value_groups
        query = query.view(batch, rows, kv_heads, groups, dim).transpose(1, 2)
        y, weights = self._attend_rows(query.reshape(batch, kv_heads, rows * groups, dim), key, value, mask)
        y = y.view(batch, kv_heads, rows, groups, dim).transpose(1, 2).reshape(batch, rows, heads, dim)
        if weights is not None:
            weights = weights.view(batch, kv_heads, rows, groups, -1).transpose(2, 3).flatten(1, 2)
        return y, weights

    def _own_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """query [B, R, H, D], each row against its own key and value [B, R, K, N, D]."""
        batch, rows, heads, dim = query.shape
        query = query.reshape(batch * rows, key.shape[2], self.num_key_value_groups, dim)
        y, weights = self._attend_rows(query, key.flatten(0, 1), value.flatten(0, 1), mask)
        if weights is not None:
            weights = weights.view(batch, rows, heads, -1).transpose(1, 2)
        return y.reshape(batch, rows, heads, dim), weights

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """query [X, K, R, D] against key and value [X, K, N, D], not causal; returns [X, K, R, D]."""
        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa":
            # The interface's function would copy to [X, R, K, D] and repeat K/V under torch.compile.
            y = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scaling)
            return y, None
        kwargs = {"dropout": dropout, "scaling": self.scaling, "is_causal": False}
        if not _is_flash(self.config):
            y, weights = self._interface()(_FoldedHeads(self, 1), query, key, value, mask, **kwargs)
            return y.transpose(1, 2), weights
        # Flash attention unpads single queries: rows go into heads, which it folds back itself.
        batch, kv_heads, rows, dim = query.shape
        query = query.reshape(batch, kv_heads * rows, 1, dim)
        y, _ = self._interface()(_FoldedHeads(self, rows), query, key, value, mask, **kwargs)
        return y.reshape(batch, kv_heads, rows, dim), None

    def _interface(self) -> Callable:
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)


def _is_flash(config: PLTConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


class PLTMLP(nn.Module):
    """down(act(gate(x)) * up(x)), as in Llama."""

    def __init__(self, config: PLTConfig, intermediate_size: int | None = None):
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PLTRouter(nn.Module):
    """Logits of the experts, and the bias for choosing them, or None.

    Offloading loads a module's weights when that module is called, so nothing else may read them. This is not an
    `nn.Linear`, since quantization and adapters replace those.
    """

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        # Balances the load without a loss: it affects the choice, not the weights. The name is DeepSeek-V3's.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.use_routing_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows [T, d] to logits [T, experts], in fp32, and the bias [experts]."""
        return F.linear(rows.float(), self.weight.float()), self.e_score_correction_bias


class PLTMoE(nn.Module):
    """A mixture of experts: each row goes to the `num_experts_per_tok` that the gate prefers, and to the shared expert.

    A row is a token in one loop: each loop of a token chooses for itself. No row is dropped.
    """

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.gate = PLTRouter(config)
        self.experts = nn.ModuleList(PLTMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        shared = config.shared_expert_intermediate_size
        self.shared_expert = PLTMLP(config, shared) if shared else None

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, d] to the experts' weights, in fp32, and their indices, both [T, top_k]."""
        logits, bias = self.gate(rows)
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(-1)
        chosen = (scores if bias is None else scores + bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights, chosen

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, d] to the same."""
        rows = hidden_states.flatten(0, 1)
        weights, chosen = self.route(rows)
        # Sort rows by expert: each expert that is used at all runs once.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(rows)
        # DDP expects a gradient of every expert, zero too; ZeRO-3 gathers weights in one order on all ranks.
        every = torch.is_grad_enabled() or hasattr(next(self.experts.parameters(), None), "ds_id")
        for expert, assigned in zip(self.experts, order.split(counts), strict=True):
            if len(assigned) or every:
                row = assigned // self.top_k
                weighted = expert(rows[row]) * weights.flatten()[assigned].to(rows.dtype).unsqueeze(-1)
                out = out.index_add(0, row, weighted)
        if self.shared_expert is not None:
            out = out + self.shared_expert(rows)
        return out.view(hidden_states.shape)


class PLTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP with their residuals; one set of weights for every loop."""

    def __init__(self, config: PLTConfig, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        pre = config.norm_placement == "pre"
        self.residual_scale = config.residual_scale
        self.self_attn = PLTAttention(config, layer_idx)
        experts = config.num_experts is not None and layer_idx >= config.first_k_dense_replace
        self.mlp = PLTMoE(config) if experts else PLTMLP(config)
        self.input_layernorm = PLTRMSNorm(size, eps) if pre else None
        self.post_attention_layernorm = PLTRMSNorm(size, eps)
        self.post_feedforward_layernorm = PLTRMSNorm(size, eps) if not pre or config.ffn_output_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        shared_key: Tensor | None = None,
        shared_value: Tensor | None = None,
        state: PLTPass | None = None,
        cache: PLTCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states [B, T, d] to the same, and the pass's keys and values [B, K, T, D] or None."""
        pre = self.input_layernorm is not None
        attention_input = self.input_layernorm(hidden_states) if pre else hidden_states
        out, _, key, value = self.self_attn(
            attention_input, hidden_states, shared_key, shared_value, state=state, cache=cache
        )
        if not pre:
            out = self.post_attention_layernorm(out)
        hidden_states = self._add(hidden_states, out)
        out = self.mlp(self.post_attention_layernorm(hidden_states) if pre else hidden_states)
        if self.post_feedforward_layernorm is not None:
            out = self.post_feedforward_layernorm(out)
        return self._add(hidden_states, out), key, value

    def _add(self, residual: Tensor, out: Tensor) -> Tensor:
        return residual + out if self.residual_scale == 1.0 else residual + self.residual_scale * out


class PLTLoopInput(nn.Module):
    """Input of loops >= 2: embedding_scale * E + hidden_scale * N(h), N the identity or the division by the RMS."""

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.embedding_scale, self.norm, self.eps = config.embedding_scale, config.hidden_norm, config.rms_norm_eps
        self.initial = self.hidden_scale = config.hidden_scale
        if config.learned_hidden_scale != "none" and config.loop_count > 1:
            size = config.hidden_size if config.learned_hidden_scale == "channel" else 1
            self.hidden_scale = nn.Parameter(torch.full((size,), self.initial))

    def forward(self, embeds: Tensor, hidden_states: Tensor) -> Tensor:
        """E and h (already shifted with cross_loop_parallel), [B, T, d] to the same."""
        if self.norm:
            hidden_states = unit_rms(hidden_states, self.eps)
        a, b = self.embedding_scale, self.hidden_scale
        return _scaled(embeds, a) + _scaled(hidden_states, b)


def _scaled(x: Tensor, scale: Any) -> Tensor:
    return x if isinstance(scale, float) and scale == 1.0 else scale * x


# Name endings of tensors that do not come from a quantization method.
_PLAIN = (".weight", ".bias", "_bias", ".hidden_scale", ".key_shift.key", ".key_shift.value")


class PLTPreTrainedModel(PreTrainedModel):
    config: PLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLTDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {"hidden_states": PLTDecoderLayer, "attentions": PLTAttention}

    def __init__(self, config: PLTConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.loop_count == 1:
            # A PLT loaded as a plain transformer has no use for its gates and its scale of h.
            self._keys_to_ignore_on_load_unexpected = [r"\.plt_gate\.", r"\bloop_input\.hidden_scale$"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load like transformers, but raise an error where it only warns that it makes up tensors or leaves some out.

        Raises:
            ValueError: the files lack tensors of the model, or have others of its modules; the message names them.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not getattr(model, "_hf_peft_config_loaded", False):  # otherwise the info is the adapter's
            model._check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def _check_loaded(self, info: dict[str, Any], source: Any) -> None:
        missing, own = set(info["missing_keys"]), self.state_dict().keys()
        # A quantization method may make further tensors itself: a module is missing if none of its tensors is there.
        read = {name.rpartition(".")[0] for name in own - missing}
        missing = {name for name in missing if name.endswith(_PLAIN) or name.rpartition(".")[0] not in read}
        # Tensors that others add beside the model's parts, such as a value head, are not checked.
        parts = {self.base_model_prefix, *(name.partition(".")[0] for name in own)}
        unexpected = {
            name for name in info["unexpected_keys"] if name.endswith(_PLAIN) and name.partition(".")[0] in parts
        }
        for names, fault in ((missing, "lacks"), (unexpected, "has unknown")):
            if names:
                first = ", ".join(sorted(names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"{source}: {fault} tensors of {type(self).__name__}: {first}{more}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (PLTGate, PLTKeyShift)):  # gates start half and half, like LoopCoder-v2's
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)
        if isinstance(module, PLTRouter):
            init.normal_(module.weight, std=self.config.initializer_range or 0.02)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        if isinstance(module, PLTLoopInput) and isinstance(module.hidden_scale, nn.Parameter):
            init.constant_(module.hidden_scale, module.initial)


class PLTModel(PLTPreTrainedModel):
    """The embedding, the looped layer stack and the final norm.

    `prefill_chunk_size` (an attribute) bounds the tokens that go through the loops at once when a cache is
    filled, so that memory grows with n and not with n * n.
    """

    prefill_chunk_size = 2048

    def __init__(self, config: PLTConfig):
        super().__init__(config)
        config.check()
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PLTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = PLTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = PLTRotaryEmbedding(config)
        self.loop_input = PLTLoopInput(config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self, max_cache_len: int | None = None, loop_count: int | None = None) -> PLTCache:
        """Create an empty cache for this model: growing, or static if `max_cache_len` is given."""
        return PLTCache(self.config, max_cache_len, self._loop_count(loop_count))

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: PLTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        loop_count: int | None = None,
        loop_mode: str | None = None,
        past_key_values: PLTCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the loops over new tokens [B, T].

        Args:
            attention_mask: [B, N] over cached and new tokens, 0 at padding. A token after padding starts
                afresh: `shift` gives it a zero vector.
            position_ids: [B or 1, T]; None: counted without padding. Without a cache, a token whose position
                does not follow the one before it starts a new (packed) document, which attends to and receives
                nothing from the others.
            use_cache: None: the configuration's, except while gradients are recorded. A cache is for
                inference: with one, no gradients are recorded.
            loop_count: loops to run, at most the configuration's.
            loop_mode: how a step of one cached token runs: "parallel" (the default where cross_loop_parallel
                allows it) or "serial", one loop after the other.
            past_key_values: `cache` under its name before transformers 5.24.

        Hidden states recorded by `output_hidden_states` are one [B, T, d] per layer and loop; in a parallel
        step one [B, L, d] per layer. `output_attentions` records attention to the whole context, not to windows.
        """
        loops = self._loop_count(loop_count)
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("cache and past_key_values are two names of one argument: give one")
            cache = past_key_values
        self._check_cache(cache, loops)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if loop_mode not in (None, "parallel", "serial"):
            raise ValueError(f'loop_mode must be "parallel" or "serial", not {loop_mode!r}')
        if loop_mode == "parallel" and loops > 1 and not self.config.cross_loop_parallel:
            raise ValueError('loop_mode "parallel" needs cross_loop_parallel: this model\'s loops wait for each other')
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be [batch, tokens], not of {attention_mask.ndim} dimensions")
        if position_ids is None and any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
            raise ValueError("packed documents need position_ids")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        documents = None
        if cache is None:
            documents = _documents(position_ids, attention_mask)
            cache = self._new_cache_if_wanted(use_cache, loops, documents is not None)
        with nullcontext() if cache is None else torch.no_grad():
            hidden_states = self._run(
                inputs_embeds, attention_mask, position_ids, cache, documents, loops, loop_mode, kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _loop_count(self, loop_count: int | None) -> int:
        most = self.config.loop_count
        if loop_count is None:
            return most
        if not isinstance(loop_count, int) or not 1 <= loop_count <= most:
            raise ValueError(f"loop_count must be from 1 to this model's {most}, not {loop_count!r}")
        return loop_count

    def _new_cache_if_wanted(self, use_cache: bool | None, loops: int, packed: bool) -> PLTCache | None:
        if torch.is_grad_enabled() and self.training:
            # Training drops the cache, like everywhere in transformers: Trainer passes use_cache freely.
            use_cache = False
        if packed and use_cache:
            raise ValueError(
                "packed documents cannot be cached: use_cache must be False (a compiled call takes any position_ids "
                "for those of packed documents: leave them out)"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled() and not packed
        return PLTCache(self.config, loop_count=loops) if use_cache else None

    def _check_cache(self, cache: Any, loops: int) -> None:
        if cache is None:
            return
        if not isinstance(cache, PLTCache):
            raise ValueError(f"a PLT decodes with a PLTCache (model.new_cache()), not with {type(cache).__name__}")
        if cache.loop_count != loops:
            raise ValueError(f"the cache was filled with {cache.loop_count} loops, but {loops} are requested")
        if cache.static_length is not None and _is_flash(self.config):
            raise ValueError("a static PLT cache works with sdpa or eager attention, not with flash attention")

    def _run(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PLTCache | None,
        documents: Tensor | None,
        loops: int,
        loop_mode: str | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        tokens = embeds.shape[1]
        recorded = [
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        ]
        chunk = tokens if cache is None or any(recorded) else self.prefill_chunk_size
        if tokens <= chunk:
            return self._run_chunk(embeds, attention_mask, position_ids, cache, documents, loops, loop_mode)
        outputs = []
        known = None if attention_mask is None else attention_mask.shape[1]
        for begin in range(0, tokens, chunk):
            end = min(begin + chunk, tokens)
            seen = None if known is None else attention_mask[:, : known - (tokens - end)]
            positions = None if position_ids is None else position_ids[:, begin:end]
            outputs.append(self._run_chunk(embeds[:, begin:end], seen, positions, cache, None, loops, loop_mode))
        return torch.cat(outputs, 1)

    def _run_chunk(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PLTCache | None,
        documents: Tensor | None,
        loops: int,
        loop_mode: str | None,
    ) -> Tensor:
        if cache is not None:
            cache.prepare(embeds)
        layout = _Layout(self.config, embeds, attention_mask, cache, documents)
        if position_ids is None:
            position_ids = layout.positions()
        step = cache is not None and layout.tokens == 1
        parallel = step and loops > 1 and self.config.cross_loop_parallel and loop_mode != "serial"
        cos, sin = self.rotary_emb(embeds, position_ids)
        state = PLTPass(
            loop=None if parallel else 0,
            loop_count=loops,
            windows=self.config.window_loops(loops),
            cos=cos,
            sin=sin,
            start=layout.start,
            position_ids=position_ids if documents is not None else None,
            records_past=cache is not None and cache.is_recording,
        )
        layout.fill(state, loops, parallel, step)
        embeds = self._once(range(self.config.looped_layers.start), embeds, state, cache)
        run = self._parallel_step if parallel else self._loop_by_loop
        return run(embeds, state, cache)

    def _once(self, layers: range, hidden_states: Tensor, state: PLTPass, cache: PLTCache | None) -> Tensor:
        """Run new tokens [B, T, d] through layers that do not loop."""
        device, state = hidden_states.device, state.once()
        for index in layers:
            hidden_states = self.layers[index](hidden_states, state=state, cache=cache)[0]
        return hidden_states.to(device)

    def _close(self, hidden_states: Tensor, state: PLTPass, cache: PLTCache | None) -> Tensor:
        """Run h(L) of new tokens [B, T, d] through the layers after those that loop, and the final norm."""
        coda = range(self.config.looped_layers.stop, len(self.layers))
        return self.norm(self._once(coda, hidden_states, state, cache))

    def _parallel_step(self, embeds: Tensor, state: PLTPass, cache: PLTCache) -> Tensor:
        """Run every loop of one token at once: row 1 is e_i, row l is e_i plus the carried h(l-1) of position i-1."""
        # A device map may put `loop_input` and `norm` on the last layers' device: both return here.
        later = self.loop_input(embeds, cache.carry.last).to(embeds.device)
        hidden_states = torch.cat([embeds, later], 1)
        for index in self.config.looped_layers:
            hidden_states = self.layers[index](hidden_states, state=state, cache=cache)[0]
        hidden_states = hidden_states.to(embeds.device)
        carries, last = hidden_states[:, :-1], hidden_states[:, -1:]
        last = self._close(last, state, cache)
        if self.config.norm_between_loops:
            carries = self.norm(carries).to(embeds.device)
        cache.carry.keep(carries.unsqueeze(1), slice(None), state)
        cache.advance(1)
        return last

    def _loop_by_loop(self, embeds: Tensor, state: PLTPass, cache: PLTCache | None) -> Tensor:
        """Run new tokens [B, T, d] one loop after the other, or each layer's loops before the next layer's; return the
        normed output of the last."""
        looped, loops = self.config.looped_layers, range(state.loop_count)
        order = [(loop, looped) for loop in loops]
        if self.config.loop_order == "layer":
            order = [(loop, (index,)) for index in looped for loop in loops]
        shared: list[tuple[Any, Any]] = [(None, None)] * len(self.layers)
        hidden_states = embeds
        for loop, layers in order:
            if loop:
                hidden_states = self._next_input(embeds, hidden_states, loop, state, cache)
            state = replace(state, loop=loop)
            for index in layers:
                hidden_states, key, value = self.layers[index](hidden_states, *shared[index], state=state, cache=cache)
                if loop == 0 and cache is None and self.config.share_kv:
                    shared[index] = (key, value)
        hidden_states = self._close(hidden_states.to(embeds.device), state, cache)
        if cache is not None:
            cache.advance(embeds.shape[1])
        return hidden_states

    def _next_input(
        self, embeds: Tensor, hidden_states: Tensor, loop: int, state: PLTPass, cache: PLTCache | None
    ) -> Tensor:
        """Return the input of loop `loop` (from 0): `PLTLoopInput` of E and shift(h) or h, or h itself."""
        if self.config.norm_between_loops:
            hidden_states = self.norm(hidden_states)
        if self.config.cross_loop_parallel:
            carry = None if cache is None else cache.carry
            hidden_states = shift(hidden_states.to(embeds.device), loop - 1, state, carry)
        elif not self.config.input_injection:
            return hidden_states
        return self.loop_input(embeds, hidden_states)


def _documents(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Return the index of each token's packed document [B or 1, T], or None if there is only one. Padding separates
    nothing."""
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    starts = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        real = attention_mask.bool()
        starts = starts & real[:, 1:] & real[:, :-1]
    if not is_torchdynamo_compiling() and not starts.any():
        return None
    return F.pad(starts.cumsum(-1), (1, 0))


class _Layout:
    """Visibility between cached and new tokens, built once per pass for all layers and loops.

    `segments` [B or 1, N] numbers documents and is -1 at padding, None if every token is one real document.
    Tokens of one segment see each other (padding sees padding: no row of a softmax is empty).
    """

    def __init__(
        self,
        config: PLTConfig,
        embeds: Tensor,
        attention_mask: Tensor | None,
        cache: PLTCache | None,
        documents: Tensor | None,
    ):
        self.config = config
        self.device, self.dtype = embeds.device, embeds.dtype
        self.batch, self.tokens = embeds.shape[:2]
        self.cache = cache
        self.static = cache is not None and cache.static_length is not None
        self.start = 0 if cache is None else cache.get_seq_length()
        self.total = cache.static_length if self.static else self.start + self.tokens
        self.slots = self.start + torch.arange(self.tokens, device=self.device)
        self.segments = self._segments(attention_mask, documents)
        self.new_segments = None  # [B or 1, T]
        if self.segments is not None:
            self.new_segments = self.segments[:, self.slots] if self.static else self.segments[:, -self.tokens :]

    def _rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Return which new tokens are not padding, and which follow a token of their text: [B or 1, T, 1] each, None if
        all do. The first new token continues the cache, whose carries are zero after padding, or nothing."""
        if self.new_segments is None:
            return None, None
        segments = self.new_segments
        real = (segments >= 0).unsqueeze(-1)
        if self.tokens == 1:
            return real, None
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
        return real, F.pad(same, (1, 0), value=True).unsqueeze(-1)

    def _segments(self, mask: Tensor | None, documents: Tensor | None) -> Tensor | None:
        if mask is not None:
            mask = self._whole_mask(mask.to(self.device))
            if not self.static and not is_torchdynamo_compiling() and mask.all():
                mask = None
        self.padded = mask is not None
        if documents is not None:
            segments = documents.to(self.device)
            return segments if mask is None else segments.masked_fill(~mask, -1)
        if mask is not None:
            return mask.long() - 1
        # A static cache has slots that are not written yet: its masks are never None.
        return torch.zeros((1, self.total), dtype=torch.long, device=self.device) if self.static else None

    def _whole_mask(self, mask: Tensor) -> Tensor:
        known = mask.shape[1]
        if mask.shape[0] != self.batch:
            raise ValueError(f"attention_mask has {mask.shape[0]} sequences, the input {self.batch}")
        if self.static and known <= self.total:
            return F.pad(mask, (0, self.total - known), value=1).bool()
        if known != self.total:
            raise ValueError(f"attention_mask covers {known} tokens, cache and input hold {self.total}")
        return mask.bool()

    def positions(self) -> Tensor:
        """Return positions [B or 1, T] of the new tokens without padding: the gate sees absolute positions."""
        if not self.padded:
            return self.slots[None]
        counted = (self.segments >= 0).cumsum(-1) - 1
        return counted.clamp(min=0).index_select(1, self.slots)

    def fill(self, state: PLTPass, loops: int, parallel: bool, step: bool) -> None:
        """Fill in the masks and slots of the pass."""
        state.real, state.continues = self._rows()
        state.slots = self.slots if self.cache is not None else None
        if state.windows and self.cache is not None:
            width = self.config.window_size
            state.ring_slots = self.slots[-min(width, self.tokens) :] % width
        if _is_flash(self.config):
            self._fill_flash(state, parallel, step, loops)
            return
        state.global_mask = state.once_mask = self._for_attention(self._global_mask(step))
        if parallel and state.global_mask is not None:
            state.global_mask = self._each_full(state.global_mask, loops)
        if not state.windows:
            return
        if step:
            mask = self._for_attention(self._ring_mask())
            state.window_mask = _each(mask, loops - 1) if parallel and mask is not None else mask
        else:
            state.window_mask = self._for_attention(self._block_mask(state))

    def _each_full(self, mask: Tensor, loops: int) -> Tensor:
        """Repeat a mask for the rows of a parallel step that attend in full, each to keys or values of its own."""
        return mask if self.config.shares_values or self.config.windows_earlier_loops else _each(mask, loops)

    def _for_attention(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)

    def _global_mask(self, step: bool) -> Tensor | None:
        """Return [B or 1, 1, T, N]: causal, within a segment. None: everything, or causal by the kernel's own flag."""
        if self.segments is None and (step or (self.start == 0 and self.config._attn_implementation == "sdpa")):
            return None
        keys = torch.arange(self.total, device=self.device)
        mask = (keys <= self.slots[:, None])[None]
        if self.segments is not None:
            mask = mask & (self.segments[:, None, :] == self.new_segments[:, :, None])
        return mask[:, None]

    def _ring_mask(self) -> Tensor | None:
        """Return [B or 1, 1, 1, <= w]: ring slots that hold a token of this segment. None: all that are filled."""
        if self.segments is None:
            return None
        width = self.config.window_size
        slots = torch.arange(width if self.static else min(self.total, width), device=self.device)
        held = self.slots - (self.slots - slots) % width  # the token in each slot, < 0: none yet
        mask = (self.segments[:, held.clamp(min=0)] == self.new_segments) & (held >= 0)
        return mask[:, None, None]

    def _prefix(self, state: PLTPass) -> int:
        """Set the ring slots of the tokens before this pass, and return how many there are."""
        width = self.config.window_size
        if self.cache is None or width == 1:
            return 0
        count = width - 1 if self.static else min(self.start, width - 1)
        if count:
            state.prefix_slots = (self.start - count + torch.arange(count, device=self.device)) % width
        return count

    def _block_mask(self, state: PLTPass) -> Tensor:
        """Return [B or 1, blocks, block, block + w - 1]: query i of a block sees keys i..i+w-1 of its segment."""
        prefix = self._prefix(state)
        width = self.config.window_size if prefix else min(self.config.window_size, self.tokens)
        state.window = width
        block = min(self.tokens, max(width, WINDOW_BLOCK))
        blocks = -(-self.tokens // block)
        segments = self.new_segments
        if segments is None:
            segments = torch.zeros((1, self.tokens), dtype=torch.long, device=self.device)
        before = self._segments_before(width - 1, prefix)
        after = blocks * block - self.tokens
        keys = torch.cat([before.expand(segments.shape[0], -1), F.pad(segments, (0, after), value=-1)], 1)
        keys = keys.unfold(1, block + width - 1, block)
        queries = F.pad(segments, (0, after), value=-1).view(-1, blocks, block)
        offset = torch.arange(block + width - 1, device=self.device) - torch.arange(block, device=self.device)[:, None]
        band = (offset >= 0) & (offset < width)
        # Padding sees itself at least, so that no row is empty.
        return band & ((keys[:, :, None, :] == queries[:, :, :, None]) | (offset == width - 1))

    def _segments_before(self, count: int, prefix: int) -> Tensor:
        """Return segments [B or 1, count] of the tokens before this pass, -1 where there is none."""
        positions = self.start - count + torch.arange(count, device=self.device)
        if self.segments is None:
            return torch.where(positions >= 0, 0, -1)[None]
        if not prefix:
            return torch.full((1, count), -1, dtype=torch.long, device=self.device)
        return self.segments[:, positions.clamp(min=0)].masked_fill(positions < 0, -1)

    def _fill_flash(self, state: PLTPass, parallel: bool, step: bool, loops: int) -> None:
        if state.position_ids is not None:
            if self.batch > 1:
                raise ValueError(
                    "packed documents with flash attention need batch size 1 (a compiled call takes any position_ids "
                    "for those of packed documents: leave them out)"
                )
        elif self.segments is not None:
            state.global_mask = state.once_mask = self.segments >= 0
        prefix = self._prefix(state) if state.windows and not step else 0
        if state.global_mask is None:
            return
        mask = state.global_mask
        if state.windows and not step:
            state.window_mask = mask[:, mask.shape[1] - self.tokens - prefix :]
        elif state.windows:
            state.window_mask = self._ring_mask()[:, 0, 0]
            state.window_mask = _each(state.window_mask, loops - 1) if parallel else state.window_mask
        if parallel:
            state.global_mask = self._each_full(mask, loops)


def _each(mask: Tensor, times: int) -> Tensor:
    """Repeat a mask for the loops of each sequence; one that all sequences share broadcasts."""
    return mask if mask.shape[0] == 1 else mask.repeat_interleave(times, 0)


class PLTForCausalLM(PLTPreTrainedModel, GenerationMixin):
    """PLT with a language-model head: the loss is on the last loop's logits only (paper section 3)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PLTConfig):
        super().__init__(config)
        self.model = PLTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, max_cache_len: int | None = None, loop_count: int | None = None) -> PLTCache:
        """Create an empty cache for this model: growing, or static if `max_cache_len` is given."""
        return self.model.new_cache(max_cache_len, loop_count)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: PLTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loop_count: int | None = None,
        loop_mode: str | None = None,
        past_key_values: PLTCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, vocab] of the last loop, and the loss if there are `labels` [B, T] (-100: ignored).

        The other arguments are `PLTModel`'s.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            loop_count=loop_count,
            loop_mode=loop_mode,
            past_key_values=past_key_values,
            **kwargs,
        )
        cache = getattr(outputs, CACHE_NAME)
        # If the layers record no gradient, the head must not either: it alone would learn.
        with nullcontext() if cache is None else torch.no_grad():
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Which experts run is known only at run time: each choice of them would be compiled anew."""
        return self.config.num_experts is None and super()._valid_auto_compile_criteria(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """An assistant has loops of its own, or none: transformers would hand it this call's arguments."""
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(
                "transformers' assisted generation would put the whole prompt into a cache that has a part of it: "
                "leave out past_key_values, or the assistant"
            )
        own = {name: value for name, value in model_kwargs.items() if name not in ("loop_count", "loop_mode")}
        return super()._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Make `generate` decode with a `PLTCache`; its other caches cannot hold a PLT's state."""
        if generation_config.assistant_early_exit is not None:
            # transformers would lower num_hidden_layers for the draft: that changes its cache; all layers still run.
            raise ValueError(
                "a PLT has no assistant_early_exit: load the model with loop_count=1 and give that as assistant_model"
            )
        given = model_kwargs.get(CACHE_NAME)
        if given is not None or generation_config.use_cache is False:
            length = getattr(given, "static_length", None)
            if length is not None and max_cache_length > length:
                raise ValueError(
                    f"the static cache holds {length} tokens, and this call needs {max_cache_length}: give "
                    "model.new_cache() as many"
                )
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f'cache_implementation must be "dynamic" or "static" for a PLT, not {kind!r}')
        length = None
        if kind == "static":
            wanted = (max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            length = max(*wanted, getattr(self, "_previous_max_cache_length", 0))
            self._previous_max_cache_length = length
        cache = self.new_cache(length, model_kwargs.get("loop_count"))
        one_device = len(set(getattr(self, "hf_device_map", {"": 0}).values())) == 1
        known = one_device and not torch.is_autocast_enabled(self.device.type)  # the keys' device and dtype
        if length is not None and generation_config.prefill_chunk_size is not None and known:
            # On a GPU the first chunk is compiled, and buffers made in a graph cannot be marked as static.
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            heads, dim = self.config.num_key_value_heads, self.config.head_dim
            cache.early_initialization(rows, heads, dim, self.dtype, self.device)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it by name: its worker would only log that its cache is not a `PLTCache`, and return no tokens."""
        raise ValueError("transformers' continuous batching cannot hold a PLT's state: use generate, or vLLM")

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Extend the mask to a static cache's full length from the start, so that a step compiles once."""
        cache = kwargs.get(CACHE_NAME)
        if attention_mask is None or cache is None or cache.static_length is None:
            return attention_mask
        return F.pad(attention_mask, (0, cache.static_length - attention_mask.shape[1]), value=1)


# This makes `save_pretrained` ship this file and its configuration, and write `auto_map`.
PLTConfig.register_for_auto_class()
PLTModel.register_for_auto_class("AutoModel")
PLTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# With label smoothing, Trainer shifts labels for classes named here alone; others would learn to repeat their input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(PLTConfig.model_type, "PLTForCausalLM")

__all__ = ["PLTCache", "PLTForCausalLM", "PLTModel", "PLTPreTrainedModel"]
