"""Random states between a CPU and a GPU, whose generators differ."""

from __future__ import annotations

import random

import numpy as np
import torch

from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime
from plt_megatron.train.checkpoint.state import restore_random_state


def test_a_state_of_a_gpu_restores_what_a_cpu_has_of_it():
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
