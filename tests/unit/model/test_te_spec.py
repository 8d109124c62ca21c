"""The Transformer Engine layer spec: refused clearly without TE, and with one that is too old."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.model.layer_specs import layer_spec
from plt_megatron.model.te_attention import require_transformer_engine


def test_without_transformer_engine_the_spec_is_refused(one_process):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(UserError, match=r"plt-megatron\[gpu\].*model\.backend: torch"):
        layer_spec(ModelConfig(), "te")


def test_a_transformer_engine_that_is_too_old_is_named(monkeypatch):
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from packaging.version import Version

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(utils, "_te_version", Version("2.8.0"))
    with pytest.raises(UserError, match=r"needs Transformer Engine 2\.9 .*, this is 2\.8\.0: update it"):
        require_transformer_engine()
