"""Which parameters `training.trainable` names, and what the others no longer cost. Without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.model.parameters import parameters_of
from plt_megatron.model.trainable import is_trained, trains
from plt_megatron.predict.parameters import Weights
from plt_megatron.predict.run_estimate import estimate_run
from plt_megatron.run_folder import resuming

LAYER = "decoder.layers.3"
MOE = "configs/runs/plt2_moe_tiny.yaml"


def config_of(patterns: list[str], *settings: str, file: str = "configs/runs/plt2_tiny.yaml"):
    config = load_config(file, ["model.vocab_size=512", *settings])
    config.training.trainable = patterns
    return config


@pytest.mark.parametrize(
    ("pattern", "named", "others"),
    [
        ("plt_gate", f"{LAYER}.self_attention.core_attention.plt_gate.bias", f"{LAYER}.mlp.linear_fc1.weight"),
        ("layers.1", "decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.11.mlp.linear_fc1.weight"),
        ("layers.2[0-9]", "decoder.layers.24.mlp.linear_fc2.weight", "decoder.layers.2.mlp.linear_fc2.weight"),
        ("linear_fc*.weight", "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.mlp.output_norm.weight"),
        ("experts.linear_fc1", f"{LAYER}.mlp.experts.17.linear_fc1.weight", f"{LAYER}.mlp.linear_fc1.weight"),
        ("final_layernorm", "final_layernorm.weight", "output_layer.weight"),
    ],
)
def test_a_pattern_names_whole_parts_of_a_name(pattern, named, others):
    assert is_trained([pattern], named) and not is_trained([pattern], others)
    assert is_trained([], named) and is_trained([], others)


@pytest.mark.parametrize("command", ["start", "estimate"])
def test_a_pattern_of_nothing_is_refused_with_a_name_that_there_is(command):
    config = config_of(["plt_gate", "linear_projection"], "model.backend=torch")
    config.data.tokenizer = None
    with pytest.raises(UserError, match=r"training\.trainable: 'linear_projection' .*linear_proj\.weight"):
        if command == "estimate":
            estimate_run(config)
        else:
            trains(config)


def test_a_tied_head_is_trained_with_the_embedding():
    for tied in (True, False):
        config = config_of(["embedding"], f"model.share_embeddings_and_output_weights={str(tied).lower()}")
        assert Weights.trained(config).has_head == tied


@pytest.mark.parametrize("file", ["configs/runs/plt2_tiny.yaml", MOE])
def test_only_what_is_trained_has_gradients_and_state(file):
    """Of one rank: 4 bytes a gradient, 8 of Adam's moments; the weights stay whole."""
    whole, part = (
        estimate_run(config_of(patterns, file=file)) for patterns in ([], ["linear_proj", "linear_fc1.weight"])
    )
    config = config_of(["linear_proj", "linear_fc1.weight"], file=file)
    trained = sum(number for parameter, number in Weights.trained(config).elements() if parameter.is_matrix)
    held, before = part.memory[0].components, whole.memory[0].components
    assert 0 < held["optimizer state"] == 8 * trained and held["gradients"] == 4 * trained
    assert held["weights"] == before["weights"]
    assert part.checkpoint_bytes < whole.checkpoint_bytes
    assert part.flops.total < whole.flops.total and part.flops.global_attention == whole.flops.global_attention


def test_frozen_matrices_save_a_third_of_their_products():
    """And a pattern of all that a model has, none."""
    config = config_of([])
    every = [parameter.name.split("{layer}.")[-1] for parameter in parameters_of(config.model)]
    full = estimate_run(config).flops
    assert estimate_run(config_of(every)).flops == full
    norms = estimate_run(config_of(["final_layernorm"])).flops
    assert norms.ffn == pytest.approx(full.ffn * 2 / 3) and norms.output == pytest.approx(full.output * 2 / 3)
    one_layer = estimate_run(config_of(["layers.0.mlp"])).flops
    layers = config.model.num_layers
    assert one_layer.ffn == pytest.approx(full.ffn * (2 + 1 / layers) / 3)


@pytest.mark.parametrize(
    ("settings", "matrix"),
    [([], "mlp.linear_fc1.weight"), (["model.moe.shared_expert_intermediate_size=32"], "shared_experts.linear_fc1")],
    ids=["dense", "shared expert"],
)
def test_sequence_parallel_ranks_gather_once_more_for_a_trained_matrix(settings, matrix):
    """In each microbatch and run of a layer, the half of its input that a rank of two lacks."""
    file = MOE if settings else "configs/runs/plt2_tiny.yaml"
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    frozen, trained = (config_of(["linear_qkv", *more], *layout, *settings, file=file) for more in ([], [matrix]))
    estimate, sent = estimate_run(trained), estimate_run(frozen).communication["tensor parallel"]
    model, batch = trained.model, trained.training.micro_batch_size * trained.data.sequence_length
    rows = estimate.layout.microbatches * model.num_layers * model.loop_count * batch
    element = {"fp32": 4, "bf16": 2}[trained.training.precision]
    assert estimate.communication["tensor parallel"] - sent == rows * model.hidden_size * element / 2


def test_a_checkpoint_of_other_trained_parameters_is_refused():
    before, now = config_of(["plt_gate"]), config_of([])
    progress = {
        "config": json.loads(json.dumps(dataclasses.asdict(before))),
        "schedule": resuming.schedule(before, 1),
        "schedule_step_tokens": 1,
    }
    resuming.check_schedule(Path("checkpoint"), progress, before, allow_other=False)
    with pytest.raises(UserError) as error:
        resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=True)
    for part in ("training.trainable ['plt_gate'] (now [])", "checkpoint.weights_only=true"):
        assert part in str(error.value)


def test_deepspeed_does_not_take_it():
    config = config_of(["plt_gate"], "deepspeed={}")
    problems = find_problems(config, check_files=False)
    assert any("training.trainable" in line and "deepspeed" in line for line in problems)
