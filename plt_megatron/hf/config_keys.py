"""Conversion between our model settings and the keys of a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from plt_megatron.config import derived
from plt_megatron.config.fields import MAX_LOOP_COUNT, Range, find_type_problems
from plt_megatron.config.schema import ModelConfig, MoeConfig, RopeScalingConfig, YarnConfig
from plt_megatron.errors import UserError
from plt_megatron.hf import switches
from plt_megatron.hf.arguments import CONFIG, check_hf_folder
from plt_megatron.hf.conversion import Style
from plt_megatron.hf.switches import SWITCHES
from plt_megatron.run_folder.files import read_json_object

_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of a configuration."""
    return {"rope_theta": model.rotary_base, **(scaling_keys(model) or {"rope_type": "default"})}


def scaling_keys(model: ModelConfig) -> dict[str, Any]:
    """Return RoPE's scaling: YaRN's, or Llama 3.1's with megatron-core's constants; empty without scaling."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    if scaling.yarn is None:
        return {"rope_type": "llama3", "factor": scaling.factor, **_LLAMA3_CONSTANTS}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.yarn.original_max_position_embeddings,
        "beta_fast": scaling.yarn.beta_fast,
        "beta_slow": scaling.yarn.beta_slow,
        "truncate": scaling.yarn.correction_range_round_to_int,
    }


def rope_scaling(rope: dict[str, Any]) -> RopeScalingConfig | None:
    """Return the scaling in `rope_parameters` as our settings have it, or None without scaling.

    Raises:
        UserError: the scaling is one that the model does not support.
    """
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "yarn":
        return _yarn(rope)
    if kind != "llama3":
        raise UserError(f"rope_type {kind!r} is not supported, only 'default', 'llama3' and 'yarn'")
    for name, value in _LLAMA3_CONSTANTS.items():
        if rope.get(name) != value:
            raise UserError(f"rope_type llama3 with {name} {rope.get(name)} is not supported, only {value}")
    return RopeScalingConfig(float(rope["factor"]))


def _yarn(rope: dict[str, Any]) -> RopeScalingConfig:
    """Read transformers' keys. Queries and keys must have the factor 0.1 ln(factor) + 1, and no other."""
    factor = float(rope["factor"])
    own = {"attention_factor": 0.1 * math.log(factor) + 1, "mscale": None, "mscale_all_dim": None}
    for name, value in own.items():
        given = rope.get(name)
        if given is not None and (value is None or not math.isclose(given, value, rel_tol=1e-6)):
            raise UserError(f"rope_type yarn with {name} {given} is not supported: leave it out for YaRN's own")
    yarn = YarnConfig(
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        correction_range_round_to_int=bool(rope.get("truncate", True)),
    )
    return RopeScalingConfig(factor, yarn)


LOOPCODER_TYPE, LOOPCODER_ARCHITECTURE = "iquestpltcoder", "IQuestPLTCoderForCausalLM"
_BIAS_UPDATE_RATE = 1e-3  # megatron-core's default; config.json has no key for it
_LOOPCODER_GATES = {"query": False, "hidden": True}  # model.gate_input: plt_gate_use_hidden_states
# Settings that Llama's keys state as they are, and those keys.
_LLAMA = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "rms_norm_eps",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
AUTO_MAP = {
    "AutoConfig": "configuration_plt.PLTConfig",
    "AutoModel": "modeling_plt.PLTModel",
    "AutoModelForCausalLM": "modeling_plt.PLTForCausalLM",
}


@dataclass
class HFModelConfig:
    """What a config.json tells of a model.

    Attributes:
        model: our settings, `vocab_size` included where they are read from a config.json.
        vocab_size: without padding.
        max_position_embeddings: the longest text the model was made for, in tokens.
        family: `model_type` of a Hugging Face folder; otherwise empty.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`, where given.
        style: how gates are stored.
    """

    model: ModelConfig
    vocab_size: int
    max_position_embeddings: Annotated[int, Range(1, 10**9)]
    family: str = ""
    tokens: dict[str, Any] = field(default_factory=dict)
    style: Style = "plt"


# ---------------------------------------------------------------- ours to theirs


def plt_keys(described: HFModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of an export that includes configuration_plt.py and modeling_plt.py."""
    from plt_megatron.hf.configuration_plt import PLTConfig

    model = described.model
    config = PLTConfig(
        **_llama_keys(described),
        **described.tokens,
        rope_parameters=rope_keys(model),
        **_expert_keys(model),
        **switches.stated(model),
        residual_scale=derived.residual_factor(model),
    )
    keys: dict[str, Any] = json.loads(config.to_json_string())
    return {"architectures": ["PLTForCausalLM"], "auto_map": AUTO_MAP, **keys, "dtype": dtype}


def loopcoder_keys(described: HFModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json in LoopCoder-v2's keys.

    Raises:
        UserError: the model has something that LoopCoder-v2 lacks.
    """
    model = described.model
    if other := list(_beyond_loopcoder(model)):
        raise UserError(f"the loopcoder format cannot express that {', '.join(other)}; use --format plt")
    return {
        "architectures": [LOOPCODER_ARCHITECTURE],
        "model_type": LOOPCODER_TYPE,
        **_llama_keys(described),
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
        **described.tokens,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _beyond_loopcoder(model: ModelConfig) -> Iterator[str]:
    """Yield what `model` has and LoopCoder-v2 lacks."""
    plain = ModelConfig()
    for name in (*(each.setting for each in SWITCHES if not each.in_loopcoder), "moe", "residual_scaling"):
        if getattr(model, name) != getattr(plain, name):
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


def _llama_keys(described: HFModelConfig) -> dict[str, Any]:
    model = described.model
    return {
        "vocab_size": described.vocab_size,
        **{key: getattr(model, setting) for setting, key in _LLAMA.items()},
        "num_key_value_heads": derived.num_query_groups(model),
        "head_dim": derived.head_dim(model),
        "max_position_embeddings": described.max_position_embeddings,
    }


# ---------------------------------------------------------------- theirs to ours


def read_config(folder: Path) -> HFModelConfig:
    """Read a Hugging Face folder's config.json.

    Raises:
        UserError: no such file, or an architecture or part of one that is not supported.
    """
    path = folder / CONFIG
    check_hf_folder(folder)
    keys = read_json_object(path)
    family = keys.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(f"{path}: model_type {family!r} is not one that can be converted ({known})")
    try:
        if keys.get("quantization_config"):
            raise UserError("the weights are quantized (quantization_config); convert the original model")
        found = _FAMILIES[family](keys)
        if problems := list(find_type_problems(found)):
            raise UserError("; ".join(problem.removeprefix("model.") for problem in problems))
        return found
    except Exception as error:  # the configuration classes' checks raise types of their own
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: {reason}") from error


def _from_plt(keys: dict[str, Any]) -> HFModelConfig:
    from plt_megatron.hf.configuration_plt import PLTConfig

    config = PLTConfig.from_dict(_without_code(keys))
    _refuse(config, attention_bias=False, mlp_bias=False)
    return _described(
        config, **switches.read(config), **derived.residual_settings(config.residual_scale, config.num_hidden_layers)
    )


def _from_loopcoder(keys: dict[str, Any]) -> HFModelConfig:
    """Read LoopCoder-v2's keys; missing ones get its own class's defaults. The other keys are Llama's."""
    from plt_megatron.hf.configuration_plt import PLTConfig

    loops = {key: keys[key] for key in keys if key.startswith("plt_")}
    llama = {key: value for key, value in _without_code(keys).items() if key not in loops and key != "model_type"}
    defaults = {"bos_token_id": 1, "rope_theta": 500000.0, "max_position_embeddings": 131072, "loop_count": 1}
    config = PLTConfig.from_dict({**defaults, **llama})
    _refuse(config, attention_bias=False, mlp_bias=False)
    left, right = loops.get("plt_window_size") or (64, 0)
    if right != 0:
        raise UserError(f"plt_window_size [{left}, {right}] looks ahead: only [n, 0] is supported")
    loop_count = loops.get("plt_num_loops", 2)
    if not isinstance(loop_count, int) or not 1 <= loop_count <= MAX_LOOP_COUNT:
        raise UserError(f"plt_num_loops must be from 1 to {MAX_LOOP_COUNT}, not {loop_count!r}")
    scales = [loops.get(key) for key in ("plt_emb_scale", "plt_hidden_scale")]
    described = _described(
        config,
        loop_count=loop_count,
        window_size=left + 1,  # ours counts the query itself
        gate_input="hidden" if loops.get("plt_gate_use_hidden_states", False) else "query",
        gate_side="global",
        loop_norm="final" if loops.get("plt_normalize_per_loop", True) else "none",
        embedding_scale=1.0 if scales[0] is None else float(scales[0]),
        hidden_scale=1.0 if scales[1] is None else float(scales[1]),
    )
    return dataclasses.replace(described, family=LOOPCODER_TYPE, style="loopcoder")


# Families of transformers: keys that must have these values, and what they mean in our settings.
_PUBLIC: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"attention_bias": False, "mlp_bias": False}, {}),
    "mistral": ({"sliding_window": None}, {}),
    "qwen2": ({"use_sliding_window": False}, {"qkv_bias": True}),
    "qwen3": ({"use_sliding_window": False, "attention_bias": False}, {"qk_layernorm": True}),
    "qwen3_moe": (
        {"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1},
        {"qk_layernorm": True},
    ),
    "olmo2": ({"attention_bias": False}, {"qk_layernorm": True, "norm_placement": "post"}),
}


def _from_transformers(keys: dict[str, Any]) -> HFModelConfig:
    """Read with transformers' own class, which fills in defaults and accepts older spellings."""
    from transformers import CONFIG_MAPPING

    ours = ("scoring_func", "first_k_dense_replace", "shared_expert_intermediate_size", "use_routing_bias")
    theirs = {key: value for key, value in _without_code(keys).items() if key not in ours}  # which ignore those
    config = CONFIG_MAPPING[keys["model_type"]].from_dict(theirs)
    if hasattr(config, "standardize_rope_params"):  # as models do: from_dict does it before it has all keys
        config.standardize_rope_params()
    understood, settings = _PUBLIC[config.model_type]
    _refuse(config, **understood)
    return _described(config, **settings)


_FAMILIES: dict[str, Callable[[dict[str, Any]], HFModelConfig]] = {
    "plt": _from_plt,
    LOOPCODER_TYPE: _from_loopcoder,
    **dict.fromkeys(_PUBLIC, _from_transformers),
}


def _experts(config: Any) -> MoeConfig | None:
    """Return the experts of a configuration, or None if it has none."""
    if not getattr(config, "num_experts", None):
        return None
    dense = list(getattr(config, "mlp_only_layers", None) or range(getattr(config, "first_k_dense_replace", 0)))
    if sorted(dense) != list(range(len(dense))):
        raise UserError(f"mlp_only_layers {dense} is not supported, only the first layers, as in {[0, 1]}")
    sigmoid = getattr(config, "scoring_func", "softmax") == "sigmoid"
    if sigmoid:
        _refuse(config, norm_topk_prob=config.num_experts_per_tok > 1)
    return MoeConfig(
        num_experts=config.num_experts,
        first_k_dense_replace=len(dense),
        router_topk=config.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=getattr(config, "shared_expert_intermediate_size", None),
        router_score_function="sigmoid" if sigmoid else "softmax" if config.norm_topk_prob else "pre_softmax",
        router_bias_update_rate=_BIAS_UPDATE_RATE if getattr(config, "use_routing_bias", False) else None,
        aux_loss_coeff=config.router_aux_loss_coef,
    )


def _without_code(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ("auto_map", "architectures")}


def _refuse(config: Any, **understood: Any) -> None:
    for name, value in understood.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{name} {getattr(config, name)!r} is not supported, only {value!r}")


def _described(config: Any, **settings: Any) -> HFModelConfig:
    """Return the settings common to all families, plus `settings`. A dense model is one loop with the paper's."""
    _refuse(config, hidden_act="silu", is_causal=True)
    rope = dict(config.rope_parameters or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"rope_parameters by layer type ({', '.join(rope)}) are not supported, only the same for all")
    heads = config.num_attention_heads
    model = ModelConfig(
        **{setting: getattr(config, key) for setting, key in _LLAMA.items()},
        num_query_groups=config.num_key_value_heads or heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=rope_scaling(rope),
        moe=_experts(config),
        **{"loop_count": 1, **settings},
    )
    if heads % derived.num_query_groups(model):
        raise UserError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {model.num_query_groups}")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    for name, ids in tokens.items():
        if any(type(each) is not int for each in (ids if isinstance(ids, list) else [ids])):
            raise UserError(f"{name} {ids!r} is not a token's id")
    return HFModelConfig(
        model=model,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        family=config.model_type,
        tokens=tokens,
    )
