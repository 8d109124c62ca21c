"""The PLT equations in plain torch (tests/reference/plain_plt.py) with an export's configuration and tensors.

It reads weights by their exported names and nothing of the modeling file, so that it can judge it.
"""

import re

from plt_megatron.config.schema import ModelConfig
from plt_megatron.hf import switches
from tests.reference.plain_plt import PlainPLT
from tests.settings import make

NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
    "model.loop_input.hidden_scale": "hidden_scale",
}
PARTS = {
    **{f"self_attn.{kind}_proj": kind for kind in "qkvo"},
    **{f"mlp.{kind}_proj": f"{kind}_proj" for kind in ("gate", "up", "down")},
    **{f"self_attn.{kind}_norm": f"{kind}_norm" for kind in "qk"},
    "self_attn.plt_gate.gate_norm": "gate.norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_output_norm",
}


def plain_name(name, post):
    """The name in `PlainPLT` of an exported tensor. `post`: whether norms are on outputs alone."""
    if name in NAMES:
        return NAMES[name]
    layer, part, kind = re.fullmatch(r"model\.(layers\.\d+\.)(.+)\.(\w+)", name).groups()
    if part in ("self_attn.plt_gate", "self_attn.key_shift"):
        return f"{layer}{part.rpartition('.')[2].removeprefix('plt_')}.{kind}"
    if part == "mlp.gate":
        return f"{layer}router" + ("" if kind == "weight" else "_bias")
    if expert := re.fullmatch(r"mlp\.(experts\.\d+\.|shared_expert\.)(\w+)", part):
        return layer + expert[1].replace("_expert", "") + expert[2]
    own = "attention_output_norm" if post and part == "post_attention_layernorm" else PARTS[part]
    return layer + own + ("_bias" if kind == "bias" else "")


def settings_of(config):
    """The training model's settings of a `PLTConfig`."""
    rope = config.rope_parameters
    settings = {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "layernorm_epsilon": config.rms_norm_eps,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "rotary_base": rope["rope_theta"],
        "residual_scaling": "layers",
        "residual_scale": config.residual_scale * config.num_hidden_layers,
    }
    if rope.get("rope_type") == "yarn":
        settings["rope_scaling.factor"] = rope["factor"]
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow")
        settings |= {f"rope_scaling.yarn.{name}": rope[name] for name in names}
    if config.num_experts is not None:
        softmax = "softmax" if config.norm_topk_prob else "pre_softmax"
        settings |= {
            "moe.num_experts": config.num_experts,
            "moe.first_k_dense_replace": config.first_k_dense_replace,
            "moe.router_topk": config.num_experts_per_tok,
            "moe.shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe.router_score_function": "sigmoid" if config.scoring_func == "sigmoid" else softmax,
            "moe.router_bias_update_rate": 1.0 if config.use_routing_bias else None,
        }
    return make(ModelConfig, settings | switches.read(config))


class Reference:
    """Run `logits(tokens)` of a PLT from its configuration and state dict (fp32)."""

    def __init__(self, config, state_dict, loop_count=None):
        post = config.norm_placement == "post"
        weights = {plain_name(name, post): tensor.double() for name, tensor in state_dict.items()}
        self.plain, self.loops = PlainPLT(settings_of(config), weights), loop_count

    def logits(self, tokens):
        """tokens [n] to fp64 logits [n, vocab] and the list of h(1..L), normed if normed between loops."""
        logits = self.plain.logits(tokens[None], loops=self.loops)
        return logits[0], [state[0] for state in self.plain.states]
