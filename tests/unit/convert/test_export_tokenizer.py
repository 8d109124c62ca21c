"""Tokenizers of exports and imports: they encode as training does, and bring no code and no other files along."""

from __future__ import annotations

import json
import shutil

import pytest
from convert_helpers import make_model, quiet, random_weights, save_run

from plt_megatron.data.encoders import ChatEncoder
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.hf.sources import open_source
from plt_megatron.hf.tokenizer_files import copy_tokenizer, write_tokenizer
from tests.unit.data.data_helpers import CHATML, make_texts, train, write_jsonl


def test_another_models_tokenizer(tmp_path, tokenizer_model):
    shutil.copytree(tokenizer_model.parent, tmp_path / "tokenizer")
    moved = tmp_path / "tokenizer" / "tokenizer.model"
    run = save_run(tmp_path / "run", make_model(), random_weights(make_model()), tokenizer=moved)
    with pytest.raises(UserError, match=r"has 400 ids, the model's vocabulary 117: it belongs to another model"):
        quiet((run, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tokenizer"]


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
    with pytest.raises(UserError, match=str(tmp_path / "tokenizer.json")):  # not at the first export
        copy_tokenizer(tmp_path, tmp_path / "out", "plt", 400, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["tokenizer.model", "tokenizer.json"])
def test_a_broken_tokenizer_config_is_named_where_the_user_has_it(tokenizer_model, tmp_path, model):
    source = tmp_path / "source"
    source.mkdir()
    for name in {model, "tokenizer.json"}:
        shutil.copy(tokenizer_model.with_name(name), source)
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=str(source / "tokenizer_config.json")):
        copy_tokenizer(source, tmp_path / "out", "plt" if model.endswith("model") else "llama", 400, {})
    (tmp_path / "out").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=str(source / "tokenizer_config.json")):
        write_tokenizer(load_tokenizer(source / model), tmp_path / "out")


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
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert [open_source(tmp_path / name).tokenizer.eod for name in ("run", "out")] == [5, 5]


def test_a_sentencepiece_models_end_is_that_of_the_data(tmp_path, tokenizer_model):
    model, tokenizer = make_model(), load_tokenizer(tokenizer_model)
    end = tokenizer.token_id("<pad>")
    assert end is not None and end != tokenizer.eod
    run = save_run(tmp_path / "run", model, random_weights(model, 400), tokenizer=tokenizer_model, document_end=end)
    quiet((run, tmp_path / "out"))
    assert [open_source(tmp_path / name).tokenizer.eod for name in ("run", "out")] == [end, end]


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
