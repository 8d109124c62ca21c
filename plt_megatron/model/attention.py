"""PLT's attention: first-loop K/V sharing, the gated sliding window (paper sections 3.2 and 3.3), and shifted keys.

`GatedSlidingWindowAttention` is the `core_attention` of an otherwise stock megatron-core layer. It receives Q, K and V
after RoPE. In the first loop it is plain causal attention and publishes K and V. In later loops:

    y_global = Attn(Q, K_1, V_1)        causal, with the first loop's K and V (this loop's V without `share_values`)
    y_local  = SWA(Q, K, V, w)          with this loop's K and V, in a window of w keys
    y        = g * y_local + (1 - g) * y_global

The gate g is one scalar per head and token. `query` (the paper): g = sigmoid(w_h . Q_h + b_h). `hidden` (LoopCoder-v2):
g = sigmoid(w_h . RMSNorm(x) + b_h), with x the layer's input residual stream and the norm the gate's own. Weights start
at zero, so that g = 1/2. With `model.gate_activation: tanh`, g starts at 0, with gradients, as in Flamingo (arXiv
2204.14198).

With `model.full_attention: last_loop`, which is not in the paper, all loops have keys and values of their own: the last
loop attends to the whole context, the others to a window.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.model.context_parallel import SequenceShard
from plt_megatron.model.loop_context import Documents, LoopContext
from plt_megatron.model.loop_input import shift
from plt_megatron.model.norms import RMSNorm
from plt_megatron.model.te_attention import TEAttention
from plt_megatron.model.torch_attention import aligned, causal_attention, window_attention
from plt_megatron.model.transformer_config import PLTTransformerConfig
from plt_megatron.runtime.cpu_runtime import is_cpu_runtime

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}  # by `model.gate_activation`


def _zeros(config: TransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=config.params_dtype, device=torch.cuda.current_device()))


def _zeros_by_head(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """Return a parameter of zeros for this tensor-parallel rank's heads."""
    parameter = _zeros(config, *shape)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


class QueryGate(nn.Module):
    """Gate logits from each head's query, in the core attention of loops >= 2. Weight [heads / TP, head_dim], bias
    [heads / TP], split by head."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        assert config.kv_channels is not None
        heads = config.num_attention_heads // tp_group.size()
        self.weight = _zeros_by_head(config, heads, config.kv_channels)
        self.bias = _zeros_by_head(config, heads)

    def forward(self, query: Tensor) -> Tensor:
        """query [s, b, heads / TP, head_dim], after RoPE -> logits [s, b, heads / TP]."""
        return (query * self.weight).sum(dim=-1) + self.bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Same signature as megatron-core's modules; shards every parameter along its first dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets)


class HiddenGate(nn.Module):
    """Gate logits from the residual stream, in every loop before the core attention. Weight [heads, hidden], bias
    [heads] and norm [hidden] are replicated on every rank: each computes all heads for its rows, and only the logits
    are exchanged."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.weight = _zeros(config, config.num_attention_heads, config.hidden_size)
        self.bias = _zeros(config, config.num_attention_heads)
        self.gate_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [s (/ TP), b, hidden] -> logits [s, b, heads / TP]."""
        logits = nn.functional.linear(self.gate_norm(hidden_states), self.weight, self.bias)
        if self.sequence_parallel:
            # Every rank's gradient covers all heads after the scatter's backward, so no reduction is needed here.
            logits = gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return scatter_to_tensor_model_parallel_region(logits, group=self.tp_group)


class TorchAttention(nn.Module):
    """Causal attention in plain torch, within a sliding window if `window_size` is given.

    Under context parallelism a rank's queries attend to the whole sequence's keys and values or, with a window, to the
    rank's own and to the `window_size - 1` rows before each of its runs.
    """

    def __init__(self, window_size: int | None, *, softmax_scale: float | None, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.window_size = window_size
        self.rows = SequenceShard.of(pg_collection, sequence_parallel=False)

    def lay_out(self, query: Tensor, documents: Documents | None) -> Tensor:
        """Lay out Q so that no attention has to copy it."""
        return aligned(query)

    def prepare(self, documents: Documents | None, *own: Tensor) -> tuple[Tensor, ...]:
        """Return K and V, or one of them, as a global attention takes them: gathered from all ranks."""
        return self.rows.gather(*own)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """query [s / CP, b, heads, d], key and value [s, b, groups, d] or, with a window, [s / CP, b, groups, d]
        -> [s / CP, b, heads, d]."""
        kwargs: dict[str, Any] = {"softmax_scale": self.softmax_scale, "documents": documents}
        if self.rows.size > 1:
            kwargs["runs"] = self.rows.runs(query.shape[0] * self.rows.size)
        if self.window_size is None:
            return causal_attention(query, key, value, **kwargs)
        if self.rows.size > 1:
            kwargs["before"] = self.rows.halo(self.window_size - 1, key, value)
        return window_attention(query, key, value, window_size=self.window_size, **kwargs)


def require_fused_gated_window() -> None:
    """Raise `UserError` unless Triton and a GPU (or Triton's interpreter, in tests) are available."""
    try:
        import triton
    except ImportError as error:
        raise UserError("model.fused_gated_window needs Triton, which comes with torch's CUDA builds") from error
    if is_cpu_runtime() and not triton.knobs.runtime.interpret:
        raise UserError("model.fused_gated_window needs a GPU: set model.fused_gated_window=false")


class GatedSlidingWindowAttention(MegatronModule):
    """megatron-core `core_attention` of a PLT layer; each call's `packed_seq_params` tells it which loop runs.

    The global attention is in FP8 where configured, the local one never. With `model.fused_gated_window` one kernel,
    which works with any backend's global attention, computes the local one, the gate and the blend.

    Attributes:
        loops: whether the layer runs in every loop; a layer that runs once has plain causal attention and no gate.
    """

    def __init__(
        self,
        config: PLTTransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,  # unused: `config` has it, and the local attention's too
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.plt = config.plt
        self.layer_number = layer_number
        self.loops = self.plt.loop_count > 1 and layer_number - 1 in derived.looped_layers(self.plt)
        self.head_dim, self.softmax_scale = config.kv_channels, softmax_scale

        def build(window_size: int | None) -> TorchAttention | TEAttention:
            kwargs: dict[str, Any] = {"layer_number": layer_number, "softmax_scale": softmax_scale}
            kernel = TEAttention if config.backend == "te" else TorchAttention
            return kernel(window_size, config=config, pg_collection=pg_collection, **kwargs)

        self.global_attention = build(None)
        self.local_attention: nn.Module | None = None
        self.plt_gate: nn.Module | None = None
        if self.loops and self.plt.gated_window:
            if self.plt.fused_gated_window:
                require_fused_gated_window()
            else:
                self.local_attention = build(self.plt.window_size)
            gate = HiddenGate if self.plt.gate_input == "hidden" else QueryGate
            self.plt_gate = gate(config, pg_collection.tp)
        elif self.loops and derived.windows_earlier_loops(self.plt):
            self.local_attention = build(self.plt.window_size)

    def reads_own(self, context: LoopContext) -> tuple[bool, bool]:
        """Return whether a loop attends to the keys, and to the values, that it computes itself. A later loop that
        shares the first loop's does so only if it has a window."""
        if context.loop == 1 or not self.loops:
            return True, True
        return derived.later_loops_use_keys(self.plt), derived.later_loops_use_values(self.plt)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: LoopContext | None = None,
    ) -> Tensor:
        """Run one loop's attention.

        Args:
            query: [s / CP, b, heads / TP, d], with one more channel, the gate's logit, if the gate reads hidden
                states.
            key, value: [s / CP, b, groups / TP, d].
            packed_seq_params: the loop's context; None means the only loop of a plain transformer.

        Returns:
            [s / CP, b, heads / TP * d].
        """
        assert attention_mask is None and attention_bias is None, "PLT attention is always causal"
        context = packed_seq_params or LoopContext()
        logits = None
        if isinstance(self.plt_gate, HiddenGate):
            query, logits = query[..., : self.head_dim], query[..., self.head_dim]
        query = self.global_attention.lay_out(query, context.documents)
        out = self._attend(query, key, value, logits, context)
        return out.reshape(*out.shape[:2], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, context: LoopContext) -> Tensor:
        if self.loops and not context.is_last_loop and derived.windows_earlier_loops(self.plt):
            assert self.local_attention is not None
            return self.local_attention(query, key, value, context.documents)
        shares = self.loops and self.plt.share_kv and context.loop_count > 1
        if context.loop == 1 or not shares:
            key, value = self.global_attention.prepare(context.documents, key, value)  # once for all loops, if shared
            if shares:
                key, value = context.first_loop_kv.publish(self.layer_number, key, value)
            return self.global_attention(query, key, value, context.documents)
        key_1, value_1 = context.first_loop_kv.read(self.layer_number)
        if not self.plt.share_values:
            (value_1,) = self.global_attention.prepare(context.documents, value)
        y_global = self.global_attention(query, key_1, value_1, context.documents)
        if self.plt_gate is None:
            return y_global
        if self.local_attention is None:
            if context.statistics is not None:
                with torch.no_grad():  # again: the kernel does not return the gate
                    context.statistics.add_gate(context.loop, self.layer_number, self._gate(query, logits))
            return self._fused_window(query, key, value, y_global, logits=logits, documents=context.documents)
        y_local = self.local_attention(query, key, value, context.documents)
        gate = self._gate(query, logits)
        if context.statistics is not None:
            context.statistics.add_gate(context.loop, self.layer_number, gate)
        if self.plt.gate_side == "local":
            return torch.lerp(y_global, y_local, gate)
        return torch.lerp(y_local, y_global, gate)

    def _fused_window(self, *tensors: Tensor, logits: Tensor | None, documents: Documents | None) -> Tensor:
        """Query, key, value and the global attention's output, as in `_attend` -> [s, b, heads, d]."""
        from plt_megatron.model.gated_window_kernel import gated_window

        gate: Any = self.plt_gate
        return gated_window(
            *tensors,
            logits=logits,
            **({"weight": gate.weight, "bias": gate.bias} if logits is None else {}),
            window_size=self.plt.window_size,
            gate_side=self.plt.gate_side,
            softmax_scale=self.softmax_scale,
            document_starts=None if documents is None else documents.first_tokens,
        )

    def _gate(self, query: Tensor, logits: Tensor | None) -> Tensor:
        """Return gate values [s, b, heads / TP, 1]; `logits` come from a gate that reads hidden states."""
        assert self.plt_gate is not None
        logits = self.plt_gate(query) if logits is None else logits
        return ACTIVATIONS[self.plt.gate_activation](logits).unsqueeze(-1)


class KeyShift(nn.Module):
    """Keys shifted by one token (`model.key_shift`), so that a query finds what followed an earlier copy of its token.

    An induction head needs keys that know the token before theirs; here part of the keys comes from that token, so that
    one layer suffices. For the first token of a text that part is zero. Keys are shifted after their norm and before
    RoPE, in every loop: RoPE still rotates them by the position they end up at, and later loops attend to the first
    loop's shifted keys.

    - heads: whole keys of the second half of the key/value groups (of an odd number, the larger half)
    - channels: in every key, the half of the channels that RoPE rotates slowly ("partial key offset" of the nanoGPT
      speed records)
    - learned: k_t becomes k_t + a (k_(t-1) - k_t), and v_t likewise with b; a and b are scalars per group, initially
      zero, so that an imported model is unchanged ("KV shifting attention", arXiv 2411.19574; the projection covers its
      scale)

    The module has this tensor-parallel rank's groups and this context-parallel rank's rows. The learned factors `key`
    and `value` [groups] are replicated on every rank: the backward pass sums their gradients over the ranks, also if
    there are fewer groups than ranks.
    """

    def __init__(self, config: TransformerConfig, plt: ModelConfig, pg_collection: Any) -> None:
        super().__init__()
        self.form = plt.key_shift
        self.rows = SequenceShard.of(pg_collection, sequence_parallel=False)
        self.tp_group = pg_collection.tp
        groups = config.num_query_groups
        assert groups is not None
        first = self.tp_group.rank() * groups // self.tp_group.size()
        self.groups = range(first, first + max(groups // self.tp_group.size(), 1))  # this rank's, of the whole model's
        self.first_shifted = groups // 2
        if self.form == "learned":
            self.key, self.value = _zeros(config, groups), _zeros(config, groups)

    def forward(self, key: Tensor, value: Tensor, context: LoopContext) -> tuple[Tensor, Tensor]:
        """key and value [s / CP, b, groups / TP, d], before RoPE -> the same."""
        if self.form == "heads":
            kept = min(max(self.first_shifted - self.groups.start, 0), len(self.groups))
            if kept < len(self.groups):
                key = torch.cat((key[:, :, :kept], self._before(key[:, :, kept:], context)), dim=2)
        elif self.form == "channels":
            quarters = key.unflatten(-1, (2, 2, -1))  # RoPE rotates pairs (i, i + d / 2), slower for larger i
            slow = self._before(quarters[..., 1, :], context)
            key = torch.stack((quarters[..., 0, :], slow), dim=-2).flatten(-3)
        else:
            key, value = self._mixed(key, self.key, context), self._mixed(value, self.value, context)
        return key, value

    def _mixed(self, own: Tensor, factors: Tensor, context: LoopContext) -> Tensor:
        whole = copy_to_tensor_model_parallel_region(factors, group=self.tp_group)
        return torch.lerp(own, self._before(own, context), whole[self.groups.start : self.groups.stop, None])

    def _before(self, part: Tensor, context: LoopContext) -> Tensor:
        """Return the previous token's `part` for each token of a document, zero for the first; [s / CP, b, ...]."""
        starts = None if context.documents is None else context.documents.starts
        return shift(part, starts, self.rows)


class PLTSelfAttention(SelfAttention):
    """megatron-core's self-attention, with optionally shifted keys (`model.key_shift`) and access to the residual
    stream for the `hidden` gate.

    The gate's logit travels as an extra channel of each head's query: RoPE ignores channels beyond the head dimension,
    and recomputation treats it like any tensor argument.
    """

    def __init__(self, config: PLTTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        shifts = config.plt.key_shift != "none"
        self.key_shift = KeyShift(config, config.plt, self.pg_collection) if shifts else None

    def forward(self, *args: Any, packed_seq_params: LoopContext | None = None, **kwargs: Any) -> Any:
        """Run megatron-core's forward with the context also passed as `key_value_states`: megatron-core, which uses
        that argument only for cross-attention, hands it to `get_query_key_value_tensors`."""
        return super().forward(*args, key_value_states=packed_seq_params, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: LoopContext | None = None, **kwargs: Any
    ) -> Any:
        """Same as megatron-core's, but query is [s, b, heads / TP, d + 1] if the gate reads hidden states."""
        query, key, value = super().get_query_key_value_tensors(hidden_states, None, **kwargs)
        context = key_value_states or LoopContext()
        reads_key, reads_value = self.core_attention.reads_own(context)
        if self.key_shift is not None and (reads_key or reads_value):
            key, value = self.key_shift(key, value, context)
        if not reads_key:
            # With recomputation, K's norm would otherwise run its backward without a gradient.
            key = key.detach()
        gate = self.core_attention.plt_gate
        if isinstance(gate, HiddenGate):
            query = torch.cat((query, gate(hidden_states).unsqueeze(-1).to(query.dtype)), dim=-1)
        return query, key, value
