"""Greedy tokens in fp32, compared with transformers' decoding of the same export."""

import json
import shutil

import pytest
from helpers import SIZES, VARIANTS, Export, assert_same, engine, greedy, prompts, served_model

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(exports, variant):
    """Each variant gives transformers' tokens for 20 uneven prompts, with chunked prefills beside decode steps."""
    export = exports(variant)
    with engine(export) as llm:
        assert_same(export, llm, prompts())


@pytest.mark.parametrize(
    ("variant", "window", "options"),
    [
        ("plt2", 5, {"block_size": 32, "max_num_batched_tokens": 9, "max_num_seqs": 8}),
        ("plt3", 40, {"block_size": 32, "max_num_batched_tokens": 33}),
        ("plt2", 64, {"block_size": 64, "max_num_batched_tokens": 50}),
        ("plt3", 100, {"block_size": 64, "max_num_batched_tokens": 17, "max_num_seqs": 16}),
        ("plt2", 12, {"block_size": 128, "max_num_batched_tokens": 256}),
        ("plt4", 8, {"block_size": 96, "max_num_batched_tokens": 24}),
        ("plt3", 64, {"block_size": 32, "max_num_batched_tokens": 128, "enable_prefix_caching": False}),
        ("learned shift", 12, {"block_size": 64, "max_num_batched_tokens": 9, "max_num_seqs": 8}),
        ("span, shifted", 12, {"block_size": 64, "max_num_batched_tokens": 9, "max_num_seqs": 8}),
        ("keys alone", 40, {"block_size": 32, "max_num_batched_tokens": 17, "max_num_seqs": 16}),
        ("last loop", 40, {"block_size": 32, "max_num_batched_tokens": 33}),
        ("last loop, 3 loops, shifted", 100, {"block_size": 64, "max_num_batched_tokens": 17, "max_num_seqs": 16}),
        ("last loop, no CLP", 5, {"block_size": 32, "max_num_batched_tokens": 9, "max_num_seqs": 8}),
    ],
)
def test_windows_blocks_and_chunks(exports, variant, window, options):
    export = exports(variant, window_size=window)
    with engine(export, **options) as llm:
        assert_same(export, llm, prompts(22, seed=1))


def test_blocks_that_the_backend_does_not_take_are_refused(exports):
    """A block size that the kernel does not take (CPU: multiples of 32; GPU: of 16) is refused.

    Otherwise windows would silently get another block size.
    """
    with pytest.raises(ValueError, match="--block-size 16 is none that CPU_ATTN takes: MultipleOf\\(32\\)"):
        with engine(exports("plt2"), block_size=16):
            pass


@pytest.mark.parametrize("variant", ["plt3", "last loop, span"])
def test_a_long_context(exports, variant):
    export = exports(variant, window_size=40)
    with engine(export, max_model_len=1024, max_num_batched_tokens=100) as llm:
        assert_same(export, llm, [*prompts(2, seed=3, longest=900), prompts(10, seed=4, longest=880)[9]], tokens=100)


@pytest.mark.parametrize(
    "variant",
    ["plt3", "loopcoder", "CLP only", "learned shift", "keys alone, span, shifted", "last loop, 3 loops, shifted"],
)
def test_serial_loops(exports, variant):
    export = exports(variant)
    with engine(export, additional_config={"plt": {"loop_mode": "serial"}}) as llm:
        assert served_model(llm).model.rows is None
        assert_same(export, llm, prompts(12))


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("plt3", 1),
        ("plt3", 2),
        ("loopcoder3", 2),
        ("naive loops", 2),
        ("recommended", 1),
        ("recommended", 2),
        ("learned shift", 1),
        ("shifted heads", 2),
        ("span, shifted", 1),
        ("span, recommended, tied", 2),
        ("keys alone", 2),
        ("last loop", 1),
        ("last loop, 3 loops, shifted", 2),
        ("last loop, no CLP", 2),
        ("last loop, span", 1),
    ],
)
def test_fewer_loops(exports, variant, count):
    export = exports(variant)
    with engine(export, additional_config={"plt": {"loop_count": count}}) as llm:
        assert_same(export, llm, prompts(12), loop_count=count)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("last loop", {"window_size": 9}),
        ("last loop", {"full_attention": "every_loop"}),
        ("last loop, no CLP", {"window_size": 7}),
        ("last loop, span", {"full_attention": "every_loop"}),
    ],
)
def test_a_wrong_window_of_earlier_loops_shows(exports, variant, changes):
    """A window one longer or shorter, or none, changes the tokens, so the other tests would notice."""
    export, other, ids = exports(variant), exports(variant, **changes), prompts()
    with engine(other) as llm:
        same = [got == export.decode(prompt, 24) for got, prompt in zip(greedy(llm, ids), ids, strict=True)]
    assert sum(same) < 10


@pytest.mark.parametrize("variant", ["plt3", "shift, no window"])
def test_without_folding(exports, monkeypatch, variant):
    """Tokens are the same with a backend whose kernel stores K and V, and so reads loop 1's cache once per loop."""
    from vllm_plt import layers

    monkeypatch.setattr(layers, "can_fold", lambda attention: False)
    export = exports(variant)
    with engine(export) as llm:
        assert_same(export, llm, prompts(12))


def test_loopcoders_names(exports, tmp_path):
    """A folder with LoopCoder-v2's config.json and tensor names, without PLT's keys or a modeling file, is served."""
    export = exports("loopcoder3", window_size=21)
    keys = json.loads((export.folder / "config.json").read_text())
    llama = [name for name in SIZES if name != "window_size"] + ["rms_norm_eps", "tie_word_embeddings"]
    config = {name: keys[name] for name in llama} | {
        "architectures": ["IQuestPLTCoderForCausalLM"],
        "model_type": "iquestpltcoder",
        "rope_theta": keys["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "plt_num_loops": 3,
        "plt_window_size": [20, 0],
        "plt_normalize_per_loop": True,
        "plt_emb_scale": 0.7,
        "plt_hidden_scale": 0.3,
        "plt_gate_use_hidden_states": True,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(export.folder / "model.safetensors", tmp_path)
    with engine(Export(tmp_path, export.model)) as llm:
        assert_same(export, llm, prompts(12))


@pytest.mark.parametrize(
    ("variant", "dropped", "options"),
    [
        ("plt3", "hidden", {}),
        ("loopcoder", "hidden", {"max_num_batched_tokens": 30}),
        ("shifted heads", "keys", {}),
        ("shift, one loop", "keys", {"max_num_batched_tokens": 30}),
        ("span, shifted", "prelude's keys", {}),
        ("span, shifted", "coda's keys", {"max_num_batched_tokens": 30}),
        ("last loop", "hidden", {}),
        ("last loop, 3 loops, shifted", "keys", {"max_num_batched_tokens": 30}),
    ],
)
def test_a_dropped_carry_shows(exports, monkeypatch, variant, dropped, options):
    """Dropping a carry changes the tokens, so the other tests would notice a wrong one."""
    from vllm_plt.carry import Carry

    def read(self, kind: str, loops: slice):
        found = whole(self, kind, loops)
        return torch.zeros_like(found) if kind == dropped else found

    export, whole = exports(variant), Carry.read
    monkeypatch.setattr(Carry, "read", read)
    ids = prompts()
    with engine(export, **options) as llm:
        same = [got == export.decode(prompt, 24) for got, prompt in zip(greedy(llm, ids), ids, strict=True)]
    assert sum(same) < 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 2.5, "truncate": True, "original_max_position_embeddings": 40},
        {"factor": 1.0},
        {"beta_fast": None, "beta_slow": None},
        {"factor": None},
        {"attention_factor": 0.75},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 0.7},
        {"rope_theta": 1e6, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_yarns_angles_are_transformers(changes, dtype):
    """Every cosine and sine of YaRN, its attention factor included, equals the modeling file's."""
    from helpers import YARN
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.rope import most_positions, rope_parameters
    from vllm_plt.vllm_internals import get_rope

    from plt_megatron.hf.modeling_plt import PLTRotaryEmbedding

    config = PLTConfig(**{**SIZES, "rope_parameters": {**YARN, **changes}})
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(32, 1024, rope_parameters=rope_parameters(config), dtype=dtype)
    positions = torch.arange(most_positions(config))
    cos, sin = PLTRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    served = rope.cos_sin_cache[positions].to(dtype)
    torch.testing.assert_close(served, torch.cat([cos[0, :, 0, :16], sin[0, :, 0, 16:]], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["shared expert", "coda alone, experts"])
def test_experts_find_the_padding_of_their_own_rows(exports, monkeypatch, variant):
    """vLLM's router finds a mask of as many entries as rows, in their order: of L * T in a decode step, T in others."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import _get_padding_mask
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    export, masks, seen = exports(variant), [], set()
    route = CPURouter._compute_routing  # knows no padding; a GPU's router asks for it in these words

    def some_padding(runner, unpadded, padded):
        masks.append(torch.rand(padded) < 0.5)
        return masks[-1]

    def asking(router, hidden_states, *args, **kwargs):
        rows, of_tokens = len(hidden_states), masks[-1]
        found = _get_padding_mask(rows)
        assert len(found) == rows
        if get_forward_context().attn_metadata is not None:  # a dry run's decode step has fewer tokens than the mask
            seen.add(rows // len(of_tokens))
            assert found.tolist() == of_tokens.tolist() * (rows // len(of_tokens))
        return route(router, hidden_states, *args, **kwargs)

    monkeypatch.setattr(GPUModelRunner, "_prepare_padding_mask", some_padding)
    monkeypatch.setattr(CPURouter, "_compute_routing", asking)
    with engine(export) as llm:
        assert_same(export, llm, prompts(5), tokens=6)
    assert seen == {1, export.model.config.loop_count}
