"""Exports compute what the training model computes, and hold what a user needs."""

from __future__ import annotations

import json
import signal
import weakref
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from convert_helpers import (
    VARIANTS,
    VOCAB,
    hf_logits,
    make_model,
    make_tokens,
    megatron_logits,
    quiet,
    random_weights,
    save_random,
    save_run,
)
from safetensors.torch import load_file

from plt_megatron.commands import export as command
from plt_megatron.config import derived
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.hf import exporting
from plt_megatron.hf.averaging import AverageOptions, average
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.hf.importing import ImportOptions, import_model
from plt_megatron.hf.model_card import model_card
from plt_megatron.hf.sources import open_source
from plt_megatron.hf.verification import export_of


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_training_models(tmp_path, name):
    model, weights = save_random(tmp_path / "run", **VARIANTS[name])
    result = quiet((tmp_path / "run", tmp_path / "out"), max_shard_size="20kB")
    assert result.files > 1
    tokens = make_tokens()
    expected = megatron_logits(model, weights, tokens)
    actual = hf_logits(tmp_path / "out", tokens)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["loop_count"] == model.loop_count and config["vocab_size"] == VOCAB
    card = (tmp_path / "out" / "README.md").read_text()
    assert (model.loop_span is not None) == ("| layers that loop |" in card)
    if model.loop_count > 1:
        fewer = hf_logits(tmp_path / "out", tokens, loop_count=1)
        assert (fewer - megatron_logits(model, weights, tokens, loop_count=1)).abs().max() < 1e-5


PLT = "Parallel Loop Transformer (PLT, arXiv 2510.24824)"
LAST_ALONE = "3 loops, whose last loop alone attends to the whole context"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", "decoder-only transformer"),
        ("plt3", f"{PLT} of 3 loops"),
        ("naive loop", f"looped transformer, an ablation of the {PLT}, of 2 loops"),
        ("full attention in the last loop", f"variant of the {PLT} of {LAST_ALONE}"),
        ("full attention in the last loop, serial", f"looped transformer, a variant of the {PLT}, of {LAST_ALONE}"),
    ],
)
def test_what_the_card_calls_a_model(tmp_path, name, kind):
    save_random(tmp_path / "run", **VARIANTS[name])
    card = model_card(open_source(tmp_path / "run"), "out", [], "plt")
    assert f"\n\nA {kind}, converted with plt_megatron.\n" in card
    windowed = "| attention to the whole context | in the last loop only; 5 keys in the others |"
    assert (windowed in card) == ("last loop" in name) == ("unlike in training" in card)
    assert "AutoTokenizer" not in card and "model.generate(torch.tensor" in card, "it has no tokenizer"


def test_a_model_that_is_measured_in_bf16_turns_keys_by_exact_angles(tmp_path):
    """Rounded frequencies would be wrong by radians at the end of long rows."""
    save_random(tmp_path / "run", **VARIANTS["experts, biased, dense first"])
    loaded = export_of(open_source(tmp_path / "run"), torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_biases_of_experts_stay_in_fp32(tmp_path):
    """In an export in bf16, and in the model that is loaded from it, as in DeepSeek-V3's."""
    from transformers import AutoModelForCausalLM

    model, weights = save_random(tmp_path / "run", "bf16", **VARIANTS["experts, biased, dense first"])
    quiet((tmp_path / "run", tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    for layer in derived.expert_layers(model):
        gate, bias = f"model.layers.{layer}.mlp.gate.", weights[f"decoder.layers.{layer}.mlp.router.expert_bias"]
        assert not torch.equal(bias, bias.bfloat16())
        assert torch.equal(stored[f"{gate}e_score_correction_bias"], bias)
        assert torch.equal(loaded.get_buffer(f"{gate}e_score_correction_bias"), bias)
        assert stored[f"{gate}weight"].dtype == loaded.get_parameter(f"{gate}weight").dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| router | sigmoid scores, balanced by a bias on each |" in card
    assert "| dense layers | the first 2, of FFN size 56 |" in card
    learned = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("expert_bias"))
    assert f"| parameters | {learned:,} |" in card


@pytest.mark.usefixtures("warm_starts")
def test_everything_a_user_needs(tmp_path, tokenizer_model):
    from transformers import AutoTokenizer, pipeline

    model = make_model()
    weights = random_weights(model, 410)  # more ids than the tokenizer has are no fault
    progress = {"step": 200, "data_fingerprint": {"tokenizer": load_tokenizer(tokenizer_model).fingerprint}}
    run = save_run(tmp_path / "run", model, weights, tokenizer=tokenizer_model, **progress)
    records = [{"kind": "validation", "step": 200, "tokens": 9, "loop_count": n, "loss": 3.0 - n / 4} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said: list[str] = []
    result = export(ExportOptions(run, tmp_path / "out", verify=True), said.append)
    assert result.difference is not None and result.difference < 1e-5 and result.tokens == 64
    assert f"largest difference of logits over 64 tokens: {result.difference:.2e} of the largest logit" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer_files = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    code = {"configuration_plt.py", "modeling_plt.py"}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors", *tokenizer_files, *code}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 200 |" in card and f"| tokens | {200 * 8 * 64:,} |" in card
    assert "| loss with 2 loops | 2.5000 |" in card
    assert f"| parameters | {sum(tensor.numel() for tensor in weights.values()):,} |" in card
    (versions,) = (line for line in card.splitlines() if line.startswith("| versions |"))
    assert f"megatron-core {version('megatron-core')}, torch {torch.__version__}, " in versions
    source = open_source(run)
    source.progress["versions"]["megatron-core"] += "+17f3dea"  # as in earlier checkpoints
    assert versions in model_card(source, "out", [], "plt")
    changing = source.progress["config"]
    changing["training"]["batch_schedule"] = [{"until": 5000, "global_batch_size": 4, "increment": None}]
    changing["data"]["stages"] = [{"until": 9000, "sources": [{"path": "a/web", "name": None, "weight": 2.0}]}]
    changing["data"]["sources"] = [{"path": "a/code", "name": "programs", "weight": 1.0}]
    card = model_card(source, "out", [], "plt")
    assert "| global batch | 8 sequences, 4 at first |" in card
    assert "| data | web (weight 2) up to 9,000 tokens, then programs (weight 1) |" in card
    assert "decodes all loops of a token in one pass" in card
    source.model.cross_loop_parallel = False
    card = model_card(source, "out", [], "plt")
    assert "in one pass" not in card and "`generate` runs them one after another" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "def f(x):\n    return 12,5 \u00e9t\u00e9"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    imported = import_model(ImportOptions(tmp_path / "out", tmp_path / "back"))
    assert imported.tokenizer is not None  # the data's own: samples tokenized with it stay usable
    assert load_tokenizer(imported.tokenizer).fingerprint == load_tokenizer(tokenizer_model).fingerprint
    generate = pipeline("text-generation", model=str(tmp_path / "out"), trust_remote_code=True)
    assert generate("the loop", max_new_tokens=4)[0]["generated_text"].startswith("the loop")


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dtypes(tmp_path, run, precision):
    folder, model, weights = run
    quiet((folder, tmp_path / "out", precision), verify=precision == "bf16")  # the rounded weights, through both models
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert torch.equal(saved["model.norm.weight"], weights["final_layernorm.weight"].to(dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_one_tensor_at_a_time(tmp_path, run, monkeypatch):
    folder, _, _ = run
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def watched(path, tokenizer=None, **options):
        source = open_source(path, tokenizer, **options)
        read = source.weights

        def weights():
            nonlocal most
            for name, tensor in read():
                alive.add(tensor)
                most = max(most, len(alive))
                yield name, tensor
                del tensor

        source.weights = weights
        return source

    monkeypatch.setattr(exporting, "open_source", watched)
    quiet((folder, tmp_path / "out"))
    assert 1 <= most <= 2


def test_paths_may_be_texts(tmp_path, run):
    export(ExportOptions(str(run[0]), str(tmp_path / "out")), say=[].append)  # type: ignore[arg-type]
    import_model(ImportOptions(str(tmp_path / "out"), str(tmp_path / "back")))  # type: ignore[arg-type]
    folders = [path / "checkpoints" / "step_00000000" for path in (run[0], tmp_path / "back")]
    options = AverageOptions(folders, str(tmp_path / "mean"))  # type: ignore[arg-type,list-item]
    average(options, say=[].append)
    name, found = "final_layernorm.weight", dict(open_source(tmp_path / "mean").weights())
    assert torch.equal(found[name], run[2][name])


def test_the_command(tmp_path, run, monkeypatch, capsys):
    folder, _, _ = run
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    out = str(tmp_path / "out")
    arguments = ["--checkpoint", str(folder), "--output", out]
    assert command.main(arguments) == 0
    assert f"{out}: 24 tensors" in capsys.readouterr().out
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {out} exists: remove it, or choose another --output\n"


@pytest.mark.parametrize(
    ("window", "context", "tokens"), [(4, 4096, 64), (64, 4096, 160), (1024, 4096, 1056), (64, 96, 96)]
)
def test_the_verifications_text_is_longer_than_the_window(window, context, tokens):
    from plt_megatron.hf.verification import _tokens

    source = Mock(max_position_embeddings=context, vocab_size=50, tokenizer=None)
    source.model.window_size = window
    assert _tokens(source, Path()).shape == (1, tokens)
