"""One sequence through the exported model's own code, watched by hooks: the states after each loop, gates, attention.

Nothing is recomputed by rules of our own: queries come from the model's projection, norm and RoPE, keys are those it
attended to, head outputs are its output projection's input, and gates its gate's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plt_megatron.experiments.diagnostics.measures import Attention, attention_statistics, head_diversity
from plt_megatron.hf.modeling_plt import rotate

HEAD_MEASURES = ("gate_mean", "entropy_global", "entropy_local", "kl_global", "kl_local")
LAYER_MEASURES = ("head_rank", "head_cosine")


class Recording:
    """What one pass over a sequence of T tokens recorded.

    Attributes:
        states: h(0) .. h(L), [T, d]: the embeddings, then each loop's output as the next loop gets it, so after the
            final norm if the model has `norm_between_loops`.
        by_head: arrays [L + 1, layers, H] by the names of `HEAD_MEASURES`, means over tokens; NaN where there is none.
        by_layer: arrays [L + 1, layers] by the names of `LAYER_MEASURES`.
    """

    def __init__(self, model: Any, documents: Tensor | None = None) -> None:
        config = model.config
        self._model, self._documents = model.model, documents
        loops, layers, heads = config.loop_count, config.num_hidden_layers, config.num_attention_heads
        self.states: list[Tensor] = []
        self.by_head = {name: np.full((loops + 1, layers, heads), math.nan) for name in HEAD_MEASURES}
        self.by_layer = {name: np.full((loops + 1, layers), math.nan) for name in LAYER_MEASURES}
        self._gate: Tensor | None = None
        self._head_outputs: Tensor | None = None
        self._previous: dict[tuple[int, str], Attention] = {}
        self._shared: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * layers
        self._pass: Any = None

    # ------------------------------------------------------------ while the model runs

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for one pass without a cache."""
        config = self._model.config
        output = self._model.norm if config.norm_between_loops else self._model.layers[-1]
        handles = [
            self._model.embed_tokens.register_forward_hook(lambda module, args, out: self._add_state(out)),
            output.register_forward_hook(lambda module, args, out: self._add_state(out)),
        ]
        for index, layer in enumerate(self._model.layers):
            attention = layer.self_attn
            handles.append(attention.o_proj.register_forward_pre_hook(self._keep_head_outputs))
            if attention.plt_gate is not None:
                handles.append(attention.plt_gate.register_forward_hook(self._keep_gate))
            handles.append(attention.register_forward_hook(self._attention_hook(index), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._previous.clear()

    def _add_state(self, out: Any) -> None:
        self.states.append((out[0] if isinstance(out, tuple) else out)[0])

    def _keep_gate(self, module: Any, args: Any, out: Tensor) -> None:
        self._gate = out[0]  # [T, H, 1]

    def _keep_head_outputs(self, module: Any, args: tuple[Tensor]) -> None:
        self._head_outputs = args[0][0]  # [T, H * D]

    def _attention_hook(self, layer: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any], out: tuple) -> None:
            hidden_states, _, shared_key, shared_value = args
            state = kwargs["state"]
            assert state.loop is not None and kwargs["cache"] is None
            # The last loop's pass is also that of one more loop: later loops have the same rules.
            self._pass, self._shared[layer] = state, (shared_key, shared_value)
            query = rotate(module._heads(module.q_proj(hidden_states), module.q_norm), state.cos, state.sin)
            query = query[0].transpose(0, 1)
            own_key = out[2]
            key = own_key if shared_key is None else shared_key
            self._add_attention("global", layer, state.loop + 1, Attention(query, key[0], module.scaling))
            if self._gate is not None:
                local = Attention(query, own_key[0], module.scaling, self._model.config.window_size)
                self._add_attention("local", layer, state.loop + 1, local)
                self.by_head["gate_mean"][state.loop + 1, layer] = self._gate.double().mean((0, 2)).cpu()
            assert self._head_outputs is not None
            outputs = self._head_outputs.unflatten(-1, (query.shape[0], -1))
            rank, cosine = head_diversity(outputs)
            self.by_layer["head_rank"][state.loop + 1, layer] = rank
            self.by_layer["head_cosine"][state.loop + 1, layer] = cosine
            self._gate = self._head_outputs = None

        return hook

    def _add_attention(self, kind: str, layer: int, loop: int, attention: Attention) -> None:
        previous = self._previous.get((layer, kind))
        self._previous[layer, kind] = attention
        entropy, divergence = attention_statistics(attention, previous, self._documents)
        self.by_head[f"entropy_{kind}"][loop, layer] = entropy.cpu()
        if divergence is not None:
            self.by_head[f"kl_{kind}"][loop, layer] = divergence.cpu()

    # ------------------------------------------------------------ afterwards

    def apply_stack(self, hidden_states: Tensor) -> Tensor:
        """f: what one more loop makes of an input [T, d], by the rules of loops >= 2 (the first's in a one-loop model).

        It attends to this sequence's first-loop keys and values and to a window of its own, as the model's switches
        say, and ends with the final norm if the model has `norm_between_loops`.
        """
        out = hidden_states[None]
        for layer, (key, value) in zip(self._model.layers, self._shared, strict=True):
            out = layer(out, key, value, state=self._pass, cache=None)[0]
        return (self._model.norm(out) if self._model.config.norm_between_loops else out)[0]

    def next_input(self, state: Tensor, starts: Tensor | None = None) -> Tensor:
        """What the loop after the state [T, d] reads: E and shift(h) joined, E and h, or h itself."""
        config = self._model.config
        if not config.cross_loop_parallel:
            return self._model.loop_input(self.states[0], state) if config.input_injection else state
        shifted = torch.cat([torch.zeros_like(state[:1]), state[:-1]])
        if starts is not None:
            shifted = shifted.masked_fill(starts[:, None], 0.0)
        return self._model.loop_input(self.states[0], shifted)


@torch.no_grad()
def record(model: Any, tokens: Tensor, starts: Tensor | None = None) -> Recording:
    """Run a `PLTForCausalLM` in evaluation mode over tokens, int64 [T].

    Args:
        starts: bool [T], first tokens of packed documents, which see and receive nothing of each other; None: one.
    """
    documents = positions = None
    if starts is not None:
        documents = starts.long().cumsum(0)
        places = torch.arange(len(tokens), device=tokens.device)
        positions = (places - torch.where(starts, places, 0).cummax(0).values)[None]
    recording = Recording(model, documents)
    with recording.watching():
        model.model(tokens[None], position_ids=positions, use_cache=False)
    assert len(recording.states) == model.config.loop_count + 1
    return recording
