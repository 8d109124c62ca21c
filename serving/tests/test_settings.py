"""Settings and unsupported options: refusals in one line, before anything is loaded, and defaults."""

import subprocess
import sys

import pytest
from helpers import MOE, YARN, engine


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (
            "plt2",
            {"additional_config": {"plt": {"loops": 1}}},
            "plt.loops is not known: plt takes loop_mode and loop_count",
        ),
        (
            "plt2",
            {"additional_config": {"plt": {"loop_count": 3}}},
            "loop_count must be from 1 to this model's 2, not 3",
        ),
        ("plt2", {"additional_config": {"plt": {"loop_count": True}}}, "loop_count must be from 1 to this model's 2"),
        ("plt2", {"additional_config": {"plt": {"loop_mode": "both"}}}, 'loop_mode must be "parallel" or "serial"'),
        ("plt2", {"additional_config": {"plt": "serial"}}, "additional_config plt must be an object, not 'serial'"),
        ("naive loops", {"additional_config": {"plt": {"loop_mode": "parallel"}}}, "no cross_loop_parallel"),
        (
            "plt2",
            {
                "enable_lora": True,
                "fully_sharded_loras": True,
                "additional_config": {"plt": {"loop_mode": "parallel"}},
            },
            "not possible with LoRA .* --fully-sharded-loras",
        ),
        ("plt2", {"pipeline_parallel_size": 2}, "cannot be served with pipeline parallelism"),
        ("plt2", {"cpu_offload_gb": 1}, "cannot be served with weights in the CPU's memory"),
        ("plt2", {"offload_group_size": 1}, "cannot be served with weights in the CPU's memory"),
        ("plt2", {"enable_return_routed_experts": True}, "cannot be served with --enable-return-routed-experts"),
        ("shift, one loop", {"disable_hybrid_kv_cache_manager": True}, "which --disable-hybrid-.* switches off"),
        ("last loop", {"disable_hybrid_kv_cache_manager": True}, "which --disable-hybrid-.* switches off"),
        (
            "plt2",
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
            "which the KV connector LMCacheConnectorV1 switches off",
        ),
        (
            "plt2",
            {"compilation_config": {"pass_config": {"fuse_allreduce_rms": True}}, "tensor_parallel_size": 2},
            "cannot be served with pass_config.fuse_allreduce_rms",
        ),
    ],
)
def test_refusals(exports, monkeypatch, variant, options, message):
    from vllm_plt import model

    monkeypatch.setattr(model.PLTForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match=message):
        with engine(exports(variant), **options):
            pass


@pytest.mark.parametrize("variant", ["plt2", "shift, one loop"])
def test_batch_invariance_is_refused_before_a_model_is_made(exports, monkeypatch, variant):
    """vLLM would find out once the weights are loaded, and name a backend that nobody has chosen."""
    from vllm_plt import model

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setattr(model.PLTForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT=1"), engine(exports(variant)):
        pass


def test_loops_by_layer_are_refused(exports):
    with pytest.raises(ValueError, match="PLT models of loop_order layer cannot be served yet: use transformers"):
        with engine(exports("naive loops", loop_order="layer")):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_parameters": {**YARN, "factor": 15.5}},
            "angles of factor x original_max_position_embeddings = 992 positions, not of 993: give --max-model-len 992",
        ),
        (
            {**MOE, "scoring_func": "sigmoid"},
            "whose experts have sigmoid scores cannot be served yet: use transformers",
        ),
        (
            {**MOE, "first_k_dense_replace": 1},
            r"whose first layers have no experts \(first_k_dense_replace 1\) cannot be served yet: use transformers",
        ),
    ],
)
def test_what_is_not_proven_is_refused(settings, message):
    from types import SimpleNamespace

    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.settings import check

    model = SimpleNamespace(hf_config=PLTConfig(**settings), max_model_len=993)
    with pytest.raises(ValueError, match=message):
        check(vllm_config(model_config=model))


def vllm_config(parallel=(), **others):
    """Return a stand-in for vLLM's configuration, with what our check reads of a server without options."""
    from types import SimpleNamespace

    from vllm.config import OffloadConfig
    from vllm.config.aux_output import AuxOutputConfig
    from vllm_plt.configuration_plt import PLTConfig

    names = dict.fromkeys((f"{kind}_parallel_size" for kind in ("pipeline", "data", "tensor")), 1)
    names |= {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_eplb": False}
    settings = {
        "parallel_config": SimpleNamespace(**{**names, "use_ubatching": False, **dict(parallel)}),
        "model_config": SimpleNamespace(hf_config=PLTConfig(), max_model_len=993),
        "speculative_config": None,
        "additional_config": {},
        "lora_config": None,
        "kv_transfer_config": None,
        "aux_output_config": AuxOutputConfig(),
        "offload_config": OffloadConfig(),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=None, max_num_seqs=24),
        "optimization_level": 2,
        "compilation_config": compilation(),
    }
    return SimpleNamespace(**{**settings, **others})


def compilation(**settings):
    from types import SimpleNamespace

    passes = SimpleNamespace(fuse_allreduce_rms=None)
    return SimpleNamespace(**{"cudagraph_mode": None, "compile_sizes": [], "pass_config": passes, **settings})


def test_what_would_end_in_other_words_is_refused():
    from types import SimpleNamespace

    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.settings import check

    experts = SimpleNamespace(hf_config=PLTConfig(**MOE), max_model_len=993)
    shifted = SimpleNamespace(hf_config=PLTConfig(key_shift="heads"), max_model_len=993)
    check(vllm_config(model_config=experts))
    check(vllm_config(model_config=shifted, compilation_config=compilation(compile_sizes=[8, 24])))
    check(vllm_config(compilation_config=compilation(compile_sizes=[64])))
    check(vllm_config({"data_parallel_size": 2}))
    check(vllm_config(speculative_config=SimpleNamespace(method="ngram")))
    for config, named in (
        (vllm_config({"data_parallel_size": 2}, model_config=experts), "--data-parallel-size"),
        (vllm_config({"use_ubatching": True}), "--enable-dbo"),
        (vllm_config({"enable_eplb": True}, model_config=experts), "--enable-eplb"),
        (vllm_config({"prefill_context_parallel_size": 2}), "context parallelism"),
        *(
            (vllm_config(model_config=shifted, compilation_config=compilation(compile_sizes=sizes)), "sizes .* 24, not")
            for sizes in ([8, 25], ["cudagraph_capture_sizes"])
        ),
        (vllm_config(speculative_config=SimpleNamespace(method="draft_model")), "draft_model.*ngram"),
    ):
        with pytest.raises(ValueError, match=named):
            check(config)


@pytest.mark.parametrize(
    ("given", "level", "used"),
    [
        (None, 2, "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", 2, "FULL_DECODE_ONLY"),
        ("PIECEWISE", 1, "FULL_DECODE_ONLY"),
        ("FULL", 2, "FULL_DECODE_ONLY"),
        ("NONE", 2, "NONE"),
        (None, 0, None),
    ],
)
def test_cuda_graphs_are_of_decode_steps(given, level, used):
    """CUDA graphs are limited to decode steps: others would be replayed with moved inputs, or capture other passes."""
    from vllm_plt import ARCHITECTURES
    from vllm_plt.settings import register_check
    from vllm_plt.vllm_internals import MODELS_CONFIG_MAP, CUDAGraphMode

    modes = compilation(cudagraph_mode=given and CUDAGraphMode[given])
    config = vllm_config(compilation_config=modes, optimization_level=level)
    for name in ARCHITECTURES:
        register_check(name)
        MODELS_CONFIG_MAP[name].verify_and_update_config(config)
    assert modes.cudagraph_mode == (used and CUDAGraphMode[used])


@pytest.mark.parametrize(
    ("variant", "options", "fused"),
    [
        ("plt2", {}, False),
        ("plt2", {"additional_config": {"plt": {"loop_mode": "serial"}}}, True),
        ("naive loops", {}, True),
    ],
)
def test_a_fusion_with_a_limit_in_tokens_is_off(exports, monkeypatch, variant, options, fused):
    """Of the defaults that vLLM has on Hopper, the fused all-reduce is off where a decode step has L rows a token."""
    from vllm.config import vllm
    from vllm.engine.arg_utils import EngineArgs

    levels = (vllm.OPTIMIZATION_LEVEL_02, vllm.OPTIMIZATION_LEVEL_03)
    for level in levels:  # the CPU's platform lowers none of the passes
        monkeypatch.setitem(level["compilation_config"]["pass_config"], "fuse_allreduce_rms", lambda config: True)
    made = EngineArgs(model=str(exports(variant).folder), skip_tokenizer_init=True, **options).create_engine_config()
    assert made.compilation_config.pass_config.fuse_allreduce_rms is fused


def test_connectors_that_keep_windows_are_accepted():
    from types import SimpleNamespace

    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.settings import check

    def connected(name, **model):
        transfer = SimpleNamespace(kv_connector=name, kv_connector_module_path=None)
        of_config = SimpleNamespace(hf_config=PLTConfig(**model), max_model_len=993)
        return vllm_config(kv_transfer_config=transfer, model_config=of_config)

    check(connected("OffloadingConnector"))
    check(connected(None))
    check(connected("ExampleConnector", cross_loop_parallel=False))
    with pytest.raises(ValueError, match="the KV connector ExampleConnector switches off"):
        check(connected("ExampleConnector"))


def test_a_model_without_its_windows_is_refused_when_it_is_made(exports, monkeypatch):
    """vLLM derives some connectors from other options, such as --kv-offloading-backend, after our first check."""
    from vllm_plt import settings

    monkeypatch.setattr(settings, "has_carry", lambda *args: False)
    with pytest.raises(ValueError, match="which --disable-hybrid-kv-cache-manager switches off"):
        with engine(exports("plt2"), disable_hybrid_kv_cache_manager=True):
            pass


def test_windows_that_look_ahead_are_refused():
    from vllm_plt.configuration_loopcoder import LoopCoderConfig

    with pytest.raises(ValueError, match="looks ahead"):
        LoopCoderConfig(plt_window_size=[64, 1])


def test_loopcoders_defaults():
    from vllm_plt.configuration_loopcoder import LoopCoderConfig

    config = LoopCoderConfig(hidden_size=64, num_attention_heads=2)
    assert (config.loop_count, config.window_size, config.norm_between_loops) == (2, 65, True)
    assert (config.gate_input, config.gate_side, config.embedding_scale) == ("query", "global", 1.0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_another_vllm_is_told_in_one_line():
    """An unsupported vLLM, or one that lacks what we use, gets a one-line message and nothing registered."""
    code = """
import vllm, vllm.model_executor.models.config as module
moved = vars(module).pop("MODELS_CONFIG_MAP")
import vllm_plt
vllm_plt.register()
module.MODELS_CONFIG_MAP = moved
vllm.__version__ = "0.33.1"
vllm_plt.register()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "plt" not in CONFIG_MAPPING
assert not set(vllm_plt.ARCHITECTURES) & set(vllm.ModelRegistry.get_supported_archs())
try:
    import vllm_plt.model
except ImportError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500, check=True)
    message = (
        "vllm-plt is made for vLLM 0.32.x and uses its internals, and this is vLLM 0.33.1: PLT models are not served."
    )
    assert f"refused: {message}" in done.stdout
    said = (done.stdout + done.stderr).replace("refused: " + message, "")
    assert message in said
    assert [line for line in said.splitlines() if "MODELS_CONFIG_MAP" in line and "PLT models are not served" in line]
