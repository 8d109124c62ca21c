"""Configuration of a Parallel Loop Transformer (PLT, arXiv 2510.24824) for transformers.

This file travels with every exported model: it imports transformers and nothing else.
"""

import transformers

# Before 5.4 configurations are not dataclasses: `__post_init__` does not run, and a tied head is silently garbage.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 4):
    raise ImportError(f"a PLT needs transformers 5.4 or later, not {transformers.__version__}")

from transformers.configuration_utils import PreTrainedConfig

MAX_LOOPS = 8
CHOICES = {
    "norm_placement": ("pre", "post"),
    "key_shift": ("none", "heads", "channels", "learned"),
    "scoring_func": ("softmax", "sigmoid"),
    "loop_order": ("stack", "layer"),
    "full_attention": ("every_loop", "last_loop"),
    "gate_input": ("query", "hidden"),
    "gate_side": ("local", "global"),
    "gate_activation": ("sigmoid", "tanh"),
    "learned_hidden_scale": ("none", "model", "channel"),
}


class PLTConfig(PreTrainedConfig):
    """A Llama-style decoder whose layer stack runs `loop_count` times with the same weights.

    Llama's keys have the same meaning as in `LlamaConfig`. The loop's own keys follow (paper section 3); the published
    descendants LoopCoder-v2 (arXiv 2606.18023) and IQuest-Coder-V1-Loop are particular settings of them:

    Args:
        loop_count (`int`): L, 1 to 8. 1 is a plain transformer without extra parameters.
        loop_span (`list[int]`): [first, last), the layers that loop. Layers before them run once, and their output is
            E in the loops' input; layers after them run once on the last loop's output. None: all layers loop.
        loop_order (`str`): "stack", or "layer": each layer runs all its loops before the next layer, without
            cross_loop_parallel.
        cross_loop_parallel (`bool`): loops >= 2 read `embedding_scale * E + hidden_scale * shift(h)`;
            otherwise `h`.
        input_injection (`bool`): without cross_loop_parallel, loops >= 2 read
            `embedding_scale * E + hidden_scale * h`.
        share_kv (`bool`): loops >= 2 attend to the first loop's keys and values.
        share_values (`bool`): False: loops >= 2 attend to the first loop's keys and their own values. Needs
            `share_kv`.
        gated_window (`bool`): loops >= 2 blend that attention with a sliding window over their own keys and
            values, by one gate per head. Needs `share_kv`.
        full_attention (`str`): "every_loop", or "last_loop": loops before the last attend to a window of their own keys
            and values, and the last loop to all of its own. Needs `share_kv` and `gated_window` to be False.
        window_size (`int`): keys that a query sees in the window, its own included.
        gate_input (`str`): what the gate reads, "query" or "hidden"; see `PLTGate`.
        gate_side (`str`): the attention that the gate multiplies, "local" or "global"; the other gets
            1 - gate.
        gate_activation (`str`): activation of the gate's logit, "sigmoid" or "tanh".
        norm_between_loops (`bool`): the final norm is applied to every loop's output, not only to the last's.
        embedding_scale, hidden_scale (`float`): scales of the input of loops >= 2.
        hidden_norm (`bool`): h is divided by its root mean square before it is scaled.
        learned_hidden_scale (`str`): "none": the scale of h is `hidden_scale`; "model" or "channel": it is a parameter,
            one for the model or one per channel.
        residual_scale (`float`): factor of what attention and MLP add to the residual stream.
        qk_norm (`bool`): RMSNorm on queries and keys, per head (over the whole projection if `norm_placement`
            is "post").
        ffn_output_norm (`bool`): RMSNorm on the MLP's output before the residual is added.
        norm_placement (`str`): "pre" (Llama) or "post" (OLMo-2: norms on the outputs of attention and MLP).
        key_shift (`str`): which keys come from the previous token, one of `CHOICES`; see `PLTKeyShift`.
        attention_bias (`bool`): biases on the q, k, v and o projections (Llama).
        qkv_bias (`bool`): biases on the q, k and v projections only (Qwen2).
        num_experts (`int`): experts in place of a layer's MLP; None: a dense model. The keys are Qwen3-MoE's.
        first_k_dense_replace (`int`): number of first layers that keep an MLP; DeepSeek-V3's key.
        num_experts_per_tok (`int`): experts that a token is sent to, chosen anew in each loop.
        moe_intermediate_size (`int`): hidden size of one expert.
        shared_expert_intermediate_size (`int`): hidden size of a further expert that every token uses; None: none.
        norm_topk_prob (`bool`): the weights of a token's experts add up to 1.
        scoring_func (`str`): function of the router's logits, "softmax" or "sigmoid"; DeepSeek-V3's key.
        use_routing_bias (`bool`): a bias is added to the scores that choose experts, but not to those that weight
            them; MiniMax-M2's key.
        router_aux_loss_coef (`float`): coefficient of the load-balancing loss in pretraining; this code has no such
            loss.
    """

    model_type = "plt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = False
    ffn_output_norm: bool = False
    norm_placement: str = "pre"
    key_shift: str = "none"

    num_experts: int | None = None
    first_k_dense_replace: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    use_routing_bias: bool = False
    router_aux_loss_coef: float = 0.01

    loop_count: int = 2
    loop_span: list[int] | None = None
    loop_order: str = "stack"
    cross_loop_parallel: bool = True
    share_kv: bool = True
    share_values: bool = True
    gated_window: bool = True
    full_attention: str = "every_loop"
    window_size: int = 64
    gate_input: str = "query"
    gate_side: str = "local"
    gate_activation: str = "sigmoid"
    norm_between_loops: bool = False
    embedding_scale: float = 1.0
    hidden_scale: float = 1.0
    input_injection: bool = False
    hidden_norm: bool = False
    learned_hidden_scale: str = "none"
    residual_scale: float = 1.0

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    @property
    def looped_layers(self) -> range:
        """The layers that run in every loop."""
        first, last = self.loop_span or (0, self.num_hidden_layers)
        return range(first, last)

    def check(self) -> None:
        """Raise a one-line `ValueError` if the keys do not describe a model."""
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        self._check_shapes()
        self._check_experts()
        self._check_loops()
        if self.norm_placement == "post" and self.ffn_output_norm:
            raise ValueError('norm_placement "post" already norms the MLP output: leave ffn_output_norm false')
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias (q, k, v, o) and qkv_bias (q, k, v) are mutually exclusive")

    def _check_shapes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "window_size")
        self._check_positive(*sizes, "num_attention_heads", "num_key_value_heads", "head_dim")
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}")
        if self.key_shift == "channels" and self.head_dim % 4:
            raise ValueError(f'key_shift "channels" needs a head_dim divisible by 4, not {self.head_dim}')
        if self.key_shift == "heads" and self.num_key_value_heads < 2:
            raise ValueError('key_shift "heads" needs num_key_value_heads to be 2 or more')

    def _check_positive(self, *names: str, where: str = "") -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer{where}, not {value!r}")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            return
        sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        self._check_positive(*sizes, where=" in a mixture of experts")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        dense = self.first_k_dense_replace
        if type(dense) is not int or not 0 <= dense < self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace must be from 0 to one less than num_hidden_layers {self.num_hidden_layers}, "
                f"not {dense!r}"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias is not supported with experts: leave it false")
        if self.use_routing_bias and self.scoring_func != "sigmoid":
            raise ValueError('use_routing_bias needs scoring_func "sigmoid", whose scores do not depend on one another')

    def _check_path(self) -> None:
        span = self.loop_span
        if span is not None:
            whole = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(end) is int for end in span)
            if not whole or not 0 <= span[0] < span[1] <= self.num_hidden_layers:
                raise ValueError(
                    f"loop_span must be [first, last) of num_hidden_layers {self.num_hidden_layers}, not {span!r}"
                )
        whole = self.cross_loop_parallel or self.input_injection or self.norm_between_loops
        if self.loop_order == "layer" and self.loop_count > 1 and whole:
            raise ValueError(
                'loop_order "layer" needs cross_loop_parallel, input_injection and norm_between_loops to be false: a '
                "layer's next loop reads its own output"
            )

    @property
    def windows_earlier_loops(self) -> bool:
        """Whether only the last of several loops attends to the whole context, the earlier ones to a window."""
        return self.loop_count > 1 and self.full_attention == "last_loop"

    def full_loops(self, loop_count: int) -> range:
        """Return the loops of a pass of `loop_count`, from 0, that attend to the whole context."""
        return range(loop_count - 1 if self.windows_earlier_loops else 0, loop_count)

    def window_loops(self, loop_count: int) -> range:
        """Return the loops of a pass of `loop_count`, from 0, that attend to a window, in layers that loop."""
        if self.gated_window:
            return range(1, loop_count)
        return range(self.full_loops(loop_count).start)

    def loops_with_keys(self, loop_count: int) -> int:
        """Return how many loops of a pass, counted from the first, use their own keys or values."""
        return loop_count if self.gated_window or not self.shares_values else 1

    @property
    def shares_values(self) -> bool:
        """Whether loops >= 2 attend to the first loop's values, not only to its keys or to neither."""
        return self.share_kv and self.share_values

    def _check_loops(self) -> None:
        count = self.loop_count
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_LOOPS:
            raise ValueError(f"loop_count must be an integer from 1 to {MAX_LOOPS}, not {count!r}")
        self._check_path()
        if self.gated_window and not self.share_kv:
            raise ValueError("gated_window needs share_kv: its gate blends the window with the first loop's K and V")
        if not self.share_values and not self.share_kv:
            raise ValueError("share_values false needs share_kv: the loops share keys alone, or nothing")
        if self.full_attention == "last_loop" and self.share_kv:
            raise ValueError('full_attention "last_loop" needs share_kv false: no other loop keeps keys to share')
        if self.norm_between_loops and self.hidden_norm:
            raise ValueError("norm_between_loops and hidden_norm are mutually exclusive: a loop's input has one norm")
        scales = (self.embedding_scale, self.hidden_scale, self.hidden_norm, self.learned_hidden_scale)
        if not (self.cross_loop_parallel or self.input_injection) and scales != (1.0, 1.0, False, "none"):
            raise ValueError(
                "embedding_scale, hidden_scale, hidden_norm and learned_hidden_scale need cross_loop_parallel or "
                "input_injection: without them a loop reads h"
            )


__all__ = ["PLTConfig"]
