"""One loop is a plain transformer: the same parameters and numbers as transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, build, differences, draw
from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from tests.reference.megatron_weights import to_plain

pytestmark = pytest.mark.usefixtures("one_process")

_LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def _llama_name(name: str) -> str:
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_LLAMA_NAMES[rest]}.weight"
    return {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "head": "lm_head.weight",
    }[name]


def _llama(model: ModelConfig, weights: dict[str, Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).double()
    missing, unexpected = llama.load_state_dict({_llama_name(name): w for name, w in weights.items()}, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return llama


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llama_for_causal_lm_computes_the_same(tied):
    from plt_megatron.model.looped_gpt import MicroBatch

    stage = build({"loop_count": 1, "share_embeddings_and_output_weights": tied, "rotary_base": 1234.0})
    llama = _llama(stage.config.plt, to_plain(stage.config.plt, dict(stage.named_parameters()), VOCAB_SIZE))
    data, device = draw(), torch.cuda.current_device()
    tokens, labels = data["tokens"], data["labels"]

    losses = stage(MicroBatch(tokens=tokens.to(device), labels=labels.to(device)))
    losses.mean().backward()
    logits = llama(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected.mean().backward()

    gradients = to_plain(stage.config.plt, {name: p.grad for name, p in stage.named_parameters()}, VOCAB_SIZE)
    theirs = dict(llama.named_parameters())
    wrong = differences(
        {"losses": losses.detach().cpu().double()} | gradients,
        {"losses": expected.detach().view(tokens.shape)} | {name: theirs[_llama_name(name)].grad for name in gradients},
    )
    assert max(wrong.values()) <= 1e-5, wrong
    assert len(gradients) == len(theirs)
