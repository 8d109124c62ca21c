"""All diagnostics of one model on held-out text: their definitions, and their values sequence by sequence.

A sequence runs through the exported model's own code, and hooks record the states after each loop, gates and attention.
Nothing is reimplemented here: queries come from the model's projection, norm and RoPE, keys are those it attended to,
head outputs are the input of its output projection, and gates the output of its gate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plt_megatron.experiments.diagnostics import measures
from plt_megatron.experiments.diagnostics.inputs import HeldOut
from plt_megatron.experiments.diagnostics.measures import Attention, attention_statistics, head_diversity
from plt_megatron.experiments.intervals import Bootstrap, Intervals
from plt_megatron.hf.modeling_plt import rotate


@dataclass(frozen=True)
class Measure:
    """One diagnostic.

    Attributes:
        name: name in JSON and CSV.
        title: name for readers.
        meaning: one line below a table.
        first_loop: smallest r for which it is defined, counted among the loops that have what it is `of`.
        detail: `head`: also for each layer and head; `layer`: for each layer; None: for the loop only.
        form: format of its numbers.
        of: what it measures, if not all loops of all models have it: attention, `global` or `local` (in the window),
            the window's `gate`, or the `shift` of cross-loop parallelism.
    """

    name: str
    title: str
    meaning: str
    first_loop: int
    detail: str | None = None
    form: str = ".4g"
    of: str | None = None


MEASURES = (
    Measure("hidden_norm", "state norm", "||h(r)||, mean over tokens", 0),
    Measure("step_size", "step size", "||h(r) - h(r-1)||", 1),
    Measure("relative_step", "relative step", "||h(r) - h(r-1)|| / ||h(r-1)||", 1),
    Measure(
        "update_cosine",
        "update cosine",
        "cosine of h(r) - h(r-1) and h(r-1) - h(r-2); below 0: oscillation",
        2,
        form="+.3f",
    ),
    Measure(
        "effective_rank",
        "effective rank",
        "exp(entropy of the normalized singular values) of the states of a sequence, each divided by its RMS",
        0,
        form=".2f",
    ),
    Measure("fixed_point_gap", "fixed-point gap", "||h(r) - f(h(r))||, f the stack as the last loop runs it", 1),
    Measure(
        "loop_map_gap",
        "loop-map gap",
        "||h(r) - the next loop's output for h(r)||: the step of loop r + 1; after the last loop, of one more",
        1,
    ),
    Measure("offset_cost", "offset cost", "||h_i(r-1) - h_(i-1)(r-1)||: the effect of the shift", 2, of="shift"),
    Measure("gate_mean", "gate", "mean of g", 2, "head", ".3f", of="gate"),
    Measure("entropy_global", "attention entropy", "of attention to all tokens, nats", 1, "head", ".3f", of="global"),
    Measure("entropy_local", "window entropy", "of attention in the window, nats", 1, "head", ".3f", of="local"),
    Measure(
        "kl_global", "attention KL", "KL(attention of loop r || of loop r-1), all tokens, nats", 2, "head", of="global"
    ),
    Measure("kl_local", "window KL", "the same in the window, nats", 2, "head", of="local"),
    Measure("head_rank", "head rank", "effective rank of the heads' outputs; 1: all the same", 1, "layer", ".3f"),
    Measure("head_cosine", "head cosine", "mean cosine of two heads' outputs", 1, "layer", "+.3f"),
    Measure("lens_loss", "loss", "cross-entropy if the model stopped after loop r, nats per token", 1, form=".4f"),
    Measure(
        "copy_loss",
        "loss on copies",
        "of tokens that also followed the last occurrence of the two tokens before, at most a window back",
        1,
        form=".4f",
    ),
    Measure("far_copy_loss", "loss on far copies", "the same, from beyond the window", 1, form=".4f"),
    Measure("lens_rank", "rank of the truth", "mean rank of the right token among all; 1 is best", 1),
    Measure("lens_entropy", "lens entropy", "of the prediction, nats", 1, form=".3f"),
    Measure("lens_kl", "lens KL", "KL(p(r) || p(r-1)), nats", 2),
    Measure("peak_loop", "peak loop", "share of tokens whose largest KL is at loop r", 2, form=".3f"),
)


def measures_for(config: Any) -> list[Measure]:
    """Return the measures that a model with this `PLTConfig` has, with their first loops in it."""
    count = config.loop_count
    having = {
        None: range(count),
        "global": config.full_loops(count),
        "local": config.window_loops(count),
        "gate": range(count if config.gated_window else 0),
        "shift": range(count if config.cross_loop_parallel else 0),
    }
    return [
        replace(measure, first_loop=having[measure.of].start + measure.first_loop)
        for measure in MEASURES
        if measure.first_loop <= len(having[measure.of])
    ]


# ---------------------------------------------------------------- one sequence


class Recording:
    """The record of one pass over a sequence of T tokens.

    Attributes:
        states: h(0) .. h(L), [T, d]: the embeddings, then each loop's output as the next loop gets it, i.e. after the
            final norm if the model has `norm_between_loops`.
        details: arrays [L + 1, layers, H] or [L + 1, layers] by the names of measures with details, means over tokens;
            NaN if not defined.
    """

    def __init__(self, model: Any, documents: Tensor | None = None) -> None:
        config = model.config
        self._model, self._documents = model.model, documents
        layers = config.num_hidden_layers
        shape = (config.loop_count + 1, layers, config.num_attention_heads)
        self.states: list[Tensor] = []
        shapes = {m.name: shape if m.detail == "head" else shape[:2] for m in MEASURES if m.detail is not None}
        self.details = {name: np.full(own, math.nan) for name, own in shapes.items()}
        self._gate: Tensor | None = None
        self._head_outputs: Tensor | None = None
        self._previous: dict[tuple[int, str], Attention] = {}
        self._shared: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * layers
        self._pass: Any = None

    # ------------------------------------------------------------ while the model runs

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks for one pass without a cache."""
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
            handles.append(attention.register_forward_hook(partial(self._add_layer, index), with_kwargs=True))
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

    def _add_layer(self, layer: int, module: Any, args: tuple, kwargs: dict[str, Any], out: tuple) -> None:
        hidden_states, _, shared_key, shared_value = args
        state = kwargs["state"]
        assert state.loop is not None and kwargs["cache"] is None and self._head_outputs is not None
        # The state of the last loop also serves one more loop: later loops have the same rules.
        self._pass, self._shared[layer] = state, (shared_key, shared_value)
        query = rotate(module._heads(module.q_proj(hidden_states), module.q_norm), state.cos, state.sin)
        query = query[0].transpose(0, 1)
        own_key, loop, config = out[2], state.loop + 1, self._model.config
        key = own_key if shared_key is None else shared_key
        if state.loop in config.full_loops(state.loop_count):
            self._add_attention("global", layer, loop, Attention(query, key[0], module.scaling))
        if state.loop in state.windows:
            local = Attention(query, own_key[0], module.scaling, config.window_size)
            self._add_attention("local", layer, loop, local)
        if self._gate is not None:
            self.details["gate_mean"][loop, layer] = self._gate.double().mean((0, 2)).cpu()
        rank, cosine = head_diversity(self._head_outputs.unflatten(-1, (query.shape[0], -1)))
        self.details["head_rank"][loop, layer] = rank
        self.details["head_cosine"][loop, layer] = cosine
        self._gate = self._head_outputs = None

    def _add_attention(self, kind: str, layer: int, loop: int, attention: Attention) -> None:
        previous = self._previous.get((layer, kind))
        self._previous[layer, kind] = attention
        entropy, divergence = attention_statistics(attention, previous, self._documents)
        self.details[f"entropy_{kind}"][loop, layer] = entropy.cpu()
        if divergence is not None:
            self.details[f"kl_{kind}"][loop, layer] = divergence.cpu()

    # ------------------------------------------------------------ afterwards

    def apply_stack(self, hidden_states: Tensor) -> Tensor:
        """Apply f, one more loop, to an input [T, d], by the rules of the last loop.

        Depending on the model's switches, the loop attends to this sequence's first-loop keys and values and to a
        window of its own, or to its own alone, and it ends with the final norm if there is one between loops.
        """
        out = hidden_states[None]
        for layer, (key, value) in zip(self._model.layers, self._shared, strict=True):
            out = layer(out, key, value, state=self._pass, cache=None)[0]
        return (self._model.norm(out) if self._model.config.norm_between_loops else out)[0]

    def next_input(self, state: Tensor, starts: Tensor | None = None) -> Tensor:
        """Return the input of the loop after the state [T, d]: E and shift(h) joined, E and h, or h itself."""
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
        starts: bool [T], first tokens of packed documents, which are isolated from each other; None: one document.
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


# ---------------------------------------------------------------- all sequences


# Measures whose change from loop to loop has an interval of its own.
DIFFERENCES = ("effective_rank", "lens_loss", "lens_rank", "step_size")


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one model.

    Attributes:
        config: the model's `PLTConfig`.
        measures: the measures that this model has.
        loops: by name, arrays [L + 1] over loops 0 .. L; layers and heads averaged.
        details: by name, [L + 1, layers, H] or [L + 1, layers], for measures with details.
        differences: by the names of `DIFFERENCES`, [L + 1]: loop r minus loop r - 1, paired by sequence.
        sequences: number of sequences, n.
    """

    config: Any
    measures: list[Measure]
    loops: dict[str, Intervals]
    details: dict[str, Intervals]
    differences: dict[str, Intervals]
    sequences: int

    @property
    def loop_count(self) -> int:
        return int(self.config.loop_count)

    @property
    def windows_earlier_loops(self) -> bool:
        """Whether loops before the last attend to a window only, so that their states are not those of the same weights
        run with fewer loops."""
        return bool(self.config.windows_earlier_loops)


def diagnose(
    model: Any,
    held_out: HeldOut,
    *,
    reset: bool = False,
    masked_token: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Run a `PLTForCausalLM` over the sequences; the states of one sequence at a time are in memory.

    Args:
        reset: isolate packed documents from each other, as with data.reset_at_document_boundaries.
        masked_token: losses leave out the token after it, as with data.eod_mask_loss.
        seed: seed of the bootstrap.
        progress: called with the number of sequences done and in total.
    """
    total = len(held_out.tokens)
    wanted = measures_for(model.config)
    rows: list[dict[str, np.ndarray]] = []
    for index in range(total):
        tokens = torch.from_numpy(held_out.tokens[index]).to(model.device)
        starts = torch.from_numpy(held_out.starts[index]).to(model.device) if reset else None
        mask = None
        if held_out.mask is not None:  # with a masked token training also leaves out the first of each document
            kept = held_out.mask[index] * (True if masked_token is None else ~held_out.starts[index])
            mask = torch.from_numpy(kept).to(model.device)
        rows.append(measure_sequence(model, tokens, starts, masked_token, mask))
        progress(index + 1, total)
    bootstrap = Bootstrap(total, seed)
    loops, details, differences = {}, {}, {}
    for measure in wanted:
        values = np.stack([row[measure.name] for row in rows])
        if measure.detail is not None:
            details[measure.name] = bootstrap.intervals(values)
            values = values.reshape(*values.shape[:2], -1).mean(-1)
        loops[measure.name] = bootstrap.intervals(values)
        if measure.name in DIFFERENCES:
            differences[measure.name] = bootstrap.intervals(np.diff(values, axis=1, prepend=math.nan))
    return Diagnosis(model.config, wanted, loops, details, differences, total)


@torch.no_grad()
def measure_sequence(
    model: Any,
    tokens: Tensor,
    starts: Tensor | None = None,
    masked_token: int | None = None,
    mask: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Compute every measure of one sequence: arrays [L + 1, ...] by name, NaN where not defined.

    Args:
        tokens: int64 [T + 1], the last one only as a label.
        starts: bool [T + 1], first tokens of documents kept apart; None: one document.
        masked_token: losses leave out the token after it.
        mask: uint8 [T + 1], 0 for tokens that losses leave out; `masked_token`, which may end each message, is not
            looked for then.
    """
    distances, window = measures.copy_distances(tokens, starts), model.config.window_size
    copies = {"copy_loss": (distances > 0) & (distances <= window), "far_copy_loss": distances > window}
    counted = torch.ones_like(tokens[1:], dtype=torch.bool)
    if starts is not None:
        counted, starts = ~starts[1:], starts[:-1]  # nothing predicts another document's first token
    if mask is not None:
        counted = counted & (mask[1:] != 0)
    elif masked_token is not None:
        counted = counted & (tokens[:-1] != masked_token)
    recording = record(model, tokens[:-1], starts)

    def head(states: Tensor) -> Tensor:
        # With a norm between loops the states are normed.
        return model.lm_head(states if model.config.norm_between_loops else model.model.norm(states))

    result = {**recording.details, **_state_measures(recording, starts)}
    return result | measures.lens_statistics(recording.states, tokens[1:], counted, head, copies)


def _state_measures(recording: Recording, starts: Tensor | None) -> dict[str, np.ndarray]:
    states = [state.float() for state in recording.states]
    found: dict[str, np.ndarray] = defaultdict(lambda: np.full(len(states), math.nan))
    for loop, state in enumerate(states):
        found["hidden_norm"][loop] = measures.mean_norm(state)
        found["effective_rank"][loop] = measures.effective_rank(state)
        if loop == 0:
            continue
        previous = states[loop - 1]
        found["step_size"][loop] = measures.mean_norm(state - previous)
        found["relative_step"][loop] = measures.relative_step(state, previous)
        recorded = recording.states[loop]
        found["fixed_point_gap"][loop] = measures.mean_norm(state - recording.apply_stack(recorded).float())
        if loop == len(states) - 1:
            after = recording.apply_stack(recording.next_input(recorded, starts)).float()
        else:
            after = states[loop + 1]  # the next loop computed it
        found["loop_map_gap"][loop] = measures.mean_norm(after - state)
        if loop > 1:
            found["update_cosine"][loop] = measures.update_cosine(state - previous, previous - states[loop - 2])
            found["offset_cost"][loop] = measures.offset_cost(previous, starts)
    return found
