"""The fused gated window in Triton's interpreter, against dense attention in float64; and compiled for two GPUs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import pytest

from tests.running import ROOT, run

pytest.importorskip("triton")

BOUNDS = {"bf16": 1.5e-2, "fp16": 2e-3}  # of the largest value: eight and eleven bits of mantissa
FP32 = 1e-5


def run_script(path: str, *arguments: str, **environment: str) -> Any:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return json.loads(run([sys.executable, ROOT / path, *arguments], env=variables).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("which", "count"), [(["quick"], (3, 1)), pytest.param([], (19, 6), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_the_kernels_equal_dense_attention(which, count):
    """Output and gradients, of the kernels and of whole models."""
    results = run_script("tests/unit/model/gated_window_cases.py", *which)
    wrong = {}
    for name, errors in {**results["cases"], **results["models"]}.items():
        bound = BOUNDS.get(name.partition(",")[0], FP32)
        wrong |= {f"{name}: {tensor}": error for tensor, error in errors.items() if not error <= bound}
    assert (len(results["cases"]), len(results["models"])) == count and not wrong, wrong
    assert results["strided"]["out"] == 0, "strided inputs are read where they are"
    assert all(error > 1e-2 for error in results["mistakes"].values()), "the comparison sees every mistake"
    assert results["same twice"], "two backward passes give the same bits"


def check_resources(rows: list[dict[str, Any]]) -> None:
    """Within what a card gives a block of threads; registers hardly spill."""
    print(*rows, sep="\n")
    for row in rows:
        assert row["shared"] <= {80: 163, 89: 99, 90: 227}[row["sm"]] * 1024, row
        limit = 640 if row["head_dim"] == 256 else {80: 256}.get(row["sm"], 128)
        assert row["registers"] <= 255 and row["spilled bytes"] <= limit, row


@pytest.mark.slow  # half a minute of compiling
def test_the_kernels_compile_for_a100_and_h100_at_every_head_dimension():
    rows = run_script("tests/unit/model/gated_window_compile.py", "80,90", "64,96,128")
    assert len(rows) == 18
    check_resources(rows)


@pytest.mark.slow
def test_wide_heads_in_fp32_fit_into_a_consumer_card():
    rows = run_script("tests/unit/model/gated_window_compile.py", "89", "256")
    assert len(rows) == 3
    check_resources(rows)


def test_rows_and_heads_may_be_more_than_a_grid_s_second_axis_holds(monkeypatch):
    """CUDA allows 2^31 - 1 programs on the first axis and 65,535 on the second: short rows have many heads."""
    import torch

    from plt_megatron.model import gated_window_kernel as kernels

    grids = {}
    for name in ("_forward_kernel", "_backward_queries_kernel", "_backward_keys_kernel"):
        launcher = mock.MagicMock()
        launcher.__getitem__.side_effect = lambda grid, name=name: grids.setdefault(name, grid) and mock.Mock()
        monkeypatch.setattr(kernels, name, launcher)
    q, k, v, y = (torch.zeros(2, 512, 128, 4, requires_grad=True) for _ in range(4))
    kernels.gated_window(q, k, v, y, window_size=2, logits=torch.zeros(2, 512, 128)).sum().backward()
    assert len(grids) == 3 and set(grids.values()) == {(512 * 128, 1)}


def test_without_a_gpu_the_fused_window_is_refused_in_one_line(monkeypatch):
    from plt_megatron.errors import UserError
    from plt_megatron.model import attention

    monkeypatch.setattr(attention, "is_cpu_runtime", lambda: True)
    with pytest.raises(UserError, match="needs a GPU: set model.fused_gated_window=false"):
        attention.require_fused_gated_window()
