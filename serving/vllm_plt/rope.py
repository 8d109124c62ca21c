"""RoPE's keys as vLLM takes them."""

from vllm_plt.configuration_plt import PLTConfig


def rope_parameters(config: PLTConfig) -> dict:
    """Those of the configuration; what YaRN's leave null is what transformers takes it for, since vLLM would fail."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") == "yarn":
        rope["beta_fast"] = rope.get("beta_fast") or 32
        rope["beta_slow"] = rope.get("beta_slow") or 1
        if rope.get("factor") is None:
            rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope


def most_positions(config: PLTConfig) -> int | None:
    """For how many vLLM has angles: YaRN's factor times the original length; None: for any context's."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "yarn":
        return None
    return int(rope["factor"] * rope["original_max_position_embeddings"])
