"""Decoding token by token, in every mode and cache, equals the full forward at every position."""

import pytest
import torch

from tests.hf.test_hf_cache import CACHED
from tests.hf.tiny import ALL, TOLERANCE, close_to_each, decode, expected, full, left_pad, make_model, make_tokens

MODES = ("parallel", "serial", "static", "eager")
# Models that differ in what padding and chunks can touch: rings, carries, stores of each loop, layers that run once.
STATES = ["vanilla", "plt", "loopcoder", "naive", "iquest", "span_clp", "span_last_loop", "learned_shift"]
STATES += ["shifted_channels", "last_loop_shifted"]
# Models that differ in what a cache holds or when it is written.
IN_EVERY_MODE = {*STATES, *CACHED, "own_values_no_window", "window_1", "by_layer_shared"}


def decode_in(mode, tokens, prefill, mask=None, **changes):
    """Logits of a model that decodes in one of MODES."""
    model = make_model(attn_implementation="eager" if mode == "eager" else "sdpa", **changes)
    cache = model.new_cache(tokens.shape[1] + 4 if mode == "static" else None)
    return decode(model, tokens, prefill, cache, mask, loop_mode="serial" if mode == "serial" else None)


@pytest.mark.parametrize("name", ALL)
def test_forward_and_decode_follow_the_equations(name):
    tokens = make_tokens(2, 26)
    model, eager = (make_model(attn_implementation=attention, **ALL[name]) for attention in ("sdpa", "eager"))
    want = expected(model, tokens)
    assert (full(model, tokens) - want).abs().max() < TOLERANCE
    assert (full(eager, tokens) - want).abs().max() < TOLERANCE
    for mode in MODES if name in IN_EVERY_MODE else ("parallel",):
        assert (decode_in(mode, tokens, 6, **ALL[name]) - want).abs().max() < TOLERANCE, mode


@pytest.mark.parametrize("loops", [1, 4])
@pytest.mark.parametrize("name", ["scales", "loopcoder", "naive", "clp", "clp_shared", "iquest", "last_loop"])
def test_fewest_and_many_loops(name, loops):
    changes, tokens = {**ALL[name], "loop_count": loops}, make_tokens(1, 18)
    want = expected(make_model(**changes), tokens)
    assert (full(make_model(**changes), tokens) - want).abs().max() < TOLERANCE
    assert (decode_in("eager", tokens, 4, **changes) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "static", "window", "length", "prefill"),
    [
        ("plt", False, 65, 220, 50),
        ("last_loop", True, 65, 220, 50),
        ("plt", True, 65, 40, 10),
        ("last_loop", False, 65, 40, 10),
        ("plt", True, 16, 150, 90),
        ("last_loop", False, 16, 150, 90),
        ("plt", False, 8, 40, 0),
        ("last_loop", True, 8, 40, 0),
    ],
)
def test_rings_wrap_and_stay_short(name, static, window, length, prefill):
    """More than two windows past the wrap, less than one, and from the first token on."""
    model = make_model(**ALL[name], window_size=window, loop_count=3, num_hidden_layers=1)
    tokens = make_tokens(1, length)
    logits = decode(model, tokens, prefill, model.new_cache(length if static else None))
    assert (logits - full(model, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", STATES)
def test_left_padding_changes_nothing(name):
    """In whole sequences, a single one included, and in steps."""
    changes = {"loop_count": 3, **ALL[name]}
    rows = [make_tokens(n, seed=n) for n in (24, 15, 13, 1)]
    tokens, mask = left_pad(rows)
    model, eager = (make_model(attn_implementation=attention, **changes) for attention in ("sdpa", "eager"))
    want = [expected(model, row[None])[0] for row in rows]
    assert close_to_each(full(model, tokens, attention_mask=mask), rows, want)
    assert close_to_each(full(eager, tokens, attention_mask=mask), rows, want)
    assert close_to_each(full(model, tokens[1:2], attention_mask=mask[1:2]), rows[1:2], want[1:2])
    for mode in MODES:
        assert close_to_each(decode_in(mode, tokens, 12, mask, **changes), rows, want), mode


@pytest.mark.parametrize("static", [False, True])
def test_a_sequence_that_starts_while_others_decode(static):
    """Its first real token comes after several steps of padding."""
    model = make_model(loop_count=3)
    rows = [make_tokens(20), make_tokens(6, seed=2)]
    tokens, mask = left_pad(rows)
    logits = decode(model, tokens, 5, model.new_cache(20 if static else None), mask)
    assert close_to_each(logits, rows, [expected(model, row[None])[0] for row in rows])


@pytest.mark.parametrize("name", STATES)
def test_prefill_in_chunks(name):
    model = make_model(**{**ALL[name], "window_size": 9})
    rows = [make_tokens(37), make_tokens(22, seed=2)]
    tokens, mask = left_pad(rows)
    want = [expected(model, row[None])[0] for row in rows]
    model.model.prefill_chunk_size = 8
    for cache in (model.new_cache(), model.new_cache(40)):
        assert close_to_each(decode(model, tokens, 33, cache, mask), rows, want)


@pytest.mark.parametrize("name", ["plt", "last_loop"])
def test_chunks_of_any_size_after_a_prefix(name):
    model = make_model(**ALL[name], loop_count=3, window_size=6)
    tokens = make_tokens(2, 60)
    want = full(model, tokens)
    cache, begin = model.new_cache(), 0
    with torch.no_grad():
        for size in (1, 1, 3, 5, 6, 7, 1, 13, 2, 21):
            logits = model(tokens[:, begin : begin + size], cache=cache).logits
            assert (logits - want[:, begin : begin + size]).abs().max() < TOLERANCE
            begin += size


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("name", ["plt", "naive", "loopcoder", "last_loop", "span_last_loop"])
def test_loop_count_lowered_at_call_time(name, loops):
    model, tokens = make_model(**{**ALL[name], "loop_count": 3}), make_tokens(1, 20)
    want = expected(model, tokens, loops)
    assert (full(model, tokens, loop_count=loops) - want).abs().max() < TOLERANCE
    assert (decode(model, tokens, 5, loop_count=loops) - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["plt", "loopcoder"])
def test_bfloat16_decode_stays_close(name):
    model = make_model(**ALL[name]).bfloat16()
    tokens = make_tokens(1, 30)
    logits, want = decode(model, tokens, 10), full(model.float(), tokens)
    assert (logits.float() - want).abs().mean() < 0.1 * want.abs().mean()


def test_parallel_step_runs_each_layer_once():
    """The point of it all: one pass of L rows, not L passes."""
    model = make_model(loop_count=4)
    cache = model.new_cache()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    with torch.no_grad():
        model(make_tokens(3, 8), cache=cache)
        assert seen == [(3, 8)] * 4
        seen.clear()
        model(make_tokens(3, 1), cache=cache)
        assert seen == [(3, 4)]
        seen.clear()
        model(make_tokens(3, 1), cache=cache, loop_mode="serial")
        assert seen == [(3, 1)] * 4


def test_layers_that_run_once_have_one_row_in_the_same_pass():
    model = make_model(**ALL["span"])
    cache, seen = model.new_cache(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    with torch.no_grad():
        model(make_tokens(2, 8), cache=cache)
        assert seen == [8] + 3 * [8, 8] + [8]
        seen.clear()
        model(make_tokens(2, 1), cache=cache)
        assert seen == [1, 3, 3, 1]


def test_window_attention_over_a_prefill_is_linear():
    """Twice the tokens, twice the window's score elements: not four times."""
    model = make_model(num_hidden_layers=1, window_size=16)
    sizes = []
    attend = model.model.layers[0].self_attn._attend_rows

    def count(query, key, value, mask):
        sizes.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
        return attend(query, key, value, mask)

    model.model.layers[0].self_attn._attend_rows = count
    for length in (512, 1024):
        full(model, make_tokens(1, length))
    assert sizes[1] == 2 * sizes[0]
    assert sizes[0] <= 512 * 4 * (64 + 16)


def test_only_the_last_loop_reads_the_whole_context():
    """In a pass over many tokens, and by its own row in a parallel step."""
    model = make_model(**ALL["last_loop"], loop_count=3, num_hidden_layers=1)
    attention, whole, rows = model.model.layers[0].self_attn, [], []
    attend, attend_rows = attention._attend, attention._attend_rows

    def count_whole(query, key, *args):
        whole.append((query.shape[1], key.shape[2]))
        return attend(query, key, *args)

    def count_rows(query, key, *args):
        rows.append((query.shape[0], key.shape[2]))
        return attend_rows(query, key, *args)

    attention._attend, attention._attend_rows = count_whole, count_rows
    cache = model.new_cache()
    with torch.no_grad():
        model(make_tokens(2, 40), cache=cache)
        assert whole == [(40, 40)] and len(rows) == 2
        rows.clear()
        model(make_tokens(2, 1), cache=cache)
    assert whole == [(40, 40)] and sorted(rows) == [(2, 41), (2 * 2, 5)]
