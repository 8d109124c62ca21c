"""Values that follow from a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.config import derived
from plt_megatron.config.layout import num_microbatches
from tests.unit.config.test_validation import good


def test_derived_values():
    config = good()
    model = config.model
    assert derived.head_dim(model) == 32 and derived.num_query_groups(model) == 4
    model.kv_channels, model.num_query_groups = 64, 2
    assert derived.head_dim(model) == 64 and derived.num_query_groups(model) == 2
    assert derived.padded_vocab_size(model, 1) == 128
    assert derived.padded_vocab_size(model, 256, 2) == 256
    assert derived.padded_vocab_size(model, 257, 2) == 512
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.pipeline_model_parallel_size = 2
    assert num_microbatches(config, 16) == 2
    assert num_microbatches(config) == 8
    assert derived.split_shares("969, 30, 1") == pytest.approx((0.969, 0.03, 0.001))
    assert derived.run_folder(config) == Path("runs/run")


def test_tokens_become_whole_steps():
    config = good()
    config.training.train_iters = None
    step = 8 * 256
    for tokens, steps in ((1, 1), (step, 1), (2 * step - 1, 1), (2 * step, 2), (10**12, 10**12 // step)):
        config.training.train_tokens = tokens
        assert derived.train_iters(config) == steps
    config.training.train_tokens = 50 * step
    assert derived.lr_decay_iters(config) == 50 and derived.lr_wsd_decay_iters(config) == 5


def test_gates_and_validation_loops():
    config = good()
    assert derived.has_gates(config.model) and derived.validation_loop_counts(config) == [2]
    config.model.loop_count = 1
    assert not derived.has_gates(config.model) and derived.validation_loop_counts(config) == [1]
