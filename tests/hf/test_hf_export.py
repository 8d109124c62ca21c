"""A saved folder is all that is needed: loaded offline as remote code, in another process."""

import ast
import json
import os
import re
import runpy
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plt_megatron.hf import configuration_plt, model_card
from plt_megatron.hf.configuration_plt import PLTConfig
from plt_megatron.hf.modeling_plt import PLTForCausalLM, PLTModel
from tests.hf.tiny import ALL, SIZES, VARIANTS, full, make_model, make_tokens
from tests.running import ROOT, run

LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
options = json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options)
assert not any(name.startswith("plt_megatron") for name in sys.modules)
tokens = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    logits = model(tokens, use_cache=False).logits
text = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
torch.save((logits, text), sys.argv[4])
"""


def load_elsewhere(folder, tokens, tmp_path, **options):
    out = tmp_path / "out.pt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD, folder, json.dumps(options), json.dumps(tokens.tolist()), out]
    result = run(command, tmp_path, env=environment)
    return (*torch.load(out), result.stderr)


@pytest.mark.parametrize("name", ["plt", pytest.param("loopcoder", marks=pytest.mark.slow)])
def test_round_trip_in_another_process(name, tmp_path):
    model = make_model(**ALL[name])
    model.save_pretrained(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"configuration_plt.py", "modeling_plt.py", "config.json", "model.safetensors"} <= files
    tokens = make_tokens(2, 12)
    logits, text, _ = load_elsewhere(tmp_path / "model", tokens, tmp_path, dtype="float32")
    assert torch.equal(logits, full(model, tokens))
    assert torch.equal(text, model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.slow
def test_loop_count_lowered_at_load_time(tmp_path):
    model = make_model(loop_count=3)
    model.save_pretrained(tmp_path / "model")
    tokens = make_tokens(1, 12)
    logits, _, stderr = load_elsewhere(tmp_path / "model", tokens, tmp_path, dtype="float32", loop_count=1)
    assert torch.allclose(logits, full(model, tokens, loop_count=1), atol=1e-5)
    assert "plt_gate" not in stderr, "unused gates are no news"
    with pytest.raises(ValueError, match="loop_count must be an integer from 1 to 8, not 9"):
        PLTForCausalLM.from_pretrained(tmp_path / "model", loop_count=9)
    lower = PLTForCausalLM.from_pretrained(tmp_path / "model", loop_count=2)
    assert torch.allclose(full(lower, tokens), full(model, tokens, loop_count=2), atol=1e-5)


@pytest.mark.parametrize("scale", ["model", "channel"])
def test_what_one_loop_does_not_use_is_no_news(scale, tmp_path):
    model = make_model(learned_hidden_scale=scale)
    model.save_pretrained(tmp_path)
    one, info = PLTForCausalLM.from_pretrained(tmp_path, loop_count=1, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    tokens = make_tokens(1, 12)
    assert torch.allclose(full(one, tokens), full(model, tokens, loop_count=1), atol=1e-5)


def without(folder, *names, **added):
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "gone", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.plt_gate.bias", "lm_head.weight"]
)
def test_a_missing_tensor_is_an_error(gone, tmp_path):
    """transformers warns, and makes it up."""
    make_model().save_pretrained(tmp_path)
    without(tmp_path, gone)
    with pytest.raises(ValueError, match=re.escape(gone)) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    own = gone.removeprefix("model.")
    with pytest.raises(ValueError, match=re.escape(own)) if own != "lm_head.weight" else nullcontext():
        PLTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("loops", [None, 1])
def test_a_tensor_that_the_model_has_no_use_for_is_an_error(loops, tmp_path):
    """Such as norms that the configuration does not know. What others add beside the model is theirs."""
    make_model().save_pretrained(tmp_path)
    options = {"loop_count": loops} if loops else {}
    without(tmp_path, **{"v_head.summary.weight": torch.zeros(3)})
    for kind in (PLTForCausalLM, PLTModel):
        kind.from_pretrained(tmp_path, **options)
    strange = "model.layers.0.self_attn.q_norm.weight"
    without(tmp_path, **{strange: torch.zeros(16)})
    for kind in (PLTForCausalLM, PLTModel):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_norm\.weight"):
            kind.from_pretrained(tmp_path, **options)


def test_a_tied_head_may_be_missing(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tokens = make_tokens(1, 12)
    loaded = PLTForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert torch.equal(full(loaded, tokens), full(model, tokens))
    without(tmp_path, "model.embed_tokens.weight")
    with pytest.raises(ValueError, match="embed_tokens"):
        PLTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["plt", "loopcoder", "paper_norms", "olmo2", "vanilla", "span_loopcoder"])
def test_tensor_names(name, tmp_path):
    model = make_model(**ALL[name])
    model.save_pretrained(tmp_path)
    config = model.config
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    layer |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"}
    layer |= {"input_layernorm"} if config.norm_placement == "pre" else set()
    layer |= {"self_attn.q_norm", "self_attn.k_norm"} if config.qk_norm else set()
    post = config.norm_placement == "post" or config.ffn_output_norm
    layer |= {"post_feedforward_layernorm"} if post else set()
    names = {f"{part}.weight" for part in layer}
    gates = {"self_attn.plt_gate.weight", "self_attn.plt_gate.bias"} if config.loop_count > 1 else set()
    if config.loop_count > 1 and config.gate_input == "hidden":
        gates |= {"self_attn.plt_gate.gate_norm.weight"}
    want = {f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in names}
    want |= {f"model.layers.{i}.{name}" for i in range(2) for name in gates}
    want |= {"model.embed_tokens.weight", "model.norm.weight"}
    want |= set() if config.tie_word_embeddings else {"lm_head.weight"}
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == want
    if config.loop_count > 1:
        width = config.hidden_size if config.gate_input == "hidden" else config.head_dim
        assert saved["model.layers.0.self_attn.plt_gate.weight"].shape == (config.num_attention_heads, width)


def test_config_keys_survive(tmp_path):
    config = PLTConfig(**SIZES, **VARIANTS["loopcoder"], loop_count=3)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key, value in {**SIZES, **VARIANTS["loopcoder"], "loop_count": 3, "model_type": "plt"}.items():
        assert (saved["rope_parameters"] if key == "rope_theta" else saved)[key] == value
    for key in ("cross_loop_parallel", "share_kv", "gated_window", "qk_norm", "tie_word_embeddings"):
        assert isinstance(saved[key], bool)
    assert PLTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0rc1", "5.3.0"])
def test_older_transformers_is_refused(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"^a PLT needs transformers 5.4 or later, not {version}$"):
        runpy.run_path(configuration_plt.__file__)


@pytest.mark.parametrize("version", ["5.4.0.dev0", "5.4.0", "5.30.0.dev0", "6.0.0rc1"])
def test_newer_transformers_is_not(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    assert runpy.run_path(configuration_plt.__file__)["CHOICES"] == configuration_plt.CHOICES


def test_card_and_package_name_the_same_transformers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {one.name: one for one in map(Requirement, project["optional-dependencies"]["hf"])}
    assert "5.4.0" in extra["transformers"].specifier and "5.3.9" not in extra["transformers"].specifier
    assert "torch and transformers 5.4 or later.\nAssisted generation needs transformers 5.15" in model_card._USE


def test_shipped_files_import_torch_and_transformers_only():
    folder = Path(configuration_plt.__file__).parent
    for name in ("configuration_plt.py", "modeling_plt.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
                assert node.level == 0 or node.module == "configuration_plt"
            else:
                continue
            for module in modules:
                root = module.split(".")[0]
                assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop_count": 0}, "loop_count must be an integer from 1 to 8, not 0"),
        ({"loop_count": 2.0}, "loop_count must be an integer from 1 to 8, not 2.0"),
        ({"loop_span": [1, 3]}, r"loop_span must be \[first, last\) of num_hidden_layers 2, not \[1, 3\]"),
        ({"loop_span": [1.0, 2]}, r"loop_span must be \[first, last\) of num_hidden_layers 2, not \[1.0, 2\]"),
        ({"loop_span": 2}, r"loop_span must be \[first, last\) of num_hidden_layers 2, not 2"),
        ({"loop_order": "token"}, "loop_order must be one of stack, layer, not 'token'"),
        ({"loop_order": "layer"}, 'loop_order "layer" needs cross_loop_parallel, input_injection and'),
        ({"share_kv": False}, "gated_window needs share_kv"),
        ({"share_kv": False, "share_values": False, "gated_window": False}, "share_values false needs share_kv"),
        ({"gate_input": "key"}, "gate_input must be one of query, hidden"),
        ({"gate_side": "left"}, "gate_side must be one of local, global"),
        ({"gate_activation": "relu"}, "gate_activation must be one of sigmoid, tanh"),
        ({"window_size": 0}, "window_size must be a positive integer, not 0"),
        ({"head_dim": 15}, "head_dim must be even for RoPE, not 15"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ({"norm_placement": "both"}, "norm_placement must be one of pre, post"),
        ({"norm_placement": "post", "ffn_output_norm": True}, "leave ffn_output_norm false"),
        ({"attention_bias": True, "qkv_bias": True}, "mutually exclusive"),
        ({"cross_loop_parallel": False, "hidden_scale": 0.5}, "need cross_loop_parallel"),
        ({"full_attention": "first_loop"}, "full_attention must be one of every_loop, last_loop"),
        ({"full_attention": "last_loop"}, 'full_attention "last_loop" needs share_kv false'),
    ],
)
def test_bad_configurations_are_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        PLTConfig(**{**SIZES, **changes})
    assert "\n" not in str(error.value)
