"""State in checkpoints: an optimizer's, a flat range of a tensor as boxes, and what they lack; random states of other
generators."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from plt_megatron.config.rules.optimizer import OPTIMIZERS
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime
from plt_megatron.train.checkpoint.megatron_state import OptimizerPart, boxes
from plt_megatron.train.checkpoint.state import restore_random_state


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (4, 1), (3, 2, 4)])
def test_boxes_are_the_range_in_its_order(shape):
    elements = np.arange(math.prod(shape)).reshape(shape)
    for start in range(elements.size + 1):
        for stop in range(start, elements.size + 1):
            found = list(boxes(shape, start, stop))
            parts = [elements[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1) for box in found]
            assert [*map(int, np.concatenate([*parts, []]))] == list(range(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_a_class_that_keeps_more_than_checkpoints_hold_is_named_at_the_first_save(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adam", replace(OPTIMIZERS["adam"], torch_class="torch.optim.NAdam"))
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    inner = torch.optim.NAdam([parameter])
    inner.step()
    optimizer: Any = SimpleNamespace(
        optimizer=inner,
        model_param_group_index_map={parameter: (0, 0)},
        buffers=[SimpleNamespace(param_index_map={parameter: 0})],
        gbuf_ranges=[{"bucket": [{"param_map": {parameter: {"param": slice(0, 3)}}}]}],
    )
    with pytest.raises(UserError, match=r"NAdam keeps mu_product"):
        OptimizerPart(RunConfig(), optimizer, ()).sharded({})


def test_a_state_of_a_gpu_restores_what_a_cpu_has_of_it():
    """The generators of a CPU and a GPU differ."""
    enter_cpu_runtime()
    random.seed(5)
    expected = random.getstate()
    kind, keys, *rest = np.random.get_state()
    own = torch.cuda.get_rng_state()
    state = {
        "python": expected,
        "numpy": (kind, torch.tensor(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.zeros(16, dtype=torch.uint8),
        "tracker": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    random.seed(6)
    restore_random_state(state)
    assert random.getstate() == expected and torch.equal(torch.cuda.get_rng_state(), own)
