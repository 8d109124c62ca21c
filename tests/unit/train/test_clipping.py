"""Clipping where a rank owns no parameter that is trained."""

from __future__ import annotations

from unittest.mock import Mock

from plt_megatron.config.schema import RunConfig
from plt_megatron.train import megatron_engine
from plt_megatron.train.megatron_engine import MegatronEngine


def test_a_rank_without_parameters_calls_no_kernel(monkeypatch):
    """Transformer Engine's reads the first tensor of its list."""
    clipped: list[list[str]] = []
    monkeypatch.setattr(megatron_engine, "clip_grad_by_total_norm_fp32", lambda found, *_: clipped.append(found))
    parts = [Mock(get_parameters=list), Mock(get_parameters=lambda: ["weight"])]
    monkeypatch.setattr(megatron_engine, "distributed_parts", lambda optimizer: parts)
    MegatronEngine._clip(Mock(config=RunConfig()), 5.0)
    assert clipped == [["weight"]]
