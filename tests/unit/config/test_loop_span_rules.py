"""What a configuration with layers that run once may ask for, by what its refusal says."""

from __future__ import annotations

import pytest

from plt_megatron.config import derived
from plt_megatron.config.presets import LOOP_PRESETS
from plt_megatron.config.schema import ModelConfig
from plt_megatron.config.validation import find_problems
from tests.unit.config.test_validation import change, good

SPAN = [1, 3]  # of four layers
BY_LAYER = {"model__loop_order": "layer", "model__cross_loop_parallel": False}


def problems(**settings: object) -> list[str]:
    return find_problems(change(good(), **{"model__loop_span": SPAN, **settings}), check_files=False)


def test_good_configurations_pass():
    assert problems() == []
    for span in ([0, 4], [0, 1], [3, 4], [0, 2], None):
        assert problems(model__loop_span=span) == []
    tensor = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    assert problems(**tensor, parallel__context_parallel_size=2, parallel__recompute_granularity="full") == []
    assert problems(model__loop_count=1) == []
    assert problems(model__loop_norm="rms", model__hidden_scale=0.0) == []
    assert problems(model__loop_span=[1, 4], training__loop_loss_weights=[0.5]) == []
    assert problems(**BY_LAYER) == problems(**BY_LAYER, model__loop_span=None) == []
    assert problems(model__loop_order="layer", model__loop_count=1) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__loop_span": []}, "model.loop_span []: give the first layer that loops and the first after it"),
        ({"model__loop_span": [1]}, "as in [1, 3] of model.num_layers 4; null: all layers"),
        ({"model__loop_span": [0, 1, 3]}, "model.loop_span [0, 1, 3]: give the first layer"),
        ({"model__loop_span": [2, 2]}, "model.loop_span [2, 2]: give the first layer"),
        ({"model__loop_span": [3, 1]}, "model.loop_span [3, 1]: give the first layer"),
        ({"model__loop_span": [1, 5]}, "model.loop_span [1, 5]: give the first layer"),
        ({"model__loop_span": [-1, 2]}, "model.loop_span[0] must be at least 0, got -1"),
        (
            {"model__residual_scaling": "loops_sqrt_layers"},
            "is for layers that all loop, not for model.loop_span [1, 3]; set model.residual_scaling=layers",
        ),
        (
            {"training__loop_loss_weights": [0.5]},
            "reaches no head without the coda; leave them out, or set model.loop_span=[1, 4]",
        ),
        (
            {"parallel__pipeline_model_parallel_size": 2},
            "set parallel.pipeline_model_parallel_size=1 and parallel.tensor_model_parallel_size=2",
        ),
        (
            {"model__loop_order": "layer"},
            "model.cross_loop_parallel with model.loop_order layer: a loop would need the whole stack's output",
        ),
        (
            {**BY_LAYER, "model__input_injection": True},
            "reads its own output as it is; set model.input_injection=false",
        ),
        ({**BY_LAYER, "model__loop_norm": "final"}, "as it is; set model.loop_norm=none"),
        ({**BY_LAYER, "model__loop_norm": "rms"}, "as it is; set model.loop_norm=none"),
        (
            {**BY_LAYER, **{f"model__{name}": value for name, value in LOOP_PRESETS["recommended"].items()}},
            "model.input_injection, model.loop_norm, model.learned_hidden_scale with "
            "model.loop_order layer: a layer's next loop reads its own output as it is; set "
            "model.input_injection=false model.loop_norm=none model.learned_hidden_scale=none",
        ),
        (
            {**BY_LAYER, "model__loop_span": None, "training__loop_loss_weights": [0.5]},
            "only the last loop ends at the head; set training.loop_loss_weights=[]",
        ),
        (
            {**BY_LAYER, "model__loop_span": None, "parallel__pipeline_model_parallel_size": 2},
            "loops are virtual stages of the whole stack; set parallel.pipeline_model_parallel_size=1",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(settings, expected):
    (line,) = problems(**settings)
    assert expected in line and "\n" not in line


def test_a_pipelines_ranks_go_to_tensor_parallelism_only_where_they_divide():
    (line,) = problems(parallel__pipeline_model_parallel_size=2, model__num_query_groups=1)
    assert line.endswith("set parallel.pipeline_model_parallel_size=1")


def test_layers_that_loop_and_how_often_layers_run():
    model = ModelConfig(num_layers=8, loop_count=3)
    assert (derived.looped_layers(model), derived.layer_runs(model)) == (range(8), 24)
    model.loop_span = [2, 6]
    assert (derived.looped_layers(model), derived.layer_runs(model)) == (range(2, 6), 16)
