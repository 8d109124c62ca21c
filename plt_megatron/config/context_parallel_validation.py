"""Checks of a configuration whose ranks share sequences (`parallel.context_parallel_size`); part of `validation`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig


def check_context_parallel(config: RunConfig) -> Iterator[str]:
    """What the sequence has to be divisible by, and what no kernel does."""
    parallel, length = config.parallel, config.data.sequence_length
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if parallel.window_cp_comm_type == "p2p":
        yield (
            "parallel.window_cp_comm_type p2p: Transformer Engine's sliding window has no p2p context parallelism; "
            "use a2a or all_gather"
        )
    if cp == 1:
        return
    if length % (2 * cp):
        yield (
            f"data.sequence_length {length} is not divisible by {2 * cp}: "
            f"parallel.context_parallel_size {cp} cuts a sequence into twice as many chunks"
        )
    elif parallel.sequence_parallel and length % (cp * tp):
        yield (
            f"data.sequence_length {length} is not divisible by {cp * tp}: parallel.sequence_parallel shares each of "
            f"parallel.context_parallel_size {cp} parts among parallel.tensor_model_parallel_size {tp} ranks"
        )


def check_te_context_parallel(config: RunConfig, have_te: bool | None) -> Iterator[str]:
    """What Transformer Engine's attention, which `auto` may mean, cannot do when ranks share a sequence.

    `have_te`: whether it is installed; None: look.
    """
    parallel, model = config.parallel, config.model
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if cp == 1 or model.backend == "torch":
        return
    if have_te is None:
        have_te = importlib.util.find_spec("transformer_engine") is not None
    if model.backend == "auto" and not have_te:
        return
    other = "or set model.backend=torch"
    if config.data.reset_at_document_boundaries:
        yield (
            "data.reset_at_document_boundaries with parallel.context_parallel_size > 1: Transformer Engine would cut "
            f"each document among the ranks, not the sequence; set it to false, {other}"
        )
    kinds = [("cp_comm_type", parallel.cp_comm_type)]
    if derived.has_gates(model):
        kinds.append(("window_cp_comm_type", parallel.window_cp_comm_type))
    for name, kind in kinds:
        if kind == "a2a" and derived.num_query_groups(model) % (tp * cp):
            yield (
                f"parallel.{name} a2a shares out the {derived.num_query_groups(model)} key/value heads "
                f"(model.num_query_groups): not divisible by tensor {tp} x context {cp}; use all_gather, {other}"
            )
