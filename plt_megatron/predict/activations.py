"""Bytes that autograd saves for one microbatch on one rank, derived from the tensors that each operation saves.

Sizes are defined in `layers`. A tensor counts with its whole storage: V is a view of the fused QKV projection's output
and keeps all of it alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.predict.layers import FP32, RankLayer, runs


@dataclass(frozen=True)
class Activations(RankLayer):
    """Activation memory of one rank; every method returns bytes per microbatch."""

    # One run of a layer.

    def layer(self) -> int:
        """Return what one run of a layer saves, excluding the first loop's K and V (`first_loop_kv`)."""
        return self.attention_block() + self.ffn_block()

    def attention_block(self) -> int:
        """Return what norms, projections and core attention save."""
        saved = self._norms(in_attention=True) + self._rope() + self._hidden_gate() + self._mixed_tokens()
        saved += self.query_bytes() + self.query_bytes()  # rotated queries; the output projection's input
        if self.part == "later" and self.shares_kv:
            return saved + self._later_loop()
        if self.local:
            return saved + (self._keys_and_values() if "core_attn" in self.recomputed else self._window())
        return saved + (0 if self.shares_kv else self._keys_and_values()) + self._core_attention_statistics()

    def ffn_block(self) -> int:
        """Return what norm, gate and up projections, SwiGLU and down projection save; if recomputed, their input, which
        other experts save too."""
        if not self.recomputes_ffn:
            return self._whole_ffn_block()
        return self._whole_ffn_block() - self._swiglu() if self.experts else self.hidden_bytes()

    def _whole_ffn_block(self) -> int:
        return self._norms(in_attention=False) + self._swiglu() + self._experts()

    def _swiglu(self) -> int:
        """Return what SwiGLU and the down projection save of a dense FFN or shared experts. torch saves both halves,
        silu(gate), the other half + 0, and their product; fused SwiGLU both halves and the product."""
        return (3 if self.te else 5) * self.tokens * self.ffn * self.element

    def _experts(self) -> int:
        """Return what experts and router save at an even load. Per token sent to this rank's experts: their inputs,
        what SwiGLU saves, and its output scaled by the router's weights. Per token of this rank: the router's logits,
        scores and map."""
        sent = self.rows * self.topk
        routing = self.rows * self.experts * (3 * FP32 + 1) + sent * (2 * FP32 + 8)
        return sent * (self.hidden + (3 if self.te else 6) * self.expert_ffn) * self.element + routing

    def first_loop_kv(self) -> int:
        """Return the size of one layer's first-loop K and V, which later loops read; 0 if they are not shared."""
        if not self.shares_kv:
            return 0
        if self.te and "core_attn" in self.recomputed:  # in addition to the inputs of recomputation
            return self.key_bytes() + self.qkv_bytes() + self.key_bytes()
        return self._keys_and_values()

    def kv_gradients(self) -> int:
        """Return the size of one layer's gradients of shared K (and V), accumulated until the first loop's backward."""
        return (2 if derived.shares_values(self.model) else 1) * self.key_bytes() if self.shares_kv else 0

    def layers_in_loop(self, layers: Iterable[int], loop: int) -> int:
        """Return what the given layers that run in loop `loop` save, excluding the first loop's K and V."""
        return sum(count * kind.layer() for kind, count in self.by_kind(runs(self.model, layers, loop)))

    # A loop's ends.

    def loop_input(self) -> int:
        """Return what combining h and E in loops >= 2 saves: h in fp32 for its norm, and a learned scale's input."""
        wide = FP32 * (self.rows * self.hidden + self.rows) if self.loops and self.model.loop_norm == "rms" else 0
        return wide + (self.hidden_bytes() if derived.has_learned_hidden_scale(self.model) else 0)

    def loop_end(self, last_loop: bool) -> int:
        """Return what the final norm saves, if this loop ends with one."""
        if last_loop or self.model.loop_norm == "final":
            return self._norm(feeds_linear=last_loop)
        return 0

    def softmax(self) -> int:
        """Return what the cross-entropy saves: probabilities in fp32, or, if fused, a copy of the logits."""
        return self.tokens * self.vocab * (self.element if self.fusions.cross_entropy_loss_fusion else FP32)

    def head_forward(self) -> int:
        """Return the size of the logits next to the probabilities, plus the gathered hidden states."""
        copied = self.element != FP32 or self.fusions.cross_entropy_loss_fusion
        logits = self.tokens * self.vocab * self.element if copied else 0
        return logits + self.gathered_bytes()

    def head_backward(self) -> int:
        """Return the gradients of the logits beyond the probabilities, which turn into the first gradient in place."""
        logits = self.tokens * self.vocab * self.element
        weight = self.vocab * self.hidden * self.element
        # Padding is masked in place: the mask's backward copies all gradients once and those of the padding twice.
        masked = logits + 2 * self.tokens * self.padding * self.element if self.padding else 0
        if self.element == FP32 or self.fusions.cross_entropy_loss_fusion:
            return max(masked, weight) + self.gathered_bytes()
        cast = logits  # alongside the fp32 gradients, which are freed by the time padding is masked
        return max(cast, logits + masked - self.softmax(), logits + weight - self.softmax()) + self.gathered_bytes()

    def backward_working_set(self) -> int:
        """Return the peak of a run's backward temporaries, beyond everything it has saved."""
        rows = 2 * self.hidden_bytes() + self.gathered_bytes()
        ffn = 2 * (self.tokens * self.ffn + self.rows * self.topk * (self.expert_ffn + self.hidden)) * self.element
        ffn += self._whole_ffn_block() - self.ffn_block()
        attention = 0
        if self.windowed and self._blocked_window:
            attention = 3 * self._window_scores() + 2 * self.query_bytes() - self.ffn_block()
        return rows + max(ffn, attention)

    # Parts.

    @property
    def _blocked_window(self) -> bool:
        """Whether the layer's window is computed in blocks: torch does so unless it spans the whole sequence."""
        has_window = self.loops and derived.has_windows(self.model)
        return has_window and not self.te and self.model.window_size < self.row_length

    def _norms(self, *, in_attention: bool) -> int:
        """Return what the norms of attention or FFN save, and its input, unless a norm is before it."""
        norms = [each for each in self.parameters if each.component == "norms" and each.in_attention == in_attention]
        saved = sum(self._norm(each.dims, feeds_linear=each.feeds_linear) for each in norms)
        return saved if any(each.feeds_linear for each in norms) else saved + self.hidden_bytes()

    def _norm(self, dims: str = "hidden", *, feeds_linear: bool) -> int:
        """Return a norm's input, the normalized input before the weight, and its output if a linear layer saves it.
        Q and K are normed by head."""
        heads = {"query_norm": self.heads, "key_norm": self.groups}.get(dims)
        rows, width = (self.rows, self.hidden) if heads is None else (self.tokens * heads, self.channels)
        kept = (0 if self.te else FP32) + (2 if feeds_linear else 1) * self.element
        return rows * (width * kept + FP32)

    @property
    def _mixes_tokens(self) -> bool:
        used = self.part != "later" or derived.later_loops_use_values(self.model)
        return used and any(each.mixes_tokens for each in self.parameters)

    def _keys_and_values(self) -> int:
        """Return K and V as attention saves them. Torch's V is a view of the fused QKV output unless it is mixed with
        the token before; TE's is not."""
        own = self.te or self._mixes_tokens
        return 2 * self.key_bytes() if own else self.key_bytes() + self.qkv_bytes()

    def _rope(self) -> int:
        """Return the cosines and sines for Q and K; the fused kernel saves only the angles, which all layers share."""
        if self.fusions.apply_rope_fusion:
            return 0
        rows = self.tokens if self.documents else self.row_length
        return 4 * rows * self.channels * self.element

    def _mixed_tokens(self) -> int:
        """Return what mixing with the token before saves: K and V as views of the QKV output, and their neighbours."""
        if not self._mixes_tokens:
            return 0
        return 2 * self.key_bytes() + self.qkv_bytes()

    def _hidden_gate(self) -> int:
        if not self.hidden_gate:
            return 0
        width = self.rows * self.hidden
        return width * (FP32 + 2 * self.element) + self.tokens * self.heads * self.element

    def _core_attention_statistics(self) -> int:
        """Return the log-sum-exp of one attention; packed documents add copies around each document's attention."""
        if "core_attn" in self.recomputed:
            return 0
        saved = self.tokens * self.heads * FP32
        if self.documents:
            saved += self.query_bytes()
        if self.layout.context > 1 and not self.te:  # K and V of the whole sequence; in a ring, of a part
            saved += 2 * self.key_bytes() * self.layout.context
        return saved

    def _later_loop(self) -> int:
        """Return what attention in a loop >= 2 saves: over the first loop's K and V, and over its own window."""
        if "core_attn" in self.recomputed:
            return self.key_bytes() + self.qkv_bytes()
        saved = self._core_attention_statistics() + self._own_values()
        if not self.windowed:
            return saved
        # Both outputs, and the gate.
        return saved + 2 * self.query_bytes() + self.tokens * self.heads * self.element + self._window()

    def _window(self) -> int:
        """Return what attention in a window saves, besides queries and output."""
        if not self._blocked_window:
            return self._keys_and_values() + self.tokens * self.heads * FP32
        blocks = -(-self.row_length // self.model.window_size)
        padding = blocks * self.model.window_size / self.row_length
        keys = 2 * self.key_bytes() * (blocks + 1) / blocks
        return int(padding * (self.query_bytes() + keys)) + self._window_scores()

    def _own_values(self) -> int:
        """Return V of a later loop that shares only keys: a view of the fused QKV output, or a copy of V."""
        window_keeps_them = self.windowed and not self._blocked_window and not self.te
        if derived.shares_values(self.model) or window_keeps_them:
            return 0
        return self.key_bytes() if self.te else self.qkv_bytes()

    def _window_scores(self) -> int:
        """Return the attention weights of each query over its own block of keys and the one before it."""
        blocks = -(-self.row_length // self.model.window_size)
        sequences = self.tokens / self.row_length
        return int(sequences * blocks * self.model.window_size * self.heads * 2 * self.model.window_size * self.element)

    def window_bias(self) -> int:
        """Return the mask of blocked window attention: kept for all layers, or recomputed if documents are packed."""
        if not self._blocked_window:
            return 0
        return self._window_scores() // 2
