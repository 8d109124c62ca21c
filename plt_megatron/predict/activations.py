"""Bytes that autograd keeps of one microbatch on one rank, from the tensors that each operation saves.

Symbols as in `flops`, of one rank: T tokens of a microbatch (divided by CP), S = T / TP with sequence parallelism and
T without, d hidden, h heads and g groups (divided by TP, at least one), c channels of a head, f FFN width (divided by
TP), w window, e bytes of an element. A tensor counts with its whole storage: V is a view of the fused Q, K, V
projection and keeps all of it alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from plt_megatron.config import derived
from plt_megatron.config.rules import fusions as fusion_rules
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.predict.layout import BYTES, Layout
from plt_megatron.predict.parameters import active_experts

FP32 = 4


@dataclass(frozen=True)
class Activations:
    """The memory of one rank; every method returns bytes of one microbatch.

    `vocab` is the padded vocabulary divided by TP, `padding` how many of the last rank's rows are padding.
    """

    tokens: int
    rows: int
    row_length: int  # tokens of one sequence on this rank
    hidden: int
    heads: int
    groups: int
    gathered_qkv: int  # of the projection that ranks with a key/value head in common gather, channels; else 0
    channels: int
    ffn: int
    window: int
    vocab: int
    padding: int
    element: int
    te: bool
    hidden_gate: bool
    windowed: bool
    shares_kv: bool
    shares_values: bool
    qk_norm: bool
    learned_key_shift: bool
    output_norms: int  # norms on the outputs of attention or FFN
    input_norms: bool
    norm_between_loops: bool
    hidden_norm: bool
    learned_scale: bool
    documents: bool
    recomputed: tuple[str, ...]  # parts of a layer, when it is not recomputed as a whole
    context: int  # ranks that share a sequence
    fusions: Fusions
    experts: int = 0  # of a layer, all ranks'; 0: a dense FFN
    topk: int = 0
    expert_ffn: int = 0
    dense_ffn: int = 0  # FFN width of layers without experts, where others have some

    def once(self) -> Activations:
        """The same for layers that do not loop: no later loop reads their K and V, and they have no gate."""
        return replace(self, shares_kv=False, windowed=False, hidden_gate=False)

    def of_layer(self, model: ModelConfig, layer: int) -> Activations:
        """The same for one layer, which may have experts and may loop."""
        own = self
        if self.experts and layer not in derived.expert_layers(model):
            own = replace(self, ffn=self.dense_ffn, experts=0, topk=0, expert_ffn=0)
        return own if layer in derived.looped_layers(model) else own.once()

    def by_kind(self, model: ModelConfig, layers: Iterable[int]) -> list[tuple[Activations, int]]:
        """Those of these layers, each with how many have them."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for layer in layers:
            kind = layer in derived.expert_layers(model), layer in derived.looped_layers(model)
            kinds.setdefault(kind, []).append(layer)
        return [(self.of_layer(model, alike[0]), len(alike)) for alike in kinds.values()]

    # One layer in one loop.

    def layer(self, loop: int) -> int:
        """Saved by one layer in loop `loop`, without the first loop's K and V (`first_loop_kv`)."""
        return self.attention_block(loop) + self.ffn_block()

    def attention_block(self, loop: int) -> int:
        """Norm, projections and core attention."""
        saved = self._norm(self.rows * self.hidden, feeds_linear=True) if self.input_norms else self._rows_bytes()
        saved += self._rope() + self._qk_norms() + self._hidden_gate() + self._key_shift(loop)
        saved += self._queries() + self._attention_output()  # rotated queries; the output projection's input
        if loop == 1 or not self.shares_kv:
            saved += 0 if self.shares_kv else self._keys_and_values()
            saved += self._core_attention_statistics()
        else:
            saved += self._later_loop()
        if self.output_norms == 2:
            saved += self._norm(self.rows * self.hidden, feeds_linear=False)
        return saved

    def ffn_block(self) -> int:
        """Norm, gate and up projections, SwiGLU, down projection, or the input of all that if it is recomputed."""
        recomputed = "mlp" in self.recomputed and not self.experts
        return self._rows_bytes() if recomputed else self._whole_ffn_block()

    def _whole_ffn_block(self) -> int:
        wide = self.tokens * self.ffn * self.element
        saved = self._norm(self.rows * self.hidden, feeds_linear=True) if self.input_norms else self._rows_bytes()
        # torch: both halves, silu(gate), the other half + 0, their product; fused SwiGLU: both halves and the product.
        saved += 3 * wide if self.te else 5 * wide
        saved += self._experts()
        if self.output_norms:
            saved += self._norm(self.rows * self.hidden, feeds_linear=False)
        return saved

    def _experts(self) -> int:
        """For the tokens of this rank's experts at an even load: their inputs, what SwiGLU keeps, and that times the
        router's weights; for this rank's tokens: the router's logits, scores and map."""
        sent = self.rows * self.topk
        routing = self.rows * self.experts * (3 * FP32 + 1) + sent * (2 * FP32 + 8)
        return sent * (self.hidden + (3 if self.te else 6) * self.expert_ffn) * self.element + routing

    def first_loop_kv(self) -> int:
        """K and V of one layer that later loops read (none are shared: 0)."""
        if not self.shares_kv:
            return 0
        if self.te and "core_attn" in self.recomputed:  # beside what recomputation starts from
            return self._keys() + self._fused_qkv() + self._keys()
        return self._keys_and_values()

    def kv_gradients(self) -> int:
        """Gradients of what is shared of the first loop's K and V of one layer, accumulated until its backward."""
        return (2 if self.shares_values else 1) * self._keys() if self.shares_kv else 0

    # A loop's ends.

    def layer_input(self) -> int:
        """Hidden states between layers."""
        return self._rows_bytes()

    def loop_input(self) -> int:
        """What joining h and E keeps, in loops >= 2: h for its norm in fp32, and what a learned scale multiplies."""
        wide = FP32 * (self.rows * self.hidden + self.rows) if self.hidden_norm else 0
        return wide + (self._rows_bytes() if self.learned_scale else 0)

    def loop_end(self, last_loop: bool) -> int:
        """The final norm, where the loop has one."""
        if last_loop or self.norm_between_loops:
            return self._norm(self.rows * self.hidden, feeds_linear=last_loop)
        return 0

    def softmax(self) -> int:
        """What the cross-entropy keeps: probabilities in fp32; the fused one a copy of the logits."""
        return self.tokens * self.vocab * (self.element if self.fusions.cross_entropy_loss_fusion else FP32)

    def head_forward(self) -> int:
        """Logits beside the probabilities, and the gathered hidden states."""
        copied = self.element != FP32 or self.fusions.cross_entropy_loss_fusion
        logits = self.tokens * self.vocab * self.element if copied else 0
        return logits + self._gathered()

    def head_backward(self) -> int:
        """Gradients of the logits beside the probabilities, which become the first of them in place."""
        logits = self.tokens * self.vocab * self.element
        weight = self.vocab * self.hidden * self.element
        # Padding is masked in place: its backward copies all gradients once and those of the padding twice.
        masked = logits + 2 * self.tokens * self.padding * self.element if self.padding else 0
        if self.element == FP32 or self.fusions.cross_entropy_loss_fusion:
            return max(masked, weight) + self._gathered()
        cast = logits  # beside the fp32 ones, which are gone when padding is masked
        return max(cast, logits + masked - self.softmax(), logits + weight - self.softmax()) + self._gathered()

    def backward_working_set(self, loop: int) -> int:
        """Temporaries of a layer's backward pass at its widest, besides everything that it has saved."""
        rows = 2 * self._rows_bytes() + self._gathered()
        ffn = 2 * (self.tokens * self.ffn + self.rows * self.topk * (self.expert_ffn + self.hidden)) * self.element
        ffn += self._whole_ffn_block() - self.ffn_block()
        attention = 0
        if loop > 1 and self._blocked_window:
            attention = 3 * self._window_scores() + 2 * self._queries() - self.ffn_block()
        return rows + max(ffn, attention)

    # Parts.

    @property
    def _blocked_window(self) -> bool:
        """Whether the window is computed in blocks, as torch does unless it spans the whole sequence."""
        return self.windowed and not self.te and self.window < self.row_length

    def _rows_bytes(self) -> int:
        return self.rows * self.hidden * self.element

    def _gathered(self) -> int:
        """Sequence parallelism gathers a linear layer's input."""
        return self.tokens * self.hidden * self.element if self.rows < self.tokens else 0

    def _norm(self, elements: int, *, feeds_linear: bool) -> int:
        """Input, normed before the weight, and the output where a linear layer keeps it."""
        if self.te:
            kept = self.element
        else:
            kept = FP32 + self.element
        return elements * (kept + (self.element if feeds_linear else 0)) + FP32 * (elements // self.hidden or 1)

    def _queries(self) -> int:
        return self.tokens * self.heads * self.channels * self.element

    def _keys(self) -> int:
        return self.tokens * self.groups * self.channels * self.element

    def _fused_qkv(self) -> int:
        return self.tokens * self.gathered_qkv * self.element or self._queries() + 2 * self._keys()

    def _keys_and_values(self) -> int:
        """As an attention keeps them: torch's V stays a part of the fused projection, Transformer Engine's does not."""
        return 2 * self._keys() if self.te else self._keys() + self._fused_qkv()

    def _attention_output(self) -> int:
        return self._queries()

    def _rope(self) -> int:
        """Cosines and sines, of Q and of K; the fused kernel keeps the angles, which all layers share."""
        if self.fusions.apply_rope_fusion:
            return 0
        rows = self.tokens if self.documents else self.row_length
        return 4 * rows * self.channels * self.element

    def _qk_norms(self) -> int:
        if not self.qk_norm:
            return 0
        elements = self.tokens * (self.heads + self.groups) * self.channels
        per_element = self.element if self.te else FP32 + self.element
        return elements * per_element + FP32 * self.tokens * (self.heads + self.groups)

    def _key_shift(self, loop: int) -> int:
        """What learned factors keep: K and V, their neighbours, and V is a tensor of its own then. Shifts by heads or
        channels keep nothing."""
        used = loop == 1 or not self.shares_kv or self.windowed or not self.shares_values
        if not (self.learned_key_shift and used):
            return 0
        return 2 * self._keys() + (self._fused_qkv() if self.te else self._keys())

    def _hidden_gate(self) -> int:
        if not self.hidden_gate:
            return 0
        width = self.rows * self.hidden
        return width * (FP32 + 2 * self.element) + self.tokens * self.heads * self.element

    def _core_attention_statistics(self) -> int:
        """Log-sum-exp of one attention; packed documents add copies around each document's."""
        if "core_attn" in self.recomputed:
            return 0
        saved = self.tokens * self.heads * FP32
        if self.documents:
            saved += self._attention_output()
        if self.context > 1 and not self.te:  # K and V of the whole sequence; Transformer Engine passes them round
            saved += 2 * self._keys() * self.context
        return saved

    def _later_loop(self) -> int:
        """Attention of a loop >= 2 with the first loop's K and V, and its window."""
        if "core_attn" in self.recomputed:
            return self._keys() + self._fused_qkv()
        saved = self._core_attention_statistics() + self._own_values()
        if not self.windowed:
            return saved
        saved += 2 * self._queries() + self.tokens * self.heads * self.element  # both outputs, the gate
        if not self._blocked_window:
            return saved + self._keys_and_values() + self.tokens * self.heads * FP32
        blocks = -(-self.row_length // self.window)
        padding = blocks * self.window / self.row_length
        keys = 2 * self._keys() * (blocks + 1) / blocks
        return saved + int(padding * (self._queries() + keys)) + self._window_scores()

    def _own_values(self) -> int:
        """Values of a later loop that shares keys alone: a part of the fused projection, or a copy of it."""
        if self.shares_values or (self.windowed and not self._blocked_window and not self.te):  # the window keeps them
            return 0
        return self._keys() if self.te else self._fused_qkv()

    def _window_scores(self) -> int:
        """Weights of each query over its own block of keys and the one before it."""
        blocks = -(-self.row_length // self.window)
        sequences = self.tokens / self.row_length
        return int(sequences * blocks * self.window * self.heads * 2 * self.window * self.element)

    def window_bias(self) -> int:
        """The mask of the blocked window attention: kept for all layers, or recomputed if documents are packed."""
        if not self._blocked_window:
            return 0
        return self._window_scores() // 2


def activations(config: RunConfig, layout: Layout, vocab_size: int) -> Activations:
    """The shapes of one rank's microbatch."""
    model = config.model
    heads, groups, channels = model.num_attention_heads, derived.num_query_groups(model), derived.head_dim(model)
    row_length = config.data.sequence_length // layout.context
    tokens = layout.micro_batch_size * row_length
    padded_vocab = derived.padded_vocab_size(model, vocab_size, layout.tensor)
    looped = model.loop_count > 1
    windowed = looped and model.gated_window
    post, experts = model.norm_placement == "post", model.moe is not None
    return Activations(
        tokens=tokens,
        rows=tokens // layout.tensor if layout.sequence_parallel else tokens,
        row_length=row_length,
        hidden=model.hidden_size,
        heads=heads // layout.tensor,
        groups=max(1, groups // layout.tensor),
        gathered_qkv=(heads + 2 * groups) * channels if groups < layout.tensor else 0,
        channels=channels,
        ffn=(derived.shared_expert_size(model) if experts else model.ffn_hidden_size) // layout.tensor,
        dense_ffn=model.ffn_hidden_size // layout.tensor,
        experts=derived.num_experts(model),
        topk=active_experts(model),
        expert_ffn=derived.expert_ffn_hidden_size(model),
        window=model.window_size,
        vocab=padded_vocab // layout.tensor,
        padding=min(padded_vocab - vocab_size, padded_vocab // layout.tensor),
        element=BYTES[config.training.precision],
        te=layout.backend == "te",
        hidden_gate=windowed and model.gate_input == "hidden",
        windowed=windowed,
        shares_kv=looped and model.share_kv,
        shares_values=derived.shares_values(model),
        qk_norm=model.qk_layernorm,
        learned_key_shift=model.key_shift == "learned",
        output_norms=2 if post else int(model.ffn_output_norm),
        input_norms=not post,
        norm_between_loops=model.norm_between_loops,
        hidden_norm=looped and model.hidden_norm,
        learned_scale=derived.has_learned_hidden_scale(model),
        documents=config.data.reset_at_document_boundaries,
        recomputed=layout.recompute_modules,
        context=layout.context,
        fusions=fusion_rules.choose(config, fusion_rules.obstacles(config, layout.backend)),
    )
