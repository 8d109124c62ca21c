"""Tensor parallelism of two processes over gloo."""

import pytest
from helpers import assert_same, engine, prompts


@pytest.mark.parametrize(
    ("variant", "changes"),
    [("loopcoder3", {}), ("OLMo-2", {"num_key_value_heads": 1}), ("shared expert", {})],
)
def test_two_ranks(exports, monkeypatch, variant, changes):
    """Gates, whole-projection norms and their heads are cut; one K/V head is repeated on both ranks."""
    # vLLM compiles its cut embedding even in eager mode: half a minute a process.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    export = exports(variant, **changes)
    with engine(export, tensor_parallel_size=2) as llm:
        assert_same(export, llm, prompts(12))
