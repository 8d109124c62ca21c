"""lm-evaluation-harness: scores through the server equal those through transformers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import VOCAB
from server import serve

from tests.hf.lm_eval_tasks import write_tasks

pytest.importorskip("lm_eval")

OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28))


def questions() -> list[dict]:
    """Return 48 questions with four choices each, of one to three words."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{rng.randrange(1, VOCAB)}" for _ in range(count))

    return [
        {
            "question": words(rng.randrange(2, 90)),
            "choices": [words(rng.randrange(1, 4)) for _ in range(4)],
            "answer": 1,
        }
        for _ in range(48)
    ]


def evaluate(folder: Path, model: str, arguments: str) -> dict[str, list]:
    """Run lm-eval; return each task's responses (log-likelihoods of the choices, or text) and the scores."""
    out = folder / model
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "choice,write"]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    command += ["--batch_size", "1" if model == "local-completions" else "8"]
    command += [] if model == "local-completions" else ["--device", "cpu"]
    offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = {}
    for task in ("choice", "write"):
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        answers[task] = [sample["filtered_resps"] for sample in samples]
    (report,) = out.rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    return {**answers, "scores": [results["choice"]["acc,none"], results["write"]["exact_match,none"]]}


def test_the_server_scores_as_transformers_does(exports, tmp_path):
    export = exports("plt3", tokenizer=True)
    write_tasks(tmp_path, questions(), stop="t9")
    plain = evaluate(tmp_path, "hf", f"pretrained={export.folder},dtype=float32,trust_remote_code=True")
    with serve(export.folder, tmp_path, *OPTIONS) as server:
        arguments = f"model=plt,base_url={server.url}/v1/completions,tokenizer={export.folder},num_concurrent=4"
        served = evaluate(tmp_path, "local-completions", arguments)
    assert served["scores"] == plain["scores"] and 0 < plain["scores"][0] < 1
    # A completion's text begins with the space before its first word.
    assert [[text.strip() for text in one] for one in served["write"]] == [
        [text.strip() for text in one] for one in plain["write"]
    ]
    assert len(plain["choice"]) == len(served["choice"]) == 48
    for one, other in zip(served["choice"], plain["choice"], strict=True):
        assert [float(answer[0]) for answer in one] == pytest.approx([float(answer[0]) for answer in other], abs=2e-3)
        assert [str(answer[1]) for answer in one] == [str(answer[1]) for answer in other], "greedy or not"
