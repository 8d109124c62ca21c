"""Every shipped configuration: parameters and FLOPs on paper equal those counted from the built model, to 0.1 %."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.predict.flops import mean_keys, training_flops_per_token
from plt_megatron.predict.parameters import count_parameters
from tests.running import ROOT, run

FOLDERS = ("models", "runs", "sweeps/base")
CONFIGS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"configs/{folder}/*.yaml"))
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def counted(warm_python: str) -> dict[Path, dict[str, int]]:
    """What count_built_models.py counts, by configuration."""
    script = Path(__file__).with_name("count_built_models.py")
    done = run([warm_python, script, *CONFIGS], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {Path(path): json.loads(figures) for path, figures in rows}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parameters_equal_the_built_models(counted, path):
    model = load_config(path).model
    assert count_parameters(model, counted[path]["vocab"]).total == counted[path]["parameters"]


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if load_config(path).model.moe is None],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_flops_equal_the_flop_counters(counted, path):
    """The counter sees whole blocks of the window attention, and no FLOPs in the query gate, which is no matrix
    product; the formula counts the window's own keys, and the gate. Both are put into the counter's terms."""
    config = load_config(path)
    model, length, vocab = config.model, counted[path]["length"], counted[path]["vocab"]
    padded = -(-vocab // model.make_vocab_size_divisible_by) * model.make_vocab_size_divisible_by
    training = training_flops_per_token(model, length, padded)
    for name, parts in (("forward", training.times(1 / 3)), ("training", training)):
        in_blocks = 2 * model.window_size * -(-length // model.window_size) * model.window_size / length
        local = parts.local_attention * (in_blocks / mean_keys(length, model.window_size) - 1)
        gate = parts.gate if model.gate_input == "query" else 0
        expected = length * (parts.total + local - gate)
        assert counted[path][name] == pytest.approx(expected, rel=TOLERANCE), name


def test_there_are_configurations_to_check():
    assert {"plt2_1b", "plt2_moe_1b_7b", "plt2_ablation", "loopcoder_7b", "plt2_demo", "plt2_tiny"} <= {
        path.stem for path in CONFIGS
    }
