"""What flash attention is asked for, with a plain function in its place that knows its rules."""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf.tiny import ALL, TOLERANCE, close_to_each, decode, expected, full, left_pad, make_model, make_tokens

NAMES = ["vanilla", "plt", "loopcoder", "naive", "iquest", "clp_shared", "span_clp", "last_loop_shifted"]
NAMES += ["last_loop_serial", "span_last_loop"]


def pretend_flash(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, is_causal=None,
    position_ids=None, **kwargs,
):  # fmt: skip
    """Causal from the bottom right; masks [B, keys]; query heads in groups; packed by positions."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    groups = heads // key.shape[1]
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal and queries > 1:
        seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    seen = seen.expand(batch, 1, queries, keys)
    if attention_mask is not None:
        assert attention_mask.shape == (batch, keys) and attention_mask.dtype == torch.bool
        seen = seen & attention_mask[:, None, None]
    if position_ids is not None:
        assert batch == 1 and attention_mask is None
        documents = (position_ids[0].diff() != 1).long().cumsum(0)
        documents = torch.cat([torch.zeros(1, dtype=torch.long), documents])
        seen = seen & (documents[:, None] == documents)
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture(autouse=True)
def flash():
    ALL_ATTENTION_FUNCTIONS["flash_pretended"] = pretend_flash
    ALL_MASK_ATTENTION_FUNCTIONS["flash_pretended"] = None
    yield
    del ALL_ATTENTION_FUNCTIONS["flash_pretended"], ALL_MASK_ATTENTION_FUNCTIONS["flash_pretended"]


def flash_model(**changes):
    model = make_model(**changes)
    model.config._attn_implementation = "flash_pretended"
    return model


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_decode(name):
    model = flash_model(**ALL[name])
    tokens = make_tokens(2, 24)
    want = expected(model, tokens)
    assert (full(model, tokens) - want).abs().max() < TOLERANCE
    for mode in (None, "serial"):
        assert (decode(model, tokens, 9, loop_mode=mode) - want).abs().max() < TOLERANCE
    model.model.prefill_chunk_size = 7
    assert (decode(model, tokens, 23) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_left_padding(name):
    model = flash_model(**ALL[name])
    rows = [make_tokens(n, seed=n) for n in (21, 11)]
    tokens, mask = left_pad(rows)
    want = [expected(model, row[None])[0] for row in rows]
    model.model.prefill_chunk_size = 4
    assert close_to_each(full(model, tokens, attention_mask=mask), rows, want)
    assert close_to_each(decode(model, tokens, 13, attention_mask=mask), rows, want)


@pytest.mark.parametrize("name", ["vanilla", "plt", "naive", "last_loop"])
def test_packed_documents(name):
    model = flash_model(**ALL[name])
    tokens = make_tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    logits = full(model, tokens, position_ids=positions)
    for part in (slice(0, 8), slice(8, 20)):
        assert (logits[:, part] - expected(model, tokens[:, part])).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="packed documents with flash attention need batch size 1"):
        full(model, tokens.repeat(2, 1), position_ids=positions)


def test_a_static_cache_is_refused():
    model = flash_model()
    with pytest.raises(ValueError, match="a static PLT cache works with sdpa or eager attention"):
        model(make_tokens(1, 4), cache=model.new_cache(8))
