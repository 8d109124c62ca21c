"""RoPE parameters in the form that vLLM takes."""

from vllm_plt.configuration_plt import PLTConfig


def rope_parameters(config: PLTConfig) -> dict:
    """Return the configuration's RoPE parameters, with transformers' defaults for YaRN's nulls, on which vLLM fails."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") == "yarn":
        rope["beta_fast"] = rope.get("beta_fast") or 32
        rope["beta_slow"] = rope.get("beta_slow") or 1
        if rope.get("factor") is None:
            rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope


def most_positions(config: PLTConfig) -> int | None:
    """Return for how many positions vLLM has angles: YaRN's factor times the original length; None if unlimited."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "yarn":
        return None
    return int(rope["factor"] * rope["original_max_position_embeddings"])
