"""`model.loop_preset`: it stands for its settings where it is named, and everything set beside it or later wins."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config.loader import dump_config, load_config, place
from plt_megatron.config.presets import LOOP_PRESETS
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError

NAIVE = {
    "model.cross_loop_parallel": "false",
    "model.share_kv": "false",
    "model.gated_window": "false",
    "model.full_attention": "every_loop",
}


def write(folder, text, name="run.yaml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("preset", LOOP_PRESETS)
@pytest.mark.parametrize("row", [{}, NAIVE, {"model.loop_count": "1"}], ids=["PLT", "naive loop", "one loop"])
def test_a_preset_is_a_model_in_every_row_of_the_ablation(tmp_path, preset, row):
    path = write(tmp_path, "training: {train_iters: 1}\nmodel: {vocab_size: 100}\ndata: {sources: [{path: x}]}\n")
    config = load_config(path, [f"model.loop_preset={preset}", *(f"{key}={value}" for key, value in row.items())])
    assert not find_problems(config, check_files=False)
    for setting, value in LOOP_PRESETS[preset].items():
        assert getattr(config.model, setting) == value or f"model.{setting}" in row
    again = write(tmp_path, dump_config(config), "resolved.yaml")
    assert dataclasses.asdict(load_config(again)) == dataclasses.asdict(config)


def test_all_presets_set_the_same_settings_and_the_papers_are_the_defaults():
    assert len({frozenset(settings) for settings in LOOP_PRESETS.values()}) == 1
    assert all(getattr(ModelConfig(), setting) == value for setting, value in LOOP_PRESETS["paper"].items())


def test_what_a_programs_file_leaves_out_is_newer_than_it_and_not_the_presets(tmp_path):
    """Whatever its name, and included. A user's file, which a run folder's name does not make a program's, takes it."""
    users = "model: {loop_preset: recommended, share_kv: false, gated_window: false, loop_norm: rms, num_layers: 3}\n"
    expected = load_config(write(tmp_path, users)).model
    assert (expected.full_attention, expected.key_shift, expected.residual_scale) == ("last_loop", "heads", 4.0)
    assert load_config(write(tmp_path, users, "config.yaml")).model == expected
    newer = ("  key_shift:", "  full_attention:", "  gate_activation:", "  loop_norm:", "  mup_base_hidden_size:")
    lines = dump_config(RunConfig(model=expected)).splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(newer))
    include = write(tmp_path, "include: copied.yaml\n", "including.yaml")
    for path in (write(tmp_path, text, "config.yaml"), write(tmp_path, text, "copied.yaml"), include):
        model = load_config(path).model
        assert model == dataclasses.replace(expected, key_shift="none", full_attention="every_loop", loop_norm="none")
    later = load_config(tmp_path / "config.yaml", ["model.loop_preset=paper"]).model
    assert later.share_kv and later.loop_norm == "none"


def test_no_preset_over_a_files_preset_is_refused(tmp_path):
    """It would keep the settings, and forget whose they are."""
    path = write(tmp_path, "model: {loop_preset: recommended}\n")
    with pytest.raises(UserError, match=r"model\.loop_preset null .*recommended"):
        load_config(path, ["model.loop_preset=null"])
    assert load_config(write(tmp_path, "model: {loop_preset: null}\n")).model.loop_preset is None


def test_what_is_set_beside_it_or_later_wins(tmp_path):
    path = write(tmp_path, "model:\n  hidden_scale: 0.2\n  loop_preset: loopcoder\n  gate_side: local\n")
    model = load_config(path).model
    assert (model.hidden_scale, model.gate_side, model.gate_input) == (0.2, "local", "hidden")
    run = write(tmp_path, "include: run.yaml\nmodel:\n  gate_input: query\n", "later.yaml")
    assert load_config(run).model.gate_input == "query"


def test_named_later_it_replaces_what_was_set_before(tmp_path):
    path = write(tmp_path, "model:\n  hidden_scale: 0.2\n  loop_preset: loopcoder\n")
    both = ["model.loop_preset=paper", "model.gate_side=global"]
    for overrides in (both, both[::-1]):
        model = load_config(path, overrides).model
        assert (model.hidden_scale, model.gate_input, model.gate_side) == (1.0, "query", "global")
        assert model.loop_preset == "paper"


def test_a_problem_is_placed_at_the_preset(tmp_path):
    path = write(tmp_path, "model:\n  loop_preset: recommended\n")
    config = load_config(path)
    (line,) = place(config, ["model.loop_norm is a problem"])
    assert line == f"{path}:2 (model.loop_preset recommended): model.loop_norm is a problem"


def test_an_unknown_preset_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"model\.loop_preset: expected one of paper, .* did you mean recommended\?"):
        load_config(write(tmp_path, "model: {loop_preset: recomended}"))
