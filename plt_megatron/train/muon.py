"""Muon for hidden matrices, with Adam for everything else, on megatron-core's distributed optimizer.

megatron-core's own optimizer for this ties checkpoints to a data-parallel size. Here the distributed optimizer takes
over that optimizer's buffer layout, in which each matrix is whole on one data-parallel rank (`wrap_ddp`): the code that
reduces, gathers, clips and saves flat pieces of parameters needs no change, and a piece of a matrix is the matrix. The
update is megatron-core's `TensorParallelMuon`, with the Newton-Schulz iteration of `emerging-optimizers`.
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
from plt_megatron.config.rules.optimizer import WHOLE_MATRICES
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import Parameter, hidden_matrix


def give_matrices_to_muon(part: DistributedOptimizer, stage: LoopedGPT, config: RunConfig) -> None:
    """Let Muon update the groups of hidden matrices that Adam was built with."""
    muon = Muon(config, stage, dict(_matrices(part, stage, config.model)))
    part.optimizer = MuonAndAdam(muon, part.optimizer)


@dataclass(frozen=True)
class Matrix:
    """A rank's part of a hidden matrix, with the attributes that `TensorParallelMuon` reads from a parameter."""

    shape: torch.Size  # [rows, columns] on this rank
    partition_dim: int | None  # that tensor-parallel ranks divide; None: each rank has all of the matrix
    qkv_split_shapes: list[int] | None  # rows of the matrices in it, in a repeating pattern; None: it is a single one

    @classmethod
    def of(cls, parameter: Parameter, model: ModelConfig, shape: torch.Size, tensor: int) -> Matrix:
        """Describe a parameter's part on one of `tensor` tensor-parallel ranks. What Hugging Face stores as several
        matrices, Muon treats as several too."""
        head = derived.head_dim(model)
        queries = model.num_attention_heads // derived.num_query_groups(model) * head
        parts = {"qkv": [queries, head, head], "gate_up": [shape[0] // 2] * 2, "direct": None}
        divided = parameter.split if tensor > 1 else None  # one rank alone has nothing to gather
        return cls(shape, {"rows": 0, "columns": 1, None: None}[divided], parts[parameter.form])


def _matrices(part: DistributedOptimizer, stage: LoopedGPT, model: ModelConfig) -> Any:
    """Yield (flat main parameter, its `Matrix`) of the hidden matrices that this rank updates."""
    for name, own in stage.named_parameters():
        parameter = hidden_matrix(name)
        if parameter is None or own not in part.model_param_group_index_map:
            continue
        group, order = part.model_param_group_index_map[own]
        main = part.optimizer.param_groups[group]["params"][order]
        assert main.numel() == own.numel(), f"{name} is divided over data-parallel ranks"
        yield main, Matrix.of(parameter, model, own.shape, stage.pg_collection.tp.size())


class Muon(TensorParallelMuon):
    """megatron-core's Muon over flat main parameters. The iteration runs in bf16 if the model does, as usual, and in
    fp32 otherwise."""

    def __init__(self, config: RunConfig, stage: LoopedGPT, matrices: dict[Tensor, Matrix]) -> None:
        settings = config.optimizer
        super().__init__(
            [torch.empty(0)],  # pieces of fp32 parameters are views, which torch's constructors reject
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
        """See megatron-core. `grad` is the momentum of the main parameter `p`; both are flat, and so is the result."""
        matrix = self._matrices[p]
        return super().orthogonalize(matrix, grad.view(matrix.shape), **kwargs).reshape(-1)


class MuonAndAdam:
    """Muon and Adam as the one inner optimizer that megatron-core's distributed optimizer expects: with the groups that
    Adam was built with, of which each of the two steps its own, and the state of both."""

    def __init__(self, muon: Muon, adam: Any) -> None:
        self.muon, self.adam = muon, adam
        self.param_groups, self.state = adam.param_groups, adam.state
        muon.param_groups = [group for group in self.param_groups if WHOLE_MATRICES in group]
        adam.param_groups = [group for group in self.param_groups if WHOLE_MATRICES not in group]
        muon.state = adam.state
        for group in muon.param_groups:
            group["momentum"] = muon.defaults["momentum"]

    def step(self) -> None:
        """Update all parameters once. Collective over tensor-parallel ranks."""
        self.adam.step()
        self.muon.step()
