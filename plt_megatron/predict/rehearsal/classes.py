"""Which ranks of a world are rehearsed: one of each kind."""

from __future__ import annotations

from plt_megatron.config.layout import ParallelLayout


def ranks_of_each_kind(layout: ParallelLayout) -> list[int]:
    """Every pipeline stage, since only all of them show whether messages meet; on the first, middle and last one also
    the last rank along TP and along EP, and the middle and last along CP; on the first stage, the last along DP. Ranks
    in between do as one of these does."""
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
