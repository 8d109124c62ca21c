"""benchmarks/gpu.py where Transformer Engine and FP8 are, tiny: every mode runs, and its tables hold what it found.

Times and errors say nothing here; that the script runs without them is in tests/unit/project/test_benchmarks.py.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

MODES = {"torch bf16", "te bf16", "te fp8"}


def run_parts(folder: Path) -> dict[str, Any]:
    from benchmarks import gpu
    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import init_process_groups

    init_process_groups(ParallelConfig())
    return gpu.run_parts(gpu.DRY, ["rates", "correctness", "training", "speed"], folder / "gpu", "gpu.py")


def test_every_mode_runs(run_te, tmp_path):
    results = run_te(run_parts, 1, tmp_path, timeout_s=240)
    compared = MODES | {"te bf16 against torch bf16"}
    assert results["correctness"].keys() == compared | {f"{name}, recommended" for name in compared}
    errors = {name: figures["median gradient"] for name, figures in results["correctness"].items()}
    for form in ("", ", recommended"):
        assert 1e-4 < errors[f"te bf16{form}"] < 0.02 < errors[f"te fp8{form}"] < 0.3
        assert errors[f"te bf16 against torch bf16{form}"] < 0.02
    assert results["training"]["curves"].keys() == MODES
    for losses in results["training"]["curves"].values():
        assert losses[-1] < losses[0]
    ends = results["training"]["last quarter"]
    assert 0 < abs(ends["te fp8"] / ends["te bf16"] - 1) < 0.05
    means = results["training"]["running means"]
    assert all(
        one == pytest.approx(other, rel=0.05) for one, other in zip(means["te fp8"], means["te bf16"], strict=True)
    )
    speed = results["speed"]
    graphs = {f"{mode}, GPT with CUDA graphs" for mode in ("te bf16", "te fp8")}
    assert speed.keys() == MODES | {"te bf16, nothing fused"} | graphs
    # Another process has no such Transformer Engine: what fails there is said, and takes nothing else along.
    assert all("te " in speed[name].pop("failed") and not speed[name] for name in graphs)
    assert all(figures["ratio"] > 0 for name, figures in speed.items() if name not in graphs)
    report = (tmp_path / "gpu.md").read_text()
    assert "te bf16, GPT with CUDA graphs |  | did not run" in report
    assert all(f"{mode} | " in report for mode in MODES) and "copy GB/s" in report


def gradients_after_a_collection() -> dict[str, float]:
    """The largest element of each gradient, with a garbage collection before the forward pass."""
    from benchmarks import gpu
    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import init_process_groups

    init_process_groups(ParallelConfig())
    random_tokens = gpu.random_tokens

    def collect_before(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        return random_tokens(*args, **kwargs)

    with mock.patch.object(gpu, "random_tokens", collect_before):
        found = gpu.gradients(gpu.run_config(gpu.DRY.small, gpu.DRY.small_length, {"backend": "torch"}))
    return {name: float(gradient.abs().max()) for name, gradient in found.items()}


def test_no_gradient_is_lost_to_a_garbage_collection(run_distributed):
    assert all(run_distributed(gradients_after_a_collection, 1).values())


def run_graphs() -> tuple[list[int], int, dict[str, float]]:
    """GPT with graphs, whose capture is faked: the layers whose graph manager is called in the first step, how often
    megatron-core is asked to capture, and what is measured then."""
    import megatron.core.transformer.cuda_graphs as cuda_graphs
    from megatron.core import tensor_parallel
    from megatron.core.transformer.module import MegatronModule
    from torch import nn

    from benchmarks import gpu, gpu_graphs
    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import init_process_groups

    class Manager(nn.Module):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            assert config.cuda_graph_impl == "local" and random_states == [{"use_cudagraphable_rng": True}]

        def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
            called.append(module.layer_number)
            return super(MegatronModule, module).__call__(*args, **kwargs)

    called: list[int] = []
    captures: list[None] = []
    random_states: list[dict[str, Any]] = []
    init_process_groups(ParallelConfig())

    def seed(_: int, *, force_reset_rng: bool, **how: Any) -> None:
        random_states.append(how)

    with (
        mock.patch.multiple(cuda_graphs, CudaGraphManager=Manager, create_cudagraphs=lambda: captures.append(None)),
        mock.patch.object(gpu, "is_cpu", lambda: False),
        mock.patch.object(tensor_parallel, "model_parallel_cuda_manual_seed", seed),
    ):
        figures = gpu_graphs.measure("te bf16", dry=True)
    return called, len(captures), figures


def test_gpts_layers_are_graphs_captured_after_the_first_step(run_te):
    called, captures, figures = run_te(run_graphs, 1)
    steps = 4  # a dry run's: two to warm up, two timed
    assert called == [1, 2] * steps and captures == steps
    assert figures["tokens/s"] > 0


def test_curves_are_compared_tenth_by_tenth():
    from benchmarks.gpu_report import running_means

    assert running_means({"a": [float(step) for step in range(20)], "b": [1.0, 3.0]}) == {
        "a": [0.5 + 2 * tenth for tenth in range(10)],
        "b": [1.0, 3.0],
    }


def test_missed_bars_are_named():
    from benchmarks.gpu_report import missed_bars

    error = {"loss": 0.0, "worst gradient": 0.4, "in": "a.weight", "median gradient": 0.1}
    results = {
        "bars": True,
        "correctness": {"te bf16": error, "te fp8": error, "te bf16 against torch bf16": error},
        "training": {
            "last quarter": {"te bf16": 2.0, "te fp8": 2.1, "te fp8 attention": 2.01},
            "running means": {"te bf16": [4.0, 2.0], "te fp8": [4.1, 2.09], "te fp8 attention": [4.4, 2.01]},
        },
        "speed": {
            "te bf16": {"ratio": 0.9},
            "te fp8": {"ratio": 0.99},
            "te fp8, GPT with CUDA graphs": {"failed": "no memory"},
        },
    }
    missed = missed_bars(results)
    assert [line.split(":")[0] for line in missed] == [
        "te bf16",
        "te bf16 against torch bf16",
        "te fp8",
        "te fp8 attention",
        "te bf16",
        "te fp8, GPT with CUDA graphs",
    ]
    assert missed[-1].endswith("GPT did not run: no memory")
    assert "loss 2.1000 at the end, 2.0000 in bf16" in missed[2] and "10.0% off bf16's in tenth 1" in missed[3]
    assert missed_bars(results | {"bars": False}) == []


def test_what_is_no_number_misses_its_bar():
    from benchmarks.gpu import largest_error
    from benchmarks.gpu_report import missed_bars

    exact = {"loss": torch.tensor([2.0]), "a": torch.ones(2), "b": torch.ones(2)}
    errors = largest_error({**exact, "b": torch.tensor([1.0, math.nan])}, exact)
    assert errors["in"] == "b"
    (missed,) = missed_bars({"bars": True, "correctness": {"te bf16": errors}})
    assert "gradient of b" in missed
    errors = largest_error({**exact, "loss": torch.tensor([math.nan])}, exact)
    (missed,) = missed_bars({"bars": True, "correctness": {"te bf16": errors}})
    assert "the loss" in missed
