"""Tiny random models of transformers, to import."""

from __future__ import annotations

import torch
from convert_helpers import VOCAB, make_tokens

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MOE = {"head_dim": 20, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "truncate": False,
}
DENSE = {
    "llama": ("LlamaConfig", {"head_dim": 16, "rms_norm_eps": 1e-6}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "qwen3 moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 6}),
    "qwen3 moe, dense first": ("Qwen3MoeConfig", {**MOE, "num_experts": 4, "mlp_only_layers": [0]}),
    "olmo2": ("Olmo2Config", {}),
}


def save_dense(folder, name, dtype=torch.float32, **others):
    """A random model of transformers, norms and biases included; (model, its logits of `make_tokens()`)."""
    import transformers

    kind, settings = DENSE[name]
    config = getattr(transformers, kind)(**{**TINY, **settings})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for key, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in key else 0.0, 0.2)
    model = model.to(dtype)
    model.save_pretrained(folder, **others)
    with torch.no_grad():
        return model, model.float()(make_tokens(), use_cache=False).logits
