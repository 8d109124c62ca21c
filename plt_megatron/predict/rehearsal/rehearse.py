"""A rehearsal: run one rank of each kind, each in its own process, and check all of them together."""

from __future__ import annotations

import dataclasses
import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from plt_megatron.config.layout import ParallelLayout, layout_of
from plt_megatron.config.loop_schedule import with_equal_steps
from plt_megatron.config.rules.fusions import NAMES as FUSIONS
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError, first_line
from plt_megatron.extras import require
from plt_megatron.predict.cards import find_gpu_spec
from plt_megatron.predict.layout import problems_on
from plt_megatron.predict.rehearsal.compare import Difference, compare, memory_problems, saving_problems
from plt_megatron.predict.rehearsal.matching import Waiting, group_problems, play
from plt_megatron.predict.rehearsal.record import RankRecord
from plt_megatron.predict.run_estimate import RunEstimate, estimate_run
from plt_megatron.runtime.local_processes import usable_cores

NOT_SEEN = (
    "kernels (their speed, numerics and workspaces)",
    "NCCL (buffers, choice of algorithm, broken links)",
    "time",
    "the allocator's fragmentation",
)


@dataclass
class Rehearsal:
    """Findings of a rehearsal.

    Attributes:
        records: one per rehearsed rank.
        waiting: result of replaying the ranks together.
        differences: between rehearsed figures and the estimate.
        replaced: what could not be rehearsed, and what stood in for it.
        problems: one line each; empty if the rehearsal passed.
    """

    config: RunConfig
    estimate: RunEstimate
    records: list[RankRecord]
    waiting: Waiting
    differences: list[Difference]
    replaced: list[str]
    problems: list[str]


def rehearse(
    config: RunConfig,
    vocab_size: int,
    *,
    world_size: int,
    gpu: str = "h100",
    gpus_per_node: int = 8,
    processes: int | None = None,
    prepare: Callable[[int], None] | None = None,
) -> Rehearsal:
    """Rehearse a configuration on `world_size` ranks. Imports torch and megatron-core and forks.

    Args:
        vocab_size: the tokenizer's.
        gpu: the card, as `plt estimate` names it.
        processes: ranks at a time; None: as many as there are cores, at most 4.
        prepare: see `rehearse_rank`.

    Raises:
        UserError: the configuration does not fit this world, or cannot be rehearsed.
    """
    problems = problems_on(config, world_size, find_gpu_spec(gpu).capability)
    if problems:
        raise UserError("\n".join(problems))
    given = config
    config, replaced = _rehearsable(given)
    layout = layout_of(config, world_size)
    estimates = [
        estimate_run(
            with_equal_steps(each), gpu=gpu, world_size=world_size, gpus_per_node=gpus_per_node, vocab_size=vocab_size
        )
        for each in (config, given)
    ]
    estimate = estimates[0]
    _import_once()
    ranks = ranks_of_each_kind(layout)
    calls = [(config, vocab_size, rank, world_size, prepare) for rank in ranks]
    processes = processes or min(4, usable_cores())
    results = _in_processes(calls, processes)
    records = [each for each in results if isinstance(each, RankRecord)]
    problems = [each for each in results if isinstance(each, str)]
    savings = [record.saving for record in records if record.saving is not None]
    waiting = Waiting() if problems else play(records)
    differences = [] if problems else compare(config, records, estimate)
    problems += [] if problems else saving_problems(savings)
    problems += [
        *group_problems(records, layout),
        *waiting.problems,
        *memory_problems(records, *estimates),
        *(f"not as estimated: {each}" for each in differences if each.is_wrong),
    ]
    return Rehearsal(config, estimate, records, waiting, differences, replaced, problems)


def ranks_of_each_kind(layout: ParallelLayout) -> list[int]:
    """Choose the ranks to rehearse: one of every pipeline stage, since only all stages together show whether messages
    match; on the first, middle and last stage also the last rank along TP and EP, and the middle and last along CP; on
    the first stage, the last along DP. All other ranks behave like one of these."""
    stages = layout.pipeline
    ranks = [_rank(layout, pp=stage) for stage in range(stages)]
    for stage in sorted({0, stages // 2, stages - 1}):
        if layout.tensor > 1:
            ranks.append(_rank(layout, pp=stage, tp=layout.tensor - 1))
        ranks.append(stage * layout.ranks_per_stage + layout.expert - 1)
        ranks += [_rank(layout, pp=stage, cp=place) for place in (layout.context // 2, layout.context - 1)]
    if layout.data > 1:
        ranks.append(_rank(layout, dp=layout.data - 1))
    return sorted(set(ranks))


def _rank(layout: ParallelLayout, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
    return tp + layout.tensor * (cp + layout.context * (dp + layout.data * pp))


def _rehearsable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Replace what needs a GPU's libraries; return the new configuration and a line per replacement."""
    if config.deepspeed is not None:
        raise UserError("deepspeed: only megatron-core's engine can be rehearsed; set deepspeed=null")
    if package := optimizer_spec(config.optimizer).package:
        require(f"rehearsing optimizer.name {config.optimizer.name}", package)
    replaced = []
    model, training, data, parallel = config.model, config.training, config.data, config.parallel
    if model.backend != "torch":
        replaced.append("Transformer Engine's layers by the torch backend's (same collectives, different activations)")
        model = dataclasses.replace(model, backend="torch")
        asked = {name: None for name in FUSIONS if getattr(parallel, name)}
        parallel = dataclasses.replace(parallel, **asked)  # type: ignore[arg-type]
    if model.moe is not None:
        replaced.append("the router's choice, which depends on values, by an even load on all experts")
    if model.fused_gated_window:
        replaced.append("the fused window kernel by the torch backend's blocks")
        model = dataclasses.replace(model, fused_gated_window=False)
    if training.precision == "fp32":
        replaced.append("fp32 attention, which may keep all scores, by the fused bf16 kernel, which keeps none")
    if training.fp8 is not None:
        replaced.append("FP8 by bf16")
        training = dataclasses.replace(training, fp8=None)
    if data.reset_at_document_boundaries:
        replaced.append("packed documents by one document per row")
        data = dataclasses.replace(data, reset_at_document_boundaries=False)
    return dataclasses.replace(config, model=model, training=training, data=data, parallel=parallel), replaced


@cache
def _import_once() -> None:
    """Import, once and without their warnings, the modules that each forked process would otherwise import itself."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    from torch._subclasses.fake_tensor import FakeTensorMode

    from plt_megatron.runtime.cpu_runtime import hide_gpu_packages

    hide_gpu_packages()  # their kernels would read the fake tensors
    from plt_megatron.predict.rehearsal.fakes import share_out_lazily, share_rank_lists

    share_rank_lists()
    share_out_lazily()
    with FakeTensorMode():  # registers torch's shape functions and flop counters
        torch.empty(2, 2).softmax(-1).to(torch.bfloat16) @ torch.empty(2, 2, dtype=torch.bfloat16)


def _in_processes(calls: Sequence[tuple[Any, ...]], processes: int) -> list[RankRecord | str]:
    """Run each call in a forked process of its own; return records or problems in the order of `calls`."""
    context = get_context("fork")
    gc.freeze()  # keeps every rank's garbage collections from scanning, hence copying, what exists now
    results: dict[int, RankRecord | str] = {}
    left, running = list(enumerate(calls)), dict[Any, tuple[int, Any]]()
    while left or running:
        while left and len(running) < processes:
            index, call = left.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send_result, args=(theirs, *call))
            process.start()
            theirs.close()
            running[ours] = index, process
        ready: list[Any] = wait(list(running))
        for connection in ready:
            index, process = running.pop(connection)
            try:
                results[index] = connection.recv()
                process.join()
            except EOFError:
                process.join()
                rank, code = calls[index][2], process.exitcode
                results[index] = f"rank {rank}'s process ended with exit code {code}; it may have run out of memory"
    return [results[index] for index in range(len(calls))]


def _send_result(connection: Any, config: RunConfig, vocab_size: int, rank: int, world_size: int, prepare: Any) -> None:
    """Send the rank's record, or one line that says why the rank failed."""
    import torch

    from plt_megatron.predict.rehearsal.rank import rehearse_rank  # imports megatron-core

    torch.set_num_threads(1)  # rebuilds the forked thread pool before autograd's threads do so concurrently and abort
    result: RankRecord | str
    try:
        result = rehearse_rank(config, vocab_size, rank, world_size, prepare)
    except Exception as error:  # whatever it is, a rank that only ends would seem to have run out of memory
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        result = f"rank {rank} fails: {first_line(error)} ({frame.f_globals.get('__name__')}:{line})"
    connection.send(result)
