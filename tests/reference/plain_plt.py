"""A Parallel Loop Transformer in plain PyTorch, straight from the equations: what the real model is judged by.

One autograd graph over all loops, attention as a masked n x n matrix, no kernels, no parallelism, and nothing of the
package but the settings' names. It computes in the dtype of its weights, float64 in the tests.

With E the token embeddings, f the stack of layers and L loops:

    h(1) = f(E)
    h(l) = f(a E + b N(shift(h(l-1))))                cross-loop parallelism, else f(h(l-1)) or f(a E + b N(h(l-1)))
    logits = Head(norm(h(L)))

With a span of layers that loop, f is those, E is what the layers before it make of the embeddings, and h(L) of the last
line what those after it make of h(L). In the order by layer, a layer's input in loop l >= 2 is its own output.

Attention of a layer in loops l >= 2, with K1 and V1 the layer's own of loop 1, or K1 and loop l's V:

    y_global = Attn(Q, K1, V1)        y_local = Attn(Q, K, V) over the last w keys
    y = g y_local + (1 - g) y_global,  g = sigmoid(gate) or tanh(gate), one scalar a head and token

With full_attention last_loop, y = Attn(Q, K, V) in the last loop and over the last w keys in those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig

KV = dict[int, tuple[Tensor, Tensor]]  # by layer


@dataclass
class PlainPLT:
    """The model: its settings, and its weights by name.

    Linear weights are [out, in]. `embedding` [V, h], `final_norm` [h], where untied `head` [V, h], where learned
    `hidden_scale` [1 or h], and of each layer
    `layers.<i>.`: `attention_norm`, `ffn_norm` [h], `q` [heads d, h], `k`, `v` [groups d, h], `o` [h, heads d],
    `gate_proj`, `up_proj` [f, h], `down_proj` [h, f]; where the settings ask for them `q_norm`, `k_norm` [d],
    `key_shift.key`, `key_shift.value` [groups], `ffn_output_norm` [h], `gate.weight` [heads, d or h], `gate.bias`
    [heads], `gate.norm` [h]. With norms on outputs alone (`norm_placement: post`), `attention_output_norm` [h] stands
    in for the first two norms, and `q_norm` and `k_norm` are of all heads together. A linear layer may have a bias: of
    `q`, `q_bias` [heads d]. A mixture of experts has `router` [E, h], and `experts.<e>.` and `shared.` with what an FFN
    has, and where the settings ask for it `router_bias` [E].

    Attributes:
        loads: by layer, how many tokens have gone to each expert, all loops' together.
        states: h(1) .. h(L) of the last pass, each normed if the next loop reads it so; none in the order by layer.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    balancing: list[Tensor] = field(default_factory=list)
    z_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)

    def losses(self, tokens: Tensor, labels: Tensor, starts: Tensor | None = None, loops: int | None = None) -> Tensor:
        """Cross-entropy of each token, [b, s]."""
        log_probabilities = self.logits(tokens, starts, loops).log_softmax(dim=-1)
        return -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def logits(self, tokens: Tensor, starts: Tensor | None = None, loops: int | None = None) -> Tensor:
        """tokens [b, s] -> [b, s, V]. `starts`: bool [b, s], first tokens of packed documents."""
        config = self.config
        starts = torch.zeros_like(tokens, dtype=torch.bool) if starts is None else starts.clone()
        starts[:, 0] = True
        embeddings = self.weights["embedding"][tokens]
        first_loop_kv: KV = {}
        first, last = config.loop_span or (0, config.num_layers)
        count = loops or config.loop_count
        self.windowed = {(loop, layer) for loop in range(1, count) for layer in range(first, last)}
        for layer in range(first):
            embeddings = self._layer(embeddings, layer, 1, starts, first_loop_kv)
        hidden, self.states = embeddings, []
        if config.loop_order == "layer":
            for layer, loop in ((layer, loop) for layer in range(first, last) for loop in range(1, count + 1)):
                hidden = self._layer(hidden, layer, loop, starts, first_loop_kv)
        for loop in range(1, count + 1) if config.loop_order == "stack" else ():
            hidden = self.states[-1] if loop > 1 else hidden
            if loop > 1 and config.cross_loop_parallel:
                shifted = torch.zeros_like(hidden)
                shifted[:, 1:] = hidden[:, :-1]
                shifted = torch.where(starts.unsqueeze(-1), torch.zeros_like(shifted), shifted)
                hidden = self._loop_input(embeddings, shifted)
            elif loop > 1 and config.input_injection:
                hidden = self._loop_input(embeddings, hidden)
            for layer in range(first, last):
                hidden = self._layer(hidden, layer, loop, starts, first_loop_kv)
            self.states.append(self._norm(hidden, "final_norm") if config.loop_norm == "final" else hidden)
        for layer in range(last, config.num_layers):
            hidden = self._layer(hidden, layer, 1, starts, first_loop_kv)
        head = "embedding" if config.share_embeddings_and_output_weights else "head"
        return self._norm(hidden, "final_norm") @ self.weights[head].T

    def _loop_input(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        config = self.config
        if config.loop_norm == "rms":
            hidden = hidden / torch.sqrt((hidden * hidden).mean(-1, keepdim=True) + config.layernorm_epsilon)
        scale: Tensor | float = config.hidden_scale
        if config.learned_hidden_scale != "none":
            scale = self.weights["hidden_scale"]
        return config.embedding_scale * embeddings + scale * hidden

    def auxiliary_loss(self) -> Tensor | float:
        """Add up the losses, with their coefficients, of all layers and loops that have run so far."""
        moe = self.config.moe
        if moe is None:
            return 0.0
        balancing = 0.0 if moe.router_load_balancing_type == "none" else moe.aux_loss_coeff
        return balancing * sum(self.balancing) + moe.z_loss_coeff * sum(self.z_losses)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.layernorm_epsilon) * self.weights[name]

    def _layer(self, x: Tensor, layer: int, loop: int, starts: Tensor, first_loop_kv: KV) -> Tensor:
        name = f"layers.{layer}."
        post, factor = self.config.norm_placement == "post", self._residual_factor()
        out = self._attention(x, layer, loop, starts, first_loop_kv)
        x = x + factor * (self._norm(out, name + "attention_output_norm") if post else out)
        normed = x if post else self._norm(x, name + "ffn_norm")
        dense = self.config.moe is None or layer < self.config.moe.first_k_dense_replace
        out = self._ffn(normed, name) if dense else self._experts(normed, name)
        if self.config.norm_placement != "pre":
            out = self._norm(out, name + "ffn_output_norm")
        return x + factor * out

    def _residual_factor(self) -> float:
        config = self.config
        if config.residual_scaling == "none":
            return 1.0
        if config.residual_scaling == "layers":
            return config.residual_scale / config.num_layers
        return config.residual_scale / (config.loop_count * config.num_layers**0.5)

    def _ffn(self, x: Tensor, name: str) -> Tensor:
        gate, up = self._linear(x, name + "gate_proj"), self._linear(x, name + "up_proj")
        return self._linear(gate * torch.sigmoid(gate) * up, name + "down_proj")

    def _experts(self, x: Tensor, name: str) -> Tensor:
        """Every expert on every token, weighted: zero where a token has not chosen it. Notes what was chosen, and the
        auxiliary losses, each a mean over the sequences."""
        config, experts = self.config, self.config.moe.num_experts
        assert experts is not None
        logits = x @ self.weights[name + "router"].T
        sigmoid = config.moe.router_score_function == "sigmoid"
        scores = torch.sigmoid(logits) if sigmoid else logits.softmax(dim=-1)
        has_bias = config.moe.router_bias_update_rate is not None
        biased = scores + self.weights[name + "router_bias"] if has_bias else scores
        chosen = _best(biased, config.moe.router_topk)
        self.loads[name] = self.loads.get(name, 0) + chosen.sum(dim=(0, 1))
        weights = scores * chosen
        if config.moe.router_topk > 1 if sigmoid else config.moe.router_score_function == "softmax":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # The balancing loss is of what the router prefers by itself, whatever the bias makes of it.
        shares, preferred = scores / scores.sum(dim=-1, keepdim=True), _best(scores, config.moe.router_topk)
        even = experts / config.moe.router_topk
        self.balancing.append((even * preferred.mean(dim=1) * shares.mean(dim=1)).sum(dim=-1).mean())
        self.z_losses.append(logits.logsumexp(dim=-1).square().mean())
        out = sum(weights[..., expert, None] * self._ffn(x, f"{name}experts.{expert}.") for expert in range(experts))
        if config.moe.shared_expert_intermediate_size is not None:
            out = out + self._ffn(x, name + "shared.")
        return out

    def moved_biases(self) -> dict[str, Tensor]:
        """Each layer's, by name, after a step of all that has run since the model was made: up by the rate where an
        expert got less than the mean, down where it got more."""
        rate, biases = self.config.moe.router_bias_update_rate, {}
        for layer, load in self.loads.items():
            bias = self.weights[layer + "router_bias"]
            biases[layer + "router_bias"] = bias + rate * (load < load.mean()) - rate * (load > load.mean())
        return biases

    def _attention(self, x: Tensor, layer: int, loop: int, starts: Tensor, first_loop_kv: KV) -> Tensor:
        config, name = self.config, f"layers.{layer}."
        normed = x if config.norm_placement == "post" else self._norm(x, name + "attention_norm")
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        query, key, value = (
            self._heads(normed, name + kind, count) for kind, count in (("q", heads), ("k", groups), ("v", groups))
        )
        key, value = self._shifted(key, value, starts, name)
        positions = _positions(starts)
        query, key = (_rotate(tensor, positions, config) for tensor in (query, key))
        if loop == 1:
            first_loop_kv[layer] = key, value
        if config.full_attention == "last_loop" and (loop, layer) in self.windowed:
            out = attend(query, key, value, starts, config.window_size)
        elif loop == 1 or not config.share_kv:
            out = attend(query, key, value, starts, None)
        else:
            key_1, value_1 = first_loop_kv[layer]
            out = attend(query, key_1, value_1 if config.share_values else value, starts, None)
            if config.gated_window:
                local = attend(query, key, value, starts, config.window_size)
                activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[config.gate_activation]
                gate = activation(self._gate(query, x, name)).unsqueeze(-1)
                first, second = (local, out) if config.gate_side == "local" else (out, local)
                out = gate * first + (1 - gate) * second
        return self._linear(out.flatten(-2), name + "o")

    def _shifted(self, key: Tensor, value: Tensor, starts: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """[b, s, groups, d]: with (some of) the previous token's, zero for the first of a document."""
        form = self.config.key_shift
        if form == "none":
            return key, value
        before_key, before_value = (
            torch.where(starts[:, :, None, None], 0.0, torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1))
            for x in (key, value)
        )
        groups, channels = key.shape[2:]
        if form == "heads":
            shifted = torch.arange(groups)[:, None] >= groups // 2
            return torch.where(shifted, before_key, key), value
        if form == "channels":
            pair = torch.arange(channels) % (channels // 2)  # RoPE's, the slower the larger its number
            return torch.where(pair >= channels // 4, before_key, key), value
        of_key, of_value = (self.weights[f"{name}key_shift.{kind}"][:, None] for kind in ("key", "value"))
        return (1 - of_key) * key + of_key * before_key, (1 - of_value) * value + of_value * before_value

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out, bias = x @ self.weights[name].T, self.weights.get(name + "_bias")
        return out if bias is None else out + bias

    def _heads(self, x: Tensor, name: str, count: int) -> Tensor:
        """Queries, keys or values [b, s, count, d]."""
        x, norms = self._linear(x, name), self.config.qk_layernorm and not name.endswith(".v")
        if norms and self.config.norm_placement == "post":
            return self._norm(x, name + "_norm").unflatten(-1, (count, -1))
        x = x.unflatten(-1, (count, -1))
        return self._norm(x, name + "_norm") if norms else x

    def _gate(self, query: Tensor, x: Tensor, name: str) -> Tensor:
        """[b, s, heads]"""
        weight, bias = self.weights[name + "gate.weight"], self.weights[name + "gate.bias"]
        if self.config.gate_input == "query":
            return torch.einsum("bshd,hd->bsh", query, weight) + bias
        return self._norm(x, name + "gate.norm") @ weight.T + bias


def _best(scores: Tensor, count: int) -> Tensor:
    """1.0 at the highest so many of the last dimension, else 0."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(count, dim=-1).indices, 1.0)


def _positions(starts: Tensor) -> Tensor:
    """A token's index in its document, [b, s]."""
    positions = torch.zeros(starts.shape, dtype=torch.long)
    for row in range(starts.shape[0]):
        for i in range(starts.shape[1]):
            positions[row, i] = 0 if starts[row, i] else positions[row, i - 1] + 1
    return positions


def _rotate(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """RoPE on [b, s, heads, d]: channels (j, j + d/2) turn by position * base ** (-2j / d)."""
    half = x.shape[-1] // 2
    frequencies, factor = _frequencies(x.shape[-1], config)
    angles = positions[..., None, None].to(x.dtype) * torch.tensor(frequencies, dtype=x.dtype)
    first, second = factor * x[..., :half], factor * x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def _frequencies(channels: int, config: ModelConfig) -> tuple[list[float], float]:
    """Radians per token of each pair, and the factor of queries and keys.

    YaRN, as its authors' code has it: a pair that turns n times over the original length is number
    d/2 * log_base(length / (2 pi n)). Pairs up to beta_fast's number keep their frequency, those from beta_slow's on
    have it divided by the factor, and between them it goes over linearly; the ends are rounded outwards.
    """
    base = config.rotary_base
    plain = [base ** (-2 * pair / channels) for pair in range(channels // 2)]
    if config.rope_scaling is None or config.rope_scaling.yarn is None:
        return plain, 1.0
    yarn, scale = config.rope_scaling.yarn, config.rope_scaling.factor
    length = yarn.original_max_position_embeddings
    ends = [channels / 2 * math.log(length / (2 * math.pi * turns), base) for turns in (yarn.beta_fast, yarn.beta_slow)]
    if yarn.correction_range_round_to_int:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], channels - 1)
    shares = [min(max((pair - first) / (last - first), 0.0), 1.0) for pair in range(channels // 2)]
    scaled = [share * own / scale + (1 - share) * own for share, own in zip(shares, plain, strict=True)]
    return scaled, 0.1 * math.log(scale) + 1


def visible(starts: Tensor, window: int | None) -> Tensor:
    """Bool [b, s, s]: whether query i sees key j, which is no later, of the same document and in the window."""
    document = starts.long().cumsum(1)
    i, j = torch.meshgrid(torch.arange(starts.shape[1]), torch.arange(starts.shape[1]), indexing="ij")
    seen = (j <= i) & (document[:, :, None] == document[:, None, :])
    return seen if window is None else seen & (i - j < window)


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, window: int | None) -> Tensor:
    """query [b, s, heads, d], key and value [b, s, groups, d] -> [b, s, heads, d]."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~visible(starts, window).unsqueeze(1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), value)
