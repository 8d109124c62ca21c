"""KV cache planned by vLLM: blocks of a request compared with a plain model's, and the concurrency that it prints."""

import pytest
from helpers import Export, engine, scheduler, served_model

# LoopCoder-v2's KV cache shape: 14 layers, K/V heads of 128, d 5120. Other sizes are tiny: only the cache is planned.
SHAPE_7B = {
    "vocab_size": 160,
    "intermediate_size": 32,
    "hidden_size": 5120,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
GIB = 1 << 30


def blocks_of_a_request(
    length: int, block: int, loops: int, window: int, in_flight: int, carries: int | None = None
) -> int:
    """Return our formula's blocks of a request, each all layers' K/V of `block` tokens, as vLLM allocates memory.

    A request holds its context, a window for each later loop, and one token's `carries`, by default one of hidden
    states. Windows and carries also hold the tokens that a step has in flight, and one more block since they may begin
    anywhere in a block.
    """

    def held(tokens: int) -> int:
        return -(-min(tokens + in_flight, length) // block) + 1

    carries = min(loops - 1, 1) if carries is None else carries
    return -(-length // block) + (loops - 1) * held(window - 1) + carries * held(1)


def bytes_of_a_request(length: int, layers: int, kv_heads: int, dim: int, size: int, loops: int, window: int) -> int:
    """Return the bytes of K/V of the context, L - 1 windows and L - 1 carries (plt_megatron's estimate of decoding)."""
    token = 2 * layers * kv_heads * dim
    return 2 * (token * length + (loops - 1) * (token * window + size))


def planned(llm, length: int, in_flight: int) -> float:
    """Return the concurrency that vLLM plans for 40 GiB, contexts of `length` tokens and chunks of `in_flight`."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs

    config = llm.llm_engine.vllm_config
    config.model_config.max_model_len = length
    config.scheduler_config.max_num_batched_tokens = in_flight
    config.cache_config.num_gpu_blocks_override = None
    specs = llm.llm_engine.model_executor.get_kv_cache_specs()
    (made,) = get_kv_cache_configs(config, specs, [40 * GIB])
    return get_kv_cache_capacity(config, made)[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders with configurations of LoopCoder-v2's cache shape, by loop count."""
    from plt_megatron.hf.configuration_plt import PLTConfig

    def write(loops: int):
        folder = tmp_path_factory.mktemp("shape")
        config = PLTConfig(**SHAPE_7B, loop_count=loops, window_size=64, architectures=["PLTForCausalLM"])
        config.save_pretrained(folder)
        return folder

    return {loops: write(loops) for loops in (1, 2, 3)}


def test_concurrency_is_what_the_formula_says(folders):
    concurrency = {}
    for loops, folder in folders.items():
        with engine(Export(folder, None), load_format="dummy", dtype="bfloat16") as llm:
            total = 40 * GIB // (32 * 2 * 8 * 128 * 2 * 14)
            for in_flight in (256, 2048):
                got = planned(llm, 32768, in_flight)
                expected = total / blocks_of_a_request(32768, 32, loops, 64, in_flight)
                assert got == pytest.approx(expected, rel=0.02), (loops, in_flight)
                concurrency[loops, in_flight] = got
    # With small chunks the memory is close to that of the state alone.
    for loops in folders:
        exact = 40 * GIB / bytes_of_a_request(32768, 14, 8, 128, 5120, loops, 64)
        assert concurrency[loops, 256] == pytest.approx(exact, rel=0.02 if loops < 3 else 0.03)
    assert concurrency[2, 2048] > 0.85 * concurrency[1, 2048]


@pytest.mark.parametrize("chunk", [128, 256, 2048, 8192])
@pytest.mark.parametrize("loops", [2, 3])
def test_what_is_said_of_chunks_is_the_formula(loops, chunk):
    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.memory import blocks_of_a_request as said

    config = PLTConfig(loop_count=loops, window_size=64)
    assert said(config, loops, 16, 2048, 128, chunk) == blocks_of_a_request(2048, 128, loops, 64, chunk)
    own = {"share_kv": False, "gated_window": False}
    naive = PLTConfig(loop_count=loops, cross_loop_parallel=False, **own)
    assert said(naive, loops, 0, 2048, 128, chunk) == 16 * loops
    last = PLTConfig(loop_count=loops, window_size=64, full_attention="last_loop", **own)
    assert said(last, loops, 16, 2048, 128, chunk) == said(config, loops, 16, 2048, 128, chunk)


@pytest.mark.parametrize("steps", [1, 2])
def test_what_is_said_of_chunks_is_what_vllm_plans(exports, monkeypatch, steps):
    """It counts the tokens of two steps where scheduling is asynchronous, vLLM's default on a GPU."""
    from vllm_plt import memory

    said, length = [], 1024
    with engine(exports("plt3"), max_model_len=length) as llm:
        monkeypatch.setattr(memory.logger, "info_once", said.append)
        config, model = llm.llm_engine.vllm_config, served_model(llm)
        config.scheduler_config.async_scheduling = steps == 2
        small, now = (40 * GIB // (32 * 2 * 2 * 32 * 4 * 3) / planned(llm, length, tokens) for tokens in (256, 512))
        memory.say_what_chunks_cost(model.config, 3, len(model.model.carry.slices), config)
    assert f"holds {round(now)} blocks, where a plain model's holds 32, since {steps * 512} tokens may be" in said[-1]
    assert said[-1].endswith(f"it holds {round(small)}")


@pytest.mark.parametrize(
    ("variant", "loops", "carries"),
    [
        ("plt1", 1, 0),
        ("plt2", 2, 1),
        ("plt3", 3, 1),
        ("shift, one loop", 1, 1),
        ("shifted channels", 2, 1),  # hidden states and keys share blocks
        ("last loop", 2, 1),
        ("last loop, 3 loops, shifted", 3, 2),  # keys of three loops
        ("last loop, no CLP", 3, 0),
        ("learned shift", 3, 4),  # carried keys and values of three loops are as wide as three layers' K/V
    ],
)
def test_the_printed_concurrency(exports, variant, loops, carries):
    """A running engine's concurrency is the formula's, and KV cache groups have equal sizes, so none is padded."""
    with engine(exports(variant), max_num_batched_tokens=32, max_num_seqs=8, num_gpu_blocks_override=500) as llm:
        got = llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
        assert got == pytest.approx(500 / blocks_of_a_request(256, 32, loops, 8, 32, carries), rel=0.02)
        manager = scheduler(llm).kv_cache_manager
        assert [len(group.layer_names) for group in manager.kv_cache_config.kv_cache_groups] == [3] * (loops + carries)


@pytest.mark.parametrize(
    ("variant", "size", "groups"),
    [
        ("span", 2, (2, 1, 1)),
        ("span, shifted", 2, (2, 1, 4)),  # seven carried keys, each as wide as a layer's K/V
        ("span, naive loops", 4, (1, 0, 1)),
        ("prelude alone, loopcoder", 4, (1, 1, 1)),  # three layers' windows, padded
        ("keys alone", 3, (3, 2, 1)),
        ("last loop, span", 4, (1, 1, 1)),
    ],
)
def test_groups_where_layers_differ(exports, variant, size, groups):
    """vLLM's groups of full-context caches, windows and carries, and a request's blocks, are those we compute."""
    from vllm_plt.memory import blocks_of_a_request as said
    from vllm_plt.memory import caches_of_loops, layers_of_a_group

    with engine(exports(variant), max_num_batched_tokens=32, max_num_seqs=8, num_gpu_blocks_override=500) as llm:
        made, config = scheduler(llm).kv_cache_manager.kv_cache_config.kv_cache_groups, exports(variant).model.config
        loops, slices = config.loop_count, len(served_model(llm).model.carry.slices)
        counts = (*caches_of_loops(config, loops), slices)
        assert layers_of_a_group(counts) == size and tuple(-(-count // size) for count in counts) == groups
        assert sum(len(group.layer_names) for group in made) == sum(counts) and len(made) == sum(groups)
        blocks = groups[0] * 8 + groups[1] * 3 + groups[2] * 3
        got = llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
        assert got == pytest.approx(500 / blocks, rel=0.02)
        assert said(config, loops, slices, 256, 32, 32) == -(-blocks * size // config.num_hidden_layers)


@pytest.mark.parametrize(
    ("layers", "span", "loops", "fewest", "slices"),
    [
        (28, None, 2, 1, 28),
        (28, None, 3, 29, 56),
        (28, [4, 24], 2, 1, 28),  # windows are padded to 28
        (36, [6, 30], 2, 1, 18),  # 24 would pad 36 layers to 48
        (24, [6, 18], 2, 1, 12),
    ],
)
def test_slices_do_not_pad_the_context(layers, span, loops, fewest, slices):
    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.memory import slices_of_a_carry

    config = PLTConfig(num_hidden_layers=layers, loop_span=span, loop_count=loops)
    assert slices_of_a_carry(config, loops, fewest) == slices
