"""The single formula for model FLOPs, loops included. Times tokens/s it is model FLOP/s; that over the peak is MFU.

Per token and forward pass, with `n` tokens in a sequence, `d` hidden, `h` heads and `g` key/value heads of
`c` channels, `f` FFN width, `w` window, `V` padded vocabulary, and a multiply-add as 2 FLOPs:

    projections   2 d c (h + 2 g) + 2 h c d          per layer and loop
    ffn           2 * 3 d f                          per layer and loop
    router        2 d E                              per layer with E experts and loop; f is then the width a token uses
    global        4 h c K(n)                         per layer and loop: Q K^T, and its softmax times V
    local         4 h c K(n, w)                      per layer and loop >= 2, with gated_window; or, in place of the
                                                     global one, in the loops that attend to a window alone
    gate          2 h * (c or d)                     per layer and loop >= 2, with gated_window
    output        2 d V                              once

A layer that runs once counts in the first loop if it comes before those that loop, and in the last one otherwise.

`K` is the mean number of keys a query sees under the causal mask: K(n) = (n + 1) / 2, and for w <= n
K(n, w) = w - w (w - 1) / (2 n).

Training costs three forward passes: the forward itself, the gradients of inputs, and the gradients of weights, which
frozen matrices skip. Recomputation adds nothing: these are model FLOPs, the work the mathematics asks for, not what the
hardware did. The embedding is a lookup; norms, RoPE, softmax, activations and the loop's shift are left out. A sequence
counts as one document: with `reset_at_document_boundaries` attention does less work than is counted. With `share_kv`
and without `gated_window`, loops >= 2 use no K and V of their own, so those projections are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from plt_megatron.config import derived
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.predict.layers import runs
from plt_megatron.predict.parameters import FFN, Weights, check_trained


@dataclass(frozen=True)
class Parts:
    """A cost split into parts; a subclass's fields are the parts."""

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def times(self, factor: float) -> Self:
        return type(self)(*(factor * part for part in dataclasses.astuple(self)))

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class Flops(Parts):
    """FLOPs per token by component, summed over layers and loops."""

    projections: float
    ffn: float  # includes the router
    global_attention: float
    local_attention: float
    gate: float
    output: float

    @property
    def matmuls(self) -> float:
        """FLOPs of the matrix products: everything but attention."""
        return self.total - self.global_attention - self.local_attention

    @property
    def looped(self) -> float:
        """FLOPs of the transformer stack: everything but the output layer."""
        return self.total - self.output


def mean_keys(sequence_length: int, window_size: int | None = None) -> float:
    """Return the mean number of keys a query sees, itself included, over a sequence and within the window if any."""
    n = sequence_length
    w = n if window_size is None else min(window_size, n)
    return w - w * (w - 1) / (2 * n)


def forward_flops(
    weights: Weights,
    keys: float,
    window_keys: float,
    padded_vocab_size: int,
    *,
    layers: Sequence[int] | None = None,
    loop: int | None = None,
) -> Flops:
    """Count the FLOPs of one token's forward pass, logits included, that sees `keys` keys, and `window_keys` in a
    window. In training both are means over a sequence; in decoding they follow from the context length.

    Args:
        weights: count products with these weights, and all of attention.
        layers: count these layers, and the logits; None: all.
        loop: count the layers in this loop alone, from 1.
    """
    model = weights.model
    found = runs(model, range(model.num_layers) if layers is None else layers, loop)
    ran, later = [run.layer for run in found], [run.layer for run in found if run.part == "later"]
    gated = later if derived.has_gates(model) else []
    local = sum(run.local for run in found)
    attention = 4 * model.num_attention_heads * derived.head_dim(model)
    return Flops(
        projections=2 * (weights.matmuls(ran, "attention") - unused_products(weights, later)),
        ffn=2 * weights.matmuls(ran, *FFN),
        global_attention=(len(ran) - local) * attention * keys,
        local_attention=(len(gated) + local) * attention * window_keys,
        gate=2 * weights.matmuls(gated, "gates"),
        output=2 * model.hidden_size * padded_vocab_size * weights.has_head,
    )


def unused_products(weights: Weights, later: Iterable[int]) -> int:
    """Count a token's multiply-adds with those of K's and V's matrices among `weights` that runs of these layers in
    later loops have no use for."""
    model = weights.model
    unused = (not derived.later_loops_use_keys(model)) + (not derived.later_loops_use_values(model))
    each = unused * derived.num_query_groups(model) * derived.head_dim(model) * model.hidden_size
    return each * sum(not any("linear_qkv.weight" in name for name in weights.missing_in(layer)) for layer in later)


def training_flops_per_token(
    model: ModelConfig,
    sequence_length: int,
    padded_vocab_size: int,
    loop_count: int | None = None,
    loop: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    trained: Weights | None = None,
) -> Flops:
    """Count the model FLOPs per token of one training step (forward and backward, no recomputation).

    Args:
        loop_count: None: the model's.
        loop: as in `forward_flops`.
        layers: as in `forward_flops`.
        trained: the weights that have gradients; None: all.
    """
    model = dataclasses.replace(model, loop_count=model.loop_count if loop_count is None else loop_count)
    keys, window_keys = mean_keys(sequence_length), mean_keys(sequence_length, model.window_size)

    def forward(weights: Weights) -> Flops:
        return forward_flops(weights, keys, window_keys, padded_vocab_size, layers=layers, loop=loop)

    if trained is None or trained.is_whole:  # the output, the input's gradient and the weights'
        return forward(Weights(model)).times(3)
    return forward(Weights(model)).times(2) + forward(dataclasses.replace(trained, model=model))


def step_flops_per_token(
    config: RunConfig,
    padded_vocab_size: int,
    loop_count: int,
    sequence_length: int | None = None,
    loop: int | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Flops:
    """Count the training FLOPs per token of a run's step with `loop_count` loops: the output layer runs once per loop
    with a loss (`training.loop_loss_weights`), and frozen weights have no gradients. `sequence_length` None:
    `data.sequence_length`; `loop`, `layers`: as in `forward_flops`."""
    length, trained = sequence_length or config.data.sequence_length, Weights.trained(config)
    flops = training_flops_per_token(
        config.model, length, padded_vocab_size, loop_count, loop, layers=layers, trained=trained
    )
    return dataclasses.replace(flops, output=len(derived.loops_with_loss(config, loop_count)) * flops.output)


def run_flops_per_token(config: RunConfig, padded_vocab_size: int, start: int = 0) -> Flops:
    """Return the mean training FLOPs per token over the run's steps after `start`: `training.loop_schedule` sets their
    loops, `data.length_schedule` their sequence lengths. Raises `UserError` as `check_trained`."""
    check_trained(config)
    total = Flops(0, 0, 0, 0, 0, 0)
    for kind, share in LoopSchedule(config).kind_token_shares(start).items():
        total += step_flops_per_token(config, padded_vocab_size, kind.loop_count, kind.sequence_length).times(share)
    return total


def flops_of_loops(config: RunConfig, padded_vocab_size: int) -> list[float]:
    """Return the training FLOPs per token of each loop, without the output layer, averaged as in
    `run_flops_per_token`."""
    totals = [0.0] * config.model.loop_count
    for kind, share in LoopSchedule(config).kind_token_shares().items():
        for loop in range(1, kind.loop_count + 1):
            flops = step_flops_per_token(config, padded_vocab_size, kind.loop_count, kind.sequence_length, loop)
            totals[loop - 1] += share * flops.looped
    return totals
