"""The carry: the state that each token hands on to the next, stored in vLLM's paged KV cache.

It consists of h(1..L-1), with cross-loop parallelism, and of the previous token's keys (and values) that shifted keys
use (`key_shift`). In pages it is shared by prefix caching and survives preemption, chunked prefill and transfers, as
K and V do.

vLLM gives all KV cache groups blocks of one size, and forms groups of as many layers as the smallest kind has, or the
largest where kinds are nearly as large (`memory.layers_of_a_group`). The carry is therefore cut into as many slices as
the model has layers, each registered as a layer: groups then have equal sizes and a request keeps one block of carries.
`slices_of_a_carry` takes a multiple of that number where a slice would be wider than an attention layer's page, and
fewer where some layers run once.
"""

from dataclasses import dataclass
from itertools import count as count_from

import torch
from torch import nn

from vllm_plt.carry_cache import CarrySpec
from vllm_plt.memory import slices_of_a_carry
from vllm_plt.settings import check_cache_manager
from vllm_plt.vllm_internals import (
    Attention,
    AttentionBackend,
    AttentionCGSupport,
    AttentionLayerBase,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    VllmConfig,
    attention_page_bytes,
    metadata_of,
    register_layer,
)


@dataclass
class CarryMetadata:
    """Attention metadata of a carry: references to the runner's buffers, so that a replayed graph sees current values.

    Attributes:
        query_start_loc: [R + 1], first token of each of the step's requests.
        seq_lens: [R], tokens of each request, this step's included.
        block_table: [R, blocks].
        slot_mapping: [T], -1 for padding.
        max_query_len: most tokens that a request has in this step.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int


class CarryMetadataBuilder(AttentionMetadataBuilder[CarryMetadata]):
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CarryMetadata:
        common = common_attn_metadata
        return CarryMetadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.max_query_len,
        )


class CarryBackend(AttentionBackend):
    """Attention backend with pages and metadata but no kernel."""

    @staticmethod
    def get_name() -> str:
        return "PLT_CARRY"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("carries are not attended to")

    @staticmethod
    def get_builder_cls():
        return CarryMetadataBuilder


class CarrySlice(nn.Module, AttentionLayerBase):
    """One slice of the carry, which vLLM's model runner treats as an attention layer with its own KV cache.

    Args:
        views: emptied when the runner sets or takes away the cache. It measures CUDA graphs with a cache that it frees
            before it allocates the real one; views would keep it.
    """

    def __init__(
        self,
        name: str,
        width: int,
        is_read_at_once: bool,
        attention: Attention,
        views: list[tuple[str, torch.Tensor]],
        vllm_config: VllmConfig,
    ):
        super().__init__()
        self.views = views
        self.name = name
        self.width = width
        self.is_read_at_once = is_read_at_once
        self.dtype = vllm_config.model_config.dtype
        self.like = (attention,)  # in a tuple, so that its weights are not registered as this layer's
        self.kv_cache = torch.tensor([])
        register_layer(name, self, vllm_config)

    @property
    def kv_cache(self) -> torch.Tensor:
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, cache: torch.Tensor) -> None:
        self._kv_cache = cache
        self.views.clear()

    def get_attn_backend(self) -> type[AttentionBackend]:
        return CarryBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> CarrySpec:
        return CarrySpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            head_size_v=0,
            dtype=self.dtype,
            sliding_window=2,
            page_size_padded=attention_page_bytes(*self.like, vllm_config),
            is_read_at_once=self.is_read_at_once,
        )


HIDDEN, KEYS = "hidden", "keys"
PRELUDE_KEYS, CODA_KEYS = "prelude's keys", "coda's keys"


class Carry(nn.Module):
    """Reader and writer of the carried states of a step's tokens.

    Args:
        states: kind of state -> (vectors per token, their width). `HIDDEN` is h(1..L-1); `KEYS` is what the shifted
            keys of all looped layers use, one vector per loop; `PRELUDE_KEYS` and `CODA_KEYS` are the same for layers
            that run once.
        loops: L.
        attention: one of the model's attention layers, which gives the page size.
        first_number: first layer number of the slices; vLLM identifies a layer by the one number in its name.
    """

    def __init__(
        self,
        states: dict[str, tuple[int, int]],
        loops: int,
        attention: Attention,
        prefix: str,
        first_number: int,
        config: VllmConfig,
    ):
        super().__init__()
        check_cache_manager(config)  # again: vLLM derives a connector from some options later
        self.states = states
        token_bytes = attention_page_bytes(attention, config) // config.cache_config.block_size
        room = token_bytes // config.model_config.dtype.itemsize
        slices = slices_of_a_carry(
            config.model_config.hf_config, loops, next(few for few in count_from(1) if self._width(few) <= room)
        )
        self.parts, width = self._parts(slices), self._width(slices)
        self._views: list[tuple[str, torch.Tensor]] = []
        # A loop's shifted keys are read before any of this step's are written.
        self.slices = nn.ModuleList(
            CarrySlice(f"{prefix}.carry.{first_number + index}", width, KEYS in states, attention, self._views, config)
            for index in range(slices)
        )

    def _parts(self, slices: int) -> dict[str, tuple[int, int]]:
        """Return for each kind of state (vectors per token, width of one slice's part of a vector)."""
        return {kind: (count, -(-width // slices)) for kind, (count, width) in self.states.items()}

    def _width(self, slices: int) -> int:
        return sum(count * part for count, part in self._parts(slices).values())

    @property
    def metadata(self) -> CarryMetadata | None:
        """This step's metadata; None in a dry run."""
        return metadata_of(self.slices[0].name)

    def views(self) -> list[tuple[str, torch.Tensor]]:
        """Return (a slice's name, view [slices, blocks, block_size, width]) of each group that shares a block table."""
        if not self._views:
            by_table: dict[int, list[CarrySlice]] = {}
            for layer in self.slices:
                by_table.setdefault(id(metadata_of(layer.name)), []).append(layer)
            self._views += [(members[0].name, self._view(members)) for members in by_table.values()]
        return self._views

    def _view(self, members: list[CarrySlice]) -> torch.Tensor:
        caches = [layer.kv_cache for layer in members]  # [blocks, 1, block_size, width] each
        first = caches[0]
        step = caches[1].storage_offset() - first.storage_offset() if len(caches) > 1 else 0
        for index, cache in enumerate(caches):
            expected = first.storage_offset() + index * step
            if cache.storage_offset() != expected or cache.stride() != first.stride():
                raise ValueError("the carry's slices do not lie at equal distances: vLLM lays out caches in a new way")
        size = (len(caches), first.shape[0], first.shape[2], members[0].width)
        strides = (step, first.stride(0), first.stride(2), first.stride(3))
        return first.as_strided(size, strides, first.storage_offset())

    def _columns(self, view: torch.Tensor, kind: str, loops: slice) -> torch.Tensor:
        """Return the slices' columns of a kind of state, [slices, blocks, block_size, loops, part]."""
        begin = 0
        for name, (count, part) in self.parts.items():
            if name == kind:
                return view[..., begin : begin + count * part].unflatten(-1, (count, part))[:, :, :, loops]
            begin += count * part
        raise ValueError(f"no {kind} is carried")

    def write(self, kind: str, states: torch.Tensor, loops: slice) -> None:
        """Store a kind of state [loops, T, width] of each token; for padding, store zeros in the null block.

        Padding rows hold arbitrary memory. Attention also reads the null block, where a window has moved on, with a
        weight of zero; a NaN there would propagate.
        """
        count, tokens, width = states.shape
        part = self.parts[kind][1]
        if missing := len(self.slices) * part - width:
            states = nn.functional.pad(states, (0, missing))
        states = states.view(count, tokens, len(self.slices), part)
        taken = 0
        for name, view in self.views():
            slots = metadata_of(name).slot_mapping[:tokens]
            new = states[:, : len(slots), taken : taken + view.shape[0]].masked_fill((slots < 0)[:, None, None], 0)
            slots = slots.clamp(min=0)
            columns = self._columns(view, kind, loops)
            columns[:, slots // view.shape[2], slots % view.shape[2]] = new.permute(2, 1, 0, 3)
            taken += view.shape[0]

    def read(self, kind: str, loops: slice) -> torch.Tensor:
        """Return a kind of state [loops, R, width] at the position before each request's first new token, or zeros if
        there is no such position."""
        parts = []
        for name, view in self.views():
            metadata = metadata_of(name)
            starts = metadata.query_start_loc
            before = metadata.seq_lens - (starts[1:] - starts[:-1]) - 1
            at = before.clamp(min=0).long()
            blocks = metadata.block_table.gather(1, (at // view.shape[2])[:, None]).squeeze(1)
            found = self._columns(view, kind, loops)[:, blocks.long(), at % view.shape[2]]  # [slices, R, loops, part]
            parts.append(found.permute(2, 1, 0, 3))
        states = torch.cat(parts, 2).flatten(2)[..., : self.states[kind][1]]
        return states.masked_fill((before < 0)[None, :, None], 0)
