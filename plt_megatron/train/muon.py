"""Muon for hidden matrices, beside Adam for everything else, on megatron-core's distributed optimizer.

megatron-core has an optimizer of its own for this, whose checkpoints belong to a data-parallel size. Here its layout of
buffers, in which each matrix is whole on one data-parallel rank, is the distributed optimizer's (`wrap_ddp`): what
reduces, gathers, clips and saves flat pieces of parameters then needs no change, and a piece of a matrix is the matrix.
The update is megatron-core's `TensorParallelMuon`, with the Newton-Schulz iteration of `emerging-optimizers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.optimizers import WHOLE_MATRICES
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import Parameter, hidden_matrix


def give_matrices_to_muon(part: DistributedOptimizer, stage: LoopedGPT, config: RunConfig) -> None:
    """Have Muon update the groups of hidden matrices that Adam was built with."""
    muon = Muon(config, stage, dict(_matrices(part, stage, config.model)))
    part.optimizer = MuonAndAdam(muon, part.optimizer)


@dataclass(frozen=True)
class Matrix:
    """A rank's part of a hidden matrix, in terms that `TensorParallelMuon` reads of a parameter.

    Attributes:
        shape: [rows, columns] on this rank.
        partition_dim: along which tensor-parallel ranks divide it; None: each has all of it.
        qkv_split_shapes: rows of the matrices that it is made of, again and again; None: it is one.
    """

    shape: torch.Size
    partition_dim: int | None
    qkv_split_shapes: list[int] | None

    @classmethod
    def of(cls, parameter: Parameter, model: ModelConfig, shape: torch.Size, tensor: int) -> Matrix:
        """What Hugging Face has as several matrices is several to Muon too.

        Args:
            parameter: the table's.
            tensor: number of tensor-parallel ranks.
        """
        head = derived.head_dim(model)
        queries = model.num_attention_heads // derived.num_query_groups(model) * head
        parts = {"qkv": [queries, head, head], "gate_up": [shape[0] // 2] * 2, "direct": None}
        divided = parameter.split if tensor > 1 else None  # one rank alone has nothing to gather
        return cls(shape, {"rows": 0, "columns": 1, None: None}[divided], parts[parameter.form])


def _matrices(part: DistributedOptimizer, stage: LoopedGPT, model: ModelConfig) -> Any:
    """(flat main parameter, what it is) of the hidden matrices that this rank updates."""
    for name, own in stage.named_parameters():
        parameter = hidden_matrix(name)
        if parameter is None or own not in part.model_param_group_index_map:
            continue
        group, order = part.model_param_group_index_map[own]
        main = part.optimizer.param_groups[group]["params"][order]
        assert main.numel() == own.numel(), f"{name} is divided over data-parallel ranks"
        yield main, Matrix.of(parameter, model, own.shape, stage.pg_collection.tp.size())


class Muon(TensorParallelMuon):
    """megatron-core's Muon over flat main parameters.

    The iteration runs in bf16 when the model does, as everywhere else; in fp32 otherwise.

    Args:
        matrices: what they are.
    """

    def __init__(self, config: RunConfig, stage: LoopedGPT, matrices: dict[Tensor, Matrix]) -> None:
        settings = config.optimizer
        super().__init__(
            [torch.empty(0)],  # pieces of fp32 parameters are views, which torch's constructors refuse
            lr=settings.lr,
            momentum=settings.muon_momentum,
            nesterov=settings.muon_nesterov,
            weight_decay=settings.weight_decay,
            split_qkv=True,
            is_qkv_fn=lambda matrix: matrix.qkv_split_shapes is not None,
            fp32_matmul_prec="highest" if config.training.precision == "fp32" else "medium",
            coefficient_type=settings.muon_coefficient_type,
            num_ns_steps=settings.muon_num_ns_steps,
            scale_mode=settings.muon_scale_mode,
            extra_scale_factor=settings.muon_extra_scale_factor,
            pg_collection=SimpleNamespace(tp=stage.pg_collection.tp, gtp_remat=None),
        )
        self._matrices = matrices

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """See megatron-core: `grad` is the momentum of the main parameter `p`, both flat, as is what is returned."""
        matrix = self._matrices[p]
        return super().orthogonalize(matrix, grad.view(matrix.shape), **kwargs).reshape(-1)


class MuonAndAdam:
    """What megatron-core's distributed optimizer takes for the one optimizer of its parameter groups.

    Attributes:
        param_groups: those that Adam was built with; each of the two steps its own.
        state: both optimizers'.
    """

    def __init__(self, muon: Muon, adam: Any) -> None:
        self.muon, self.adam = muon, adam
        self.param_groups, self.state = adam.param_groups, adam.state
        muon.param_groups = [group for group in self.param_groups if WHOLE_MATRICES in group]
        adam.param_groups = [group for group in self.param_groups if WHOLE_MATRICES not in group]
        muon.state = adam.state
        for group in muon.param_groups:
            group["momentum"] = muon.defaults["momentum"]

    def step(self) -> None:
        """One update of all parameters. Collective over tensor-parallel ranks."""
        self.adam.step()
        self.muon.step()
