"""LoopCoder-v2: its exact names and keys come in, run in our code and in training, and go out again."""

from __future__ import annotations

import json

import pytest
import torch
from convert_helpers import (
    VOCAB,
    hf_logits,
    imported,
    make_tokens,
    megatron_logits,
    quiet,
    refuse_import,
    save_random,
)
from safetensors.torch import load_file, save_file

from plt_megatron.hf.configuration_plt import PLTConfig
from tests.hf.reference import Reference

LOOPCODER_KEYS = {
    "architectures": ["IQuestPLTCoderForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_iquestpltcoder.IQuestPLTCoderConfig"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 64, 69],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "iquestpltcoder",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "plt_emb_scale": 0.707,
    "plt_gate_use_hidden_states": True,
    "plt_hidden_scale": 0.053,
    "plt_normalize_per_loop": True,
    "plt_num_loops": 2,
    "plt_window_size": [64, 0],
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def save_loopcoder(folder, **changes):
    """Small random weights under LoopCoder-v2's names."""
    keys = {**LOOPCODER_KEYS, **changes}
    generator = torch.Generator().manual_seed(11)
    gate_width = 48 if keys["plt_gate_use_hidden_states"] else 16
    shapes = {"model.embed_tokens.weight": (VOCAB, 48), "model.norm.weight": (48,), "lm_head.weight": (VOCAB, 48)}
    for layer in range(2):
        inside = {
            "input_layernorm.weight": (48,),
            "post_attention_layernorm.weight": (48,),
            "self_attn.q_proj.weight": (64, 48),
            "self_attn.k_proj.weight": (32, 48),
            "self_attn.v_proj.weight": (32, 48),
            "self_attn.o_proj.weight": (48, 64),
            "self_attn.plt_gate.weight": (4, gate_width),
            "self_attn.plt_gate.bias": (4,),
            "mlp.gate_proj.weight": (56, 48),
            "mlp.up_proj.weight": (56, 48),
            "mlp.down_proj.weight": (48, 56),
        }
        if gate_width == 48:
            inside["self_attn.plt_gate.gate_norm.weight"] = (48,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.2 * values if "norm" in name else 0.2 * values).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(keys))
    return tensors


def published(**changes):
    """LoopCoder-v2's model in our terms, from what its report and its config say."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    gates = {"window_size": 65, "gate_input": "hidden", "gate_side": "global", "norm_between_loops": True}
    others = {"rope_theta": 500000.0, "embedding_scale": 0.707, "hidden_scale": 0.053, "loop_count": 2}
    return PLTConfig(**{**sizes, **gates, **others, **changes})


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({}, {}),
        ({"plt_num_loops": 3, "plt_window_size": [2, 0]}, {"loop_count": 3, "window_size": 3}),
        (
            {"plt_gate_use_hidden_states": False, "plt_emb_scale": None, "plt_hidden_scale": None},
            {"gate_input": "query", "embedding_scale": 1.0, "hidden_scale": 1.0},
        ),
        ({"plt_normalize_per_loop": False}, {"norm_between_loops": False}),
    ],
)
def test_loopcoder_runs_in_our_code_and_goes_back(tmp_path, keys, changes):
    tensors = save_loopcoder(tmp_path / "v2", **keys)
    result, weights = imported(tmp_path / "v2", tmp_path / "run")
    assert result.precision == "bf16" and result.fresh == result.dropped == 0
    tokens = make_tokens(1, 80)  # longer than the window
    reference = Reference(published(**changes), tensors)
    expected = reference.logits(tokens[0])[0]
    # Straight into our code, by way of a training checkpoint, and in training.
    quiet((tmp_path / "v2", tmp_path / "straight", "fp32"))
    quiet((tmp_path / "run", tmp_path / "out", "fp32"))
    for folder in ("straight", "out"):
        assert (hf_logits(tmp_path / folder, tokens)[0] - expected).abs().max() < 1e-4
    actual = megatron_logits(result.model, weights, tokens)
    assert (actual[0] - expected).abs().max() < 1e-4
    # And back: names, bits and keys.
    quiet((tmp_path / "run", tmp_path / "back"), style="loopcoder", verify=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    none_is_one = {key: 1.0 for key in ("plt_emb_scale", "plt_hidden_scale") if keys.get(key, 0) is None}
    expected_keys = {**LOOPCODER_KEYS, **keys, **none_is_one}
    del expected_keys["auto_map"]  # its class is not ours to ship
    assert written == expected_keys
    assert not (tmp_path / "back" / "modeling_plt.py").exists()


@pytest.mark.usefixtures("warm_starts")
def test_a_local_gate_travels_through_loopcoders_format(tmp_path):
    model, weights = save_random(tmp_path / "run", share_embeddings_and_output_weights=False)
    quiet((tmp_path / "run", tmp_path / "v2"), style="loopcoder", verify=True)
    result, back = imported(tmp_path / "v2", tmp_path / "back")
    assert result.model.gate_side == "global"
    before, after = megatron_logits(model, weights, make_tokens()), megatron_logits(result.model, back, make_tokens())
    assert (before - after).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"plt_window_size": [64, 1]}, r"plt_window_size \[64, 1\] looks ahead"),
        ({"plt_num_loops": 9}, "plt_num_loops must be from 1 to 8, not 9"),
        ({"plt_window_size": 64}, "config.json: "),
    ],
)
def test_loopcoders_we_do_not_have(tmp_path, keys, message):
    save_loopcoder(tmp_path / "v2", **keys)
    refuse_import(tmp_path / "v2", message)
