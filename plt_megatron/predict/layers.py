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
from typing import Literal, NamedTuple, Self

from plt_megatron.config import derived
from plt_megatron.config.rules import fusions as fusion_rules
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.parameters import Parameter
from plt_megatron.predict.layout import BYTES, Layout
from plt_megatron.predict.parameters import Weights, active_experts

FP32 = 4
Part = Literal["once", "first", "later"]


class Run(NamedTuple):
    """A layer's run in a forward pass: its only one, the first of several, or a later one.

    `local`: it attends to a window alone, as all loops but the last may do.
    """

    layer: int
    part: Part
    local: bool = False


def runs(model: ModelConfig, layers: Iterable[int], loop: int | None = None) -> list[Run]:
    """Return these layers' runs in a loop, or in all loops (None): the prelude runs in the first only, the coda in the
    last only, all others in each."""
    looped, last, layers = derived.looped_layers(model), model.loop_count, list(layers)
    found = []
    for each in range(1, last + 1) if loop is None else [loop]:
        part: Part = "once" if last == 1 else "first" if each == 1 else "later"
        local = derived.windows_earlier_loops(model) and each < last
        for layer in layers:
            if layer in looped:
                found.append(Run(layer, part, local))
            elif each == (1 if layer < looped.start else last):
                found.append(Run(layer, "once"))
    return found


@dataclass(frozen=True)
class RankLayer:
    """Sizes of a layer on one rank for one microbatch, and of the two ends of a stack of such layers.

    Attributes:
        trained: the parameters that the run trains.
        part, local: which of the layer's runs this is, as in `Run`.
        parameters: the layer's; `frozen`: names in the table of those that are not trained.
        tokens: T; `rows`: S; `row_length`: tokens of one sequence on this rank.
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
    trained: Weights
    part: Part
    local: bool
    parameters: list[Parameter]
    frozen: frozenset[str]
    tokens: int
    rows: int
    row_length: int
    layout: Layout
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

    @property
    def recomputes_ffn(self) -> bool:
        """Whether the dense FFN, or the shared experts beside others, are recomputed by themselves."""
        return ("shared_experts" if self.experts else "mlp") in self.recomputed

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocab_size: int) -> Self:
        """Compute the sizes on a rank of this layout, for the first run of a layer that loops and has experts if any
        layer does."""
        model = config.model
        heads, groups, channels = model.num_attention_heads, derived.num_query_groups(model), derived.head_dim(model)
        row_length = config.data.sequence_length // layout.context
        tokens = layout.micro_batch_size * row_length
        padded_vocab = derived.padded_vocab_size(model, vocab_size, layout.tensor)
        ffn = model.ffn_hidden_size if model.moe is None else derived.shared_expert_size(model)
        return cls(
            model=model,
            trained=Weights.trained(config),
            part="first" if model.loop_count > 1 else "once",
            local=False,
            parameters=[],
            frozen=frozenset(),
            tokens=tokens,
            rows=tokens // layout.tensor if layout.sequence_parallel else tokens,
            row_length=row_length,
            layout=layout,
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

    def of_run(self, run: Run) -> Self:
        """Return the sizes of one particular run of one particular layer, with or without experts."""
        own = self
        if self.experts and run.layer not in derived.expert_layers(self.model):
            own = replace(self, ffn=self.model.ffn_hidden_size // self.layout.tensor, experts=0, topk=0, expert_ffn=0)
        parameters, frozen = self.trained.in_layer(run.layer), self.trained.missing_in(run.layer)
        return replace(own, part=run.part, local=run.local, parameters=parameters, frozen=frozen)

    def by_kind(self, runs: Iterable[Run]) -> list[tuple[Self, int]]:
        """Group runs of the same kind: return each kind's sizes with its number of runs."""
        experts = derived.expert_layers(self.model)
        kinds: dict[tuple[object, ...], list[Run]] = {}
        for run in runs:
            kind = (run.layer in experts, run.part, run.local, self.trained.missing_in(run.layer))
            kinds.setdefault(kind, []).append(run)
        return [(self.of_run(alike[0]), len(alike)) for alike in kinds.values()]

    @property
    def hidden(self) -> int:
        return self.model.hidden_size

    @property
    def loops(self) -> bool:
        """Whether the layer runs in every of several loops."""
        return self.part != "once"

    @property
    def gated(self) -> bool:
        """Whether the layer has a window and a gate in loops >= 2."""
        return self.loops and self.model.gated_window

    @property
    def windowed(self) -> bool:
        """Whether this run attends to a window, alone or with a gate."""
        return self.local or (self.part == "later" and self.gated)

    @property
    def hidden_gate(self) -> bool:
        return self.gated and self.model.gate_input == "hidden"

    @property
    def shares_kv(self) -> bool:
        """Whether later loops read the layer's first-loop keys."""
        return self.loops and self.model.share_kv

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
