"""Bytes that autograd keeps of one microbatch on one rank, from the tensors that each operation saves.

Sizes are those of `layers`. A tensor counts with its whole storage: V is a view of the fused Q, K, V projection and
keeps all of it alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.predict.layers import FP32, RankLayer, running


@dataclass(frozen=True)
class Activations(RankLayer):
    """The memory of one rank; every method returns bytes of one microbatch."""

    # One layer in one loop.

    def layer(self, loop: int) -> int:
        """Saved by one layer in loop `loop`, without the first loop's K and V (`first_loop_kv`)."""
        return self.attention_block(loop) + self.ffn_block()

    def attention_block(self, loop: int) -> int:
        """Norm, projections and core attention."""
        saved = self._block_input()
        saved += self._rope() + self._qk_norms() + self._hidden_gate() + self._key_shift(loop)
        saved += self.query_bytes() + self.query_bytes()  # rotated queries; the output projection's input
        if loop == 1 or not self.shares_kv:
            saved += 0 if self.shares_kv else self._keys_and_values()
            saved += self._core_attention_statistics()
        else:
            saved += self._later_loop()
        if self.model.norm_placement == "post":
            saved += self._norm(self.rows * self.hidden, feeds_linear=False)
        return saved

    def ffn_block(self) -> int:
        """Norm, gate and up projections, SwiGLU, down projection, or the input of all that if it is recomputed."""
        recomputed = "mlp" in self.recomputed and not self.experts
        return self.hidden_bytes() if recomputed else self._whole_ffn_block()

    def _whole_ffn_block(self) -> int:
        wide = self.tokens * self.ffn * self.element
        saved = self._block_input()
        # torch: both halves, silu(gate), the other half + 0, their product; fused SwiGLU: both halves and the product.
        saved += 3 * wide if self.te else 5 * wide
        saved += self._experts()
        if self.model.ffn_output_norm or self.model.norm_placement == "post":
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
            return self.key_bytes() + self.qkv_bytes() + self.key_bytes()
        return self._keys_and_values()

    def kv_gradients(self) -> int:
        """Gradients of what is shared of the first loop's K and V of one layer, accumulated until its backward."""
        return (2 if self.shares_values else 1) * self.key_bytes() if self.shares_kv else 0

    def layers_in_loop(self, layers: Iterable[int], loop: int) -> int:
        """Saved by those of these layers that run in loop `loop`, without the first loop's K and V."""
        return sum(count * kind.layer(loop) for kind, count in self.by_kind(running(self.model, layers, loop)))

    # A loop's ends.

    def loop_input(self) -> int:
        """What joining h and E keeps, in loops >= 2: h for its norm in fp32, and what a learned scale multiplies."""
        wide = FP32 * (self.rows * self.hidden + self.rows) if self.loops and self.model.hidden_norm else 0
        return wide + (self.hidden_bytes() if derived.has_learned_hidden_scale(self.model) else 0)

    def loop_end(self, last_loop: bool) -> int:
        """The final norm, where the loop has one."""
        if last_loop or self.model.norm_between_loops:
            return self._norm(self.rows * self.hidden, feeds_linear=last_loop)
        return 0

    def softmax(self) -> int:
        """What the cross-entropy keeps: probabilities in fp32; the fused one a copy of the logits."""
        return self.tokens * self.vocab * (self.element if self.fusions.cross_entropy_loss_fusion else FP32)

    def head_forward(self) -> int:
        """Logits beside the probabilities, and the gathered hidden states."""
        copied = self.element != FP32 or self.fusions.cross_entropy_loss_fusion
        logits = self.tokens * self.vocab * self.element if copied else 0
        return logits + self.gathered_bytes()

    def head_backward(self) -> int:
        """Gradients of the logits beside the probabilities, which become the first of them in place."""
        logits = self.tokens * self.vocab * self.element
        weight = self.vocab * self.hidden * self.element
        # Padding is masked in place: its backward copies all gradients once and those of the padding twice.
        masked = logits + 2 * self.tokens * self.padding * self.element if self.padding else 0
        if self.element == FP32 or self.fusions.cross_entropy_loss_fusion:
            return max(masked, weight) + self.gathered_bytes()
        cast = logits  # beside the fp32 ones, which are gone when padding is masked
        return max(cast, logits + masked - self.softmax(), logits + weight - self.softmax()) + self.gathered_bytes()

    def backward_working_set(self, loop: int) -> int:
        """Temporaries of a layer's backward pass at its widest, besides everything that it has saved."""
        rows = 2 * self.hidden_bytes() + self.gathered_bytes()
        ffn = 2 * (self.tokens * self.ffn + self.rows * self.topk * (self.expert_ffn + self.hidden)) * self.element
        ffn += self._whole_ffn_block() - self.ffn_block()
        attention = 0
        if loop > 1 and self._blocked_window:
            attention = 3 * self._window_scores() + 2 * self.query_bytes() - self.ffn_block()
        return rows + max(ffn, attention)

    # Parts.

    def _block_input(self) -> int:
        """What attention or FFN keeps of its input: a norm's with norms before them, else itself."""
        if self.model.norm_placement == "post":
            return self.hidden_bytes()
        return self._norm(self.rows * self.hidden, feeds_linear=True)

    @property
    def _blocked_window(self) -> bool:
        """Whether the window is computed in blocks, as torch does unless it spans the whole sequence."""
        return self.windowed and not self.te and self.model.window_size < self.row_length

    def _norm(self, elements: int, *, feeds_linear: bool) -> int:
        """Input, normed before the weight, and the output where a linear layer keeps it."""
        if self.te:
            kept = self.element
        else:
            kept = FP32 + self.element
        return elements * (kept + (self.element if feeds_linear else 0)) + FP32 * (elements // self.hidden or 1)

    def _keys_and_values(self) -> int:
        """As an attention keeps them: torch's V stays a part of the fused projection, Transformer Engine's does not."""
        return 2 * self.key_bytes() if self.te else self.key_bytes() + self.qkv_bytes()

    def _rope(self) -> int:
        """Cosines and sines, of Q and of K; the fused kernel keeps the angles, which all layers share."""
        if self.fusions.apply_rope_fusion:
            return 0
        rows = self.tokens if self.documents else self.row_length
        return 4 * rows * self.channels * self.element

    def _qk_norms(self) -> int:
        if not self.model.qk_layernorm:
            return 0
        elements = self.tokens * (self.heads + self.groups) * self.channels
        per_element = self.element if self.te else FP32 + self.element
        return elements * per_element + FP32 * self.tokens * (self.heads + self.groups)

    def _key_shift(self, loop: int) -> int:
        """What learned factors keep: K and V, their neighbours, and V is a tensor of its own then. Shifts by heads or
        channels keep nothing."""
        used = loop == 1 or not self.shares_kv or self.windowed or not self.shares_values
        if not (self.model.key_shift == "learned" and used):
            return 0
        return 2 * self.key_bytes() + (self.qkv_bytes() if self.te else self.key_bytes())

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
            saved += self.query_bytes()
        if self.context > 1 and not self.te:  # K and V of the whole sequence; Transformer Engine passes them round
            saved += 2 * self.key_bytes() * self.context
        return saved

    def _later_loop(self) -> int:
        """Attention of a loop >= 2 with the first loop's K and V, and its window."""
        if "core_attn" in self.recomputed:
            return self.key_bytes() + self.qkv_bytes()
        saved = self._core_attention_statistics() + self._own_values()
        if not self.windowed:
            return saved
        saved += 2 * self.query_bytes() + self.tokens * self.heads * self.element  # both outputs, the gate
        if not self._blocked_window:
            return saved + self._keys_and_values() + self.tokens * self.heads * FP32
        blocks = -(-self.row_length // self.model.window_size)
        padding = blocks * self.model.window_size / self.row_length
        keys = 2 * self.key_bytes() * (blocks + 1) / blocks
        return saved + int(padding * (self.query_bytes() + keys)) + self._window_scores()

    def _own_values(self) -> int:
        """Values of a later loop that shares keys alone: a part of the fused projection, or a copy of it."""
        if self.shares_values or (self.windowed and not self._blocked_window and not self.te):  # the window keeps them
            return 0
        return self.key_bytes() if self.te else self.qkv_bytes()

    def _window_scores(self) -> int:
        """Weights of each query over its own block of keys and the one before it."""
        blocks = -(-self.row_length // self.model.window_size)
        sequences = self.tokens / self.row_length
        return int(sequences * blocks * self.model.window_size * self.heads * 2 * self.model.window_size * self.element)

    def window_bias(self) -> int:
        """The mask of the blocked window attention: kept for all layers, or recomputed if documents are packed."""
        if not self._blocked_window:
            return 0
        return self._window_scores() // 2
