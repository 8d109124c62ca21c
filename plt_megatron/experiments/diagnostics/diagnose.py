"""All diagnostics of one model on held-out text, sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plt_megatron.experiments.diagnostics import measures
from plt_megatron.experiments.diagnostics.bootstrap import Bootstrap, Intervals
from plt_megatron.experiments.diagnostics.catalog import Measure, measures_for
from plt_megatron.experiments.diagnostics.recording import Recording, record
from plt_megatron.experiments.diagnostics.samples import HeldOut

# Measures whose change from loop to loop gets an interval of its own.
DIFFERENCES = ("effective_rank", "lens_loss", "lens_rank", "step_size")
_STATE_MEASURES = (
    *("hidden_norm", "step_size", "relative_step", "update_cosine", "effective_rank"),
    *("fixed_point_gap", "loop_map_gap", "offset_cost"),
)


@dataclass(frozen=True)
class Diagnosis:
    """The numbers.

    Attributes:
        loop_count: L.
        measures: those that this model has.
        loops: by name, arrays [L + 1] over loops 0 .. L; layers and heads averaged.
        details: by name, [L + 1, layers, H] or [L + 1, layers], of the measures that have them.
        differences: by the names of `DIFFERENCES`, [L + 1]: loop r minus loop r - 1, paired by sequence.
        sequences: n.
        gate_activation: of the gates, sigmoid or tanh.
    """

    loop_count: int
    measures: list[Measure]
    loops: dict[str, Intervals]
    details: dict[str, Intervals]
    differences: dict[str, Intervals]
    sequences: int
    gate_activation: str = "sigmoid"


def diagnose(
    model: Any,
    held_out: HeldOut,
    *,
    reset: bool = False,
    masked_token: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Run a `PLTForCausalLM` over the sequences; one sequence's states are in memory at a time.

    Args:
        reset: packed documents see and receive nothing of each other, as with data.reset_at_document_boundaries.
        masked_token: losses leave out what follows it, as with data.eod_mask_loss.
        seed: of the bootstrap.
        progress: called with the number of sequences done and in all.
    """
    total = len(held_out.tokens)
    wanted = _measures_of(model.config)
    rows: list[dict[str, np.ndarray]] = []
    for index in range(total):
        tokens = torch.from_numpy(held_out.tokens[index]).to(model.device)
        starts = torch.from_numpy(held_out.starts[index]).to(model.device) if reset else None
        rows.append(measure_sequence(model, tokens, starts, masked_token))
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
    return Diagnosis(model.config.loop_count, wanted, loops, details, differences, total, model.config.gate_activation)


def _measures_of(config: Any) -> list[Measure]:
    return measures_for(
        loop_count=config.loop_count,
        cross_loop_parallel=config.cross_loop_parallel,
        gated_window=config.gated_window,
    )


@torch.no_grad()
def measure_sequence(
    model: Any, tokens: Tensor, starts: Tensor | None = None, masked_token: int | None = None
) -> dict[str, np.ndarray]:
    """Every measure of one sequence, arrays [L + 1, ...] by name, NaN where not defined.

    Args:
        tokens: int64 [T + 1], the last one only as a label.
        starts: bool [T + 1], first tokens of documents kept apart; None: one document.
        masked_token: losses leave out what follows it.
    """
    distances, window = measures.copy_distances(tokens, starts), model.config.window_size
    copies = {"copy_loss": (distances > 0) & (distances <= window), "far_copy_loss": distances > window}
    counted = torch.ones_like(tokens[1:], dtype=torch.bool)
    if starts is not None:
        counted, starts = ~starts[1:], starts[:-1]  # nothing predicts another document's first token
    if masked_token is not None:
        counted = counted & (tokens[:-1] != masked_token)
    recording = record(model, tokens[:-1], starts)

    def head(states: Tensor) -> Tensor:
        # With a norm between loops the states are normed.
        return model.lm_head(states if model.config.norm_between_loops else model.model.norm(states))

    result = {**recording.by_head, **recording.by_layer, **_state_measures(recording, starts)}
    return result | measures.lens_statistics(recording.states, tokens[1:], counted, head, copies)


def _state_measures(recording: Recording, starts: Tensor | None) -> dict[str, np.ndarray]:
    states = [state.float() for state in recording.states]
    found = {name: np.full(len(states), math.nan) for name in _STATE_MEASURES}
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
            after = states[loop + 1]  # the next loop did it
        found["loop_map_gap"][loop] = measures.mean_norm(after - state)
        if loop > 1:
            found["update_cosine"][loop] = measures.update_cosine(state - previous, previous - states[loop - 2])
            found["offset_cost"][loop] = measures.offset_cost(previous, starts)
    return found
