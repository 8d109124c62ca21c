"""Whether a checkpoint's plan has every element of every tensor written by exactly one rank of the world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plt_megatron.predict.rehearsal.record import Box, Saving

_SHOWN = 3  # faults of a tensor


def saving_problems(savings: Sequence[Saving]) -> list[str]:
    """What is written twice, or not at all, by the stages together; one line each."""
    tensors: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    problems = []
    for saving in savings:
        for key, (shape, boxes) in saving.tensors.items():
            known, all_boxes = tensors.setdefault(key, (shape, []))
            all_boxes += boxes
            if known != shape:
                problems.append(f"checkpoint: stages disagree on the shape of {key}: {list(known)} and {list(shape)}")
    found: dict[tuple, list[str]] = {}  # an optimizer's states are divided alike
    for key, (shape, boxes) in tensors.items():
        division = shape, tuple(sorted(boxes))
        if division not in found:
            faults = _faults(shape, sorted(boxes), ())
            found[division] = [fault for fault, _ in zip(faults, range(_SHOWN), strict=False)]
        problems += [f"checkpoint: {fault.format(key=key)}" for fault in found[division]]
    return problems


def _faults(shape: tuple[int, ...], boxes: Sequence[Box], before: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Go through the slabs of the first axis in which the same boxes lie.

    Args:
        shape: of the axes that are left; boxes: sorted, in these axes.
        before: start and end along the axes that are done.
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
