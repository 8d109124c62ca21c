"""lm-evaluation-harness runs an exported folder, on tasks from local files: by plt evaluate, and by `--model hf`."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from plt_megatron.hf.evaluation import keep
from plt_megatron.run_folder import metrics
from plt_megatron.run_folder.metrics import read_scores
from tests.hf.lm_eval_tasks import write_tasks
from tests.hf.test_hf_generate import make_tokenizer
from tests.hf.tiny import make_model

pytest.importorskip("lm_eval")


@pytest.fixture
def folder(tmp_path):
    """An export in `model`, and tasks."""
    make_model(loop_count=2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/README.md").write_bytes(b"# caf\xe9\n\n## Evaluation\n\nold\n\n## Use\n\nso\n")  # Latin-1
    rows = [{"question": f"w{i} w{i + 1} w7", "choices": ["w5", "w6 w8"], "answer": i % 2} for i in range(3, 9)]
    write_tasks(tmp_path, rows, stop="w9")
    return tmp_path


@pytest.fixture
def evaluate(folder, monkeypatch):
    """The command on an export of the folder, in this process, whose environment it changes."""
    from plt_megatron.commands import evaluate

    monkeypatch.setattr(os, "environ", dict(os.environ))
    return lambda model, *arguments: evaluate.main(["--model", str(folder / model), *arguments])


def run(folder, *command):
    caches = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, cwd=folder, env={**os.environ, **caches}, capture_output=True, text=True)


def test_plt_evaluate(folder):
    """Scores are printed, kept and on the card, in the place of older ones. The folder's own Python is not run."""
    (folder / "model/modeling_plt.py").write_text("open('ran', 'w')\n")
    command = ["plt_megatron", "evaluate", "--model", "model", "--include-path", ".", "--limit", "4", "--tasks"]
    done = run(folder, *command, "choice,write")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "ran").exists()
    scores = read_scores(folder / "model")
    assert {"choice/acc", "choice/acc_stderr", "write/exact_match"} <= set(scores)
    assert scores["choice/acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert ["choice/acc", f"{scores['choice/acc']:.4f}"] in [line.split() for line in done.stdout.splitlines()]
    card = (folder / "model/README.md").read_text(errors="surrogateescape")
    assert card.startswith("# caf\udce9\n\n## Use\n\nso\n\n## Evaluation\n") and "old" not in card
    assert f"| choice/acc | {scores['choice/acc']:.4f} |" in card and "| rows of each task | 4 |" in card


@pytest.mark.parametrize("ends", [None, 7, [7, 2]])
def test_log_likelihoods_are_sums_in_fp32_after_the_end_of_a_document(folder, ends):
    """Whatever the weights' precision; a token that begins texts for Hugging Face alone was in no training text."""
    from lm_eval.api.instance import Instance

    from plt_megatron.hf import evaluation

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    for part in (make_model(loop_count=2, eos_token_id=ends).bfloat16(), tokenizer):
        part.save_pretrained(folder / "model")
    harness = evaluation._model(folder / "model", "cpu", chat=False)
    (text,) = tokenizer([" ".join(f"w{i % 90 + 3}" for i in range(60))])["input_ids"]
    with torch.no_grad():
        end = tokenizer.eos_token_id if ends is None else 7  # the data's, if config.json tells
        logits = harness.model(torch.tensor([[end, *text[:-1]]])).logits
    assert logits.dtype == torch.bfloat16
    wanted = logits.float().log_softmax(-1)[0, range(len(text)), text].sum().item()
    request = Instance("loglikelihood_rolling", {}, (tokenizer.decode(text),), 0)
    assert harness.loglikelihood_rolling([request], disable_tqdm=True) == [pytest.approx(wanted, abs=1e-3)]


def test_a_task_that_the_model_cannot_run_is_one_line(folder, evaluate, capsys):
    task = folder / "write.yaml"
    task.write_text(task.read_text().replace("max_gen_toks: 6", "max_gen_toks: 100000"))
    assert evaluate("model", "--tasks", "write", "--include-path", str(folder)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "write" in error and "100000" in error
    assert not (folder / "model/evaluation.json").exists()


def test_a_text_that_fails_without_a_word_is_one_line(evaluate, monkeypatch, capsys):
    """lm-evaluation-harness asserts that a text has tokens, and not more than the context."""
    from plt_megatron.hf import evaluation

    def seed_all(number):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(number)

    def fail(**options):
        seed_all(1234)
        raise AssertionError

    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    monkeypatch.setattr(evaluation, "_harness", lambda *_: (Mock(simple_evaluate=fail), Mock()))
    seed_all(5)
    expected = [draw(), draw()]
    seed_all(5)
    drawn = [draw()]
    assert evaluate("model", "--tasks", "choice") == 2
    assert [*drawn, draw()] == expected, "it seeds the generators, which are the caller's"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "choice: a text is empty, or longer than the model's context" in error


@pytest.mark.slow
def test_errors(folder, evaluate, capsys):
    """It reads the names of some ten thousand tasks."""
    assert evaluate("model", "--tasks", "chance") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "there is no task 'chance' in lm-evaluation-harness" in error
    assert not (folder / "model/evaluation.json").exists()


def test_an_export_without_a_tokenizer_is_refused(folder, evaluate, capsys):
    make_model(loop_count=2).save_pretrained(folder / "bare")
    assert evaluate("bare", "--tasks", "choice", "--include-path", str(folder)) == 2
    assert "the model has no tokenizer" in capsys.readouterr().err


def test_tasks_that_are_not_there_are_one_line(folder):
    """Data of the hub that no cache has: before the model is loaded."""
    (folder / "far.yaml").write_text((folder / "choice.yaml").read_text().replace("task: choice", "task: far"))
    text = re.sub("dataset_path.*\n.*\n.*\n", "dataset_path: nobody/has-it\n", (folder / "far.yaml").read_text())
    (folder / "far.yaml").write_text(text)
    done = run(folder, "plt_megatron", "evaluate", "--model", "model", "--tasks", "far", "--include-path", ".")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "nobody/has-it" in line and "HF_HOME" in line and "--tasks far --download" in line
    assert "Traceback" not in done.stderr and not (folder / "model/evaluation.json").exists()


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("where", ["hf://datasets/nobody/has-it/rows.jsonl", "http://127.0.0.1:9/rows.jsonl"])
def test_data_on_a_server_out_of_reach_is_one_line(folder, where, download, monkeypatch):
    (folder / "choice.yaml").write_text((folder / "choice.yaml").read_text().replace(str(folder / "data.jsonl"), where))
    monkeypatch.setenv("HF_ENDPOINT", "http://nobody.invalid")
    command = ["evaluate", "--model", "model", "--tasks", "choice", "--include-path", "."]
    done = run(folder, "plt_megatron", *command, *(["--download"] if download else []))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "choice" in line and "Traceback" not in done.stderr
    assert ("HF_HOME" in line) is not download


@pytest.mark.parametrize(
    ("of_the_task", "instead"),
    [
        ("output_type: multiple_choice", "output_type: chosen"),
        ("{{question}}", "{{asked}}"),
        ("{{question}}", "{{question"),
        ("test_split: test", "test_split: train"),
        ("data.jsonl", "nowhere.jsonl"),
        ("metric: acc", "metric: luck"),
        (
            "output_type: multiple_choice",
            "output_type: multiple_choice\nfilter_list: [{name: n, filter: [{function: regex, regex_pattern: '('}]}]",
        ),
        ("test_split: test", "test_split: test\nnum_fewshot: 100"),
        ("{{question}}", "{{answer / 0}}"),
    ],
)
def test_a_broken_task_is_one_line(folder, evaluate, capsys, of_the_task, instead):
    """Not data of the hub that --download would bring."""
    task = folder / "choice.yaml"
    assert task.read_text().count(of_the_task) == 1
    task.write_text(task.read_text().replace(of_the_task, instead))
    assert evaluate("model", "--tasks", "choice", "--include-path", str(folder)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "choice" in error and "HF_HOME" not in error and "not on this machine" not in error
    assert not error.endswith(": None") and len(error) > 50


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(folder):
    (folder / "home").write_text("no folder")
    done = run(folder, "plt_megatron", "evaluate", "--model", "model", "--tasks", "choice", "--include-path", ".")
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and str(folder / "home") in error and "set HF_HOME" in error


def test_broken_data_is_one_line(folder, evaluate, capsys):
    (folder / "data.jsonl").write_text("no JSON\n")
    assert evaluate("model", "--tasks", "choice", "--include-path", str(folder)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the task choice cannot be loaded" in error


def test_scores_of_other_tasks_stay(tmp_path):
    """If as many rows were asked in the same way."""
    keep(tmp_path, {"a/acc": 0.5, "group_part/acc": 0.1}, ["a", "group"])
    keep(tmp_path, {"b/acc": 0.25, "group_part/acc": 0.2}, ["b", "group"])
    assert read_scores(tmp_path) == {"a/acc": 0.5, "b/acc": 0.25, "group_part/acc": 0.2}
    assert json.loads((tmp_path / "evaluation.json").read_text())["tasks"] == ["a", "b", "group"]
    card = (tmp_path / "README.md").read_text()
    assert "| a/acc | 0.5000 |" in card and "| b/acc | 0.2500 |" in card
    keep(tmp_path, {"a/acc_norm": 0.75, "group_part/acc": 0.2}, ["a", "group"])
    assert read_scores(tmp_path) == {"a/acc_norm": 0.75, "b/acc": 0.25, "group_part/acc": 0.2}, "a's metric is another"
    for how in ({"limit": 10}, {"limit": 10, "chat": True}):
        keep(tmp_path, {"b/acc": 0.75}, ["b"], **how)
        assert read_scores(tmp_path) == {"b/acc": 0.75} and "a/acc" not in (tmp_path / "README.md").read_text()
        keep(tmp_path, {"a/acc": 1.0}, ["a"], **how)
    for broken in ("{", "[]", '{"limit": null, "chat_template": false, "tasks": 1, "scores": 2}'):
        (tmp_path / "evaluation.json").write_text(broken)
        keep(tmp_path, {"b/acc": 0.75}, ["b"])
        assert read_scores(tmp_path) == {"b/acc": 0.75}


def test_two_that_end_together_keep_both_scores(tmp_path, monkeypatch):
    """The second reads what the first has written, not what was there before."""
    stock, first_has_read, second_is_done = metrics.write_json, threading.Event(), threading.Event()

    def slow(path, value):
        first_has_read.set()
        second_is_done.wait(0.3)  # it is, unless it waits for the first
        stock(path, value)

    monkeypatch.setattr(metrics, "write_json", slow)
    first = threading.Thread(target=keep, args=(tmp_path, {"a/acc": 0.5}, ["a"]))
    first.start()
    first_has_read.wait()
    monkeypatch.setattr(metrics, "write_json", stock)
    keep(tmp_path, {"b/acc": 0.25}, ["b"])
    second_is_done.set()
    first.join()
    assert read_scores(tmp_path) == {"a/acc": 0.5, "b/acc": 0.25}


def test_scores_that_cannot_be_written_are_printed(evaluate, monkeypatch, capsys):
    from plt_megatron.hf import evaluation

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"choice/acc": 0.5})
    monkeypatch.setattr(evaluation, "write_scores", full)
    assert evaluate("model", "--tasks", "choice") == 2
    printed = capsys.readouterr()
    assert printed.out.split() == ["choice/acc", "0.5000"]
    assert printed.err.startswith("error: ") and "model" in printed.err and "No space left" in printed.err


@pytest.mark.parametrize("what", ["exported again", "removed", "another card"])
def test_an_export_that_is_replaced_meanwhile_gets_no_scores_of_the_earlier_model(
    what, folder, evaluate, monkeypatch, capsys
):
    from plt_megatron.hf import evaluation

    def slow(model, *_, **__):
        if what == "another card":
            (model / "README.md").write_text("new")
        else:
            shutil.rmtree(model)
        if what == "exported again":
            make_model(loop_count=2).save_pretrained(model)
        return {"choice/acc": 0.5}

    monkeypatch.setattr(evaluation, "evaluate", slow)
    is_same = what == "another card"
    assert evaluate("model", "--tasks", "choice") == (0 if is_same else 2)
    printed = capsys.readouterr()
    assert printed.out.split() == ["choice/acc", "0.5000"]
    assert is_same or "model was replaced or removed while it was evaluated" in printed.err
    assert (folder / "model/evaluation.json").exists() == is_same
    assert (folder / "model").exists() == (what != "removed")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ",loop_count=1"])
def test_lm_eval(folder, options):
    command = ["lm_eval", "--model", "hf", "--tasks", "choice,write", "--include_path", str(folder)]
    command += ["--model_args", f"pretrained={folder / 'model'},trust_remote_code=True,dtype=float32{options}"]
    result = run(folder, *command, "--device", "cpu", "--batch_size", "2", "--output_path", str(folder / "out"))
    assert result.returncode == 0, result.stderr[-3000:]
    (report,) = (folder / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert set(results) == {"choice", "write"}
    assert 0 <= results["choice"]["acc,none"] <= 1
