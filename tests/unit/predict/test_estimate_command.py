"""plt estimate as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plt_megatron.commands.estimate import main
from plt_megatron.predict.report import _count
from tests.running import ROOT, run

RUN = "configs/runs/plt2_1b.yaml"


def command(*arguments: str, cwd: Path = ROOT, blocked: Path | None = None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if blocked is not None:
        env["PYTHONPATH"] = str(blocked)
    return run([sys.executable, ROOT / "tools/estimate.py", *arguments], cwd, status=None, env=env)


def test_tables():
    done = command(RUN, "--nodes", "8", "parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=1")
    assert done.returncode == 0 and done.stderr == ""
    for text in (
        "1,178,735,104  total",
        "Run: TP1 PP2 DP32, 64 x h100",
        "global attention",
        "loop 2",
        "first-loop K/V",
        "of 1 sequence, per step",
        "pipeline bubble",
        "MFU",
        "KV cache",
        "GiB usable on a h100",
    ):
        assert text in done.stdout, text
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_counts_have_two_digits_or_all():
    assert [_count(number) for number in (0.123, 9.96, 99.4, 99.6, 1234.4)] == ["0.12", "10", "99", "100", "1,234"]


def test_a_layout_in_words_is_the_same_as_settings():
    words = command(RUN, "--json", "--layout", "TP2 SP PP2 DP2 full")
    settings = command(
        RUN, "--json", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=2", "parallel.data_parallel_size=2",
        "parallel.recompute_granularity=full",
    )  # fmt: skip
    assert words.returncode == 0 and words.stdout == settings.stdout
    assert json.loads(words.stdout)["world_size"] == 8


def test_json_is_the_same_and_complete():
    done = command(RUN, "--json", "--gpu", "h200", "--nodes", "2", "--context", "2048", "--batch", "8")
    answer = json.loads(done.stdout)
    assert answer["parameters_total"] == 1178735104 and answer["gpu"] == "h200" and answer["world_size"] == 16
    assert sum(answer["memory"][0]["components"].values()) == answer["peak_memory_bytes"]
    assert answer["decode"]["kv_cache_bytes"] == 2048 * 16 * 2 * 8 * 64 * 2
    assert set(answer["times"]) >= {"matmul", "attention", "bubble", "recompute"}


def test_it_works_from_anywhere_without_torch_and_quickly(tmp_path):
    """Packages that take seconds are replaced by ones that refuse to be imported."""
    for name in ("torch", "megatron", "transformers", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError(f'{__name__} imported')")
    before = os.times()
    started = time.perf_counter()
    done = command(str(ROOT / RUN), cwd=tmp_path, blocked=tmp_path)
    wall, after = time.perf_counter() - started, os.times()
    assert done.returncode == 0, done.stderr
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0, f"{spent:.2f} s of processor time, {wall:.2f} s on the clock"


def test_search():
    done = command("configs/runs/loopcoder_7b.yaml", "--nodes", "4", "--search", "--top", "3")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "fit into" in lines[0]
    assert lines[2].split()[:3] == ["layout", "micro", "batch"]
    assert all(line.startswith("TP") and "%" in line for line in lines[4:7]) and lines[7] == ""
    assert lines[8].startswith("best: parallel.tensor_model_parallel_size=")
    found = json.loads(
        command("configs/runs/loopcoder_7b.yaml", "--nodes", "4", "--search", "--top", "3", "--json").stdout
    )
    assert len(found) == 3 and found[0]["step_seconds"] <= found[1]["step_seconds"]
    best = " ".join(f"{key}={str(value).lower()}" for key, value in found[0]["overrides"].items())
    assert lines[8] == f"best: {best}"


def test_search_that_finds_nothing_names_the_nearest_and_fails():
    done = command("configs/runs/loopcoder_7b.yaml", "--nodes", "1", "--gpus-per-node", "1", "--gpu", "l4", "--search")
    assert done.returncode == 1
    assert "none fits; nearest: parallel." in done.stdout and "optimizer state" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RUN, "--gpu", "a100", "training.fp8.format=hybrid"], "error: training.fp8: sm80 has no FP8 units"),
        (
            [RUN, "--nodes", "3"],
            "error: configs/runs/plt2_1b.yaml:12: training.global_batch_size 1024 is not divisible by 96",
        ),
        ([RUN, "--layout", "CP2 DP4"], "parallel.cp_comm_type p2p with data.reset_at_document_boundaries"),
        ([RUN, "--nodes", "3", "--search"], "error: 24 ranks cannot be arranged"),
        ([RUN, "--search", "model.num_query_groups=7"], "not divisible by model.num_query_groups 7"),
        ([RUN, "model.vocab_size=null"], "error: the vocabulary is unknown: the tokenizer data/tokenizer.json"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
    assert all(line.startswith("error: ") for line in said.err.splitlines())


def test_the_tokenizer_says_the_vocabulary(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [{"id": 2, "content": "<|endoftext|>", "special": True, "single_word": False,
                                  "lstrip": False, "rstrip": False, "normalized": False}],
                "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<|endoftext|>": 2}, "unk_token": "a"},
            }
        )
    )  # fmt: skip
    done = command("configs/runs/plt2_tiny.yaml", f"data.tokenizer={tmp_path}", "--gpu", "cpu")  # a file's folder
    assert done.returncode == 0, done.stderr
    assert f"{128 * 64:,}  embedding" in done.stdout, "3 ids, padded to 128 rows of 64"
    assert "MiB" in done.stdout and "x cpu" in done.stdout
