"""The measures: their names in files, what a reader sees, and the loop from which each is defined."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One diagnostic.

    Attributes:
        name: in JSON and CSV.
        title: for readers.
        meaning: one line below a table.
        first_loop: the least r for which it is defined.
        detail: `head`: also for each layer and head; `layer`: for each layer; None: for the loop only.
        form: how its numbers are written.
        clp_only: measures what only cross-loop parallelism does.
        window_only: measures the window or its gate.
    """

    name: str
    title: str
    meaning: str
    first_loop: int
    detail: str | None = None
    form: str = ".4g"
    clp_only: bool = False
    window_only: bool = False


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
    Measure("fixed_point_gap", "fixed-point gap", "||h(r) - f(h(r))||, f the stack as later loops run it", 1),
    Measure(
        "loop_map_gap",
        "loop-map gap",
        "||h(r) - what the next loop would make of h(r)||: the step of loop r + 1; after the last, of one more",
        1,
    ),
    Measure("offset_cost", "offset cost", "||h_i(r-1) - h_(i-1)(r-1)||: what the shift changes", 2, clp_only=True),
    Measure("gate_mean", "gate", "mean of g", 2, "head", ".3f", window_only=True),
    Measure("entropy_global", "attention entropy", "of the attention to all tokens, nats", 1, "head", ".3f"),
    Measure("entropy_local", "window entropy", "of the window's attention, nats", 2, "head", ".3f", window_only=True),
    Measure("kl_global", "attention KL", "KL(attention of loop r || of loop r-1), all tokens, nats", 2, "head"),
    Measure("kl_local", "window KL", "the same of the window, nats", 3, "head", window_only=True),
    Measure("head_rank", "head rank", "effective rank of the heads' outputs; 1: all say the same", 1, "layer", ".3f"),
    Measure("head_cosine", "head cosine", "mean cosine of two heads' outputs", 1, "layer", "+.3f"),
    Measure("lens_loss", "loss", "cross-entropy if the model stopped after loop r, nats per token", 1, form=".4f"),
    Measure(
        "copy_loss",
        "loss on copies",
        "of tokens that also came after the last occurrence of the two before them, at most a window back",
        1,
        form=".4f",
    ),
    Measure("far_copy_loss", "loss on far copies", "the same, further back than the window reaches", 1, form=".4f"),
    Measure("lens_rank", "rank of the truth", "mean rank of the right token among all; 1 is best", 1),
    Measure("lens_entropy", "lens entropy", "of the prediction, nats", 1, form=".3f"),
    Measure("lens_kl", "lens KL", "KL(p(r) || p(r-1)), nats", 2),
    Measure("peak_loop", "peak loop", "share of tokens whose largest KL is at loop r", 2, form=".3f"),
)


def measures_for(*, loop_count: int, cross_loop_parallel: bool, gated_window: bool) -> list[Measure]:
    """The measures that a model with these settings has."""
    return [
        measure
        for measure in MEASURES
        if measure.first_loop <= loop_count
        and (cross_loop_parallel or not measure.clp_only)
        and (gated_window or not measure.window_only)
    ]
