"""PLT decoder layers, built from vLLM's tensor-parallel layers.

Shapes: T tokens of a step, L loops, N rows (T tokens of one loop, or L * T), H query heads, K key/value heads, D the
head dimension, d the hidden size; heads are this rank's.
"""

import torch
from torch import nn

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.heads import Heads, sharded_parameter
from vllm_plt.key_shift import KeyCarry, KeyShift
from vllm_plt.passes import PassState
from vllm_plt.rope import rope_parameters
from vllm_plt.vllm_internals import (
    Attention,
    FusedMoEFactory,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VllmConfig,
    attend_folded,
    can_fold,
    check_block_size,
    get_act_and_mul_fn,
    get_rope,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)


class WholeRMSNorm(nn.Module):
    """RMSNorm over a whole projection that tensor parallelism shards (OLMo-2's query and key norms)."""

    def __init__(self, size: int, shard: int, eps: float):
        super().__init__()
        self.weight = sharded_parameter(size, shard=shard)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean = tensor_model_parallel_all_reduce(wide.pow(2).mean(-1, keepdim=True))
        mean = mean / get_tensor_model_parallel_world_size()
        return self.weight * (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)


class PLTGate(nn.Module):
    """Gate: one scalar per head and row, computed from the query after RoPE or from the layer's input."""

    def __init__(self, config: PLTConfig, heads: Heads):
        super().__init__()
        if config.gate_input not in ("query", "hidden"):
            raise ValueError(f"gate_input {config.gate_input!r} cannot be served yet: PLTGate has no equation for it")
        self.from_hidden = config.gate_input == "hidden"
        self.activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[config.gate_activation]
        width = config.hidden_size if self.from_hidden else config.head_dim
        # Gates are computed in fp32; storing these in fp32 saves a cast in every step.
        self.weight = sharded_parameter(heads.query, width, shard=heads.rank, dtype=torch.float32)
        self.bias = sharded_parameter(heads.query, shard=heads.rank, dtype=torch.float32)
        if self.from_hidden:
            self.gate_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, query: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return gates [N, H, 1] from query [N, H, D] and residual [N, d]; computed in fp32."""
        if self.from_hidden:
            logits = nn.functional.linear(self.gate_norm(residual).float(), self.weight, self.bias)
        else:
            logits = (query.float() * self.weight).sum(-1) + self.bias
        return self.activation(logits).to(query.dtype).unsqueeze(-1)


class PLTAttention(nn.Module):
    """Global attention of all loops, the later loops' sliding windows, and the gate that blends the two.

    With `full_attention: last_loop` no loop has both: the last one has global attention, those before it have windows.

    Args:
        index: index of the layer.
        loops: L; 1 for a layer that does not loop.
        rows: decode steps run all loops at once.
        prefix: the model's prefix. vLLM identifies an attention layer by the one number in its name, which is
            pass * layers + index: pass 0 for the full context of loop 1 (of loop L, if the earlier ones have
            windows), passes 1..L-1 for the windows, and L..2L-2 for the later loops' full-context caches, if they have
            keys or values of their own.
    """

    def __init__(self, config: PLTConfig, index: int, loops: int, rows: bool, prefix: str, vllm_config: VllmConfig):
        super().__init__()
        self.loops = loops
        self.heads = heads = Heads(config)
        self.scaling = heads.dim**-0.5
        self.shares_keys, self.shares_values = config.share_kv, config.shares_values
        self.windows_earlier_loops = config.windows_earlier_loops
        self.gate_is_local = config.gate_side == "local"
        name = f"{prefix}.layers.{index}.self_attn"
        quant = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            heads.dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias or config.qkv_bias,
            quant_config=quant,
            prefix=f"{name}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * heads.dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=f"{name}.o_proj",
        )
        self.rotary_emb = get_rope(
            heads.dim, max_position=config.max_position_embeddings, rope_parameters=rope_parameters(config)
        )
        self.norms_heads = config.norm_placement == "pre"
        self.q_norm, self.k_norm = self._qk_norms(config) if config.qk_norm else (None, None)
        self.key_shift = None if config.key_shift == "none" else KeyShift(config, heads)
        self.plt_gate = PLTGate(config, heads) if config.gated_window and loops > 1 else None

        def attention(number: int, kind: str, width: int = 1, **kwargs) -> Attention:
            return Attention(
                heads.query * width,
                heads.dim,
                self.scaling,
                num_kv_heads=heads.kv,
                cache_config=vllm_config.cache_config,
                quant_config=quant,
                prefix=f"{prefix}.layers.{number * config.num_hidden_layers + index}.self_attn.{kind}",
                **kwargs,
            )

        self.attn = attention(0, "attn")
        check_block_size(self.attn, vllm_config)
        window = {"per_layer_sliding_window": config.window_size}
        windows = len(config.window_loops(loops))
        self.windows = nn.ModuleList(attention(1 + number, "window", **window) for number in range(windows))
        later = [] if config.shares_values else config.full_loops(loops)[1:]
        self.own = nn.ModuleList(attention(loops - 1 + loop, "attn") for loop in later)
        self.folded = None
        if rows and config.shares_values and can_fold(self.attn):
            self.folded = attention(0, "folded", loops, kv_sharing_target_layer_name=self.attn.layer_name)

    def _qk_norms(self, config: PLTConfig) -> tuple[nn.Module, nn.Module]:
        heads, eps = self.heads, config.rms_norm_eps
        if self.norms_heads:
            return RMSNorm(heads.dim, eps=eps), RMSNorm(heads.dim, eps=eps)
        return WholeRMSNorm(heads.query_size, heads.rank, eps), WholeRMSNorm(heads.kv_size, heads.kv_shard, eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor, state: PassState
    ) -> torch.Tensor:
        """Return the attention output [N, d] of hidden_states [N, d] at positions [N].

        `residual` [N, d] is the layer's input, which a "hidden" gate reads; hidden_states is its norm, or with norms on
        the outputs (OLMo-2) the same.
        """
        query, key, value = self._qkv(positions, hidden_states, state.shifted)
        attend = self._rows if state.loop is None else self._loop
        out = attend(query, key, value, residual, state)
        return self.o_proj(out)[0]

    def _qkv(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, carry: KeyCarry | None
    ) -> tuple[torch.Tensor, ...]:
        """Return query, key and value, [N, heads * D] each: normed, shifted and rotated where that applies."""
        heads = self.heads
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([heads.query_size, heads.kv_size, heads.kv_size], dim=-1)
        if self.q_norm is not None:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        if carry is not None:
            key, value = self.key_shift(key, value, carry)
        query, key = self.rotary_emb(positions, query, key)
        return query, key, value

    def _normed(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not self.norms_heads:
            return norm(x)
        return norm(x.reshape(-1, self.heads.dim)).view(x.shape)

    def _with_own(self) -> tuple[Attention, ...]:
        """Return what each loop attends with, if it has K or V of its own."""
        return (*self.windows, self.attn) if self.windows_earlier_loops else (self.attn, *self.own)

    def _loop(self, query, key, value, residual, state: PassState) -> torch.Tensor:
        loop, first = state.loop, state.first
        if loop == 0:
            if first is not None:
                first.keep(key)
            return self._with_own()[0](query, key, value)
        if self.shares_values:
            shared = self.attn(query, None, None)  # reads loop 1's cache
        else:
            shared = self._with_own()[loop](query, first.take() if self.shares_keys else key, value)
        if self.plt_gate is None:
            return shared
        return self._blend(query, residual, self.windows[loop - 1](query, key, value), shared)

    def _rows(self, query, key, value, residual, state: PassState) -> torch.Tensor:
        """Attend with all loops of T tokens at once; row l * T + t is loop l + 1 of token t."""
        count = query.shape[0] // self.loops
        queries, keys, values = query.split(count), key.split(count), value.split(count)
        if self.shares_values:
            shared = self._shared_rows(query, queries, keys[0], values[0], count)
        else:
            attended = keys[:1] * self.loops if self.shares_keys else keys
            each = zip(self._with_own(), queries, attended, values, strict=True)
            shared = torch.cat([layer(*qkv) for layer, *qkv in each])
        if self.plt_gate is None:
            return shared
        windows = zip(self.windows, queries[1:], keys[1:], values[1:], strict=True)
        local = [layer(*qkv) for layer, *qkv in windows]
        local = local[0] if len(local) == 1 else torch.cat(local)
        shared[count:] = self._blend(query[count:], residual[count:], local, shared[count:])
        return shared

    def _shared_rows(self, query, queries, key, value, count: int) -> torch.Tensor:
        """Attend with all loops' queries [L * T, H * D] to loop 1's keys and values, reading them once if possible."""
        heads, loops = self.heads, self.loops
        if self.folded is None:
            return torch.cat([self.attn(queries[0], key, value), *(self.attn(q, None, None) for q in queries[1:])])
        # Query heads that share a key/value head must be adjacent.
        shape = (loops, count, heads.kv, heads.query // heads.kv, heads.dim)
        folded = query.reshape(shape).permute(1, 2, 0, 3, 4).reshape(count, loops * heads.query, heads.dim)
        key, value = key.reshape(count, heads.kv, heads.dim), value.reshape(count, heads.kv, heads.dim)
        out = attend_folded(self.attn, self.folded, folded, key, value)
        out = out.view(count, heads.kv, loops, heads.query // heads.kv, heads.dim).permute(2, 0, 1, 3, 4)
        return out.reshape(loops * count, heads.query_size)

    def _blend(self, query, residual, local, shared) -> torch.Tensor:
        """Blend local and shared attention by the gate; residual is [N, d], all others and the result [N, H * D]."""
        shape = (-1, self.heads.query, self.heads.dim)
        gate = self.plt_gate(query.view(shape), residual)
        first, second = (shared, local) if self.gate_is_local else (local, shared)
        return torch.lerp(first.view(shape), second.view(shape), gate).view(query.shape)


class PLTMLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: PLTConfig, size: int, prefix: str, vllm_config: VllmConfig):
        super().__init__()
        quant = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [size] * 2, bias=config.mlp_bias, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, bias=config.mlp_bias, quant_config=quant, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class PLTMoE(nn.Module):
    """Mixture of experts in place of the MLP. A row is a token in one loop: a token is routed anew in each loop."""

    def __init__(self, config: PLTConfig, prefix: str, vllm_config: VllmConfig):
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=vllm_config.quant_config,
            activation=config.hidden_act,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )
        shared = config.shared_expert_intermediate_size
        self.shared_expert = PLTMLP(config, shared, f"{prefix}.shared_expert", vllm_config) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate(x.float())
        shared = None if self.shared_expert is None else self.shared_expert(x)  # first: experts may overwrite x
        out = self.experts(hidden_states=x, router_logits=logits)
        return out if shared is None else out + shared


class PLTDecoderLayer(nn.Module):
    """Attention and MLP with residual connections; all loops share the weights."""

    def __init__(self, config: PLTConfig, index: int, loops: int, rows: bool, prefix: str, vllm_config: VllmConfig):
        super().__init__()
        self.self_attn = PLTAttention(config, index, loops, rows, prefix, vllm_config)
        name = f"{prefix}.layers.{index}.mlp"
        if config.num_experts is None:
            self.mlp = PLTMLP(config, config.intermediate_size, name, vllm_config)
        else:
            self.mlp = PLTMoE(config, name, vllm_config)

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.pre = config.norm_placement == "pre"
        self.residual_scale = config.residual_scale
        self.input_layernorm = norm() if self.pre else None
        self.post_attention_layernorm = norm()
        self.post_feedforward_layernorm = norm() if not self.pre or config.ffn_output_norm else None

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        state: PassState,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the layer to hidden_states + residual, [N, d] each; return the output as the same two addends.

        Both arguments may be overwritten.
        """
        if not self.pre:
            return self._post_norm(positions, hidden_states, residual, state)
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self._scaled(self.self_attn(positions, hidden_states, residual, state))
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        if self.post_feedforward_layernorm is not None:
            hidden_states = self.post_feedforward_layernorm(hidden_states)
        return self._scaled(hidden_states), residual

    def _scaled(self, out: torch.Tensor) -> torch.Tensor:
        """Return a branch's output times the residual scale."""
        return out if self.residual_scale == 1.0 else self.residual_scale * out

    def _post_norm(self, positions, hidden_states, residual, state) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the layer with norms on the outputs of attention and MLP, as in OLMo-2."""
        layer_input = hidden_states if residual is None else hidden_states + residual
        out = self.self_attn(positions, layer_input, layer_input, state)
        residual = layer_input + self._scaled(self.post_attention_layernorm(out))
        return self._scaled(self.post_feedforward_layernorm(self.mlp(residual))), residual
