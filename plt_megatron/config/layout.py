"""Parallel layout of a run: its sizes, and the ranks of each group. Imports no torch.

Ranks are numbered in megatron-core's order: tensor parallelism varies fastest, then context, data, and pipeline
parallelism. Experts use another order over the same ranks: expert, expert-data, and pipeline parallelism.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import gcd

from plt_megatron.config.schema import ParallelConfig, RunConfig

# A dimension's name in reports -> its attribute below, and its setting.
DIMENSIONS = {
    "TP": ("tensor", "tensor_model_parallel_size"),
    "PP": ("pipeline", "pipeline_model_parallel_size"),
    "CP": ("context", "context_parallel_size"),
    "DP": ("data", "data_parallel_size"),
    "EP": ("expert", "expert_model_parallel_size"),
}


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions: ranks along each. `data` does not include `context`."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1  # ranks, among those that hold the same layers, over which whole experts are distributed
    loops: int = 1  # of the model; with a pipeline, its virtual stages
    sequence_parallel: bool = False  # whether tensor-parallel ranks split the rows between the layers' matrices
    first_stage_layers: int | None = None  # of the first and last pipeline stage; None: as many as the others
    last_stage_layers: int | None = None
    embedding_as_layer: bool = False  # whether each counts as a layer when layers are divided among stages
    head_as_layer: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int | None = None, loops: int = 1) -> ParallelLayout:
        """Return the layout on `world_size` ranks; None: as many as it asks for.

        The data-parallel size is as configured, else what the other sizes leave of `world_size`, else the least that
        the experts need.
        """
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        context, expert = parallel.context_parallel_size, parallel.expert_model_parallel_size
        data = parallel.data_parallel_size
        if data is None and world_size is not None:
            data = max(1, world_size // (tensor * pipeline * context))
        elif data is None:
            data = expert // gcd(expert, tensor * context)
        return cls(
            tensor,
            pipeline,
            context,
            data,
            expert,
            loops,
            parallel.sequence_parallel,
            first_stage_layers=parallel.num_layers_in_first_pipeline_stage,
            last_stage_layers=parallel.num_layers_in_last_pipeline_stage,
            embedding_as_layer=parallel.account_for_embedding_in_pipeline_split,
            head_as_layer=parallel.account_for_loss_in_pipeline_split,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the dimensions, by setting."""
        return {setting: getattr(self, name) for name, setting in DIMENSIONS.values()}

    @property
    def megatron_sizes(self) -> dict[str, int]:
        """`sizes` without the data-parallel size, which megatron-core derives from the number of ranks."""
        return {setting: size for setting, size in self.sizes.items() if setting != "data_parallel_size"}

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share the work of one model copy: each holds part of the model or part of each sequence."""
        return self.tensor * self.pipeline * self.context

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.data

    @property
    def shards(self) -> int:
        """Ranks that hold the same weights, over which gradients are summed and optimizer state is sharded."""
        return self.data * self.context

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage, over which experts are distributed."""
        return self.tensor * self.context * self.data

    @property
    def expert_shards(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks_per_stage // self.expert

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks per pipeline stage, one per loop, in the interleaved schedule; None: not interleaved."""
        return self.loops if self.pipeline > 1 and self.loops > 1 else None

    def stage_layers(self, num_layers: int) -> list[range]:
        """Return the layers that each pipeline stage holds, of `num_layers`; empty for one of embedding or head."""
        ends = list(itertools.accumulate(self._stage_sizes(num_layers)))
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _stage_sizes(self, num_layers: int) -> list[int]:
        last = self.pipeline - 1
        ends = ((0, self.first_stage_layers), (last, self.last_stage_layers))
        given = {stage: layers for stage, layers in ends if layers is not None}
        counted = num_layers - sum(given.values()) + self.embedding_as_layer + self.head_as_layer
        each = counted // max(self.pipeline - len(given), 1)
        sizes = [given.get(stage, each) for stage in range(self.pipeline)]
        sizes[0] -= self.embedding_as_layer
        sizes[last] -= self.head_as_layer
        return sizes

    def fewest_stage_layers(self, num_layers: int) -> int:
        """Return the layers of the smallest stage that holds any."""
        return min((len(layers) for layers in self.stage_layers(num_layers) if layers), default=0)

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Return the microbatches that each copy of the model runs per optimizer step."""
        return global_batch_size // (micro_batch_size * self.data)

    def world_size_problem(self, world_size: int) -> str | None:
        """Return why the layout does not fill `world_size` ranks; None if it does."""
        if world_size == self.world_size:
            return None
        if world_size % self.model_parallel_size:
            words = self.in_words(data=False)
            return f"{world_size} processes: {words} parallel needs a multiple of {self.model_parallel_size}"
        return f"{self.in_words()} parallel needs {self.world_size} processes, got {world_size}"

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return a rank's position along each dimension: `tp`, `cp`, `dp`, `pp`, and `ep` and `edp` of its experts."""
        return {**_place(rank, self._dense()), **_place(rank, self._experts())}

    def groups(self, *dimensions: str) -> list[list[int]]:
        """Return the ranks of each group along one or several dimensions of `coordinates`, ascending.

        Ranks along `dp` and `cp` hold the same weights.

        Raises:
            ValueError: `tp`, `cp` or `dp` is combined with `ep` or `edp`, or a name is unknown.
        """
        sizes = next((sizes for sizes in (self._dense(), self._experts()) if set(dimensions) <= sizes.keys()), None)
        if sizes is None:
            raise ValueError(f"no group lies along {' and '.join(dimensions)}")
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = _place(rank, sizes)
            groups.setdefault(tuple(place[name] for name in sizes if name not in dimensions), []).append(rank)
        return list(groups.values())

    def _dense(self) -> dict[str, int]:
        return {"tp": self.tensor, "cp": self.context, "dp": self.data, "pp": self.pipeline}

    def _experts(self) -> dict[str, int]:
        return {"ep": self.expert, "edp": self.expert_shards, "pp": self.pipeline}

    def in_words(self, *, data: bool = True) -> str:
        """Format the layout as in `tensor 2 x pipeline 4 x data 8`."""
        names = ["tensor", "pipeline", *(["context"] if self.context > 1 else []), *(["data"] if data else [])]
        return " x ".join(f"{name} {getattr(self, name)}" for name in names)

    def __str__(self) -> str:
        """Format the layout as in `TP2 SP PP4 DP8`."""
        always = ("TP", "PP", "DP")
        words = [
            f"{word}{getattr(self, name)}"
            for word, (name, _) in DIMENSIONS.items()
            if word in always or getattr(self, name) > 1
        ]
        if self.sequence_parallel:
            words.insert(1, "SP")
        return " ".join(words)


def _place(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Return a rank's coordinates; the first dimension varies fastest."""
    place = {}
    for name, size in sizes.items():
        rank, place[name] = divmod(rank, size)
    return place


def layout_of(config: RunConfig, world_size: int | None = None) -> ParallelLayout:
    """Return a configuration's layout on `world_size` ranks; None: as many as it asks for."""
    return ParallelLayout.of(config.parallel, world_size, config.model.loop_count)


def num_microbatches(config: RunConfig, world_size: int | None = None) -> int:
    """Return the microbatches that each copy of the model runs per optimizer step."""
    training = config.training
    return layout_of(config, world_size).num_microbatches(training.global_batch_size, training.micro_batch_size)
