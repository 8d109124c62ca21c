"""The benchmarks run; whether their bars hold is for a quiet machine."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from plt_megatron.errors import UserError
from tests.running import ROOT, run
from tests.unit.experiments.sweep_helpers import LOOPS, saved_plan
from tests.unit.project.test_sweep_benchmarks import load


def test_the_bubble_benchmark_measures_real_schedules(tmp_path, warm_python):
    """Two stages, short sleeps: whether the bar holds is for a quiet machine, that the bubble shrinks is not."""
    command = [warm_python, str(ROOT / "benchmarks/bubble.py"), "--stages", "2", "--microbatches", "2"]
    command += ["--loops", "1", "3", "--milliseconds", "60", "--json", str(tmp_path / "b.json")]
    result = run([*command, "--plot", str(tmp_path / "b.png")], status=None)
    assert result.returncode in (0, 1) and "(P-1)/(LM)" in result.stdout, result.stdout + result.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["1"]["predicted"] == 0.5 and figures["3"]["predicted"] == pytest.approx(1 / 6)
    assert 0.4 < figures["1"]["measured"] and figures["3"]["measured"] < 0.8 * figures["1"]["measured"]
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_the_training_benchmark_runs_and_explains_itself(tmp_path, warm_python):
    command = [warm_python, str(ROOT / "benchmarks/train.py"), "--quick", "--json", str(tmp_path / "figures.json")]
    result = run(command)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"fp32", "bf16"}
    assert all(value > 0 for seconds in figures.values() for value in seconds.values())
    assert result.stdout.count("where a PLT-2 step's time goes") == 2 and "aten::mm" in result.stdout


def test_the_gpu_benchmark_runs_without_a_gpu_when_told_to(tmp_path, warm_python):
    """With Transformer Engine's layers and FP8: tests/te/test_te_gpu_benchmark.py."""
    command = [warm_python, str(ROOT / "benchmarks/gpu.py"), "--output", str(tmp_path / "gpu")]
    result = run([*command, "--dry-run"])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {"rates", "correctness", "training", "speed", "decode"} <= results.keys()
    for form in ("torch bf16", "torch bf16, recommended"):
        assert results["correctness"][form]["median gradient"] == pytest.approx(4e-3, rel=0.9)
    assert (tmp_path / "gpu.md").read_text() in result.stdout


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(tmp_path, warm_python):
    command = [warm_python, str(ROOT / "benchmarks/gpu.py"), "--output", str(tmp_path / "gpu")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    assert "no GPU here" in run(command, status=2, env=environment).stderr


@pytest.mark.parametrize("name", ["depth_gain", "loop_curriculum", "learning_rate_transfer"])
def test_the_benchmark_of_one_sweep_refuses_another(tmp_path, name):
    plan = saved_plan(tmp_path, LOOPS.replace("axes: {", "axes: {optimizer.lr: [1e-3], "))
    with pytest.raises(UserError, match="another sweep; its axes are optimizer.lr, model.loop_count, not"):
        load(name).read(plan.folder)


def test_a_row_without_runs_misses_the_bar_of_depths_gain():
    depth = load("depth_gain")
    losses = {"k layers": 3.0, "2k layers": 2.9, "naive loop x2": 2.95, "PLT-2": 2.95}
    corpus = depth.Corpus("planted", {name: depth.Row(1.0, {1: x, 2: x, 3: x}) for name, x in losses.items()})
    assert depth.missed_bars(corpus) == ["no run of PLT-2 + loop loss"]


def test_a_serving_row_is_charged_for_no_other_rows_step(monkeypatch):
    """On a GPU vLLM returns from a step while its next one runs, which the next row would wait for."""
    serving = load("serving")
    clock = SimpleNamespace(now=0.0, gpu_done=0.0)

    class Engine:
        """Two batches under way, as with vLLM's asynchronous scheduling."""

        def __init__(self, seconds: float) -> None:
            self.seconds, self.ends = seconds, []

        def add_request(self, *args, **kwargs) -> None: ...

        def step(self) -> list:
            while len(self.ends) < 2:
                clock.gpu_done = max(clock.gpu_done, clock.now) + self.seconds
                self.ends.append(clock.gpu_done)
            clock.now = max(clock.now, self.ends.pop(0))
            return []

    monkeypatch.setattr(serving.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(clock, "now", max(clock.now, clock.gpu_done)))
    decodings = {seconds: serving.Decoding(Engine(seconds), 0, 0, 0) for seconds in (0.002, 0.004, 0.003)}
    for turn in range(6):
        for seconds in serving.in_turn(decodings, turn):
            assert decodings[seconds].milliseconds(6) == pytest.approx(1e3 * seconds), turn
