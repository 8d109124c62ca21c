"""The cache under what generation does to it, and what it costs."""

import copy

import pytest
import torch

from plt_megatron.hf.modeling_plt import PLTCache
from tests.hf.tiny import (
    ABLATIONS,
    ALL,
    TOLERANCE,
    decode,
    expected,
    full,
    left_pad,
    make_config,
    make_model,
    make_tokens,
)

# Models whose caches differ: rings, carries, stores of each loop, layers that run once, and their pairs.
CACHED = ["vanilla", "plt", "clp_shared", "naive", "iquest", "span", "learned_shift"]
CACHED += ["last_loop_shifted", "last_loop_serial", "span_last_loop"]


def step(model, cache, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, cache=cache, **kwargs).logits


@pytest.mark.parametrize("name", CACHED)
def test_beam_reorder(name):
    model = make_model(**ALL[name])
    tokens = make_tokens(3, 20)
    order = torch.tensor([2, 2, 0])
    want = full(model, torch.cat([tokens[order, :14], tokens[:, 14:]], 1))[:, 14:]
    for cache in (model.new_cache(), model.new_cache(30)):
        decode(model, tokens[:, :14], 9, cache)
        cache.reorder_cache(order)
        assert (decode(model, tokens[:, 14:], 0, cache) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CACHED)
def test_repeat_and_select(name):
    model = make_model(**ALL[name])
    tokens = make_tokens(2, 16)
    cache = model.new_cache()
    decode(model, tokens[:, :12], 8, cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 4]))
    assert cache.layers[0].batch_size == 2
    assert (decode(model, tokens[:, 12:], 0, cache) - full(model, tokens)[:, 12:]).abs().max() < TOLERANCE


# Three models with each number of tokens that are removed and each of those before them.
CROPPED = ("plt", "span", "last_loop_shifted")
CROPS = [(name, n, (0, 3, 30)[(i + j) % 3]) for i, name in enumerate(CROPPED) for j, n in enumerate((9, 1, 4))]
CROPS += [(name, 9, 30) for name in CACHED if name not in CROPPED]


@pytest.mark.parametrize(("name", "removed", "before"), CROPS)
def test_crop(name, removed, before):
    """Tokens that turned out wrong leave no trace, whether they came one by one or at once."""
    model = make_model(**{"loop_count": 3, **ALL[name]})
    tokens, wrong = make_tokens(2, 50), make_tokens(2, removed, seed=9)
    for prefill in (0, removed):
        cache = model.new_cache()
        if before:
            step(model, cache, tokens[:, :before])
        cache.activate_past_recording()
        decode(model, tokens[:, before : before + 8], 3, cache)
        decode(model, wrong, prefill, cache)
        cache.crop(-removed)
        cache.crop(0)
        assert cache.get_seq_length() == before + 8
        rest = decode(model, tokens[:, before + 8 :], 0, cache)
        assert (rest - full(model, tokens)[:, before + 8 :]).abs().max() < TOLERANCE
        cache.crop(-4)
        rest = decode(model, tokens[:, 46:], 0, cache)
        assert (rest - full(model, tokens)[:, 46:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["naive", "shared_no_clp", "vanilla"])
def test_crop_without_recording_where_nothing_is_lost(name):
    model = make_model(**ALL[name])
    tokens = make_tokens(1, 20)
    cache = model.new_cache()
    step(model, cache, tokens)
    cache.crop(-8)
    assert (decode(model, tokens[:, 12:], 0, cache) - full(model, tokens)[:, 12:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["plt", "clp", "clp_shared", "iquest", "last_loop_serial"])
def test_crop_of_what_is_gone_is_an_error(name):
    model = make_model(**ALL[name])
    cache = model.new_cache()
    step(model, cache, make_tokens(1, 9))
    with pytest.raises(ValueError, match=r"cannot remove 3 tokens: call activate_past_recording"):
        cache.crop(-3)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="cannot remove 3 tokens"):
        cache.crop(-3)


@pytest.mark.parametrize("name", CACHED)
def test_a_stored_prefix_is_continued_many_times(name):
    model = make_model(**ALL[name])
    prefix, tails = make_tokens(1, 14), [make_tokens(1, 8, seed=seed) for seed in (2, 3)]
    wanted = [full(model, torch.cat([prefix, tail], 1))[:, 14:] for tail in tails]
    for stored in (model.new_cache(), model.new_cache(30)):
        step(model, stored, prefix)
        for tail, want in zip(tails, wanted, strict=True):
            assert (decode(model, tail, 0, copy.deepcopy(stored)) - want).abs().max() < TOLERANCE
        assert int(stored.get_seq_length()) == 14


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it(name):
    model = make_model(**ALL[name])
    tokens, cache = make_tokens(2, 14), model.new_cache()
    with torch.inference_mode():
        step(model, cache, tokens[:, :6])
    with torch.no_grad():
        found = [model(tokens[:, at : at + 1], cache=cache).logits for at in range(6, 14)]
    assert (torch.cat(found, 1) - full(model, tokens)[:, 6:]).abs().max() < TOLERANCE
    with torch.inference_mode():
        step(model, cache := model.new_cache(), tokens[:, :6])
        cache.activate_past_recording()
        step(model, cache, tokens[:, 6:9])
    cache.crop(-3)
    assert (step(model, cache, tokens[:, 6:]) - full(model, tokens)[:, 6:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("static", [False, True])
def test_reset(static):
    model = make_model(loop_count=3)
    tokens = make_tokens(2, 20)
    cache = model.new_cache(20 if static else None)
    decode(model, make_tokens(2, 20, seed=5), 10, cache)
    cache.reset()
    assert (decode(model, tokens, 3, cache) - full(model, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["plt", "last_loop"])
def test_padding_after_tokens_starts_afresh_in_every_path(name):
    """A gap of padding cuts shift, with and without a cache; no token sees the gap."""
    model = make_model(**ALL[name], loop_count=3, window_size=4)
    tokens, mask = make_tokens(1, 24), torch.ones(1, 24, dtype=torch.long)
    mask[:, 10:13] = 0
    want = full(model, tokens, attention_mask=mask)
    assert torch.isfinite(want).all()
    for prefill in (0, 11, 20):
        got = decode(model, tokens, prefill, attention_mask=mask)
        assert (got - want)[mask.bool()].abs().max() < TOLERANCE


def test_state_is_what_the_paper_says():
    """Global K/V, (L - 1) rings of w per layer, (L - 1) carries: 1.05 times vanilla at 1,280 tokens."""
    sizes = {}
    for name, loops in (("vanilla", 1), ("plt", 2), ("plt", 3), ("naive", 2), ("last_loop", 3), ("last_loop", 1)):
        model = make_model(**{**ALL[name], "loop_count": loops, "window_size": 64, "max_position_embeddings": 2048})
        cache = model.new_cache()
        step(model, cache, make_tokens(1, 1280))
        sizes[name, loops] = cache.memory_bytes()
        config = model.config
        token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 4
        assert cache.memory_bytes(allocated=True) == cache.memory_bytes()
        stores = loops if name == "naive" else 1
        rings = (loops - 1) * 64 if name in ("plt", "last_loop") else 0
        carries = (loops - 1) * config.hidden_size * 4 if name != "naive" else 0
        assert sizes[name, loops] == (stores * 1280 + rings) * token + carries
    assert sizes["plt", 2] <= 1.07 * sizes["vanilla", 1]
    assert sizes["naive", 2] == 2 * sizes["vanilla", 1]
    assert sizes["last_loop", 3] == sizes["plt", 3] and sizes["last_loop", 1] == sizes["vanilla", 1]


@pytest.mark.parametrize(("name", "looped"), [("span", 2), ("span_clp", 1), ("span_shifted", 1), ("span_last_loop", 2)])
def test_layers_that_run_once_have_keys_of_one_loop_and_no_rings(name, looped):
    model = make_model(**{**ALL[name], "loop_count": 3})
    config, cache = model.config, model.new_cache()
    step(model, cache, make_tokens(1, 20))
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    once, stores = config.num_hidden_layers - looped, 3 if name == "span_clp" else 1
    rings = 0 if name == "span_clp" else 2 * config.window_size
    half_keys = (once + looped * 3) * token // 4 if config.key_shift == "heads" else 0  # of the last token
    held = (once * 20 + looped * (stores * 20 + rings)) * token + 2 * config.hidden_size * 4
    assert cache.memory_bytes() == held + half_keys


@pytest.mark.parametrize("name", ["plt", "vanilla", "naive", "last_loop"])
def test_buffers_of_a_static_cache_are_marked(name):
    """A compiled step changes them in place. Unmarked, even the length alone keeps it from being a CUDA graph."""
    model = make_model(**ALL[name])
    cache = model.new_cache(8)
    step(model, cache, make_tokens(1, 3))
    buffers = [cache.length, *([] if cache.carry.last is None else [cache.carry.last])]
    buffers += [tensor for layer in cache.layers for tensor in layer.tensors()]
    assert {getattr(buffer, "_dynamo_static_input_type", None) for buffer in buffers} == {"unguarded"}


def test_buffers_of_a_static_cache_never_move():
    model = make_model(loop_count=3)
    cache = model.new_cache(32)
    step(model, cache, make_tokens(2, 5))
    before = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    before += [cache.carry.last.data_ptr(), cache.length.data_ptr()]
    decode(model, make_tokens(2, 10), 0, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    after = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    assert before == [*after, cache.carry.last.data_ptr(), cache.length.data_ptr()]


def test_early_initialization_allocates_everything():
    model = make_model()
    cache = model.new_cache(16)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    assert cache.is_initialized and cache.is_compileable and cache.carry.last.shape == (2, 1, 64)
    growing = PLTCache(model.config)
    growing.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    assert growing.memory_bytes() > 0
    rows = [make_tokens(12), make_tokens(7, seed=2)]
    tokens, mask = left_pad(rows)
    logits = decode(model, tokens, 8, cache, mask)
    assert (logits[1, -7:] - expected(model, rows[1][None])[0]).abs().max() < TOLERANCE


def test_errors_are_one_clear_line():
    model = make_model(loop_count=3)
    tokens = make_tokens(1, 6)
    with pytest.raises(ValueError, match="the cache was filled with 3 loops, but 2 are requested"):
        step(model, model.new_cache(), tokens, loop_count=2)
    with pytest.raises(ValueError, match="loop_count must be from 1 to this model's 3, not 4"):
        step(model, None, tokens, loop_count=4)
    with pytest.raises(ValueError, match='loop_mode must be "parallel" or "serial", not \'both\''):
        step(model, None, tokens, loop_mode="both")
    with pytest.raises(ValueError, match='"parallel" needs cross_loop_parallel'):
        step(make_model(**ABLATIONS["naive"]), None, tokens, loop_mode="parallel")
    with pytest.raises(ValueError, match="attention_mask covers 4 tokens, cache and input hold 6"):
        step(model, model.new_cache(), tokens, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="attention_mask has 2 sequences, the input 1"):
        step(model, None, tokens, attention_mask=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="attention_mask must be"):
        step(model, None, tokens, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="packed documents cannot be cached"):
        step(model, None, tokens, use_cache=True, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="a static PLT cache cannot be cropped"):
        PLTCache(make_config(), 8).crop(-1)
    with pytest.raises(ValueError, match="cannot record its past"):
        PLTCache(make_config(), 8).activate_past_recording()
    with pytest.raises(ValueError, match="crop takes minus the number"):
        PLTCache(make_config()).crop(3)
    with pytest.raises(ValueError, match="max_cache_len must be positive"):
        PLTCache(make_config(), 0)
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="two names of one argument"):
        step(model, model.new_cache(), tokens, past_key_values=model.new_cache())


def test_the_former_name_of_cache():
    model = make_model()
    tokens = make_tokens(1, 10)
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache)
        logits = model(tokens[:, 6:], past_key_values=cache).logits
    assert (logits - full(model, tokens)[:, 6:]).abs().max() < TOLERANCE
