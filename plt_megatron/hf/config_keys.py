"""Conversion between our model settings and the keys of a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.fields import MAX_LOOP_COUNT
from plt_megatron.config.schema import ModelConfig, MoeConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.param_mapping import Style
from plt_megatron.hf.rope_keys import rope_keys, rope_scaling, scaling_keys

CONFIG = "config.json"
LOOPCODER_TYPE, LOOPCODER_ARCHITECTURE = "iquestpltcoder", "IQuestPLTCoderForCausalLM"
_BIAS_UPDATE_RATE = 1e-3  # megatron-core's default; config.json has no key for it
_LOOPCODER_GATES = {"query": False, "hidden": True}  # model.gate_input: plt_gate_use_hidden_states
AUTO_MAP = {
    "AutoConfig": "configuration_plt.PLTConfig",
    "AutoModel": "modeling_plt.PLTModel",
    "AutoModelForCausalLM": "modeling_plt.PLTForCausalLM",
}


@dataclass
class HFModelConfig:
    """The contents of a config.json.

    Attributes:
        model: our settings, `vocab_size` included.
        max_position_embeddings: the longest text the model was made for, in tokens.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`, where given.
        family: its `model_type`.
        style: how gates are stored.
    """

    model: ModelConfig
    vocab_size: int
    max_position_embeddings: int
    family: str
    tokens: dict[str, Any] = field(default_factory=dict)
    style: Style = "plt"


# ---------------------------------------------------------------- ours to theirs


def plt_keys(
    model: ModelConfig, vocab_size: int, max_position_embeddings: int, tokens: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Return the config.json of an export that includes configuration_plt.py and modeling_plt.py."""
    from plt_megatron.hf.configuration_plt import PLTConfig

    adds = derived.adds_embeddings(model)
    config = PLTConfig(
        **_llama_keys(model, vocab_size, max_position_embeddings),
        **tokens,
        rope_parameters=rope_keys(model),
        qk_norm=model.qk_layernorm,
        qkv_bias=model.qkv_bias,
        ffn_output_norm=model.norm_placement == "pre_ffn_output",
        norm_placement="post" if model.norm_placement == "post" else "pre",
        key_shift=model.key_shift,
        **_expert_keys(model),
        loop_count=model.loop_count,
        loop_span=model.loop_span,
        loop_order=model.loop_order,
        cross_loop_parallel=model.cross_loop_parallel,
        share_kv=model.share_kv,
        # A one-loop model does not use these, and may have settings that are rejected with several loops.
        share_values=model.share_values or not model.share_kv,
        gated_window=model.gated_window and model.share_kv,
        window_size=model.window_size,
        gate_input=model.gate_input,
        gate_side=model.gate_side,
        gate_activation=model.gate_activation,
        norm_between_loops=model.loop_norm == "final",
        input_injection=model.input_injection,
        embedding_scale=model.embedding_scale if adds else 1.0,
        hidden_scale=model.hidden_scale if adds else 1.0,
        hidden_norm=model.loop_norm == "rms" and adds,
        learned_hidden_scale=model.learned_hidden_scale if adds else "none",
        residual_scale=derived.residual_factor(model),
    )
    keys: dict[str, Any] = json.loads(config.to_json_string())
    return {"architectures": ["PLTForCausalLM"], "auto_map": AUTO_MAP, **keys, "dtype": dtype}


def loopcoder_keys(
    model: ModelConfig, vocab_size: int, max_position_embeddings: int, tokens: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Return the config.json in LoopCoder-v2's keys.

    Raises:
        UserError: the model has something that LoopCoder-v2 lacks.
    """
    if other := list(_beyond_loopcoder(model)):
        raise UserError(f"the loopcoder format cannot express that {', '.join(other)}; use --format plt")
    return {
        "architectures": [LOOPCODER_ARCHITECTURE],
        "model_type": LOOPCODER_TYPE,
        **_llama_keys(model, vocab_size, max_position_embeddings),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling_keys(model) or None,
        "plt_num_loops": model.loop_count,
        "plt_window_size": [model.window_size - 1, 0],
        "plt_normalize_per_loop": model.loop_norm == "final",
        "plt_emb_scale": model.embedding_scale,
        "plt_hidden_scale": model.hidden_scale,
        "plt_gate_use_hidden_states": _LOOPCODER_GATES[model.gate_input],
        **tokens,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _beyond_loopcoder(model: ModelConfig) -> Iterator[str]:
    """Yield what `model` has and LoopCoder-v2 lacks."""
    wanted = {
        "loop_span": None,
        "cross_loop_parallel": True,
        "share_kv": True,
        "share_values": True,
        "gated_window": True,
        "gate_activation": "sigmoid",
        "qk_layernorm": False,
        "qkv_bias": False,
        "norm_placement": "pre",
        "key_shift": "none",
        "moe": None,
        "learned_hidden_scale": "none",
        "residual_scaling": "none",
    }
    for name, value in wanted.items():
        if getattr(model, name) != value:
            yield f"model.{name} is {getattr(model, name)}"
    if model.loop_norm == "rms":
        yield "model.loop_norm is rms"
    if derived.yarn_factor(model) is not None:
        yield "model.rope_scaling.yarn is set"
    if model.loop_count == 1:
        yield "model.loop_count is 1"
    if model.gate_input not in _LOOPCODER_GATES:
        yield f"model.gate_input is {model.gate_input}"


def _expert_keys(model: ModelConfig) -> dict[str, Any]:
    """Return Qwen3-MoE's keys, Qwen2-MoE's for a shared expert, and DeepSeek-V3's and MiniMax-M2's for dense layers,
    scores and their bias."""
    moe = model.moe
    if moe is None:
        return {}
    sigmoid = moe.router_score_function == "sigmoid"
    return {
        "num_experts": moe.num_experts,
        "first_k_dense_replace": moe.first_k_dense_replace,
        "num_experts_per_tok": moe.router_topk,
        "moe_intermediate_size": derived.expert_ffn_hidden_size(model),
        "shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
        "norm_topk_prob": moe.router_topk > 1 if sigmoid else moe.router_score_function == "softmax",
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "use_routing_bias": derived.has_expert_bias(model),
        "router_aux_loss_coef": moe.aux_loss_coeff,
    }


def _llama_keys(model: ModelConfig, vocab_size: int, max_position_embeddings: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": derived.num_query_groups(model),
        "head_dim": derived.head_dim(model),
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
    }


# ---------------------------------------------------------------- theirs to ours


def read_config(folder: Path, loop_count: int | None = None) -> HFModelConfig:
    """Read a Hugging Face folder's config.json.

    Args:
        loop_count: loops to run instead of the model's own. A dense model becomes the start of a PLT with the paper's
            settings.

    Raises:
        UserError: no such file, or an architecture or part of one that is not supported.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(keys, dict)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {CONFIG}") from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: not a JSON object") from error
    family = keys.get("model_type")
    if family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(f"{path}: model_type {family!r} is not one that can be converted ({known})")
    try:
        if keys.get("quantization_config"):
            raise UserError("the weights are quantized (quantization_config); convert the original model")
        described = _FAMILIES[family](keys)
    except Exception as error:  # the configuration classes' checks raise types of their own
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: {reason}") from error
    if loop_count is not None:
        if not 1 <= loop_count <= MAX_LOOP_COUNT:
            raise UserError(f"--loop-count must be from 1 to {MAX_LOOP_COUNT}, not {loop_count}")
        described.model.loop_count = loop_count
    return described


def _from_plt(keys: dict[str, Any]) -> HFModelConfig:
    from plt_megatron.hf.configuration_plt import PLTConfig

    config = PLTConfig.from_dict(_without_code(keys))
    _refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    return _described(
        config,
        qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        norm_placement="pre_ffn_output" if config.ffn_output_norm else config.norm_placement,
        key_shift=config.key_shift,
        moe=_experts(config, config.first_k_dense_replace),
        loop_count=config.loop_count,
        loop_span=config.loop_span,
        loop_order=config.loop_order,
        cross_loop_parallel=config.cross_loop_parallel,
        share_kv=config.share_kv,
        share_values=config.share_values,
        gated_window=config.gated_window,
        window_size=config.window_size,
        gate_input=config.gate_input,
        gate_side=config.gate_side,
        gate_activation=config.gate_activation,
        loop_norm="final" if config.norm_between_loops else "rms" if config.hidden_norm else "none",
        input_injection=config.input_injection,
        embedding_scale=config.embedding_scale,
        hidden_scale=config.hidden_scale,
        learned_hidden_scale=config.learned_hidden_scale,
        **derived.residual_settings(config.residual_scale, config.num_hidden_layers),
    )


def _from_loopcoder(keys: dict[str, Any]) -> HFModelConfig:
    """Read LoopCoder-v2's keys; missing ones get its own class's defaults. The other keys are Llama's."""
    from plt_megatron.hf.configuration_plt import PLTConfig

    loops = {key: keys[key] for key in keys if key.startswith("plt_")}
    llama = {key: value for key, value in _without_code(keys).items() if key not in loops and key != "model_type"}
    defaults = {"bos_token_id": 1, "rope_theta": 500000.0, "max_position_embeddings": 131072, "loop_count": 1}
    config = PLTConfig.from_dict({**defaults, **llama})
    _refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    described = _described(config)
    left, right = loops.get("plt_window_size") or (64, 0)
    if right != 0:
        raise UserError(f"plt_window_size [{left}, {right}] looks ahead: only [n, 0] is supported")
    model = described.model
    model.loop_count = loops.get("plt_num_loops", 2)
    if not isinstance(model.loop_count, int) or not 1 <= model.loop_count <= MAX_LOOP_COUNT:
        raise UserError(f"plt_num_loops must be from 1 to {MAX_LOOP_COUNT}, not {model.loop_count!r}")
    model.window_size = left + 1  # ours counts the query itself
    model.gate_input = "hidden" if loops.get("plt_gate_use_hidden_states", False) else "query"
    model.gate_side = "global"
    model.loop_norm = "final" if loops.get("plt_normalize_per_loop", True) else "none"
    model.embedding_scale = _or_one(loops.get("plt_emb_scale"))
    model.hidden_scale = _or_one(loops.get("plt_hidden_scale"))
    described.family, described.style = LOOPCODER_TYPE, "loopcoder"
    return described


def _or_one(scale: float | None) -> float:
    return 1.0 if scale is None else float(scale)


def _from_llama(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("llama", keys)
    _refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    return _described(config)


def _from_mistral(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("mistral", keys)
    _refuse(config, sliding_window=None, hidden_act="silu")
    return _described(config)


def _from_qwen2(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("qwen2", keys)
    _refuse(config, use_sliding_window=False, hidden_act="silu")
    return _described(config, qkv_bias=True)


def _from_qwen3(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("qwen3", keys)
    _refuse(config, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    return _described(config, qk_layernorm=True)


def _from_qwen3_moe(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("qwen3_moe", keys)
    _refuse(config, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    dense = list(config.mlp_only_layers or [])
    _refuse(config, decoder_sparse_step=1)
    if sorted(dense) != list(range(len(dense))):
        raise UserError(f"mlp_only_layers {dense} is not supported, only the first layers, as in {[0, 1]}")
    return _described(config, qk_layernorm=True, moe=_experts(config, len(dense)))


def _experts(config: Any, first_dense: int) -> MoeConfig | None:
    """Return the experts of a configuration whose first `first_dense` layers are dense, or None without experts."""
    if not config.num_experts:
        return None
    sigmoid = getattr(config, "scoring_func", "softmax") == "sigmoid"
    if sigmoid:
        _refuse(config, norm_topk_prob=config.num_experts_per_tok > 1)
    return MoeConfig(
        num_experts=config.num_experts,
        first_k_dense_replace=first_dense,
        router_topk=config.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=getattr(config, "shared_expert_intermediate_size", None),
        router_score_function="sigmoid" if sigmoid else "softmax" if config.norm_topk_prob else "pre_softmax",
        router_bias_update_rate=_BIAS_UPDATE_RATE if getattr(config, "use_routing_bias", False) else None,
        aux_loss_coeff=config.router_aux_loss_coef,
    )


def _from_olmo2(keys: dict[str, Any]) -> HFModelConfig:
    config = _transformers_config("olmo2", keys)
    _refuse(config, attention_bias=False, hidden_act="silu")
    return _described(config, qk_layernorm=True, norm_placement="post")


_FAMILIES: dict[str, Callable[[dict[str, Any]], HFModelConfig]] = {
    "plt": _from_plt,
    LOOPCODER_TYPE: _from_loopcoder,
    "llama": _from_llama,
    "mistral": _from_mistral,
    "qwen2": _from_qwen2,
    "qwen3": _from_qwen3,
    "qwen3_moe": _from_qwen3_moe,
    "olmo2": _from_olmo2,
}


def _transformers_config(family: str, keys: dict[str, Any]) -> Any:
    """Parse with transformers' own class, which fills in defaults and accepts older spellings."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family].from_dict(_without_code(keys))


def _without_code(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ("auto_map", "architectures")}


def _refuse(config: Any, **understood: Any) -> None:
    for name, value in understood.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{name} {getattr(config, name)!r} is not supported, only {value!r}")


def _described(config: Any, **settings: Any) -> HFModelConfig:
    """Return the settings common to all families, plus `settings`. A dense model is one loop with the paper's."""
    rope = dict(config.rope_parameters or {})
    heads = config.num_attention_heads
    model = ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=rope_scaling(rope),
        layernorm_epsilon=config.rms_norm_eps,
        init_method_std=config.initializer_range,
        **{"loop_count": 1, **settings},
    )
    if heads % derived.num_query_groups(model):
        raise UserError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {model.num_query_groups}")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return HFModelConfig(
        model=model,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        family=config.model_type,
        tokens={name: getattr(config, name) for name in names if getattr(config, name, None) is not None},
    )
