"""Exports: they compute what the training model computes, hold what a user needs, and appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from convert_helpers import (
    LOOPCODER,
    VARIANTS,
    VOCAB,
    hf_logits,
    make_model,
    make_tokens,
    megatron_logits,
    quiet,
    random_weights,
    save_run,
)
from safetensors.torch import load_file

from plt_megatron.commands import export as command
from plt_megatron.config import derived
from plt_megatron.data.encoders import ChatEncoder
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.hf import exporting, verification
from plt_megatron.hf.averaging import AverageOptions, average
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.hf.importing import ImportOptions, import_model
from plt_megatron.hf.model_card import model_card
from plt_megatron.hf.sources import open_source
from plt_megatron.hf.tokenizer_files import copy_tokenizer, write_tokenizer
from plt_megatron.hf.verification import export_of
from tests.unit.data.data_helpers import CHATML, make_texts, train, write_jsonl


@pytest.fixture
def run(tmp_path):
    """A run of a small PLT: (folder, model, weights)."""
    model = make_model()
    weights = random_weights(model)
    return save_run(tmp_path / "run", model, weights), model, weights


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_training_models(tmp_path, name):
    model = make_model(**VARIANTS[name])
    weights = random_weights(model)
    save_run(tmp_path / "run", model, weights)
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
    model = make_model(**VARIANTS[name])
    card = model_card(open_source(save_run(tmp_path / "run", model, random_weights(model))), "out", [], "plt")
    assert f"\n\nA {kind}, converted with plt_megatron.\n" in card
    windowed = "| attention to the whole context | in the last loop only; 5 keys in the others |"
    assert (windowed in card) == ("last loop" in name) == ("unlike in training" in card)
    assert "AutoTokenizer" not in card and "model.generate(torch.tensor" in card, "it has no tokenizer"


def test_a_model_that_is_measured_in_bf16_turns_keys_by_exact_angles(tmp_path):
    """Rounded frequencies would be wrong by radians at the end of long rows."""
    model = make_model(**VARIANTS["experts, biased, dense first"])
    run = save_run(tmp_path / "run", model, random_weights(model))
    loaded = export_of(open_source(run), torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_biases_of_experts_stay_in_fp32(tmp_path):
    """In an export in bf16, and in the model that is loaded from it, as in DeepSeek-V3's."""
    from transformers import AutoModelForCausalLM

    model = make_model(**VARIANTS["experts, biased, dense first"])
    weights = random_weights(model, dtype=torch.bfloat16)
    quiet((save_run(tmp_path / "run", model, weights, precision="bf16"), tmp_path / "out"))
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


def test_another_models_tokenizer(tmp_path, tokenizer_model):
    model = make_model()
    shutil.copytree(tokenizer_model.parent, tmp_path / "tokenizer")
    moved = tmp_path / "tokenizer" / "tokenizer.model"
    weights = random_weights(model)
    run = save_run(tmp_path / "run", model, weights, tokenizer=moved)
    with pytest.raises(UserError, match=r"has 400 ids, the model's vocabulary 117: it belongs to another model"):
        quiet((run, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tokenizer"]


@pytest.mark.usefixtures("warm_starts")
def test_everything_a_user_needs(tmp_path, tokenizer_model):
    from transformers import AutoTokenizer, pipeline

    model = make_model()
    weights = random_weights(model, 410)  # more ids than the tokenizer has are no fault
    progress = {"step": 200, "data_fingerprint": {"tokenizer": open_fingerprint(tokenizer_model)}}
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
    assert tokenizer.decode(tokenizer("def f(x):\n    return 12,5 \u00e9t\u00e9")["input_ids"]) == (
        "def f(x):\n    return 12,5 \u00e9t\u00e9"
    )
    imported = import_model(ImportOptions(tmp_path / "out", tmp_path / "back"))
    assert imported.tokenizer is not None  # the data's own: samples tokenized with it stay usable
    assert open_fingerprint(imported.tokenizer) == open_fingerprint(tokenizer_model)
    generate = pipeline("text-generation", model=str(tmp_path / "out"), trust_remote_code=True)
    assert generate("the loop", max_new_tokens=4)[0]["generated_text"].startswith("the loop")


def open_fingerprint(path: Path) -> str:
    from plt_megatron.data.tokenizer import load_tokenizer

    return load_tokenizer(path).fingerprint


def test_a_tokenizer_that_is_not_the_runs(tmp_path, tokenizer_model):
    model = make_model()
    weights = random_weights(model, 400)
    lost = tmp_path / "gone" / "tokenizer.model"
    fingerprint = {"tokenizer": "0" * 64}
    run = save_run(tmp_path / "run", model, weights, tokenizer=lost, data_fingerprint=fingerprint)
    with pytest.raises(
        UserError,
        match="which the run used, is missing .* where the run was started, or .*--tokenizer .plt export, plt diagnose",
    ):
        quiet((run, tmp_path / "out"))
    with pytest.raises(UserError, match="is not the file the model was trained with: its content differs"):
        quiet((run, tmp_path / "out"), tokenizer=tokenizer_model)
    copy = tmp_path / "bad"
    shutil.copytree(tokenizer_model.parent, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][10:]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    run = save_run(tmp_path / "run2", model, weights, tokenizer=copy / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.json does not encode like .*tokenizer\.model"):
        quiet((run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", ["tokenizer.json", "nothing"])
def test_a_chat_template_beside_a_sentencepiece_model(tmp_path, tokenizer_model, beside):
    """It comes along; a list of tokens that the model does not have stays."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    for name in names if beside == "tokenizer.json" else names[:1]:
        shutil.copy(tokenizer_model.with_name(name), folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "added_tokens.json").write_text('{"<other>": 400}')
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(folder / "tokenizer.model"), tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (exported.chat_template, len(exported)) == (template, 400)


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_broken_file_beside_a_sentencepiece_model_is_named(tokenizer_model, tmp_path, content):
    shutil.copy(tokenizer_model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=str(tmp_path / "tokenizer.json")):
        write_tokenizer(load_tokenizer(tmp_path / "tokenizer.model"), tmp_path)


def test_an_import_copies_the_models_files_alone(tokenizer_model, tmp_path):
    """Of the hub's cache, where they are links, too; but no other file that a link names. An export does not either."""
    (tmp_path / "secret").write_text("secret")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "0a"
    folder.mkdir(parents=True)
    shutil.copy(tokenizer_model.with_name("tokenizer.json"), cache / "blobs" / "1")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "added_tokens.json").symlink_to("tokenizer_config.json")
    assert copy_tokenizer(folder, tmp_path / "one", "llama", 400, {}) == tmp_path / "one" / "tokenizer.json"
    assert (tmp_path / "one" / "added_tokens.json").read_text() == "{}"
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "three").mkdir()
    with pytest.raises(UserError, match="merges.txt"):
        copy_tokenizer(folder, tmp_path / "two", "llama", 400, {})
    assert not (tmp_path / "two").exists()
    with pytest.raises(UserError, match="merges.txt"):
        write_tokenizer(load_tokenizer(folder / "tokenizer.json"), tmp_path / "three")


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer"])
def test_an_import_and_its_export_encode_as_training_does(tmp_path, kind):
    """And not as the class that the model's tokenizer_config.json names, whose special tokens and padding they keep."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    fast = Tokenizer(
        models.BPE({"1": 0, "2": 1, "3": 2, "4": 3, "12": 4, "34": 5, "\u2581": 6}, [("1", "2"), ("3", "4")])
    )
    if kind == "GPT2Tokenizer":
        groups = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([groups, pre_tokenizers.ByteLevel(False, use_regex=False)])
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    end = "<|endoftext|>" if kind == "GPT2Tokenizer" else "</s>"
    fast.add_special_tokens([AddedToken(end, normalized=False)])
    folder = tmp_path / "model"
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "model_max_length": 77, "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    read = copy_tokenizer(folder, tmp_path / "in", "llama", 8, {})
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(read), tmp_path / "out")
    for text in ("1234", "  12", " 3"):
        ids = load_tokenizer(folder / "tokenizer.json").encode(text)
        for made in ("in", "out"):
            theirs = AutoTokenizer.from_pretrained(tmp_path / made)
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids, (text, made)
    side = "left" if kind == "LlamaTokenizer" else "right"
    assert (theirs.eos_token, theirs.padding_side, theirs.model_max_length) == (end, side, 77)


def test_a_sentencepiece_model_that_no_export_could_have_is_not_imported(tmp_path, tokenizer_model):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(tokenizer_model.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=str(tmp_path / "tokenizer.model")):
        copy_tokenizer(tmp_path, tmp_path / "in", "llama", 400, {})
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("known", [{}, {"imported_from": "a model"}, {"made_elsewhere": True}])
def test_prompts_begin_as_texts_did_in_training(tmp_path, known):
    """Without the token that a public model's tokenizer puts before them, unless it is that model or its data; and they
    end with the token that the data names (`plt preprocess --eod-token`)."""
    from tokenizers import Tokenizer, models, processors
    from transformers import AutoTokenizer

    fast = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    fast.add_special_tokens(["<s>", "</s>", "<end>"])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    (tmp_path / "tokenizer").mkdir()
    fast.save(str(tmp_path / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    model, path = make_model(), tmp_path / "tokenizer/tokenizer.json"
    run = save_run(tmp_path / "run", model, random_weights(model, 6), tokenizer=path, document_end=5, **known)
    quiet((run, tmp_path / "out"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]
    assert ids == [3, 0, 1] if known else ids == load_tokenizer(path).encode("ab") == [0, 1]
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [5, 4]


@pytest.mark.parametrize("read", ["tokenizer.model", "tokenizer.json"])
def test_an_exports_chat_template_writes_the_tokens_of_training(tmp_path, read):
    """Control tokens among them, which texts without a template do not have."""
    from transformers import AutoTokenizer

    corpus, folder = write_jsonl(tmp_path / "corpus.jsonl", make_texts(300)), tmp_path / "tokenizer"
    symbols = ("<|im_start|>", "<|im_end|>")
    train(corpus, folder, control_symbols=symbols)
    splits = []
    for name, template in (("bare", None), ("chat", CHATML)):
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        (tmp_path / name).mkdir()
        write_tokenizer(load_tokenizer(folder / read), tmp_path / name)
        splits.append(json.loads((tmp_path / name / "tokenizer_config.json").read_text())["split_special_tokens"])
    assert splits == [True, False]
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    encoder = ChatEncoder(load_tokenizer(folder / "tokenizer.json"), append_eod=False)
    trained = encoder([json.dumps({"messages": messages, "tools": None})]).flat.tolist()
    exported = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert exported.apply_chat_template(messages, return_dict=True)["input_ids"] == trained
    assert {exported.convert_tokens_to_ids(symbol) for symbol in symbols} <= set(trained)


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


def test_bf16_checkpoints_export_as_bf16(tmp_path):
    model = make_model()
    weights = random_weights(model)
    run = save_run(tmp_path / "run", model, weights, precision="bf16")
    quiet((run, tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], weights["final_layernorm.weight"].bfloat16())


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
    assert torch.equal(
        dict(open_source(tmp_path / "mean").weights())["final_layernorm.weight"], run[2]["final_layernorm.weight"]
    )


@pytest.mark.usefixtures("warm_starts")
def test_the_verification_sees_a_wrong_export(tmp_path, run, monkeypatch):
    folder, _, _ = run
    right = exporting.to_hf

    def wrong(weights, rules):
        for name, tensor in right(weights, rules):
            yield name, tensor + 0.01 if name.endswith("layers.1.self_attn.plt_gate.weight") else tensor

    monkeypatch.setattr(exporting, "to_hf", wrong)
    with pytest.raises(UserError, match=r"logits differ by up to \d\.\d+e-\d+ of .*, more than 2e-05; nothing is wri"):
        quiet((folder, tmp_path / "out"), verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_verification_leaves_the_calling_process_and_the_home_folder_alone(tmp_path, run, monkeypatch):
    monkeypatch.setattr(verification, "single_process", None)  # of this process
    for name in ("HF_MODULES_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    random, hook = torch.get_rng_state(), sys.excepthook
    assert quiet((run[0], tmp_path / "out"), verify=True).difference < 1e-5
    assert torch.equal(torch.get_rng_state(), random) and sys.excepthook is hook
    assert [path.parent.name for path in tmp_path.rglob("modeling_plt.py")] == ["out"]


@pytest.mark.usefixtures("warm_starts")
def test_the_verification_allows_for_the_size_of_logits(tmp_path):
    """Rounding grows with them: those of public models reach 40."""
    model = make_model()
    weights = random_weights(model)
    weights["final_layernorm.weight"] *= 1000
    save_run(tmp_path / "run", model, weights)
    result = quiet((tmp_path / "run", tmp_path / "out"), verify=True)
    assert megatron_logits(model, weights, make_tokens()).abs().max() > 100 and result.difference < 1e-5


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped(), SystemExit(143)])
def test_nothing_half_written(tmp_path, run, monkeypatch, error):
    folder, _, _ = run

    def stopping(weights, rules):
        yield from list(exporting.to_hf_original(weights, rules))[:3]
        raise error

    monkeypatch.setattr(exporting, "to_hf_original", exporting.to_hf, raising=False)
    monkeypatch.setattr(exporting, "to_hf", stopping)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        quiet((folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if isinstance(error, OSError):
        assert "No space left on device; nothing is written" in str(caught.value)


def test_all_files_reach_the_disk_before_the_folder_has_its_name(tmp_path, run, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        if not (tmp_path / "out").exists():
            synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    quiet((run[0], tmp_path / "out"))
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= synced


def test_targets_and_checkpoints_that_cannot_be_used(tmp_path, run):
    folder, model, weights = run
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists: remove it, or choose another --output"):
        quiet((folder, tmp_path / "there"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="'many' is not a size"):
        quiet((folder, out), max_shard_size="many")
    with pytest.raises(UserError, match="nowhere: no such run or checkpoint"):
        quiet((tmp_path / "nowhere", out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no complete checkpoint there"):
        quiet((tmp_path / "empty", out))
    weights = dict(weights)
    del weights["decoder.layers.1.self_attention.core_attention.plt_gate.bias"]
    del weights["decoder.layers.0.self_attention.core_attention.plt_gate.bias"]
    with pytest.raises(UserError, match=r"lack tensors decoder\.layers\.0\..*plt_gate\.bias, decoder\.layers\.1\."):
        quiet((save_run(tmp_path / "gateless", model, weights), out))
    progress = folder / "checkpoints" / "step_00000000" / "__0_0.distcp"
    progress.write_bytes(progress.read_bytes()[:-1])
    with pytest.raises(UserError, match="run: no complete checkpoint there"):
        quiet((folder, out))
    assert not out.exists()


def test_a_checkpoint_of_a_newer_program(tmp_path, run):
    _, model, weights = run
    from plt_megatron.hf.sources import saved_model

    with pytest.raises(UserError, match=r"model\.router is a setting of a newer version"):
        saved_model({"router": 1}, tmp_path)
    assert saved_model({"num_layers": 3}, tmp_path).num_layers == 3


def test_the_loopcoder_format_says_when_it_cannot(tmp_path):
    yarn = VARIANTS["yarn rope"] | {"qk_layernorm": True}
    model = make_model(**{**LOOPCODER, **yarn})
    run = save_run(tmp_path / "run", model, random_weights(model))
    what = r"model\.qk_layernorm is True, model\.rope_scaling\.yarn is set"
    with pytest.raises(UserError, match=rf"cannot express that {what}; use --format plt"):
        quiet((run, tmp_path / "out"), style="loopcoder")
    plain = make_model(loop_count=1)
    run = save_run(tmp_path / "plain", plain, random_weights(plain))
    with pytest.raises(UserError, match=r"cannot express that model\.loop_count is 1"):
        quiet((run, tmp_path / "out"), style="loopcoder")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, run, monkeypatch, capsys):
    folder, _, _ = run
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    out = str(tmp_path / "out")
    arguments = ["--checkpoint", str(folder), "--output", out]
    assert command.main(arguments) == 0
    assert f"{out}: 24 tensors" in capsys.readouterr().out
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {out} exists: remove it, or choose another --output\n"
