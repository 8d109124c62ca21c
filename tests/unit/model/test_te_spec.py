"""The Transformer Engine layer spec: refused clearly without TE, built with the same parameters where it is."""

from __future__ import annotations

import pytest
import torch

from plt_megatron.config.schema import ModelConfig, ParallelConfig
from plt_megatron.errors import UserError
from plt_megatron.model.layer_specs import layer_spec
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.te_attention import require_transformer_engine
from plt_megatron.model.transformer_config import transformer_config

VARIANTS = [
    {},
    {"gate_input": "hidden", "gate_side": "global", "loop_norm": "final"},
    {"qk_layernorm": True, "norm_placement": "pre_ffn_output"},
    {"loop_count": 1},
]


def model(**changes) -> ModelConfig:
    return ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=512, num_attention_heads=2, **changes)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    stage = LoopedGPT(transformer_config(config, ParallelConfig()), 128, 64)
    return {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}


def test_without_transformer_engine_the_spec_is_refused(one_process):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(UserError, match=r"plt-megatron\[gpu\].*model\.backend: torch"):
        layer_spec(model(), "te")


def test_a_transformer_engine_that_is_too_old_is_named(monkeypatch):
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from packaging.version import Version

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(utils, "_te_version", Version("2.8.0"))
    with pytest.raises(UserError, match=r"needs Transformer Engine 2\.9 .*, this is 2\.8\.0: update it"):
        require_transformer_engine()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_both_backends_have_the_same_parameters(one_process, changes):
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    if not torch.cuda.is_available():
        pytest.skip("Transformer Engine's modules cannot be built without a GPU")
    assert shapes(model(backend="te", **changes)) == shapes(model(backend="torch", **changes))
