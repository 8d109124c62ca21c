"""Tiny models with every weight random, gates and norms included, so that nothing cancels out."""

import torch

from plt_megatron.hf.configuration_plt import PLTConfig
from plt_megatron.hf.modeling_plt import PLTForCausalLM
from tests.hf.reference import Reference

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "window_size": 5,
}

# The paper's ablation, row by row.
ABLATIONS = {
    "vanilla": {"loop_count": 1},
    "naive": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False},
    "clp": {"share_kv": False, "gated_window": False},
    "clp_shared": {"gated_window": False},
    "plt": {},
}
# Full attention in the last loop only, which the paper does not have.
LAST_LOOP = {**ABLATIONS["clp"], "full_attention": "last_loop"}
# Published variants, and the parts they are made of.
VARIANTS = {
    "loopcoder": {
        "gate_input": "hidden",
        "gate_side": "global",
        "norm_between_loops": True,
        "embedding_scale": 0.707,
        "hidden_scale": 0.053,
    },
    "scales": {"embedding_scale": 0.7, "hidden_scale": 0.6, "norm_between_loops": True},
    "iquest": {"cross_loop_parallel": False, "gate_side": "global"},
    "shared_no_clp": {"cross_loop_parallel": False, "gated_window": False},
    "own_values": {"share_values": False, "loop_count": 3},
    "own_values_no_window": {"share_values": False, "gated_window": False},
    "own_values_serial": {"share_values": False, "cross_loop_parallel": False, "loop_count": 3},
    "paper_norms": {"qk_norm": True, "ffn_output_norm": True, "tie_word_embeddings": True},
    "olmo2": {"norm_placement": "post", "qk_norm": True, "num_key_value_heads": 4},
    "qwen2": {"qkv_bias": True},
    "hidden_local": {"gate_input": "hidden", "attention_bias": True, "mlp_bias": True},
    "tanh_gate": {"gate_activation": "tanh"},
    "window_1": {"window_size": 1},
    "shifted_channels": {"key_shift": "channels", "qk_norm": True, "loop_count": 3},
    "shifted_heads": {"key_shift": "heads", "norm_placement": "post", "qk_norm": True},
    "learned_shift": {"key_shift": "learned", "share_values": False, "qkv_bias": True},
    "shifted_channels_shared": {"key_shift": "channels", "gated_window": False, "num_key_value_heads": 1},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,  # 1/8 of what SIZES have
            "beta_fast": 8.0,
            "beta_slow": 1.0,
        }
    },
    "learned_scale": {
        "hidden_norm": True,
        "learned_hidden_scale": "channel",
        "embedding_scale": 0.7,
        "residual_scale": 0.6,
        "loop_count": 3,
    },
    "injected": {
        "cross_loop_parallel": False,
        "input_injection": True,
        "learned_hidden_scale": "model",
        "norm_between_loops": True,
        "residual_scale": 1.3,
    },
    "last_loop": LAST_LOOP,
    "last_loop_shifted": {**LAST_LOOP, "loop_count": 3, "key_shift": "heads", "qk_norm": True},
    "last_loop_serial": {**LAST_LOOP, "loop_count": 3, "cross_loop_parallel": False},
    "last_loop_window_1": {**LAST_LOOP, "window_size": 1, "norm_between_loops": True, "hidden_scale": 0.5},
}
# Layers that run once, and loops by layer; some on longer texts than their RoPE's.
PATHS = {
    "span": {"num_hidden_layers": 4, "loop_span": [1, 3], "loop_count": 3},
    "span_shifted": {"num_hidden_layers": 3, "loop_span": [1, 2], "key_shift": "heads", "norm_between_loops": True},
    "span_loopcoder": {
        "num_hidden_layers": 3,
        "loop_span": [0, 2],
        "gate_input": "hidden",
        "gate_side": "global",
        "norm_between_loops": True,
        "hidden_scale": 0.3,
    },
    "span_clp": {
        **VARIANTS["yarn"],
        "num_hidden_layers": 3,
        "loop_span": [1, 2],
        "share_kv": False,
        "gated_window": False,
    },
    "by_layer": {
        **ABLATIONS["naive"],
        **VARIANTS["yarn"],
        "loop_order": "layer",
        "loop_count": 3,
        "num_hidden_layers": 3,
        "loop_span": [0, 2],
    },
    "span_last_loop": {**VARIANTS["yarn"], **LAST_LOOP, "num_hidden_layers": 4, "loop_span": [1, 3], "loop_count": 3},
    "by_layer_last_loop": {**LAST_LOOP, "cross_loop_parallel": False, "loop_order": "layer", "qkv_bias": True},
    "by_layer_shared": {"cross_loop_parallel": False, "loop_order": "layer", "gate_input": "hidden"},
}
ALL = {**ABLATIONS, **VARIANTS, **PATHS}
TOLERANCE = 1e-4


def make_config(**changes):
    return PLTConfig(**{**SIZES, **changes})


def make_model(seed=0, **changes):
    """An fp32 model in eval mode with every parameter random, and biases of experts."""
    torch.manual_seed(seed)
    attention = changes.pop("attn_implementation", "sdpa")
    model = PLTForCausalLM._from_config(make_config(**changes), attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.7, 1.3)
        else:
            parameter.data.normal_(std=0.3 if "gate" in name or "bias" in name else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model.eval()


def make_tokens(*shape, seed=1, vocab=97):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def decode(model, tokens, prefill, cache=None, attention_mask=None, **kwargs):
    """Logits [B, n, vocab] of `tokens`: the first `prefill` in one pass, the others one by one."""
    cache = model.new_cache(loop_count=kwargs.get("loop_count")) if cache is None else cache
    steps = ([(0, prefill)] if prefill else []) + [(i, i + 1) for i in range(prefill, tokens.shape[1])]
    logits = []
    with torch.no_grad():
        for begin, end in steps:
            mask = None if attention_mask is None else attention_mask[:, :end]
            out = model(tokens[:, begin:end], attention_mask=mask, cache=cache, **kwargs)
            logits.append(out.logits)
    return torch.cat(logits, 1)


def full(model, tokens, **kwargs):
    """Logits of one pass without a cache."""
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def expected(model, tokens, loop_count=None):
    """The equations' logits [B, n, vocab] in fp32."""
    return Reference(model.config, model.state_dict(), loop_count).plain.logits(tokens, loops=loop_count).float()


def close_to_each(logits, rows, wanted):
    """Whether rows padded on the left have the logits of each row alone."""
    parts = zip(logits, rows, wanted, strict=True)
    return all((got[-len(row) :] - want).abs().max() < TOLERANCE for got, row, want in parts)


def left_pad(rows):
    """Sequences of uneven lengths to tokens and mask [B, n], padded on the left."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return tokens, mask
