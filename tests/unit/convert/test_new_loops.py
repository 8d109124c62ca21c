"""Imports with new loops, which start as the source: `--loop-count` and what goes with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from convert_helpers import (
    VOCAB,
    hf_logits,
    imported,
    make_tokens,
    megatron_gradients,
    megatron_logits,
    quiet,
    refuse_import,
    save_random,
)
from dense_models import save_dense

from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.hf.verification import single_process


@pytest.mark.parametrize("name", ["llama", "qwen2", "olmo2"])
def test_dense_models_start_a_plt_with_fresh_gates(tmp_path, name):
    _, expected = save_dense(tmp_path / "hf", name)
    result, weights = imported(tmp_path / "hf", tmp_path / "run", loop_count=3)
    model = result.model
    assert (model.loop_count, model.cross_loop_parallel, model.share_kv, model.gated_window) == (3, True, True, True)
    gates = {key: tensor for key, tensor in weights.items() if ".plt_gate." in key}
    assert len(gates) == result.fresh == 4 and not any(tensor.any() for tensor in gates.values())
    one_loop = megatron_logits(model, weights, make_tokens(), loop_count=1)
    assert (one_loop - expected).abs().max() < 2e-5
    quiet((tmp_path / "run", tmp_path / "out"))
    loops = hf_logits(tmp_path / "out", make_tokens())
    assert (loops - megatron_logits(model, weights, make_tokens())).abs().max() < 2e-5
    assert (loops - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "switches"),
    [(name, {}) for name in ("llama, tied", "llama, yarn", "qwen2", "qwen3 moe, dense first", "olmo2")]
    + [("llama 3.1", {"loop_span": [0, 1]}), ("qwen3", {"loop_span": [1, 2]})]
    + [("llama", {"full_attention": "last_loop"}), ("qwen2", {"full_attention": "last_loop", "key_shift": "learned"})],
)
def test_with_a_preset_the_first_logits_are_the_sources(tmp_path, name, switches):
    """At any loop count, in a text longer than the window, trained or exported."""
    source, _ = save_dense(tmp_path / "hf", name)
    options = {"loop_count": 3, "preset": "recommended", "switches": switches}
    result, weights = imported(tmp_path / "hf", tmp_path / "run", **options)
    gates = 0 if "full_attention" in switches else 1 if "loop_span" in switches else 2
    assert sum(".plt_gate.weight" in key for key in weights) == gates
    tokens = make_tokens(2, 80)
    assert result.model.window_size < 80 and result.new_loops
    with torch.no_grad():
        expected = source(tokens, use_cache=False).logits
    bound = 1e-5 * expected.abs().max()
    for loops in (1, 2, 3):
        logits = megatron_logits(result.model, weights, tokens, loop_count=loops)
        assert (logits - expected).abs().max() < bound
    quiet((tmp_path / "run", tmp_path / "out"))
    assert (hf_logits(tmp_path / "out", tokens) - expected).abs().max() < bound


def test_a_run_included_before_an_import_does_not_change_its_model(tmp_path):
    """Nor a preset of it: the later file wins, and gives every setting of the model."""
    save_dense(tmp_path / "hf", "llama")
    result, _ = imported(tmp_path / "hf", tmp_path / "run", loop_count=2)
    other = "model: {loop_preset: recommended, rotary_base: 5e5, layernorm_epsilon: 0.1, fused_gated_window: true}\n"
    (tmp_path / "other.yaml").write_text(other)
    (tmp_path / "new.yaml").write_text("include: [other.yaml, run/model.yaml]\n")
    found = load_config(tmp_path / "new.yaml").model
    assert found.loop_preset == "recommended" and found.fused_gated_window
    assert dataclasses.replace(found, loop_preset=None, fused_gated_window=False) == result.model


def test_what_is_new_is_learned_from_the_first_step(tmp_path):
    save_dense(tmp_path / "hf", "llama")
    result, weights = imported(tmp_path / "hf", tmp_path / "run", loop_count=2, preset="recommended")
    gradients = megatron_gradients(result.model, weights, make_tokens(2, 80))
    new = {name for name in weights if ".plt_gate." in name or name == "loop_input.hidden_scale"}
    assert len(new) == result.fresh == 5 and not any(weights[name].any() for name in new)
    largest = gradients["final_layernorm.weight"].abs().max()
    assert all(gradients[name].abs().max() > 1e-3 * largest for name in new)
    # With h let in and the gates open, later loops change what comes out.
    opened = {name: tensor + 0.1 if name in new else tensor for name, tensor in weights.items()}
    one, two = (megatron_logits(result.model, opened, make_tokens(), loop_count=loops) for loops in (1, 2))
    assert (one - two).abs().max() > 0.01


def test_learned_shares_of_the_previous_token_are_added_once(tmp_path):
    """To a model of any loop count."""
    model, weights = save_random(tmp_path / "run")
    quiet((tmp_path / "run", tmp_path / "out"))
    learned = {"switches": {"key_shift": "learned"}}
    result, shifted = imported(tmp_path / "out", tmp_path / "shifted", **learned)
    assert result.fresh == 4 and load_config(tmp_path / "shifted" / "model.yaml").model.key_shift == "learned"
    expected = megatron_logits(model, weights, make_tokens())
    assert (megatron_logits(result.model, shifted, make_tokens()) - expected).abs().max() < 1e-5
    quiet((tmp_path / "shifted", tmp_path / "again"))
    assert "| keys of the previous token | learned shares |" in (tmp_path / "again" / "README.md").read_text()
    refuse_import(tmp_path / "again", "--key-shift .* key_shift learned", **learned)


def test_what_one_loop_leaves_unused_cannot_contradict_new_loops(tmp_path):
    model, weights = save_random(tmp_path / "run", loop_count=1, loop_order="layer")
    quiet((tmp_path / "run", tmp_path / "out"))
    refuse_import(tmp_path / "out", r"out: model\.cross_loop_parallel with model\.loop_order layer: ", loop_count=2)
    result, again = imported(tmp_path / "out", tmp_path / "two", loop_count=2, preset="recommended")
    expected = megatron_logits(model, weights, make_tokens())
    assert (megatron_logits(result.model, again, make_tokens()) - expected).abs().max() < 1e-5


def test_the_layers_stay_the_sources(tmp_path):
    """The preset scales branches; those of a trained model are as they are, and come back with it."""
    model, weights = save_random(tmp_path / "run", loop_count=1, residual_scaling="layers", residual_scale=3.0)
    quiet((tmp_path / "run", tmp_path / "out"))
    result, back = imported(tmp_path / "out", tmp_path / "back", loop_count=2, preset="recommended")
    assert derived.residual_factor(result.model) == 1.5 and not result.model.loop_preset
    expected = megatron_logits(model, weights, make_tokens(2, 80))
    assert (megatron_logits(result.model, back, make_tokens(2, 80)) - expected).abs().max() < 1e-5
    assert load_config(tmp_path / "back" / "model.yaml").model == result.model


def test_a_schedule_switches_the_new_loop_on_without_a_jump(tmp_path):
    """While steps of one loop train the source's weights, two loops compute the same; then they do not."""
    save_dense(tmp_path / "hf", "llama")
    imported(tmp_path / "hf", tmp_path / "run", loop_count=2, preset="recommended")
    schedule = "training.loop_schedule=[{until: 0.5, loop_count: 1}, {loop_count: 2}]"
    settings = ["training.precision=fp32", "training.train_iters=4", "training.global_batch_size=2", schedule]
    config = load_config(
        tmp_path / "run" / "model.yaml", [*settings, "model.backend=torch", "model.window_size=5", "optimizer.lr=0.01"]
    )
    config.training.micro_batch_size = 2
    with single_process():
        from plt_megatron.model.looped_gpt import MicroBatch
        from plt_megatron.train.checkpoint.store import CheckpointStore
        from plt_megatron.train.megatron_engine import MegatronEngine

        engine = MegatronEngine(config, VOCAB)
        assert CheckpointStore(tmp_path / "new" / "checkpoints", config, {}).load(engine) is None
        tokens = make_tokens()
        batches = [MicroBatch(tokens[:, :-1], labels=tokens[:, 1:])]
        losses = []
        for loops in (1, 1, 2, 2):
            losses.append([engine.evaluate(batches, count)[0] for count in (1, 2)])
            assert engine.train_step(batches, loop_count=loops).updated
        one, two = (engine.evaluate(batches, count)[0] for count in (1, 2))
    assert all(first == pytest.approx(second, rel=1e-6) for first, second in losses[:3])
    assert losses[2][0] < losses[0][0] and two != pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loop_count": 2, "preset": "paper"}, r"--preset paper: .* read 1 E \+ 1 h instead of E, .*use --preset rec"),
        ({"loop_count": 2, "preset": "loopcoder"}, r"--preset loopcoder: .* read 0\.707 E \+ 0\.053 h instead of E"),
        ({"switches": {"loop_span": [0, 1]}}, "--loop-span says which layers loop: also give --loop-count 2 or more"),
        ({"loop_count": 2, "switches": {"loop_span": [1, 3]}}, "--loop-span 1 3: give 0 <= FIRST < LAST <= 2, the mod"),
        ({"loop_count": 2, "switches": {"loop_span": [1, 1]}}, "--loop-span 1 1: give 0 <= FIRST < LAST <= 2, the mod"),
        ({"switches": {"full_attention": "last_loop"}}, "--full-attention is about later loops: .* --loop-count 2"),
        ({"preset": "recommended"}, "--preset says how later loops are .*: also give --loop-count 2 or more"),
    ],
)
def test_presets_that_do_not_start_as_the_source(tmp_path, options, message):
    save_dense(tmp_path / "hf", "llama")
    refuse_import(tmp_path / "hf", message, **options)


def test_new_loops_of_our_own_model_attend_as_it_says(tmp_path):
    """A model of one loop has no use for the setting, and keeps it for those that it gets."""
    for name, last in (("paper", False), ("recommended", True)):
        attention = {"full_attention": "last_loop", "share_kv": False, "gated_window": False} if last else {}
        save_random(tmp_path / name / "run", loop_count=1, **attention)
        quiet((tmp_path / name / "run", tmp_path / name / "out"))
        result, _ = imported(tmp_path / name / "out", tmp_path / name / "two", loop_count=2, preset="recommended")
        assert (result.model.full_attention == "last_loop") == (not result.model.share_kv) == last
