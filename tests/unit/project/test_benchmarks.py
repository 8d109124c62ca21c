"""The benchmarks run; whether their bars hold is for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_training_benchmark_runs_and_explains_itself(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/train.py"), "--quick", "--json", str(tmp_path / "figures.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"fp32", "bf16"}
    assert all(value > 0 for seconds in figures.values() for value in seconds.values())
    assert result.stdout.count("where a PLT-2 step's time goes") == 2 and "aten::mm" in result.stdout
