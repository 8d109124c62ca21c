"""Decoding on paper: the paper's table of costs, cache sizes by hand, and the batch where loops begin to cost."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import ModelConfig
from plt_megatron.predict.decode_cost import decode_cost
from tests.settings import changed

MODEL = ModelConfig(
    num_layers=12,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=4,
    loop_count=2,
    window_size=64,
)
ROWS = {
    "vanilla": {"loop_count": 1},
    "vanilla loop": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False},
    "+ CLP": {"share_kv": False, "gated_window": False},
    "+ KV sharing": {"gated_window": False},
    "PLT-2": {},
}


def cost(changes=None, context=1024, batch=4, **arguments):
    model = changed(MODEL, changes or {})
    return decode_cost(model, vocab_size=32000, context_length=context, batch_size=batch, **arguments)


def test_caches_by_hand():
    token = 12 * 2 * 4 * 64 * 2  # layers, K and V, groups, channels, bf16
    by_row = {name: cost(changes) for name, changes in ROWS.items()}
    assert [row.kv_cache_bytes for row in by_row.values()] == [1024 * token * n for n in (1, 2, 2, 1, 1)]
    carry = 1024 * 2
    assert [row.state_bytes for row in by_row.values()] == [0, 0, carry, carry, carry + 64 * token]
    own_values = cost({"share_values": False, "loop_count": 3}, batch=1)
    assert own_values.kv_cache_bytes == 1024 * token * 2, "one loop's K, three loops' V"
    assert own_values.bytes - cost({"loop_count": 3}, batch=1).bytes == 1024 * token, "read once for each loop"
    last_loop = cost({**ROWS["+ CLP"], "full_attention": "last_loop"})
    assert (last_loop.kv_cache_bytes, last_loop.state_bytes) == (1024 * token, carry + 64 * token), "as PLT-2"
    assert last_loop.flops < by_row["PLT-2"].flops and last_loop.bytes < by_row["PLT-2"].bytes
    assert cost({"loop_count": 4}).state_bytes == 3 * (carry + 64 * token)
    assert cost(context=10).state_bytes == carry + 10 * token, "a window holds no more than there is"


def test_layers_that_run_once_by_hand():
    span, token = {"loop_span": [2, 10], "loop_count": 3}, 2 * 4 * 64 * 2
    plain, looped = cost({"loop_count": 1}, batch=1), cost(span, batch=1)
    assert looped.kv_cache_bytes == plain.kv_cache_bytes == 12 * 1024 * token
    assert looped.state_bytes == 2 * (1024 * 2 + 8 * 64 * token)
    gates, written = 8 * 16 * 65 * 2, 2 * 8 * token
    assert looped.bytes - plain.bytes == pytest.approx(looped.state_bytes + gates + written)
    layer = 2 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096) + 4 * 1024 * 1024
    assert looped.flops - plain.flops == 2 * 8 * (layer + 4 * 1024 * 64 + 2 * 16 * 64)
    serial = {**ROWS["vanilla loop"], **span}
    assert cost(serial).kv_cache_bytes == (4 + 3 * 8) * 1024 * token
    weights = sum((1024 * 1024 * 2, 2 * 1024 * 256, 3 * 1024 * 4096, 2 * 1024)) * 2
    again = cost(serial, batch=1).bytes - plain.bytes
    assert again == pytest.approx(2 * 8 * (weights + (1024 + 1) * token))


def test_what_no_loop_reads_is_not_computed():
    """Without windows later loops have no use for the keys and values that they share."""
    shared, own = cost(ROWS["+ KV sharing"], batch=1), cost(ROWS["+ CLP"], batch=1)
    assert own.flops - shared.flops == 12 * 2 * (2 * 1024 * 256)


def test_the_papers_table_of_costs():
    """At a small batch: the loop takes twice as long, CLP almost as long as vanilla, PLT-2 a few percent more."""
    by_row = {name: cost(changes) for name, changes in ROWS.items()}
    base = by_row["vanilla"].milliseconds
    ratio = {name: row.milliseconds / base for name, row in by_row.items()}
    assert 1.6 < ratio["vanilla loop"] < 2
    assert 1.01 < ratio["+ CLP"] < 1.3
    assert 1 < ratio["+ KV sharing"] < ratio["PLT-2"] < 1.02
    flops = {name: row.flops for name, row in by_row.items()}
    assert 1.5 < flops["PLT-2"] / flops["vanilla"] < 2
    assert all(row.bound == "memory" for row in by_row.values())


def test_bytes_and_flops_of_one_loop_by_hand():
    single = cost({"loop_count": 1}, context=100, batch=3)
    qkv, out, ffn = 1024 * (16 + 8) * 64, 1024 * 1024, 3 * 1024 * 4096
    stack = 12 * (qkv + out + ffn + 2 * 1024) + 1024
    token = 12 * 2 * 4 * 64 * 2
    assert single.bytes == 2 * (stack + 32000 * 1024) + 3 * (100 * token + token + 2 * 32000)
    assert single.flops == 3 * (2 * (12 * (qkv + out + ffn) + 32000 * 1024) + 12 * 4 * 1024 * 100)


@pytest.mark.parametrize("loops", [2, 3, 4])
def test_loops_stop_being_free_where_a_step_takes_five_percent_longer(loops):
    looped = {"loop_count": loops}
    first = cost(looped, context=64).loops_stop_being_free_at
    assert first is not None and first > 1

    def slower(batch):
        plain = cost({"loop_count": 1}, context=64, batch=batch).milliseconds
        return cost(looped, context=64, batch=batch).milliseconds / plain

    assert slower(first) > 1.05 >= slower(first - 1)


def test_more_loops_cost_earlier_and_serial_loops_at_once():
    firsts = [cost({"loop_count": loops}, context=64).loops_stop_being_free_at for loops in (1, 2, 3, 4)]
    assert firsts[0] is None and firsts[1] > firsts[2] > firsts[3]
    assert cost(ROWS["vanilla loop"]).loops_stop_being_free_at == 1


def test_a_long_context_keeps_loops_free():
    """Reading the shared cache then takes longer than all loops' arithmetic, at any batch."""
    assert cost(context=65536).loops_stop_being_free_at is None


def test_dense_layers_are_read_as_a_whole():
    """One layer of twelve is dense, and its FFN is as wide as all experts together, which all rows use."""
    experts = {"moe.num_experts": 8, "moe.router_topk": 8, "moe.ffn_hidden_size": 512, "ffn_hidden_size": 8 * 512}
    changes = {**experts, "loop_span": [1, 12], "loop_count": 3}
    dense, mixed = (cost({**changes, "moe.first_k_dense_replace": count}, batch=1) for count in (0, 1))
    assert dense.bytes - mixed.bytes == 8 * 1024 * 2, "the router alone differs, and is read once"
    assert dense.flops - mixed.flops == 2 * 8 * 1024
    few = cost({**changes, "moe.router_topk": 1, "moe.first_k_dense_replace": 1}, batch=1)
    read = 3 * 1024 * 8 * 512 * 2
    assert mixed.bytes - few.bytes == pytest.approx(11 * read * (7 / 8) ** 3), "of a looped layer, by three rows"


def test_experts_that_are_read_by_hand():
    """Of 8 experts, 2 a token: a row reads a quarter of them, two rows that choose independently 7 / 16."""
    experts = {"moe.num_experts": 8, "moe.router_topk": 2, "moe.ffn_hidden_size": 512}
    one, two = (cost({**experts, "loop_count": loops}, batch=1) for loops in (1, 2))
    each = 12 * 3 * 1024 * 512 * 2
    dense = cost({"ffn_hidden_size": 1024, "loop_count": 1}, batch=1)
    assert one.bytes - dense.bytes == 12 * 8 * 1024 * 2, "as a dense FFN of two experts' width, and the router"
    state = two.state_bytes + 12 * 2 * 4 * 64 * 2  # windows, carry, and one more loop's K and V written
    gates = 12 * 16 * 65 * 2
    assert two.bytes - one.bytes == pytest.approx((8 * 7 / 16 - 2) * each + state + gates)
    assert two.loops_stop_being_free_at == 1, "unlike a dense model's"
