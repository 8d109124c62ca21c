"""The configurations in configs/runs are valid, with the rows of an ablation too."""

from __future__ import annotations

import pytest

from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import validate
from tests.running import ROOT

RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
ABLATION_ROWS = [
    [],
    ["model.loop_count=1"],
    ["model.gated_window=false"],
    ["model.share_kv=false", "model.gated_window=false"],
    ["model.cross_loop_parallel=false", "model.share_kv=false", "model.gated_window=false"],
]


def test_the_shipped_runs_are_there():
    names = {path.stem for path in RUNS}
    assert names >= {"plt2_tiny", "plt2_demo", "plt2_1b", "plt2_ablation", "loopcoder_7b"}


@pytest.mark.parametrize("row", ABLATION_ROWS, ids=["plt2", "vanilla", "clp_kv", "clp", "loop"])
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_runs_and_their_ablations_are_valid(path, row):
    config = load_config(path, row)
    validate(config, check_files=False, have_te=False)
    assert config.name == path.stem


def test_the_large_runs_fit_a_cluster():
    validate(load_config(ROOT / "configs/runs/plt2_1b.yaml"), world_size=128, check_files=False)
    validate(load_config(ROOT / "configs/runs/plt2_moe_1b_7b.yaml"), world_size=64, check_files=False)
    validate(load_config(ROOT / "configs/runs/loopcoder_7b.yaml"), world_size=64, check_files=False)


def test_loopcoder_warms_up_over_a_twentieth():
    config = load_config(ROOT / "configs/runs/loopcoder_7b.yaml")
    assert config.optimizer.lr_warmup_iters / derived.train_iters(config) == pytest.approx(0.05, rel=1e-3)
