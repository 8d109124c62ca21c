"""Memory of a Muon update, against what megatron-core's own allocates."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.parameters import Sizes, parameters_of
from plt_megatron.predict.held import Held, _rank_matrix
from plt_megatron.predict.memory import _matrix_update, _orthogonalization

MODEL = ModelConfig(
    num_layers=1, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=2, vocab_size=8
)


class Allocated(TorchDispatchMode):
    """Bytes of tensors that are made inside, now and at most; `own` are others that operations may return."""

    def __init__(self, *own: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def free(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


def measured(config: RunConfig, parameter: Any, tensor: int) -> int:
    """Return the most bytes that an update of this rank's part of a parameter allocates."""
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    from plt_megatron.train.muon import Matrix

    rows, columns = Sizes.of(config.model, 8).shape(parameter.dims)
    rows //= tensor if parameter.split == "rows" else 1
    columns //= tensor if parameter.split == "columns" else 1
    matrix: Any = Matrix.of(parameter, config.model, torch.Size((rows, columns)), tensor)
    weight = torch.zeros(rows * columns, requires_grad=True)
    weight.grad = torch.ones_like(weight)

    class Muon(TensorParallelMuon):
        def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **options: Any) -> torch.Tensor:
            return super().orthogonalize(matrix, grad.view(matrix.shape), **options).reshape(-1)

    muon = Muon(
        [weight],
        nesterov=config.optimizer.muon_nesterov,
        split_qkv=True,
        is_qkv_fn=lambda matrix: matrix.qkv_split_shapes is not None,
        fp32_matmul_prec="highest" if config.training.precision == "fp32" else "medium",
        pg_collection=SimpleNamespace(tp=SimpleNamespace(size=lambda: tensor, rank=lambda: 0), gtp_remat=None),
    )
    muon.step()
    with Allocated(weight, weight.grad, muon.state[weight]["momentum_buffer"]) as allocated:
        muon.step()
    return allocated.most


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_an_update_allocates_what_is_estimated(monkeypatch, tensor, precision, nesterov):
    """Of all hidden matrices: wide, tall, in parts, and in parts whose rows alternate."""
    monkeypatch.setattr(dist, "all_gather", lambda parts, part, group: [each.copy_(part) for each in parts])
    config = RunConfig(model=MODEL)
    config.training.precision, config.optimizer.muon_nesterov = precision, nesterov
    sizes = Sizes.of(MODEL, 8)
    matrices = [each for each in parameters_of(MODEL) if each.is_hidden_matrix]
    assert len(matrices) >= 4
    for parameter in matrices:
        estimated = _orthogonalization(config, _rank_matrix(parameter, sizes, tensor))
        assert estimated == measured(config, parameter, tensor), parameter.name


def test_the_direction_of_the_matrix_before_is_still_there():
    config, sizes = RunConfig(model=MODEL), Sizes.of(MODEL, 8)
    table = [each for each in parameters_of(MODEL) if each.is_hidden_matrix and each.name.endswith("weight")]
    one, other = (_rank_matrix(each, sizes, 1) for each in table if "linear_fc" in each.name)
    alone = [_orthogonalization(config, each) for each in (one, other)]
    assert _matrix_update(config, Held(0, 2, ((one,), (other,)))) == max(alone)
    both = max(alone[0] + 4 * other.size, alone[1] + 4 * one.size)
    assert _matrix_update(config, Held(0, 1, ((one, other),))) == both > max(alone)
