"""Configurations of the version before optional sections: read as they were meant, and rewritten by `plt config`.

The archive has every YAML of configs/ as of that version, and `config.yaml` as it wrote them into run folders.
"""

from __future__ import annotations

import dataclasses
import stat
import tarfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.commands import config as command
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.presets import LOOP_PRESETS, PARAMETERISATION
from plt_megatron.config.schema import (
    DeepSpeedConfig,
    EvaluationConfig,
    ExportsConfig,
    FimConfig,
    Fp8Config,
    MoeConfig,
    ProfileConfig,
    RopeScalingConfig,
    RunConfig,
    SpikeConfig,
    StragglerConfig,
    UploadsConfig,
    YarnConfig,
)
from plt_megatron.config.upgrade import upgraded
from plt_megatron.config.upgrade_file import upgrade_text
from plt_megatron.errors import UserError

ARCHIVE = Path(__file__).resolve().parents[2] / "fixtures" / "configs_before_sections.tar.gz"
with tarfile.open(ARCHIVE) as _archive:
    NAMES = [member.name for member in _archive.getmembers() if member.isfile()]
RUNS = [name for name in NAMES if name.startswith("configs/runs/")]
_CHANGED = (
    "configs/models/plt2_moe",
    "configs/models/plt2_1b",
    "configs/models/plt2_ablation",
    "configs/models/loopcoder",
)
# What `recommended` left to the paper's defaults in that version.
PINNED = "key_shift: none, share_kv: true, gated_window: true, full_attention: every_loop"
_SIGMOID: dict[str, Any] = {"router_score_function": "sigmoid", "router_bias_update_rate": 1e-3}
# What the settings of a run folder that its name tells of are now; all others are those of plt2_tiny.yaml.
MEANT: dict[str, dict[str, dict[str, Any]]] = {
    "experts": {
        "model": {
            "moe": MoeConfig(8, 1, router_topk=3, aux_loss_coeff=0.05, shared_expert_intermediate_size=64, **_SIGMOID)
        }
    },
    "experts_without_bias": {"model": {"moe": MoeConfig(4, expert_capacity_factor=1.5)}},
    "llama3": {"model": {"rope_scaling": RopeScalingConfig(8.0)}},
    "yarn": {"model": {"rope_scaling": RopeScalingConfig(4.0, YarnConfig(512, beta_fast=16.0))}},
    "fp8": {
        "model": {"backend": "te"},
        "training": {"precision": "bf16", "fp8": Fp8Config("e4m3", "tensorwise", False, 1, 2)},
    },
    "fp8_attention": {"model": {"backend": "te"}, "training": {"precision": "bf16", "fp8": Fp8Config(attention=True)}},
}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def rewritten(old, tmp_path) -> Path:
    """The archive's files after `plt config upgrade`."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((old / name).read_text())
    assert command.main(["upgrade", *(str(tmp_path / name) for name in NAMES)]) == 0
    return tmp_path


def test_every_file_of_that_version_is_read_as_its_rewritten_text(old, rewritten, monkeypatch):
    """The run folders' were resolved by that version's own loader, before it knew of sections, and before
    `recommended`, which `plt2_demo.yaml` names, set keys and attention too."""
    recommended = LOOP_PRESETS["recommended"].keys() - PARAMETERISATION
    for name in RUNS:
        monkeypatch.chdir(rewritten)
        config = load_config(rewritten / name)
        monkeypatch.chdir(old)
        if name == "configs/runs/plt2_demo.yaml":
            assert config.model.full_attention == "last_loop"
            paper = {setting: LOOP_PRESETS["paper"][setting] for setting in recommended}
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, **paper))
        else:
            assert load_config(old / name, accept_old_names=True) == config, name
        assert load_config(old / "run_folders" / Path(name).stem / "config.yaml") == config, name
    text = (rewritten / "configs/models/plt2_moe_1b_7b.yaml").read_text()
    assert "  moe:\n    num_experts: 64\n" in text and "num_moe_experts" not in text


def test_comments_and_untouched_sections_stay(old, rewritten):
    for name in NAMES:
        before, after = ((folder / name).read_text().splitlines() for folder in (old, rewritten))
        assert [line.strip() for line in before if "#" in line] == [line.strip() for line in after if "#" in line], name
        assert before == after or name.startswith((*_CHANGED, "run_folders/")), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # With a rate of 0 a source may have one of its own.
        ("data: {fim_rate: 0.0, fim_spm_rate: 0.5, fim_prefix_token: null}", {"data.fim": None}),
        ("data: {fim_rate: 0.5, fim_spm_rate: 0.2}", {"data.fim": FimConfig(0.5, 0.2)}),
        ("data: {fim_rate: 0.0, fim_spm_rate: 0.2}", {"data.fim": FimConfig(0.0, 0.2)}),
        (
            "data: {fim_rate: 0, fim_prefix_token: a, fim_middle_token: b, fim_suffix_token: c}",
            {"data.fim": FimConfig(0.0, tokens=[*"abc"])},
        ),
        ("training: {on_spike: ignore, spike_threshold: 6.0, spike_window: 128}", {"training.spikes": None}),
        (
            "training: {on_spike: skip, spike_threshold: 4.0, spike_window: 64}",
            {"training.spikes": SpikeConfig("skip", 4.0, 64)},
        ),
        ("training: {on_spike: rollback}", {"training.spikes": SpikeConfig("rollback")}),
        (
            "checkpoint: {export_interval: 0, export_upload_to: null, upload_to: null, upload_keep_last: 2}",
            {"checkpoint.exports": None, "checkpoint.uploads": None},
        ),
        (
            "checkpoint: {export_interval: 4, export_upload_to: null}",
            {"checkpoint.exports": ExportsConfig(4), "checkpoint.uploads": None},
        ),
        (
            "checkpoint: {export_interval: 4, export_upload_to: hf://a/b, upload_to: s3://c, upload_keep_last: 3}",
            {"checkpoint.exports": ExportsConfig(4, "hf://a/b"), "checkpoint.uploads": UploadsConfig("s3://c", 3)},
        ),
        (
            "logging: {profile_step_start: 1, profile_step_end: 3, profile_ranks: [0, 2]}",
            {"logging.profile": ProfileConfig(3, 1, [0, 2])},
        ),
        ("logging: {profile_step_start: 0, profile_step_end: 0, profile_ranks: [0]}", {"logging.profile": None}),
        ("logging: {straggler_interval: 5, straggler_threshold: 0.5}", {"logging.straggler": StragglerConfig(5, 0.5)}),
        ("logging: {straggler_interval: 0, straggler_threshold: 0.75}", {"logging.straggler": None}),
        ("evaluation: {tasks: [a], limit: 3}", {"evaluation": EvaluationConfig(["a"], limit=3)}),
        ("evaluation: {tasks: [], include_path: null, limit: null}", {"evaluation": None}),
    ],
)
def test_what_is_a_section_now_is_one_where_anything_of_it_counts(tmp_path, old, new):
    path = tmp_path / "config.yaml"
    path.write_text(f"{old}\n")
    config = load_config(path)
    assert {section: attrgetter(section)(config) for section in new} == new


def test_a_second_time_changes_nothing(rewritten, capsys):
    capsys.readouterr()
    assert command.main(["upgrade", "--check", *(str(rewritten / name) for name in NAMES)]) == 0
    assert capsys.readouterr().out.count("nothing to change") == len(NAMES)


def test_a_link_stays_one(tmp_path):
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("model: {norm_between_loops: true}\n")
    real.chmod(0o640)
    link.symlink_to(real)
    assert command.main(["upgrade", str(link)]) == 0
    assert link.is_symlink() and real.read_text() == "model: {loop_norm: final}\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_file_that_would_change_is_told_and_left_alone(old, capsys):
    path = old / "configs/models/plt2_moe_tiny.yaml"
    before = path.read_text()
    assert command.main(["upgrade", "--check", str(path)]) == 1
    assert path.read_text() == before and "old names" in capsys.readouterr().out


@pytest.mark.parametrize("name", MEANT)
def test_a_run_folders_settings_are_meant_as_they_were(old, name):
    config, base = (load_config(old / "run_folders" / each / "config.yaml") for each in (name, "plt2_tiny"))
    changes = {section: dataclasses.replace(getattr(base, section), **MEANT[name][section]) for section in MEANT[name]}
    assert config == dataclasses.replace(base, **changes)
    assert load_back(config, old) == config


def test_a_preset_leaves_to_an_included_file_what_it_left_to_it(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {gated_window: false, key_shift: channels}\n")
    text = "include: base.yaml\nmodel: {loop_preset: recommended, hidden_norm: false, gate_side: global}\n"
    (tmp_path / "run.yaml").write_text(upgrade_text(text, "run"))
    model = load_config(tmp_path / "run.yaml").model
    assert (model.gated_window, model.key_shift, model.share_kv) == (False, "channels", True)
    assert (model.loop_norm, model.gate_side, model.hidden_scale) == ("none", "global", 0.0)


def test_deepspeed_is_its_section(old):
    plain = load_config(old / "run_folders/deepspeed_plain/config.yaml")
    assert plain.deepspeed == DeepSpeedConfig()
    config = load_config(old / "run_folders/deepspeed/config.yaml")
    added = {"zero_optimization": {"sub_group_size": 1_000_000}, "steps_per_print": 5}
    assert config.deepspeed == DeepSpeedConfig(3, offload_param="cpu", config=added)
    assert dataclasses.replace(config, deepspeed=None) == load_config(old / "run_folders/plt2_tiny/config.yaml")


def load_back(config: RunConfig, folder: Path) -> RunConfig:
    (folder / "again.yaml").write_text(dump_config(config))
    return load_config(folder / "again.yaml")


def test_plain_values_keep_their_types(old):
    values = {
        "name": "1e5",
        "model": {"num_moe_experts": 4, "moe_router_topk": 2, "loop_span": [1, 2], "rotary_base": 10000.0},
        "training": {"fp8": "none", "fp8_recipe": "auto", "train_tokens": None, "loop_schedule": [{"until": 0.5}]},
    }
    new = upgraded(values)
    assert new == {
        "name": "1e5",
        "model": {"moe": {"num_experts": 4, "router_topk": 2}, "loop_span": [1, 2], "rotary_base": 10000.0},
        "training": {"fp8": None, "train_tokens": None, "loop_schedule": [{"until": 0.5}]},
    }
    assert type(new["model"]["rotary_base"]) is float and upgraded(new) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{ffn_output_norm: true}", "{norm_placement: pre_ffn_output}"),
        ("{ffn_output_norm: false}", "{norm_placement: pre}"),
        ("{norm_placement: pre, ffn_output_norm: true}", "{norm_placement: pre_ffn_output}"),
        ("{norm_placement: pre, ffn_output_norm: false}", "{norm_placement: pre}"),
        ("{ffn_output_norm: false, norm_placement: post}", "{norm_placement: post}"),
        (
            "{moe: {num_experts: 4, router_pre_softmax: true}}",
            "{moe: {num_experts: 4, router_score_function: pre_softmax}}",
        ),
        (
            "{moe: {num_experts: 4, router_pre_softmax: false, router_score_function: sigmoid}}",
            "{moe: {num_experts: 4, router_score_function: sigmoid}}",
        ),
        (
            "{moe: {num_experts: 4, router_pre_softmax: true, router_score_function: softmax}}",
            "{moe: {num_experts: 4, router_score_function: pre_softmax}}",
        ),
        ("{hidden_norm: false, norm_between_loops: true}", "{loop_norm: final}"),
        ("{hidden_norm: true, norm_between_loops: false}", "{loop_norm: rms}"),
        ("{norm_between_loops: false, hidden_norm: false}", "{loop_norm: none}"),
        ("{norm_between_loops: false}", "{loop_norm: none}"),
        ("{loop_preset: loopcoder, norm_between_loops: false}", "{loop_preset: loopcoder, loop_norm: none}"),
        ("{loop_preset: recommended, norm_between_loops: false}", f"{{loop_preset: recommended, {PINNED}}}"),
        ("{loop_preset: loopcoder, hidden_norm: false}", "{loop_preset: loopcoder}"),
        ("{loop_preset: loopcoder, hidden_scale_ratio: 0.5}", "{loop_preset: loopcoder, hidden_scale: 0.00707}"),
        ("{loop_preset: loopcoder, hidden_scale_ratio: null}", "{loop_preset: loopcoder, hidden_scale: 0.053}"),
        (
            "{num_moe_experts: 4, moe_router_score_function: sigmoid, moe_router_bias_update_rate: 1e-3}",
            "{moe: {num_experts: 4, router_score_function: sigmoid, router_bias_update_rate: null}}",
        ),
        ("{hidden_scale_ratio: null, hidden_scale: 0.3}", "{hidden_scale: 0.3}"),
        ("{hidden_scale_ratio: 0.0, hidden_scale: 1.0}", "{hidden_scale: 0.0}"),
        (
            "{loop_preset: recommended, hidden_scale_ratio: null}",
            f"{{loop_preset: recommended, hidden_scale: 1.0, {PINNED}}}",
        ),
        (
            "{loop_preset: recommended, key_shift: heads, hidden_scale_ratio: 0}",
            "{loop_preset: recommended, key_shift: heads, hidden_scale: 0.0, "
            f"{PINNED.removeprefix('key_shift: none, ')}}}",
        ),
        (
            "{hidden_scale_ratio: 0.5, embedding_scale: -0.7, init_method_std: 0.1}",
            f"{{embedding_scale: -0.7, init_method_std: 0.1, hidden_scale: {0.5 * 0.7 * 0.1}}}",
        ),
    ],
)
def test_settings_that_are_one_with_another_now(tmp_path, old, new):
    (tmp_path / "old.yaml").write_text(f"model: {old}\n")
    (tmp_path / "new.yaml").write_text(f"model: {new}\n")
    assert upgrade_text(f"model: {old}\n", "part") == f"model: {new}\n"
    old_model, model = (load_config(tmp_path / f"{name}.yaml", accept_old_names=True).model for name in ("old", "new"))
    assert old_model == model
    with pytest.raises(UserError, match="is now model"):
        load_config(tmp_path / "old.yaml")


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("model: {num_moe_experts: 8, window_size: 3}", "model.moe.num_experts"),
        ("model: {moe_router_enable_expert_bias: true}", "model.moe.router_bias_update_rate"),
        ("model: {yarn_beta_fast: 8}", "model.rope_scaling.yarn.beta_fast"),
        ("model: {rope_scaling_type: yarn}", "model.rope_scaling.yarn"),
        ("model: {moe_router_pre_softmax: true}", "model.moe.router_score_function"),
        ("training: {fp8: hybrid}", "training.fp8.format=hybrid"),
        ("training: {fp8: none}", "training.fp8=null"),
        ("training: {fp8_recipe: delayed}", "training.fp8.recipe"),
        ("training: {on_spike: skip}", "training.spikes.action"),
        ("checkpoint: {upload_to: s3://bucket}", "checkpoint.uploads.to"),
        ("checkpoint: {export_interval: 3}", "checkpoint.exports.interval"),
        ("data: {fim_rate: 0.5}", "data.fim.rate"),
        ("data: {fim_middle_token: x}", "data.fim.tokens"),
        ("logging: {profile_step_end: 3}", "logging.profile.step_end"),
        ("logging: {straggler_interval: 3}", "logging.straggler.interval"),
        ("engine: megatron", "deepspeed"),
        ("zero: {stage: 2}", "deepspeed"),
        ("deepspeed: {steps_per_print: 5}", "deepspeed.config.steps_per_print"),
    ],
)
def test_a_users_file_is_refused_with_the_new_name_and_the_command(tmp_path, text, new):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\n{text}\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    line = str(error.value)
    assert line.startswith(f"{path}:2: ") and new in line and "plt config upgrade" in line


@pytest.mark.parametrize(
    ("override", "new"),
    [("zero.stage=2", "deepspeed.zero_stage"), ("model.moe_router_topk=2", "model.moe.router_topk")],
)
def test_an_override_is_refused_with_the_new_name(override, new):
    with pytest.raises(UserError, match=f"override .*{new}$"):
        load_config("configs/runs/plt2_tiny.yaml", [override])


def test_a_misspelled_setting_of_deepspeed_is_no_old_name():
    with pytest.raises(UserError, match="did you mean deepspeed.zero_stage"):
        load_config("configs/runs/plt2_tiny.yaml", ["deepspeed.zero_stag=2"])


def test_old_and_new_names_of_one_setting_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {num_moe_experts: 8, moe: {num_experts: 4}}\n")
    with pytest.raises(UserError, match="model.num_moe_experts is now model.moe.num_experts"):
        load_config(path)
    path.write_text("model: {norm_between_loops: true, loop_norm: rms}\n")
    with pytest.raises(UserError, match="model.norm_between_loops is now model.loop_norm=final"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "old"),
    [
        ("model: {num_moe_experts: 8, moe: {num_experts: 4}}\n", "model.num_moe_experts"),
        ("model: {norm_between_loops: true, loop_norm: rms}\n", "model.norm_between_loops"),
        ("parallel: {local_cp_comm_type: a2a, window_cp_comm_type: a2a}\n", "parallel.local_cp_comm_type"),
        ("model: {ffn_output_norm: false, norm_placement: pre_ffn_output}\n", "model.ffn_output_norm"),
        (
            "model: {moe_router_enable_expert_bias: true, moe: {num_experts: 4, router_bias_update_rate: 5e-3}}\n",
            "model.moe_router_enable_expert_bias",
        ),
    ],
)
def test_what_cannot_be_rewritten_is_named_by_the_command_too(text, old):
    with pytest.raises(UserError, match=f"file.yaml:1: {old}, now "):
        upgrade_text(text, "file.yaml")


def test_a_renamed_setting_and_a_removed_one_are_rewritten():
    assert upgrade_text("parallel: {local_cp_comm_type: all_gather}\n", "x") == (
        "parallel: {window_cp_comm_type: all_gather}\n"
    )
    assert upgrade_text("data: {index_timeout_minutes: 3}\n", "x").strip() == ""
    with pytest.raises(UserError, match="by hand"):  # it would lose what the file that includes it may need
        upgrade_text("model: {rope_scaling_type: yarn}\n", "x")


def test_a_part_of_a_file_keeps_what_it_says():
    old, new = "  moe_router_topk: 4  # of 8\n", "  moe:\n    router_topk: 4  # of 8\n"
    text = "# a part\nmodel:\n{}  loop_count: 3\n\n# the end\n"
    assert upgrade_text(text.format(old), "part") == text.format(new)
    assert upgrade_text("training: {fp8: none, seed: 3}\n", "part") == "training: {fp8: null, seed: 3}\n"
    assert upgrade_text("engine: deepspeed\nname: x\n", "part") == "deepspeed: {}\nname: x\n"
    assert upgrade_text("engine: megatron\nname: x\n", "part") == "deepspeed: null\nname: x\n"


@pytest.mark.parametrize(
    ("text", "old"),
    [
        ("training: {fp8_recipe: auto}", "training.fp8_recipe"),
        ("training: {first_last_layers_bf16: false}", "training.first_last_layers_bf16"),
        ("zero: {stage: 1}", "zero.stage"),
        ("include: b.yaml\ndeepspeed: {steps_per_print: 5}", "deepspeed.steps_per_print"),
        ("training: {spike_threshold: 6.0}", "training.spike_threshold"),
        ("model: {moe_router_bias_update_rate: 5e-3}", "model.moe_router_bias_update_rate"),
        ("model: {num_moe_experts: null, moe_router_topk: 4}", "model.moe_router_topk"),
        ("training: {on_spike: ignore, spike_threshold: 4}", "training.spike_threshold"),
        ("training: {fp8: none, fp8_recipe: delayed}", "training.fp8_recipe"),
        ("checkpoint: {export_interval: 0, export_upload_to: file:///x}", "checkpoint.export_upload_to"),
        ("evaluation: {tasks: [], limit: 3}", "evaluation.limit"),
        ("include: b.yaml\nmodel: {hidden_scale_ratio: 0.5}", "model.hidden_scale_ratio"),
        ("include: b.yaml\nmodel: {hidden_scale_ratio: null}", "model.hidden_scale_ratio"),
        ("include: b.yaml\nmodel: {ffn_output_norm: false}", "model.ffn_output_norm"),
        ("include: b.yaml\nmodel: {moe_router_pre_softmax: false}", "model.moe_router_pre_softmax"),
        ("include: b.yaml\nmodel: {norm_between_loops: false}", "model.norm_between_loops"),
        ("include: b.yaml\nmodel: {rope_scaling_factor: 8, rope_scaling_type: llama3}", "model.rope_scaling_type"),
        ("include: b.yaml\nmodel: {moe_router_enable_expert_bias: true}", "model.moe_router_enable_expert_bias"),
        ("include: b.yaml\ntraining: {fp8: hybrid, first_last_layers_bf16: true}", "training.first_last_layers_bf16"),
    ],
)
def test_what_other_files_decide_is_left_to_the_user(text, old):
    with pytest.raises(UserError, match=rf"^x:[12]: {old}(, now .*,)? cannot be rewritten .*by hand$"):
        upgrade_text(f"{text}\n", "x")


def test_what_other_files_cannot_change_is_rewritten_beside_an_include():
    old = "include: b\nmodel: {ffn_output_norm: true, moe_router_enable_expert_bias: false, hidden_scale_ratio: 0.0}\n"
    new = "{norm_placement: pre_ffn_output, moe: {router_bias_update_rate: null}, hidden_scale: 0.0}"
    assert upgrade_text(old, "x") == f"include: b\nmodel: {new}\n"
    dormant = "training: {fp8: hybrid, num_layers_at_start_in_bf16: 2}\n"  # without first_last_layers_bf16
    assert upgrade_text(dormant, "x") == "training: {fp8: {format: hybrid, num_layers_at_start_in_bf16: 0}}\n"


def test_a_files_own_indentation_is_kept():
    old = "model:\n    moe_router_topk: 4\n    num_layers: 2\ndata:\n    sequence_length: 8  # short\n"
    new = "model:\n    moe:\n      router_topk: 4\n    num_layers: 2\ndata:\n    sequence_length: 8  # short\n"
    assert upgrade_text(old, "wide") == new


# ---------------------------------------------------------------- sections


def test_comments_below_and_beside_sections_stay():
    old = """\
model:  # the model
  num_layers: 2
  norm_between_loops: true
  # the end of the model

# the rest
training:
  # in FP8
  fp8: hybrid
  train_iters: 5
# profile
logging:
  profile_step_end: 5
  profile_ranks:
    - 0
# the end
"""
    new = old.replace("norm_between_loops: true", "loop_norm: final")
    new = new.replace("  # in FP8\n  fp8: hybrid", "  fp8:\n    # in FP8\n    format: hybrid")
    new = new.replace("  profile_step_end: 5\n", "  profile:\n    step_end: 5\n")
    assert upgrade_text(old, "old") == new.replace("  profile_ranks:\n    - 0", "    ranks: [0]")
    flow = "model: {norm_between_loops: true}  # the model\n"
    assert upgrade_text(flow, "old") == "model: {loop_norm: final}  # the model\n"
    tab = "model:\n  norm_between_loops: true\t# tab\n"
    assert upgrade_text(tab, "old") == "model:\n  loop_norm: final  # tab\n"


@pytest.mark.parametrize(
    ("text", "comment"),
    [
        ("model: {norm_between_loops: true,  # first\n  loop_count: 2}\n", "old:1: the comment '# first'"),
        ("engine: deepspeed  # e\nzero: {stage: 3}  # z\n", "old:1: the comment '# e'"),
        ("training:\n  fp8: none  # off\n  fp8_recipe: auto  # old\n", "old:3: the comment '# old'"),
    ],
)
def test_a_comment_that_would_be_lost_is_told(text, comment):
    with pytest.raises(UserError, match=comment):
        upgrade_text(text, "old")


def test_a_section_is_off_until_a_setting_turns_it_on(tmp_path):
    run = "configs/runs/plt2_tiny.yaml"
    assert load_config(run).model.moe is None
    assert load_config(run, ["model.moe.num_experts=8"]).model.moe == MoeConfig(8)
    assert load_config(run, ["training.fp8={}"]).training.fp8 == Fp8Config()
    assert load_config(run, ["training.fp8.attention=true", "training.fp8=null"]).training.fp8 is None
    with pytest.raises(UserError, match=r"override 'model.moe.router_topk=3': model.moe.num_experts is missing"):
        load_config(run, ["model.moe.router_topk=3"])
    base = tmp_path / "base.yaml"
    base.write_text("model: {moe: {num_experts: 8, router_topk: 4}}\n")
    assert load_config(base, ["model.moe=null"]).model.moe is None
    (tmp_path / "over.yaml").write_text("include: base.yaml\nmodel: {moe: {num_experts: 16}}\n")
    assert load_config(tmp_path / "over.yaml").model.moe == MoeConfig(16, router_topk=4)
