"""A layer of a model on one rank: its kinds, the loops that run it, and the sizes of its tensors.

What a rank computes, saves and sends follows from these sizes and the parameter table alone: `flops` counts matrix
products, `activations` what autograd saves, `traffic` what collectives send.

Symbols as in `flops`, for one rank: T tokens of a microbatch (divided by CP), S = T / TP with sequence parallelism and
T without, d hidden, h heads and g groups (divided by TP, at least one), c channels of a head, f FFN width (divided by
TP), w window, e bytes per element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from plt_megatron.config import derived
from plt_megatron.config.rules import fusions as fusion_rules
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.predict.layout import BYTES, Layout
from plt_megatron.predict.parameters import active_experts

FP32 = 4


def running(model: ModelConfig, layers: Iterable[int], loop: int) -> list[int]:
    """Select the layers that run in a loop: the prelude in the first only, the coda in the last only, others in all."""
    looped = derived.looped_layers(model)
    once = (
        range(looped.start) if loop == 1 else (),
        range(looped.stop, model.num_layers) if loop == model.loop_count else (),
    )
    return [layer for layer in layers if layer in looped or any(layer in each for each in once)]


def runs(model: ModelConfig, layers: Iterable[int]) -> list[int]:
    """Return these layers as a forward pass runs them, each once per loop that runs it."""
    layers = list(layers)
    return [layer for loop in range(1, model.loop_count + 1) for layer in running(model, layers, loop)]


@dataclass(frozen=True)
class RankLayer:
    """Sizes of a layer on one rank for one microbatch, and of the two ends of a stack of such layers.

    Attributes:
        loops: whether the model has several loops and the layer runs in all of them.
        tokens: T; `rows`: S; `row_length`: tokens of one sequence on this rank.
        tensor, context: number of ranks that share a matrix, and a sequence.
        heads, groups, channels: h, g, c.
        gathered_qkv: channels of the QKV projection that ranks sharing a key/value head gather; 0: they gather none.
        ffn: f, of a dense FFN or of a shared expert.
        experts, topk, expert_ffn: experts over all ranks, experts per token, width of an expert; 0: a dense FFN.
        vocab: the padded vocabulary divided by TP; `padding`: how many of the last rank's rows are padding.
        element: e.
        te: Transformer Engine's layers, not torch's.
        documents: several are packed in a row, and attention keeps them apart.
        recomputed: parts of a layer that are recomputed, unless whole layers are.
    """

    model: ModelConfig
    loops: bool
    tokens: int
    rows: int
    row_length: int
    tensor: int
    context: int
    heads: int
    groups: int
    channels: int
    gathered_qkv: int
    ffn: int
    experts: int
    topk: int
    expert_ffn: int
    vocab: int
    padding: int
    element: int
    te: bool
    documents: bool
    recomputed: tuple[str, ...]
    fusions: Fusions

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocab_size: int) -> Self:
        """Compute the sizes on a rank of this layout, for a layer that loops and has experts if any layer does."""
        model = config.model
        heads, groups, channels = model.num_attention_heads, derived.num_query_groups(model), derived.head_dim(model)
        row_length = config.data.sequence_length // layout.context
        tokens = layout.micro_batch_size * row_length
        padded_vocab = derived.padded_vocab_size(model, vocab_size, layout.tensor)
        ffn = model.ffn_hidden_size if model.moe is None else derived.shared_expert_size(model)
        return cls(
            model=model,
            loops=model.loop_count > 1,
            tokens=tokens,
            rows=tokens // layout.tensor if layout.sequence_parallel else tokens,
            row_length=row_length,
            tensor=layout.tensor,
            context=layout.context,
            heads=heads // layout.tensor,
            groups=max(1, groups // layout.tensor),
            channels=channels,
            gathered_qkv=(heads + 2 * groups) * channels if groups < layout.tensor else 0,
            ffn=ffn // layout.tensor,
            experts=derived.num_experts(model),
            topk=active_experts(model),
            expert_ffn=derived.expert_ffn_hidden_size(model),
            vocab=padded_vocab // layout.tensor,
            padding=min(padded_vocab - vocab_size, padded_vocab // layout.tensor),
            element=BYTES[config.training.precision],
            te=layout.backend == "te",
            documents=config.data.reset_at_document_boundaries,
            recomputed=layout.recompute_modules,
            fusions=fusion_rules.choose(config, fusion_rules.obstacles(config, layout.backend)),
        )

    def of_layer(self, layer: int, *, loops: bool | None = None) -> Self:
        """Return the sizes of one particular layer, with or without experts and loops; `loops` overrides the latter."""
        own = self
        if self.experts and layer not in derived.expert_layers(self.model):
            own = replace(self, ffn=self.model.ffn_hidden_size // self.tensor, experts=0, topk=0, expert_ffn=0)
        loops = layer in derived.looped_layers(self.model) if loops is None else loops
        return replace(own, loops=self.loops and loops)

    def by_kind(self, layers: Iterable[int]) -> list[tuple[Self, int]]:
        """Group layers of the same kind: return each kind's sizes with its number of layers."""
        experts, looped = derived.expert_layers(self.model), derived.looped_layers(self.model)
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for layer in layers:
            kinds.setdefault((layer in experts, layer in looped), []).append(layer)
        return [(self.of_layer(alike[0]), len(alike)) for alike in kinds.values()]

    @property
    def hidden(self) -> int:
        return self.model.hidden_size

    @property
    def windowed(self) -> bool:
        """Whether the layer has a window and a gate in loops >= 2."""
        return self.loops and self.model.gated_window

    @property
    def hidden_gate(self) -> bool:
        return self.windowed and self.model.gate_input == "hidden"

    @property
    def shares_kv(self) -> bool:
        """Whether later loops read the layer's first-loop keys."""
        return self.loops and self.model.share_kv

    @property
    def shares_values(self) -> bool:
        return derived.shares_values(self.model)

    # Bytes of the layer's tensors.

    def hidden_bytes(self) -> int:
        """Return the size of the hidden states between layers."""
        return self.rows * self.hidden * self.element

    def gathered_bytes(self) -> int:
        """Return the size of a linear layer's input gathered over sequence-parallel ranks; 0 without such ranks."""
        return self.tokens * self.hidden * self.element if self.rows < self.tokens else 0

    def query_bytes(self) -> int:
        """Return the size of Q, or of the attention's output."""
        return self.tokens * self.heads * self.channels * self.element

    def key_bytes(self) -> int:
        """Return the size of K, or of V."""
        return self.tokens * self.groups * self.channels * self.element

    def qkv_bytes(self) -> int:
        """Return the size of the fused QKV projection's output."""
        return self.tokens * self.gathered_qkv * self.element or self.query_bytes() + 2 * self.key_bytes()
