"""Compare what the ranks did with what must hold: memory, FLOPs and bytes as estimated, and each element of a
checkpoint's tensors written by exactly one rank of the world.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.flops import step_flops_per_token, unused_products
from plt_megatron.predict.layers import runs
from plt_megatron.predict.parameters import Weights
from plt_megatron.predict.rehearsal.record import BESIDE_STEP, Box, Call, RankRecord, Saving
from plt_megatron.predict.run_estimate import USABLE_SHARE, RunEstimate

TOLERANCES = {"memory": 0.10, "FLOPs": 0.001, "bytes sent": 0.01, "checkpoint": 0.01}
# Phases whose traffic repeats per microbatch and is scaled to the run's number of microbatches.
PER_MICROBATCH = ("forward", "backward", "between")
_SCALED = ("neighbours' rows", "tensor parallel", "context parallel", "expert parallel", "pipeline")
_NOT_ESTIMATED = ("scalars", "neighbours' rows")  # the latter for the shift and, with context parallelism, the window
# Buffers of parameters are padded, by tensor and at their end, which counts where little is trained.
_PADDED, _PADDING = ("gradient reduction", "weight gathering"), 64 << 10  # bytes
_SHOWN = 3  # faults per tensor


@dataclass(frozen=True)
class Difference:
    """A rehearsed figure of one rank, and its estimate.

    Attributes:
        kind: a key of `TOLERANCES`.
        what: name of the figure, as in `bytes sent, tensor parallel`.
        rank: the rank it is from; the worst of several.
        is_bound: whether the estimate is an upper bound, so that less is right too.
        padding: how much more than the estimate is right too.
    """

    kind: str
    what: str
    rank: int
    rehearsed: float
    estimated: float
    is_bound: bool = False
    padding: int = 0

    @property
    def off(self) -> float:
        """Relative error of the estimate; infinite if only the rehearsed figure is 0."""
        if self.rehearsed == self.estimated:
            return 0.0
        return self.estimated / self.rehearsed - 1 if self.rehearsed else float("inf")

    @property
    def is_wrong(self) -> bool:
        if 0 < self.rehearsed - self.estimated <= self.padding:
            return False
        off = min(self.off, 0.0) if self.is_bound else self.off
        return abs(off) > TOLERANCES[self.kind]

    def __str__(self) -> str:
        missing = " (missing: the ranks send nothing)" if not self.rehearsed else ""
        return (
            f"{self.what}, rank {self.rank}: rehearsed {self.rehearsed:,.0f}, estimated {self.estimated:,.0f}{missing}"
        )


def compare(config: RunConfig, records: Sequence[RankRecord], estimate: RunEstimate) -> list[Difference]:
    """Compare every figure that both the records and the estimate have."""
    return [
        # The estimate assumes that each linear layer saves its input; one with frozen weights need not.
        *_memory(records, estimate, is_bound=not Weights.trained(config).is_whole),
        *(_flops(config, record, estimate) for record in records),
        *_traffic(records, estimate),
        *_saving(records, estimate),
    ]


def memory_problems(records: Sequence[RankRecord], estimate: RunEstimate, given: RunEstimate) -> list[str]:
    """List the ranks that do not fit the card.

    Args:
        estimate: of the rehearsed configuration.
        given: estimate of the configuration as given; its difference to `estimate` is due to what was replaced.
    """
    usable = int(USABLE_SHARE * estimate.device_memory_bytes)
    problems = []
    for record in records:
        stage = record.place["pp"]
        replaced = given.memory[stage].total_bytes - estimate.memory[stage].total_bytes
        needed = record.peak + replaced
        if needed > usable:
            estimated = f" (including an estimated {replaced:+,} for what was replaced)" if replaced else ""
            problems.append(
                f"memory over: rank {record.rank} needs {needed:,} bytes{estimated} in {record.peak_phase}, of "
                f"{usable:,} usable on a card ({estimate.gpu}) of {estimate.device_memory_bytes:,}"
            )
    return problems


def _memory(records: Sequence[RankRecord], estimate: RunEstimate, *, is_bound: bool) -> Iterator[Difference]:
    for stage in sorted({record.place["pp"] for record in records}):
        worst = max((each for each in records if each.place["pp"] == stage), key=lambda each: each.peak)
        expected = estimate.memory[stage].total_bytes
        yield Difference("memory", f"memory, stage {stage}", worst.rank, worst.peak, expected, is_bound)


def _flops(config: RunConfig, record: RankRecord, estimate: RunEstimate) -> Difference:
    """Compare FLOPs of linear layers and causal attention, without recomputation, and without windows, which torch
    computes in blocks unless they span the sequence."""
    layout, model = estimate.layout, config.model
    layers, loops = layout.stage_layers(model.num_layers)[record.place["pp"]], model.loop_count
    parts = step_flops_per_token(config, 0, loops, layers=layers)
    expected = parts.projections + parts.ffn + parts.global_attention
    if record.place["pp"] == layout.pipeline - 1:
        expected += estimate.flops.output
    if model.gate_input == "hidden" and loops > 1:  # computed in the first loop too, where it is unused
        copies = 1 if layout.sequence_parallel else layout.tensor  # each rank computes all heads for its rows
        expected += parts.gate * loops / (loops - 1) * copies
    if layout.context == 1 and model.window_size >= config.data.sequence_length:
        expected += parts.local_attention
    expected += _unused_keys_and_values(config, layers)
    tokens = record.microbatches * config.training.micro_batch_size * config.data.sequence_length
    rehearsed = record.flops.get("linear", 0) + record.flops.get("attention", 0)
    return Difference("FLOPs", "FLOPs", record.rank, rehearsed, expected * tokens / layout.tensor / layout.context)


def _unused_keys_and_values(config: RunConfig, layers: range) -> int:
    """Return the FLOPs per token of K and V that later loops do not use: a fused projection computes them, too."""
    later = [run.layer for run in runs(config.model, layers) if run.part == "later"]
    return 2 * (2 * unused_products(Weights(config.model), later) + unused_products(Weights.trained(config), later))


def _saving(records: Sequence[RankRecord], estimate: RunEstimate) -> Iterator[Difference]:
    written = {rank: size for each in records if each.saving for rank, size in each.saving.written.items()}
    if written:
        whole = sum(written.values())
        yield Difference("checkpoint", "checkpoint, written by all", records[0].rank, whole, estimate.checkpoint_bytes)
        most = max(written, key=lambda rank: written[rank])
        yield Difference("memory", "checkpoint, of one rank", most, written[most], estimate.saving_bytes)


def sent_by_purpose(record: RankRecord, microbatches: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step of `microbatches` microbatches, by the estimate's purposes."""
    sent: dict[str, float] = defaultdict(float)
    for call in record.calls:
        if call.phase in BESIDE_STEP:
            continue
        purpose = _purpose(call)
        repeated = purpose in _SCALED and call.phase.startswith(PER_MICROBATCH)
        times = microbatches / record.microbatches if repeated else 1
        sent[purpose] += times * call.sent_bytes
    return sent


def _purpose(call: Call) -> str:
    group = call.group
    if call.operation == "send":
        return "pipeline"
    if call.operation == "all_to_all" and not group.startswith("expert"):
        return "neighbours' rows"
    if group == "embedding":
        return "tied embeddings"
    if group.startswith(("data parallel", "expert data parallel")) and call.elements > 8:
        return "gradient reduction" if call.operation == "reduce_scatter" else "weight gathering"
    if group == "tensor and context parallel" and call.operation == "all_reduce":
        return "scalars"  # load statistics of a router
    if group in ("context parallel", "tensor and context parallel"):
        return "context parallel"
    if group.startswith("tensor model parallel"):
        return "matrix updates" if call.phase == "optimizer" and call.operation == "all_gather" else "tensor parallel"
    if group.startswith("expert"):
        return "expert parallel"
    return "scalars"


def _traffic(records: Sequence[RankRecord], estimate: RunEstimate) -> Iterator[Difference]:
    sent = {record.rank: sent_by_purpose(record, estimate.layout.microbatches) for record in records}
    seen = [each for counts in sent.values() for each in counts if each not in _NOT_ESTIMATED]
    for purpose in dict.fromkeys([*estimate.communication, *seen]):
        rank = max(sent, key=lambda each: sent[each][purpose])
        expected = estimate.communication.get(purpose, 0.0)
        if sent[rank][purpose] or expected:
            what, padding = f"bytes sent, {purpose}", _PADDING if purpose in _PADDED and expected else 0
            yield Difference("bytes sent", what, rank, sent[rank][purpose], expected, padding=padding)


def saving_problems(savings: Sequence[Saving]) -> list[str]:
    """List what the stages together write twice, or not at all, one line each."""
    tensors: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    problems = []
    for saving in savings:
        for key, (shape, boxes) in saving.tensors.items():
            known, all_boxes = tensors.setdefault(key, (shape, []))
            all_boxes += boxes
            if known != shape:
                problems.append(f"checkpoint: stages disagree on the shape of {key}: {list(known)} and {list(shape)}")
    found: dict[tuple, list[str]] = {}  # by division: an optimizer's states are all divided alike
    for key, (shape, boxes) in tensors.items():
        division = shape, tuple(sorted(boxes))
        if division not in found:
            faults = _faults(shape, sorted(boxes), ())
            found[division] = [fault for fault, _ in zip(faults, range(_SHOWN), strict=False)]
        problems += [f"checkpoint: {fault.format(key=key)}" for fault in found[division]]
    return problems


def _faults(shape: tuple[int, ...], boxes: Sequence[Box], before: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield gaps and overlaps, slab by slab along the first axis; within a slab the same boxes lie.

    Args:
        shape: of the remaining axes; boxes: sorted, in the remaining axes.
        before: start and end along the axes already done.
    """
    if not shape:
        ranks = [rank for *_, rank in boxes]
        where = "{key}[" + ", ".join(f"{start}:{end}" for start, end in before) + "]"
        if not ranks:
            yield f"nobody writes {where}"
        elif len(ranks) > 1:
            yield f"ranks {ranks[0]} and {ranks[1]} both write {where}"
        return
    cuts = sorted({0, shape[0]} | {edge for start, size, _ in boxes for edge in (start[0], start[0] + size[0])})
    inside: list[Box] = []
    at = 0
    for start, end in zip(cuts, cuts[1:], strict=False):
        inside = [box for box in inside if box[0][0] + box[1][0] > start]
        while at < len(boxes) and boxes[at][0][0] == start:
            inside.append(boxes[at])
            at += 1
        rest = sorted((offset[1:], size[1:], rank) for offset, size, rank in inside)
        yield from _faults(shape[1:], rest, (*before, (start, end)))
