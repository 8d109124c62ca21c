"""The coordinate check: `recommended` is flat over depth and loops, with muP over width too; the paper's is not."""

from __future__ import annotations

import math

import pytest

from plt_megatron.commands.check_coordinates import main
from plt_megatron.config.loader import load_config
from plt_megatron.experiments.coordinates import FLAT, Result, check_coordinates, verdict

CONFIG = "configs/runs/plt2_demo.yaml"
ADAM = "optimizer.name=adam"


def test_recommended_is_flat_over_depth_and_loops(capsys, tmp_path):
    output = tmp_path / "coordinates.png"
    flat = [CONFIG, ADAM, "model.loop_preset=recommended", "--axes", "depth", "loops"]
    assert main([*flat, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "depth: flat" in printed and "loops: flat" in printed and "depth 16" in printed and "loops 4" in printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_mup_is_flat_over_width_too(capsys):
    widths = ["model.loop_preset=recommended", "--axes", "width"]
    assert main([CONFIG, ADAM, "model.mup_base_hidden_size=64", *widths]) == 0
    assert "width: flat" in capsys.readouterr().out
    assert main([CONFIG, ADAM, *widths]) == 1
    assert "width: not flat: hidden update differs by" in capsys.readouterr().out


def test_the_papers_form_is_not(capsys):
    assert main([CONFIG, ADAM, "model.loop_preset=paper", "--axes", "loops"]) == 1
    assert "loops: not flat: hidden update differs by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([ADAM, "model.loop_span=[1, 3]"], "whose layers all loop; set model.loop_span=null"),
        (
            [ADAM, "model.moe.num_experts=4", "model.moe.ffn_hidden_size=32", "model.moe.router_topk=2"],
            "of dense models; set model.moe=null",
        ),
        (
            [ADAM, "model.loop_preset=recommended", "model.share_kv=true"],
            "model.full_attention last_loop needs model.share_kv=false",
        ),
        (["optimizer.name=muon"], "not muon; set optimizer.name=adam"),
    ],
    ids=["layers that run once", "experts", "a contradiction", "another optimizer"],
)
def test_what_it_cannot_check_is_refused(settings, said, capsys):
    assert main([CONFIG, *settings]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "axis"),
    [(["model.loop_norm=none", "model.hidden_scale=1"], "loops"), (["model.residual_scaling=none"], "depth")],
    ids=["no norm", "unscaled branches"],
)
def test_each_part_of_recommended_is_needed(broken, axis):
    config = load_config(CONFIG, [ADAM, "model.loop_preset=recommended", *broken])
    sizes = {"loops": (1, 4), "depth": (2, 16)}[axis]
    (result,) = check_coordinates(config, {axis: sizes})
    assert not result.is_flat


def test_the_worst_quantity_decides():
    small = {"hidden": 1.0, "logits update": 1.0}
    large = small | {"logits update": FLAT + 0.1}
    assert Result("loops", {1: small, 2: small}).is_flat
    result = Result("loops", {1: small, 2: large, 3: small})
    assert not result.is_flat
    assert not Result("width", {1: small, 2: small | {"hidden": math.nan}}).is_flat
    assert verdict(result) == "loops: not flat: logits update differs by 1.6x (at most 1.5x)"
