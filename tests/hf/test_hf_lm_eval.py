"""lm-evaluation-harness runs an exported folder by `--model hf`, on tasks from local files."""

import json
import os
import subprocess
import sys

import pytest

from tests.hf.lm_eval_tasks import write_tasks
from tests.hf.test_hf_generate import make_tokenizer
from tests.hf.tiny import make_model

pytest.importorskip("lm_eval")


@pytest.mark.parametrize("options", ["", pytest.param(",loop_count=1", marks=pytest.mark.slow)])
def test_lm_eval(tmp_path, options):
    make_model(loop_count=2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"w{i} w{i + 1} w7", "choices": ["w5", "w6 w8"], "answer": i % 2} for i in range(3, 9)]
    write_tasks(tmp_path, rows, stop="w9")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "choice,write"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32{options}"]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out")]
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, **caches}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert set(results) == {"choice", "write"}
    assert 0 <= results["choice"]["acc,none"] <= 1
