"""Imports: transformers' own tiny models, our own exports, and folders that are neither."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from convert_helpers import (
    VARIANTS,
    VOCAB,
    imported,
    make_tokens,
    megatron_logits,
    quiet,
    refuse_import,
    save_random,
)
from dense_models import DENSE, LLAMA3_ROPE, TINY, YARN_ROPE, save_dense
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from plt_megatron.commands import import_ as command
from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import DataConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.config_keys import read_config
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.hf.importing import ImportOptions, import_model
from plt_megatron.hf.sources import open_source, read_lineage
from plt_megatron.train.checkpoint.reading import read_weights
from tests.checkpoints import read_progress
from tests.files import update_json


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_compute_the_same_as_one_loop(tmp_path, name):
    _, expected = save_dense(tmp_path / "hf", name)
    result, weights = imported(tmp_path / "hf", tmp_path / "run")
    assert result.model.loop_count == 1 and result.fresh == result.dropped == 0 and result.precision == "fp32"
    actual = megatron_logits(result.model, weights, make_tokens())
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("precision", "name"),
    [*(("fp32", name) for name in VARIANTS), ("bf16", "plt3"), ("bf16", "experts, biased, dense first")],
)
def test_our_exports_come_back_bit_for_bit(tmp_path, name, precision):
    model, weights = save_random(tmp_path / "run", precision, **VARIANTS[name], backend="auto")
    quiet((tmp_path / "run", tmp_path / "out"))
    result, back = imported(tmp_path / "out", tmp_path / "back")
    assert result.precision == precision
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) and back[key].dtype == weights[key].dtype for key in weights)
    quiet((tmp_path / "back", tmp_path / "again"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    changed = {"vocab_size", "num_query_groups", "kv_channels"}  # None stands for what an import writes out
    assert not derived.adds_embeddings(model) or result.model.hidden_scale == model.hidden_scale
    assert derived.residual_factor(result.model) == pytest.approx(derived.residual_factor(model))
    changed |= {"hidden_scale", "residual_scaling", "residual_scale"}
    if not model.share_kv:
        changed |= {"share_values", "gated_window"}  # shares nothing either way
    for setting, value in vars(result.model).items():
        assert setting in changed or value == getattr(model, setting), setting


def test_other_loop_counts_keep_or_drop_the_gates(tmp_path):
    _, weights = save_random(tmp_path / "run", loop_count=2)
    quiet((tmp_path / "run", tmp_path / "out"))
    only = "is for one-loop models; this model's 2 loops"
    for message, given in (
        (f"--preset {only} have settings", {"loop_count": 3, "preset": "recommended"}),
        (f"--loop-span {only}", {"switches": {"loop_span": [0, 1]}}),
        (f"--full-attention {only}", {"switches": {"full_attention": "last_loop"}}),
    ):
        refuse_import(tmp_path / "out", message, **given)
    result, three = imported(tmp_path / "out", tmp_path / "three", loop_count=3)
    assert result.fresh == 0 and all(torch.equal(three[key], weights[key]) for key in weights)
    result, one = imported(tmp_path / "out", tmp_path / "one", loop_count=1)
    assert result.dropped == 4 and one.keys() == {key for key in weights if ".plt_gate." not in key}


# ---------------------------------------------------------------- what is written


@pytest.mark.slow
def test_layers_of_two_kinds_are_stored_as_a_run_stores_them(tmp_path):
    """Dense ones before experts, with biases: a run starts from them, and saves the same under the same keys."""
    from plt_megatron.hf.verification import single_process

    model, weights = save_random(tmp_path / "run", **VARIANTS["experts, biased, dense first"])
    written = tmp_path / "run" / "checkpoints" / "step_00000000"
    config = RunConfig(model=model, data=DataConfig(sequence_length=8), training=TrainingConfig(train_iters=1))
    with single_process():
        from plt_megatron.train.checkpoint.loading import load_weights
        from plt_megatron.train.megatron_engine import MegatronEngine
        from tests.checkpoints import save_checkpoint

        engine = MegatronEngine(config, VOCAB)
        load_weights(engine, written)
        saved = save_checkpoint(engine, tmp_path / "saved", {"step": 1})
    back = dict(read_weights(saved))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name].to(back[name])) for name in back)
    shapes = [FileSystemReader(path).read_metadata().state_dict_metadata for path in (written, saved)]
    ours, theirs = ({key: entry.size for key, entry in each.items() if key.startswith("decoder")} for each in shapes)
    assert ours == theirs and "decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in ours


def test_training_starts_from_it(tmp_path, caplog):
    """`checkpoint.load` with the model.yaml that is written; and only weights: no optimizer state is there.

    What is trained keeps what it is of: the context, of which its rows are a part, the source's name and its licence.
    """
    save_dense(tmp_path / "hf", "qwen2")
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: other\nlicense_name: 'so: so'\ntags: [a]\n---\n# hf\n")
    _, weights = imported(tmp_path / "hf", tmp_path / "run", loop_count=2)
    settings = ["training.precision=fp32", "training.train_iters=5", "model.backend=torch", "data.sequence_length=16"]
    config = load_config(tmp_path / "run" / "model.yaml", [*settings, f"output_dir={tmp_path}/new"])
    assert config.checkpoint.load == str(tmp_path / "run") and config.model.qkv_bias
    from plt_megatron.hf.verification import single_process

    with single_process(), caplog.at_level(logging.INFO):
        from plt_megatron.model.build import global_names
        from plt_megatron.train.checkpoint.store import CheckpointStore
        from plt_megatron.train.megatron_engine import MegatronEngine

        engine = MegatronEngine(config, VOCAB)
        store = CheckpointStore(tmp_path / "new" / "checkpoints", config, {})
        assert store.load(engine) is None  # step 0
        for name, parameter in global_names(engine.stage):
            value = parameter.detach()
            if name == "embedding.word_embeddings.weight":
                assert not value[VOCAB:].any()
                value = value[:VOCAB]
            assert torch.equal(value, weights[name]), name
        saved = store.save(engine, {"step": 1})
        config.checkpoint.weights_only = False
        with pytest.raises(UserError, match="has only weights, no optimizer state; set checkpoint.weights_only=true"):
            CheckpointStore(tmp_path / "other" / "checkpoints", config, {}).load(engine)
    assert f"starting from the weights of {tmp_path / 'run'}" in caplog.text
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(saved))
    said: list[str] = []
    export(ExportOptions(tmp_path / "new", tmp_path / "out"), said.append)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64
    assert [line for line in said if "max_position_embeddings" in line and "64" in line and "16" in line]
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"], front["license_name"]) == ("hf", "other", "so: so")
    assert "plt" in front["tags"] and "| weights from | hf (qwen2) |" in card
    again, _ = imported(tmp_path / "out", tmp_path / "again")
    progress = read_progress(again.checkpoint)
    assert (progress["base_model"], progress["license"]) == ("out", "other")


def test_a_models_name_on_the_hub(tmp_path):
    """Where the folder is one of the hub's cache. A card that says nothing, or is broken, is none."""
    folder = tmp_path / "models--Someone--Some-Model" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    assert read_lineage(folder) == {"base_model": "Someone/Some-Model"}
    for card in ("# no front matter\n---\nlicense: mit\n---\n", "---\n{: broken\n---\n", "---\n- a list\n---\n"):
        (folder / "README.md").write_text(card)
        assert read_lineage(folder) == {"base_model": "Someone/Some-Model"}
    for card in (
        *(b"---\nlicense: mit\n---\n", b"\xef\xbb\xbf---\r\nlicense: mit\r\n---", b"\n---\nlicense: mit\n---\ncaf\xe9"),
        *(b"---\nlicense: mit\ndate: 2024-02-30\n---\n", b"---\nlicense: mit\nx: !!int abc\n---\n"),
    ):
        (folder / "README.md").write_bytes(card)
        assert read_lineage(folder)["license"] == "mit"
    for card in (b"---\nlicense:\n---\n", b"---\nlicense: mit\nx: " + b"[" * 3000 + b"\n---\n", b"---" + b"\n" * 10**6):
        (folder / "README.md").write_bytes(card)
        assert "license" not in read_lineage(folder)


def save_llama(folder, tokenizer_model, **changes):
    """A Llama with a tokenizer of 400 ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 400, **changes})).save_pretrained(folder)
    shutil.copytree(tokenizer_model.parent, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("given", ["run", "../there/run"])
def test_the_model_yaml_works_from_any_folder(tmp_path, tokenizer_model, monkeypatch, given):
    folder = save_llama(tmp_path / "hf", tokenizer_model)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    result = import_model(ImportOptions(folder, Path(given)))
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "there" / "run" / "model.yaml")
    assert Path(config.checkpoint.load, "checkpoints").is_dir() and Path(config.data.tokenizer).is_file()
    assert open_source(tmp_path / "there" / "run").tokenizer is not None and result.tokenizer is not None


def test_the_tokenizer_comes_along(tmp_path, tokenizer_model):
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path / "hf", tokenizer_model, eos_token_id=[2, 5])
    generation = {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 5, 7], "pad_token_id": None}
    update_json(folder / "generation_config.json", **generation)
    result, _ = imported(folder, tmp_path / "run")
    assert result.tokenizer == tmp_path / "run" / "tokenizer" / "tokenizer.json"
    config = load_config(tmp_path / "run" / "model.yaml")
    assert config.data.tokenizer == str(result.tokenizer)
    (tmp_path / "run").rename(tmp_path / "moved")
    quiet((tmp_path / "moved", tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("the loop")["input_ids"] == AutoTokenizer.from_pretrained(folder)("the loop")["input_ids"]
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 5, 7] and settings["temperature"] == 0.6
    quiet((folder, tmp_path / "direct"))
    assert json.loads((tmp_path / "direct" / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 7]
    (folder / "tokenizer_config.json").unlink()  # config.json alone says where a text ends
    assert open_source(folder).tokenizer.eod == 2
    small = save_llama(tmp_path / "small", tokenizer_model, vocab_size=VOCAB)
    refuse_import(small, "has 400 ids, the model's vocabulary 117: it belongs to another model")


CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def test_chat_tokens_survive_a_second_import(tmp_path, tokenizer_model):
    """Llama's folders also have the sentencepiece model that tokenizer.json was made from, without the chat tokens."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path / "hf", tokenizer_model, vocab_size=402)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    update_json(folder / "tokenizer_config.json", split_special_tokens=False)
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (folder / name).write_text(CHAT)
    chat = [{"role": "user", "content": "the loop"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, return_dict=True)["input_ids"]
    assert {expected[0], expected[-1]} == {400, 401}
    for number in (1, 2):
        result = import_model(ImportOptions(folder, tmp_path / f"run{number}"))
        assert result.tokenizer is not None and result.tokenizer.name == "tokenizer.json"
        folder = tmp_path / f"out{number}"
        quiet((tmp_path / f"run{number}", folder))
        exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert exported.chat_template == {"default": CHAT, "tool_use": CHAT} and len(exported) == 402
        assert exported.apply_chat_template(chat, return_dict=True)["input_ids"] == expected


@pytest.mark.usefixtures("warm_starts")
def test_code_of_a_models_folder_is_not_asked_for(tmp_path, tokenizer_model):
    """It is not copied; a name such as `owner/repo--module.Class` would have readers of the export fetch and run it."""
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path / "hf", tokenizer_model)
    expected = AutoTokenizer.from_pretrained(folder)("the loop")["input_ids"]
    own = {"AutoTokenizer": ["tokenization_x.X", None]}
    update_json(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="X")
    imported(folder, tmp_path / "run")
    for source, name in ((tmp_path / "run", "out"), (folder, "direct")):
        quiet((source, tmp_path / name), verify=source == folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert tokenizer("the loop")["input_ids"] == expected


def test_dtypes(tmp_path):
    save_dense(tmp_path / "half", "llama", torch.float16)
    result, weights = imported(tmp_path / "half", tmp_path / "run")  # fp16 has no training precision: exact in fp32
    assert result.precision == "fp32"
    read = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(weights["final_layernorm.weight"], read["model.norm.weight"].float())
    save_dense(tmp_path / "bf16", "llama", torch.bfloat16)
    assert imported(tmp_path / "bf16", tmp_path / "run2")[0].precision == "bf16"
    result, weights = imported(tmp_path / "half", tmp_path / "run3", precision="bf16")
    assert weights["final_layernorm.weight"].dtype == torch.bfloat16
    assert read_progress(tmp_path / "run3")["config"]["training"]["precision"] == "bf16"


# ---------------------------------------------------------------- what cannot be converted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("embedding_scale", value) for value in ("abc", [1.0], float("nan"))),
        *(("max_position_embeddings", value) for value in (0, -5)),
        ("share_kv", "no"),
        ("bos_token_id", 5.0),
        ("eos_token_id", [2, "3"]),
    ],
)
def test_a_value_of_another_type_or_out_of_range(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "plt", "eos_token_id": [2, 3]}))
    assert read_config(tmp_path).model.embedding_scale == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "plt", key: value}))
    with pytest.raises(UserError, match=rf"config\.json: .*{key}"):
        read_config(tmp_path)


def test_keys_are_read_as_the_familys_own_model_reads_them(tmp_path):
    scaling = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4}}
    keys = {"model_type": "llama", "max_position_embeddings": 512, **scaling}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert read_config(tmp_path).model.rope_scaling.yarn.original_max_position_embeddings == 64
    ours = {"scoring_func": "sigmoid", "first_k_dense_replace": 1, "shared_expert_intermediate_size": 8}
    keys = {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, "use_routing_bias": True}
    (tmp_path / "config.json").write_text(json.dumps({**keys, **ours}))
    moe = read_config(tmp_path).model.moe
    assert (moe.router_score_function, moe.router_bias_update_rate) == ("softmax", None)
    assert (moe.first_k_dense_replace, moe.shared_expert_intermediate_size) == (0, None)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"model_type": "gpt_neox"}, r"model_type 'gpt_neox' is not one that can be converted \(iquest"),
        ("llama", {"model_type": None}, "model_type None is not one"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not one"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'linear'"),
        ("llama, yarn", {"rope_parameters": {**YARN_ROPE, "mscale": 0.7}}, "yarn with mscale 0.7 is not supported"),
        ("llama, yarn", {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.0}}, "with attention_factor 1.0 is"),
        ("llama, yarn", {"rope_parameters": {**YARN_ROPE, "factor": "long"}}, "config.json: "),
        ("llama 3.1", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "llama3 with low_freq_factor 2.0"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "the weights are quantized"),
        ("llama", {"intermediate_size": 64}, r"gate_proj\.weight has shape \(56, 48\), config\.json says \(64, 48\)"),
        ("llama", {"num_hidden_layers": 1}, r"has unknown tensors model\.layers\.1\."),
        ("llama", {"num_hidden_layers": 3}, r"lacks tensors model\.layers\.2\."),
        ("llama", {"hidden_size": "big"}, "config.json: "),
        ("llama", {"tie_word_embeddings": True}, r"but lm_head\.weight is not model\.embed_tokens\.weight"),
        ("llama", {"is_causal": False}, "is_causal False is not supported, only True"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters .*full_attention"),
        ("mistral", {"sliding_window": 32}, "sliding_window 32 is not supported, only None"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window True is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias True is not supported"),
    ],
)
def test_models_we_do_not_have(tmp_path, family, keys, message):
    save_dense(tmp_path / "hf", family)
    update_json(tmp_path / "hf" / "config.json", **keys)
    refuse_import(tmp_path / "hf", rf"{re.escape(str(tmp_path / 'hf'))}.*{message}")


def test_broken_folders(tmp_path):
    refuse_import(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    refuse_import(tmp_path / "empty", "empty has no config.json")
    folder = tmp_path / "hf"
    save_dense(folder, "llama", max_shard_size="30kB")
    refuse_import(folder, "--loop-count must be from 1 to 8, not 0", loop_count=0)
    refuse_import(folder, "--dtype must be fp32 or bf16, as in training, not fp16", precision="fp16")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, shard)
    refuse_import(folder, f"{name} is of type I8; only F32, BF16, F16 can be converted")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
    refuse_import(folder, f"{name} is not in {shard.name}")
    shutil.copytree(folder, tmp_path / "none", ignore=shutil.ignore_patterns("model*"))
    save_file({}, tmp_path / "none" / "model.safetensors")
    refuse_import(tmp_path / "none", "lacks tensors ")
    shard.unlink()
    refuse_import(folder, f"{shard.name} is missing")
    for content, problem in (("{", "valid JSON"), ("[]", "a JSON object")):
        (folder / "config.json").write_text(content)
        refuse_import(folder, f"config.json is not {problem}")


UNFINISHED = RuntimeError("unexpected pos 704 vs 598")  # torch.save's, once the disk is full
UNFINISHED.__context__ = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [UNFINISHED.__context__, UNFINISHED, UserError("x.safetensors: damaged")], ids=repr)
def test_nothing_half_written(tmp_path, monkeypatch, error):
    from plt_megatron.hf.safetensors_files import SafetensorsFolder

    save_dense(tmp_path / "hf", "llama")
    read, calls = SafetensorsFolder.read, []

    def failing(self, name):
        calls.append(name)
        if len(calls) == 5:
            raise error
        return read(self, name)

    monkeypatch.setattr(SafetensorsFolder, "read", failing)
    refuse_import(tmp_path / "hf", "No space left on device; nothing is written|^x.safetensors: damaged$")


def test_the_command(tmp_path, monkeypatch, capsys):
    save_dense(tmp_path / "hf", "llama")
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    arguments = ["--model", str(tmp_path / "hf"), "--output", str(tmp_path / "run"), "--loop-count", "2"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "step_00000000: llama, 2 loops, 19 tensors in fp32" in out and "4 of them are new, such as gates" in out
    assert "its initial logits are not the model's own; with --preset recommended they are" in out
    assert open_source(tmp_path / "run").model.loop_count == 2
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'run'} exists")
    arguments[3] = str(tmp_path / "other")
    assert command.main([*arguments, "--preset", "recommended"]) == 0
    assert "its initial logits are the model's own: later loops" in capsys.readouterr().out
