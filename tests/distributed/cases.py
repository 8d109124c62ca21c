"""Cases, layouts and outcomes of the parity tests. Without torch: workers import `parity`, the tests need not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from plt_megatron.config.schema import DecayFactors, RateFactors
from tests import settings

VOCAB_SIZE = 50
SEQUENCE_LENGTH = 8
GLOBAL_BATCH_SIZE = 16
STEPS = 2  # the second shows what the first one's update did, and overlap, which begins with it
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "window_size": 3,
    "make_vocab_size_divisible_by": 8,  # 56 rows on one process, 64 on two
    "init_method_std": 0.15,  # attention is not uniform, and rounding is not amplified much
    "backend": "torch",
}

YARN = {"rope_scaling.factor": 4.0, "rope_scaling.yarn.original_max_position_embeddings": 16}
# Four experts, of which a token uses two; both auxiliary losses weigh enough to be seen.
EXPERTS: dict[str, Any] = {
    "moe.num_experts": 4,
    "moe.ffn_hidden_size": 12,
    "moe.aux_loss_coeff": 0.05,
    "moe.z_loss_coeff": 1e-3,
}

LOSSES = {"loop_loss_weights": (0.5, 0.25)}  # of three loops, as a case's `training`
Z_LOSS = {"z_loss_coeff": 0.02}  # as a case's `training`

# The first step moves each bias by a good part of what scores differ in, so that the second routes otherwise.
BIASES = {"moe.router_score_function": "sigmoid", "moe.router_bias_update_rate": 0.1}

# As a case's `optimizer`: each kind of parameter has rates of its own.
FACTORS = {
    "lr_mult": RateFactors(embedding=4.0, hidden=0.5, gates=2.0, norms=3.0),
    "wd_mult": DecayFactors(embedding=3.0, gates=2.0, norms=0.5),
}
# As a case's `parallel`: embedding and head count as layers where a pipeline's layers are divided.
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
SPAN = {"num_layers": 4, "loop_span": [1, 3]}
# Models that change several things at once.
NAIVE = {"cross_loop_parallel": False, "share_kv": False, "gated_window": False}
LOOPCODER = {**settings.LOOPCODER, "window_size": 4}


@dataclass(frozen=True)
class Layout:
    """How the processes are arranged."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, words: str) -> Layout:
        """Read a layout as in "TP2 SP PP2"; a dimension that is not named has one rank."""
        named = words.split()
        return cls(sp="SP" in named, **{word[:2].lower(): int(word[2:]) for word in named if word != "SP"})

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `ParallelConfig`, without the data-parallel size: it is what the others leave."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.sp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
        }

    def __str__(self) -> str:
        context = f" CP{self.cp}" if self.cp > 1 else ""
        experts = f" EP{self.ep}" if self.ep > 1 else ""
        return f"TP{self.tp}{' SP' if self.sp else ''} PP{self.pp}{context} DP{self.dp}{experts}"


class Settings(dict[str, Any]):
    """Settings that can be a key: references are trained once for each case."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(str(sorted(self.items())))


@dataclass(frozen=True)
class Case:
    """A model and its training, and how the work is done in a layout."""

    loops: int = 2
    recompute: str = "none"
    overlap: bool = False
    packed: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)  # settings other than MODEL's
    zero_gates: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: Mapping[str, Any] = field(default_factory=dict)  # how ranks communicate, beside the layout
    training: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    step_loops: tuple[int, ...] = ()  # loops of each step, for a model of `loops`; empty: `loops` in each of `STEPS`

    def __post_init__(self) -> None:
        for name in ("model", "parallel", "training", "optimizer"):
            object.__setattr__(self, name, Settings(getattr(self, name)))

    def fitted(self, layout: Layout) -> Case:
        """With half of the layers, most of a step's time, where no pipeline divides them and none is named."""
        if layout.pp > 1 or self.model.keys() & {"num_layers", "loop_span", "moe.first_k_dense_replace"}:
            return self
        return replace(self, model={"num_layers": MODEL["num_layers"] // 2, **self.model})

    @property
    def reference(self) -> Case:
        """The same numbers, asked of one process."""
        return replace(self, recompute="none", overlap=False, parallel={})


@dataclass
class Outcome:
    """The numbers that must not depend on the layout, and how the gradients were reduced.

    Attributes:
        numbers: losses and gradient norms by name.
        initial, final: every parameter and buffer of the whole model by name, unsharded, without vocabulary padding.
        dispatched: for each rank and step, bucket groups that were on their way before backward ended, and all.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    initial: dict[str, np.ndarray] = field(default_factory=dict)
    final: dict[str, np.ndarray] = field(default_factory=dict)
    dispatched: list[list[tuple[int, int]]] = field(default_factory=list)


def train_cases(layout: Layout, cases: list[Case]) -> list[Outcome]:
    """Train each case, in a job of `layout.world_size` ranks. Outcomes are complete on rank 0."""
    from tests.distributed.parity import train_all

    return train_all(layout, cases)


def train_with_other_sums(layout: Layout, case: Case) -> Outcome:
    """Train a case as if tensor-parallel ranks' data-parallel groups summed gradients in other orders, as NCCL may."""
    from tests.distributed import parity

    return parity.train_with_other_sums(layout, case)
