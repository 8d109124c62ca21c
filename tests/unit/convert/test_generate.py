"""Text from an export, by the command a user types."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_helpers import make_model, random_weights, save_run
from safetensors.torch import load_file, save_file

from plt_megatron.commands import generate as generate_command
from plt_megatron.errors import UserError
from plt_megatron.hf import generation
from plt_megatron.hf.exporting import ExportOptions, export
from tests.files import update_json
from tests.running import ROOT, run


@pytest.fixture
def generate(warm_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, on a folder with more options."""
    command = [warm_python, ROOT / "tools/generate.py", "--prompt", "the loop", "--model"]
    return lambda folder, *more: run([*command, folder, *more], status=None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_model) -> Path:
    """An export in several shards."""
    folder = tmp_path_factory.mktemp("generate")
    run = save_run(folder / "run", make_model(), random_weights(make_model(), 400), tokenizer=tokenizer_model)
    export(ExportOptions(run, folder / "out", max_shard_size="50KB"), lambda line: None)
    assert len(list((folder / "out").glob("*.safetensors"))) > 2
    return folder / "out"


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An export to change."""
    return shutil.copytree(exported, tmp_path / "out")


def test_a_prompt_is_continued_and_the_seed_decides(generate, exported):
    texts = [generate(exported, "--max-new-tokens", "6", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert all(text.startswith("the loop") and len(text) > len("the loop\n") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_a_broken_tokenizer_is_one_line(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=rf"{copy}.*its tokenizer"):
        generation.load_export(copy)


def test_no_temperature_is_the_likeliest_token_whatever_the_folder_prefers(exported, copy, capfd):
    likeliest = generation.generate(str(exported), "the loop", 12, 0.0, 1).text
    update_json(copy / "generation_config.json", do_sample=True, temperature=1.7, top_p=0.9, top_k=30)
    assert {generation.generate(str(copy), "the loop", 12, 0.0, seed).text for seed in (1, 2)} == {likeliest}
    assert "generation flags" not in capfd.readouterr().err


def test_a_prompt_that_is_not_utf_8():
    with pytest.raises(UserError, match="at character 1"):
        generation.generate("nowhere", "a\udcff", 4, 0.0, 1)


def test_a_folders_own_python_is_not_run(copy, tmp_path):
    for name in ("modeling_plt.py", "configuration_plt.py"):
        (copy / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    found = generation.generate(str(copy), "the loop", 4, 0.0, 0)
    assert found.text.startswith("the loop") and not found.has_chat_template
    assert not (tmp_path / "ran").exists()


def test_a_chat(generate, exported, copy):
    """The prompt goes through the tokenizer's template, and the answer alone is printed."""
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as some tokenizers are saved
    update_json(copy / "tokenizer_config.json", model_input_names=names)
    greedy = ("--max-new-tokens", "6", "--temperature", "0")
    plain, chat = generate(copy, *greedy), generate(copy, *greedy, "--chat")
    answer = plain.stdout.removeprefix("the loop").strip()
    assert answer == chat.stdout.strip() != "", (plain.stderr, chat.stderr)
    assert "--chat" in plain.stderr and "--chat" not in chat.stderr
    with pytest.raises(UserError, match=r"no chat template"):
        generation.generate(str(exported), "the loop", 4, 0.0, 0, chat=True)
    for template in ("{{ raise_exception('a system message is needed') }}", "{{ messages +"):
        (copy / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match="chat template cannot render the prompt"):
            generation.generate(str(copy), "the loop", 4, 0.0, 0, chat=True)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_temperature_that_cannot_be(capsys, value):
    with pytest.raises(SystemExit, match="2"):
        generate_command.main(["--model", "model", "--prompt", "the loop", "--temperature", value])
    assert "error: --temperature must be " in capsys.readouterr().err


def test_the_callers_random_state_stays(exported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of a driver that is too old for torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generation.generate(str(exported), "the loop", 4, 0.8, 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize(
    "numbers", [(0, 0.8, 0), (4, -0.1, 0), (4, 1e-40, 0), (4, math.nan, 0), (4, 0.8, 2**32), (4, 0.8, -1)]
)
def test_numbers_that_cannot_be_from_a_program(exported, numbers):
    with pytest.raises(UserError, match="max_new_tokens {}, temperature {}, seed {}:".format(*numbers)):
        generation.generate(str(exported), "the loop", *numbers)


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def name_other_shapes(folder: Path) -> None:
    path, name = first_shard(folder), "model.embed_tokens.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:200].clone()}, path)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def drop_file(folder: Path) -> None:
    """The first shard goes, and the index does not know it: transformers would make its tensors up."""
    index, gone = folder / "model.safetensors.index.json", first_shard(folder)
    gone.unlink()
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != gone.name}
    index.write_text(json.dumps(content))


def drop_ids(folder: Path) -> None:
    """The model lacks the tokenizer's last ids."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        ends = {name for name in tensors if name in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(tensors | {name: tensors[name][:40].clone() for name in ends}, path)
    update_json(folder / "config.json", vocab_size=40)


DAMAGES = {
    "a tokenizer of more ids": (drop_ids, "ids, the model's vocabulary 40: it belongs to another model"),
    "truncated": (truncate, r"model-00001-of-\d+\.safetensors: not a safetensors file, or a damaged one"),
    "wrong shape": (name_other_shapes, r"model\.embed_tokens\.weight"),
    "a tensor is nowhere": (drop_file, r"lacks tensor"),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_one_line(copy, damage):
    apply, said = DAMAGES[damage]
    apply(copy)
    with pytest.raises(UserError, match=said) as error:
        generation.generate(str(copy), "the loop", 4, 0.0, 0)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_the_command_on_a_truncated_file(generate, copy):
    truncate(copy)
    result = generate(copy)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_an_empty_prompt_and_a_folder_without_a_model_are_refused(exported, tmp_path, capsys):
    assert generate_command.main(["--model", str(tmp_path), "--prompt", "the loop"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no exported model")
    with pytest.raises(UserError, match="the prompt is empty"):
        generation.generate(str(exported), "", 4, 0.0, 0)
