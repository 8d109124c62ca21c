"""Text from an export, by the command a user types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from convert_helpers import make_model, random_weights, save_run

ROOT = Path(__file__).resolve().parents[3]


def generate(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/generate.py"), "--model", str(folder), "--prompt", "the loop", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_prompt_is_continued_and_the_seed_decides(tmp_path, tokenizer_model):
    from plt_megatron.hf.exporting import ExportOptions, export

    run = save_run(tmp_path / "run", make_model(), random_weights(make_model(), 400), tokenizer=tokenizer_model)
    export(ExportOptions(run, tmp_path / "out"), lambda line: None)
    texts = [generate(tmp_path / "out", "--max-new-tokens", "6", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert all(text.startswith("the loop") and len(text) > len("the loop\n") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_a_folder_without_a_model_is_named(tmp_path):
    result = generate(tmp_path)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path}: no exported model")
    assert "Traceback" not in result.stderr
