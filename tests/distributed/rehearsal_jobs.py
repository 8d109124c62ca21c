"""Rehearsals for test_rehearsal.py: of a real gloo run, and with faults seeded into the code.

The main program rehearses the cases that it is given, in a process of its own since the tests' processes run on the CPU
runtime, and prints their findings as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import (
    BatchStage,
    DataConfig,
    DataSource,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from tests.distributed.cases import ENDS, Layout

if TYPE_CHECKING:
    from plt_megatron.predict.rehearsal.record import Log

VOCAB_SIZE = 200
_EXPERTS = MoeConfig(
    num_experts=8,
    router_topk=2,
    ffn_hidden_size=32,
    z_loss_coeff=0.001,
    router_score_function="sigmoid",
    router_bias_update_rate=1e-3,
    first_k_dense_replace=1,  # of two layers: with PP2 a stage has no experts
)
# Words that may follow a layout -> settings of `ParallelConfig`.
WAYS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap_grad_reduce": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "uneven": {"num_layers_in_first_pipeline_stage": 1},
    "ends": ENDS,
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}
# .. -> what of the model is trained.
TRAINED = {"top": ["layers.1"], "gates": ["plt_gate"]}


def run_config(case: str) -> RunConfig:
    """A small model, tied embeddings included, in a layout as in "TP2 SP DP2 EP2 overlap"; with experts if it has EP.

    Further words: `wide`, a window as long as the rows; `ungated`, without windows; `hidden`, a gate on hidden states;
    `Muon`; `average`, a moving average of the weights; `span`, layers that run once; `losses`, one for
    each loop; `batches`, larger ones first; `layerwise`, all loops of a layer before the next; `six`, experts instead
    of eight; those of `TRAINED`.
    """
    words = case.split()
    layout = Layout.of(" ".join(word for word in words if re.fullmatch(r"SP|[A-Z]{2}\d", word)))
    parallel = layout.settings | {"data_parallel_size": layout.dp}
    for word in words:
        parallel |= WAYS.get(word, {})
    batch = (layout.pp if layout.pp > 1 else 8) * layout.dp
    layers = 4 if {"span", "uneven"}.intersection(words) else 2 if "ends" in words else max(2, layout.pp)
    return RunConfig(
        model=ModelConfig(
            num_layers=layers,
            loop_count=3 if "span" in words else 2,
            loop_span=[1, 3] if "span" in words else None,
            loop_order="layer" if "layerwise" in words else "stack",
            cross_loop_parallel="layerwise" not in words,
            gate_input="hidden" if {"span", "hidden"}.intersection(words) else "query",
            gated_window="ungated" not in words,
            hidden_size=128 if layout.tp == 4 else 64,  # padding of the smaller one would be 1 %
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            window_size=32 if "wide" in words else 8,
            vocab_size=VOCAB_SIZE,
            backend="torch",
            moe=dataclasses.replace(_EXPERTS, num_experts=6 if "six" in words else 8) if layout.ep > 1 else None,
        ),
        data=DataConfig(sources=[DataSource(path="unread")], sequence_length=32),
        training=TrainingConfig(
            micro_batch_size=1,
            global_batch_size=batch,
            train_iters=10,
            batch_schedule=[BatchStage(128 * batch, 2 * batch)] if "batches" in words else [],
            loop_loss_weights=[0.5] if "losses" in words else [],
            ema_decay=0.9 if "average" in words else None,
            trainable=[pattern for word in words for pattern in TRAINED.get(word, [])],
        ),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(name="muon" if "Muon" in words else "adam"),
    )


@contextlib.contextmanager
def recorded() -> Iterator[Log]:
    """What a real rank communicates in the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from plt_megatron.predict.rehearsal.record import Log

    log = Log()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                log.add(func, args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield log


def record_real(config: RunConfig, folder: Path) -> dict[str, list[list[Any]]]:
    """Record what this gloo rank communicates in a training step and a validation, as `essence` has it, and what it
    writes of a checkpoint: key, offset and shape."""
    import torch

    from plt_megatron.model.looped_gpt import MicroBatch
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.build_engine import build_engine
    from plt_megatron.train.callbacks.weight_ema import WeightAverage
    from plt_megatron.train.checkpoint.saving import begin_save

    init_process_groups(config.parallel)
    engine = build_engine(config, VOCAB_SIZE)
    shape = 1, config.data.sequence_length
    ones = torch.ones(shape, dtype=torch.int64)
    batches = [
        MicroBatch(tokens=ones, labels=ones, loss_mask=torch.ones(shape))
        for _ in range(max(2, config.parallel.pipeline_model_parallel_size))  # a rehearsal runs no more
    ]
    if config.parallel.overlap_grad_reduce:
        engine.train_step(batches)
    with balanced_routing(), recorded() as log:
        engine.train_step(batches)
        engine.evaluate(batches[: config.parallel.pipeline_model_parallel_size], config.model.loop_count)
    average = config.training.ema_decay is not None
    kept = {"ema": WeightAverage(engine).sharded("ema")} if average else None  # type: ignore[arg-type]
    items = [item for *_, (_, tensors) in begin_save(engine, folder, {"step": 1}, kept).buckets for item, _ in tensors]
    written = [
        [item.index.fqn, list(item.tensor_data.chunk.offsets), list(item.tensor_data.chunk.sizes)] for item in items
    ]
    return {"calls": essence(log.calls, log.groups), "written": sorted(written)}


def written_by_rank(records: Any) -> dict[int, list[list[Any]]]:
    """The same of all ranks, by a rehearsal's plan."""
    found: dict[int, list[list[Any]]] = {}
    for saving in (record.saving for record in records if record.saving is not None):
        for key, (_, boxes) in saving.tensors.items():
            for offset, shape, rank in boxes:
                found.setdefault(rank, []).append([key, list(offset), list(shape)])
    return {rank: sorted(boxes) for rank, boxes in found.items()}


@contextlib.contextmanager
def balanced_routing() -> Iterator[None]:
    """Within it, each expert gets as many tokens as every other, as a rehearsal assumes."""
    import torch

    from plt_megatron.model.layer_specs import LoopRouter

    stock = LoopRouter.routing

    def routing(self: Any, logits: Any, padding_mask: Any = None) -> Any:
        experts = logits.shape[-1]
        tokens = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1])
        chosen = (tokens[..., None] * self.topk + torch.arange(self.topk)) % experts
        return stock(self, 0 * logits + torch.nn.functional.one_hot(chosen, experts).sum(dim=-2), padding_mask)

    with mock.patch.object(LoopRouter, "routing", routing):
        yield


def essence(calls: Any, groups: Any) -> list[list[Any]]:
    """Operation, the group's ranks, peer, dtype, elements, bytes and splits of each call before the checkpoint."""
    return [
        [
            call.operation,
            list(groups[call.ranks]),
            call.peer,
            call.dtype,
            call.elements,
            call.size,
            [list(rows) for rows in call.splits],
        ]
        for call in calls
        if call.operation != "wait" and call.phase != "checkpoint"
    ]


# Faults, each seeded on a rank when its process groups exist.


def _wrong_group(rank: int) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    group = dist.new_group([rank % 2, rank % 2 + 2], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group


def _rank_dependent_shape(rank: int) -> None:
    from plt_megatron.train.megatron_engine import MegatronEngine

    if rank != 1:
        return
    stock = MegatronEngine._run

    def shorter(self: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        parts = ("tokens", "labels", "loss_mask")
        cut = [dataclasses.replace(each, **{name: getattr(each, name)[:, :-8] for name in parts}) for each in batches]
        return stock(self, cut, *args, **kwargs)

    MegatronEngine._run = shorter  # type: ignore[method-assign]


def _no_embedding_reduction(rank: int) -> None:
    finalize_model_grads: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    finalize_model_grads._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def _mismatched_messages(rank: int) -> None:
    """The last stage takes the even stages' turn."""
    from megatron.core.pipeline_parallel import p2p_communication

    stock = p2p_communication._p2p_ops

    class Turned:
        def __init__(self, group: Any) -> None:
            self.group = group

        def rank(self) -> int:
            return self.group.rank() + 1

        def __getattr__(self, name: str) -> Any:
            return getattr(self.group, name)

    def turned(*, group: Any, **kwargs: Any) -> Any:
        return stock(group=group, **kwargs) if group.rank() == 0 else _unwrapped(stock, Turned(group), kwargs)

    p2p_communication._p2p_ops = turned


def _unwrapped(stock: Callable, group: Any, kwargs: Any) -> Any:
    import torch.distributed as dist

    isend, irecv = dist.isend, dist.irecv
    dist.isend = lambda tensor, dst, group: isend(tensor, dst, getattr(group, "group", group))
    dist.irecv = lambda tensor, src, group: irecv(tensor, src, getattr(group, "group", group))
    dist_backend, dist.get_backend = dist.get_backend, lambda group=None: "fake"
    try:
        return stock(group=group, **kwargs)
    finally:
        dist.isend, dist.irecv, dist.get_backend = isend, irecv, dist_backend


def _replica_is_written(rank: int) -> None:
    """Norms and whatever else tensor-parallel ranks hold whole count as theirs on each of them."""
    from plt_megatron.train.checkpoint import state

    stock = state.model_state

    def model_state(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        for value in found.values():
            value.replica_id = (0, 0, value.replica_id[-1])
        return found

    importlib.import_module("plt_megatron.predict.rehearsal.saving").model_state = model_state


def _end_is_not_written(rank: int) -> None:
    """An optimizer's rank leaves out the last element of each part that it has."""
    from plt_megatron.train.checkpoint import megatron_state

    stock = megatron_state.boxes
    megatron_state.boxes = lambda shape, start, stop: stock(shape, start, stop - 1)


FAULTS: dict[str, tuple[str, Callable[[int], None]]] = {
    "wrong group": ("TP2 DP2", _wrong_group),
    "rank-dependent shape": ("TP2", _rank_dependent_shape),
    "tied embeddings": ("PP2", _no_embedding_reduction),
    "written twice": ("TP2 DP2", _replica_is_written),
    "not written": ("TP2 DP2", _end_is_not_written),
    "mismatched messages": ("PP2", _mismatched_messages),
}


def main(cases: list[str]) -> None:
    """Rehearse layouts, and layouts with faults, as on a machine with a GPU, and print what is found."""
    import torch

    torch._C._cuda_getDeviceCount = lambda: 1  # type: ignore[attr-defined]
    assert torch.cuda.is_available()
    from plt_megatron.predict.rehearsal.compare import memory_problems
    from plt_megatron.predict.rehearsal.rehearse import rehearse

    found = {}
    for case in cases:
        layout, prepare = FAULTS.get(case, (case, None))
        config = run_config(layout)
        result = rehearse(config, VOCAB_SIZE, world_size=layout_of(config).world_size, prepare=prepare)
        small = dataclasses.replace(result.estimate, device_memory_bytes=100_000)
        found[case] = {
            "calls": {record.rank: essence(record.calls, record.groups) for record in result.records},
            "written": written_by_rank(result.records),
            "problems": result.problems,
            "on_a_small_card": memory_problems(result.records, small, small),
            "differences": [[each.what, each.off] for each in result.differences],
            "matched": result.waiting.matched,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
