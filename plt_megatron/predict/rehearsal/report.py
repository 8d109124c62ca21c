"""A rehearsal as text or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from plt_megatron.predict.cards import GIB
from plt_megatron.predict.rehearsal.compare import PER_MICROBATCH, sent_by_purpose
from plt_megatron.predict.rehearsal.record import BESIDE_STEP, RankRecord
from plt_megatron.predict.rehearsal.rehearse import NOT_SEEN, Rehearsal
from plt_megatron.run_folder.text import format_bytes, format_table, plural


def to_text(found: Rehearsal) -> str:
    layout = found.estimate.layout
    ranks = ", ".join(f"{record.rank} ({_place(record)})" for record in found.records)
    lines = [
        f"{found.config.name}: {layout}, {layout.world_size:,} ranks of {found.estimate.gpu}, "
        f"{plural(layout.microbatches, 'microbatch')} per step",
        f"rehearsed ranks: {ranks}",
        *(f"replaced: {each}" for each in found.replaced),
        f"not covered: {', '.join(NOT_SEEN)}",
        "",
        *_memory(found.records),
        "",
        *_communication(found),
        "",
        *_groups(found.records),
        *_shapes(found.records),
        *_saving(found.records),
        *_host_waits(found),
        *_waiting(found),
        "",
        _comparison(found),
        "",
        *(f"problem: {each}" for each in found.problems),
    ]
    count = len(found.problems)
    lines.append(plural(count, "problem") if count else "rehearsal passed")
    return "\n".join(lines)


def to_json(found: Rehearsal) -> str:
    """Format the rehearsal as JSON, with every call of every rank."""
    records = [_plain(record) for record in found.records]
    return json.dumps(
        {
            "name": found.config.name,
            "layout": str(found.estimate.layout),
            "world_size": found.estimate.world_size,
            "gpu": found.estimate.gpu,
            "replaced": found.replaced,
            "not_seen": NOT_SEEN,
            "ranks": records,
            "idle": {f"{waiting} for {awaited}": flops for (waiting, awaited), flops in found.waiting.idle.items()},
            "matched": found.waiting.matched,
            "differences": [dataclasses.asdict(each) | {"wrong": each.is_wrong} for each in found.differences],
            "problems": found.problems,
        },
        indent=1,
    )


def _plain(record: RankRecord) -> dict[str, Any]:
    plain = dataclasses.asdict(record)
    del plain["groups"]  # they list thousands of ranks
    if record.saving is not None:
        plain["saving"] = {"tensors": len(record.saving.tensors), "written": record.saving.written}
    plain["waits"] = [[*key, count] for key, count in record.waits.items()]
    return plain


def _place(record: RankRecord) -> str:
    return " ".join(f"{name} {record.place[name]}" for name in ("pp", "tp", "cp", "dp"))


def _memory(records: Sequence[RankRecord]) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record.memory))
    rows = [[name, *(f"{record.memory.get(name, 0) / GIB:.2f}" for record in records)] for name in names]
    rows.append(["total", *(f"{record.peak / GIB:.2f}" for record in records)])
    peaks = ", ".join(dict.fromkeys(record.peak_phase for record in records))
    return [
        f"peak memory, GiB, by holder or phase of allocation (the peak is in {peaks})",
        format_table(rows, header=["rank", *(str(record.rank) for record in records)]),
    ]


def _communication(found: Rehearsal) -> list[str]:
    if not found.records:  # every rank failed
        return []
    record = max(found.records, key=lambda each: len(each.calls))
    counts: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    for call in record.calls:
        if call.operation != "wait":
            key = (call.phase, call.operation, call.group, f"{call.ranks[1]:,}")
            counts[key] += 1
            sizes[key] += call.size
    rows = [[*key, str(count), f"{sizes[key] / 1e6:,.2f}"] for key, count in counts.items()]
    microbatches = found.estimate.layout.microbatches
    sent = sent_by_purpose(record, microbatches)
    purposes = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in sent.items() if amount)
    return [
        f"communication of rank {record.rank} in order of first calls, {record.microbatches} of {microbatches} "
        "microbatches",
        format_table(rows, header=["phase", "call", "group", "ranks", "calls", "MB"]),
        f"sent per step: {purposes or 'nothing'}",
    ]


def _groups(records: Sequence[RankRecord]) -> list[str]:
    made = Counter(records[0].groups_made) if records else Counter()
    used = {call.group for record in records for call in record.calls}
    return [f"process groups that every rank helps create: {made.total():,}; used: {', '.join(sorted(used))}"]


def _shapes(records: Sequence[RankRecord]) -> list[str]:
    shapes = {f"{name} {shape}": None for record in records for name, shape in record.shapes.items()}
    return [f"shapes: {'; '.join(shapes)}"]


def _saving(records: Sequence[RankRecord]) -> list[str]:
    stages = [(record.place["pp"], record.saving) for record in records if record.saving is not None]
    if not stages:
        return []
    keys = {key for _, saving in stages for key in saving.tensors}
    ranks = sum(len(saving.written) for _, saving in stages)
    whole = sum(sum(saving.written.values()) for _, saving in stages)
    lines = [f"checkpoint: {ranks:,} ranks write {len(keys):,} tensors, {format_bytes(whole)}"]
    for stage, saving in stages:
        least, most = (choose(saving.written, key=lambda rank: saving.written[rank]) for choose in (min, max))
        lines.append(
            f"checkpoint: in stage {stage}, rank {least} writes least, {format_bytes(saving.written[least])}, and rank "
            f"{most} most, {format_bytes(saving.written[most])}"
        )
    return lines


def _host_waits(found: Rehearsal) -> list[str]:
    lines = []
    for record in found.records[:1]:
        microbatches = found.estimate.layout.microbatches / record.microbatches
        for (phase, place), count in record.waits.items():
            if phase not in BESIDE_STEP:
                times = plural(round(count * (microbatches if phase.startswith(PER_MICROBATCH) else 1)), "time")
                lines.append(f"rank 0's host waits for the GPU {times} per step at {place} ({phase})")
    return lines


def _waiting(found: Rehearsal) -> list[str]:
    rehearsed = {record.rank: record.microbatches for record in found.records}
    lines = [f"{found.waiting.matched:,} collectives and messages of these ranks fit together"]
    alone = {record.rank for record in found.records if record.place["dp"]}  # rehearsed without their other stages
    for (waiting, awaited), flops in found.waiting.idle.most_common():
        if waiting in alone or flops == 0:
            continue
        share = flops / (found.waiting.work[waiting] + flops)
        if share >= 0.01:
            among = f"in {rehearsed[waiting]} of {found.estimate.layout.microbatches} microbatches, measured in FLOPs"
            lines.append(f"rank {waiting} waits for rank {awaited}: {100 * share:.0f} % of its time {among}")
    return lines


def _comparison(found: Rehearsal) -> str:
    rows = [
        [
            each.what,
            str(each.rank),
            f"{each.rehearsed:.4g}",
            f"{each.estimated:.4g}",
            f"{100 * each.off:+.2f} %" + (" !" if each.is_wrong else ""),
        ]
        for each in found.differences
    ]
    return format_table(rows, header=["against the estimate", "rank", "rehearsed", "estimated", "off"])
