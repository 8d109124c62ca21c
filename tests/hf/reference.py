"""The PLT equations in plain torch, one sequence at a time, with no cache, no padding and no cleverness.

It reads weights by their exported names and nothing of the modeling file, so that it can judge it.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, parameters):
    """x [n, heads, D]: pairs (j, j + D/2) turn by position * theta ** (-2j / D). YaRN slows down those that turn rarely
    within the original length, linearly in j between the two bounds, and makes queries and keys longer."""
    n, _, dim = x.shape
    pairs, theta = torch.arange(dim // 2, dtype=torch.float64), parameters["rope_theta"]
    speed, factor = theta ** (-2 * pairs / dim), 1.0
    if parameters.get("rope_type") == "yarn":
        length, scale = parameters["original_max_position_embeddings"], parameters["factor"]
        turns = (parameters["beta_fast"], parameters["beta_slow"])
        first, last = (dim / 2 * math.log(length / (2 * math.pi * n), theta) for n in turns)
        first, last = max(math.floor(first), 0), math.ceil(last)
        share = ((pairs - first) / (last - first)).clamp(0, 1)
        speed, factor = speed * (share / scale + 1 - share), 0.1 * math.log(scale) + 1
    angle = torch.arange(n)[:, None] * speed[None]
    cos, sin = factor * angle.cos()[:, None], factor * angle.sin()[:, None]
    half = dim // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v, window=None):
    """Causal attention, q [n, H, D] on k, v [n, K, D]; a query sees `window` keys at most, itself one."""
    n, heads, dim = q.shape
    out = torch.zeros_like(q)
    for head in range(heads):
        kv = head // (heads // k.shape[1])
        for i in range(n):
            first = 0 if window is None else max(0, i - window + 1)
            scores = k[first : i + 1, kv] @ q[i, head] / dim**0.5
            out[i, head] = scores.softmax(0) @ v[first : i + 1, kv]
    return out


class Reference:
    """Run `logits(tokens)` of a PLT from its configuration and state dict (fp32)."""

    def __init__(self, config, state_dict, loop_count=None):
        self.config = config
        self.loops = loop_count or config.loop_count
        looped = range(*(getattr(config, "loop_span", None) or (0, config.num_hidden_layers)))
        earlier = range(self.loops - 1 if config.full_attention == "last_loop" else 0)
        self.windowed = {(layer, loop) for layer in looped for loop in earlier}  # that attend to nothing else
        self.weights = {name: tensor.double() for name, tensor in state_dict.items()}

    def w(self, name):
        return self.weights[name]

    def linear(self, x, name):
        y = x @ self.w(f"{name}.weight").T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x, name):
        return rms_norm(x, self.w(f"{name}.weight"), self.config.rms_norm_eps)

    def logits(self, tokens):
        """tokens [n] to fp64 logits [n, vocab] and the list of h(1..L), normed if normed between loops."""
        config = self.config
        e = self.w("model.embed_tokens.weight")[tokens]
        first_kv = [None] * config.num_hidden_layers
        first, last = getattr(config, "loop_span", None) or (0, config.num_hidden_layers)
        by_layer = getattr(config, "loop_order", "stack") == "layer"
        for layer in range(first):
            e = self.layer(e, layer, 0, first_kv)
        x, states = e, []
        if by_layer:
            for layer, loop in ((layer, loop) for layer in range(first, last) for loop in range(self.loops)):
                x = self.layer(x, layer, loop, first_kv)
        for loop in () if by_layer else range(self.loops):
            if loop and config.cross_loop_parallel:
                shifted = torch.cat([torch.zeros_like(e[:1]), states[-1][:-1]])
                x = self.loop_input(e, shifted)
            elif loop and config.input_injection:
                x = self.loop_input(e, states[-1])
            elif loop:
                x = states[-1]
            for layer in range(first, last):
                x = self.layer(x, layer, loop, first_kv)
            states.append(self.norm(x, "model.norm") if config.norm_between_loops else x)
        for layer in range(last, config.num_hidden_layers):
            x = self.layer(x, layer, 0, first_kv)
        out = self.norm(x, "model.norm")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return out @ self.w(f"{head}.weight").T, states

    def loop_input(self, e, h):
        config = self.config
        if config.hidden_norm:
            h = h / (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        scale = config.hidden_scale
        if config.learned_hidden_scale != "none":
            scale = self.w("model.loop_input.hidden_scale")
        return config.embedding_scale * e + scale * h

    def layer(self, x, index, loop, first_kv):
        name = f"model.layers.{index}"
        pre = self.config.norm_placement == "pre"
        inside = self.norm(x, f"{name}.input_layernorm") if pre else x
        y = self.attention(inside, x, index, loop, first_kv)
        x = x + self.config.residual_scale * (y if pre else self.norm(y, f"{name}.post_attention_layernorm"))
        inside = self.norm(x, f"{name}.post_attention_layernorm") if pre else x
        gate, up = self.linear(inside, f"{name}.mlp.gate_proj"), self.linear(inside, f"{name}.mlp.up_proj")
        y = self.linear(gate / (1 + torch.exp(-gate)) * up, f"{name}.mlp.down_proj")
        if not pre or self.config.ffn_output_norm:
            y = self.norm(y, f"{name}.post_feedforward_layernorm")
        return x + self.config.residual_scale * y

    def shifted(self, k, v, name):
        """[n, K, D]: with (some of) the previous token's; zero before the first."""
        before_k, before_v = (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (k, v))
        heads, dim = k.shape[1:]
        if self.config.key_shift == "heads":
            return torch.where(torch.arange(heads)[:, None] < heads // 2, k, before_k), v
        if self.config.key_shift == "channels":
            return torch.where(torch.arange(dim) % (dim // 2) < dim // 4, k, before_k), v
        if self.config.key_shift == "learned":
            a, b = self.w(f"{name}.key_shift.key")[:, None], self.w(f"{name}.key_shift.value")[:, None]
            return (1 - a) * k + a * before_k, (1 - b) * v + b * before_v
        return k, v

    def heads(self, x, name, norm):
        config = self.config
        x = self.linear(x, name)
        if norm and config.qk_norm and config.norm_placement == "post":
            x = self.norm(x, norm)
        x = x.view(x.shape[0], -1, config.head_dim)
        if norm and config.qk_norm and config.norm_placement == "pre":
            x = self.norm(x, norm)
        return x

    def attention(self, x, residual, index, loop, first_kv):
        config, name = self.config, f"model.layers.{index}.self_attn"
        q = self.heads(x, f"{name}.q_proj", f"{name}.q_norm")
        k = self.heads(x, f"{name}.k_proj", f"{name}.k_norm")
        v = self.heads(x, f"{name}.v_proj", None)
        k, v = self.shifted(k, v, name)
        q, k = (rope(x, config.rope_parameters) for x in (q, k))
        if loop == 0:
            first_kv[index] = (k, v)
        if (index, loop) in self.windowed:
            y = attend(q, k, v, config.window_size)
        elif loop == 0 or not config.share_kv:
            y = attend(q, k, v)
        else:
            first_k, first_v = first_kv[index]
            y = attend(q, first_k, first_v if config.share_values else v)
            if config.gated_window:
                local = attend(q, k, v, config.window_size)
                gate = self.gate(q, residual, name)
                y = gate * local + (1 - gate) * y if config.gate_side == "local" else gate * y + (1 - gate) * local
        return self.linear(y.flatten(1), f"{name}.o_proj")

    def gate(self, q, residual, name):
        """[n, H, 1]"""
        weight, bias = self.w(f"{name}.plt_gate.weight"), self.w(f"{name}.plt_gate.bias")
        if self.config.gate_input == "hidden":
            score = self.norm(residual, f"{name}.plt_gate.gate_norm") @ weight.T + bias
        else:
            score = torch.einsum("nhd,hd->nh", q, weight) + bias
        return (torch.tanh if self.config.gate_activation == "tanh" else torch.sigmoid)(score)[..., None]
