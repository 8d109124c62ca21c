"""Files of sweeps and studies: what they say, and where what is wrong with them stands; every preset makes a plan."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from plt_megatron.config.fields import field_types, kinds_with
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import Hold, StudyFile, SweepFile, read_study, read_sweep
from plt_megatron.experiments.records import Status
from plt_megatron.experiments.sweep_plan import make_plan
from tests.running import ROOT
from tests.unit.experiments.study.study_helpers import STUDY, write_study

PRESETS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
CORPUS = ["demo_corpus.vocab_size=2048"]  # of a tokenizer that does not exist


def write(folder: Path, text: str) -> Path:
    path = folder / "my_sweep.yaml"
    path.write_text(text)
    return path


def test_defaults_come_from_the_files_name_and_place(tmp_path):
    sweep = read_sweep(write(tmp_path, "base: runs/a.yaml"))
    assert (sweep.name, sweep.base, sweep.seeds) == ("my_sweep", tmp_path / "runs/a.yaml", [1])
    assert sweep.compared_axis() is None and sweep.match_budget is None


def test_values_stay_as_they_were_written(tmp_path):
    text = """
base: a.yaml
set: {optimizer.lr: 1e-4, data.split: "9,1,0"}
axes:
  optimizer.min_lr: [1e-5, 2_0e-6]
  data:
    a: {data.sources: [{path: x, weight: 1e-1}]}
    b: {data.tokenizer: null}
    none:
"""
    sweep = read_sweep(write(tmp_path, text))
    assert sweep.overrides == ("optimizer.lr=1e-4", 'data.split="9,1,0"')
    rates, data = sweep.axes.values()
    assert [choice.overrides for choice in rates.choices] == [("optimizer.min_lr=1e-5",), ("optimizer.min_lr=2_0e-6",)]
    assert [choice.label for choice in rates.choices] == ["min_lr=1e-5", "min_lr=2_0e-6"]
    assert data.choices[0].overrides == ("data.sources=[{path: x, weight: 1e-1}]",)
    assert data.choices[2].overrides == ()
    (tmp_path / "a.yaml").write_text("")
    config = load_config(tmp_path / "a.yaml", [*sweep.overrides, *data.choices[0].overrides])
    assert config.optimizer.lr == 1e-4 and config.data.split == "9,1,0"
    assert config.data.sources[0].weight == 0.1


def test_settings_change_the_sweep_or_every_run(tmp_path):
    path = write(tmp_path, "base: a.yaml\naxes: {model.loop_count: [1, 2], model.num_layers: [2, 4]}\nseeds: [1, 2]")
    sweep = read_sweep(path, ["seeds=[7]", "axes.model.loop_count=[3, 1]", "name=other", "model.hidden_size=64"])
    assert (sweep.seeds, sweep.name, sweep.overrides) == ([7], "other", ("model.hidden_size=64",))
    assert {axis.name: [c.label for c in axis.choices] for axis in sweep.axes.values()} == {
        "model.num_layers": ["num_layers=2", "num_layers=4"],
        "model.loop_count": ["3 loops", "1 loop"],
    }
    assert sweep.compared_axis().name == "model.loop_count"


def test_the_compared_axis_is_the_one_that_changes_the_loops(tmp_path):
    text = (
        "base: a.yaml\naxes: {model.num_layers: [1, 2], row: {a: {model.loop_count: 1}, b: {model.share_kv: false}}}\n"
    )
    assert read_sweep(write(tmp_path, text)).compared_axis().name == "row"
    assert read_sweep(write(tmp_path, text), ["compare=model.num_layers"]).compared_axis().name == "model.num_layers"
    for loops in ("model: [{loop_count: 1}, {loop_count: 2}]", "model.loop_preset: [paper, recommended]"):
        text = f"base: a.yaml\naxes: {{model.num_layers: [1, 2], {loops}}}\n"
        assert read_sweep(write(tmp_path, text)).compared_axis().name == loops.partition(":")[0]


def test_blocks_may_hold_marks_that_brackets_give_a_meaning(tmp_path):
    text = """
base: a.yaml
set:
  data:
    split: 95,5,0
  training.trainable:
    - layers.[0-9]
    - it's, {x}
  data.sources: [{path: x, weight: }]
"""
    (tmp_path / "a.yaml").write_text("")
    overrides = read_sweep(write(tmp_path, text)).overrides
    config = load_config(tmp_path / "a.yaml", overrides[:2])
    assert config.data.split == "95,5,0" and config.training.trainable == ["layers.[0-9]", "it's, {x}"]
    assert overrides[2] == "data.sources=[{path: x, weight: null}]"


def test_a_setting_that_every_run_overrides_is_refused(tmp_path):
    path = write(tmp_path, "base: a.yaml\naxes: {model.loop_count: [1, 2], row: {a: {model.share_kv: false}, b: {}}}")
    with pytest.raises(UserError, match=r"model.loop_count: axes.model.loop_count sets it in every run"):
        read_sweep(path, ["model={loop_count: 4}"])
    assert read_sweep(path, ["model.share_kv=true"]).settings == ["model.share_kv=true"]


def test_settings_of_each_kind_of_file_are_known_to_the_others():
    kinds = {"a run (plt train, plt submit)": RunConfig, "a sweep (plt sweep)": SweepFile}
    kinds |= {"a study (plt study)": StudyFile}
    names = {kind: set(field_types(schema)) for kind, schema in kinds.items()}
    for name in set().union(*names.values()) - {"name", "output_dir"}:
        assert kinds_with(name) == " or ".join(kind for kind in kinds if name in names[kind])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axes: {}", "base is missing"),
        ("base: a.yaml\nmatch_budget: flops", "match_budget: expected one of tokens, training_flops"),
        ("base: a.yaml\nseed: [1]", "unknown key seed; did you mean seeds?"),
        ("base: a.yaml\nseeds: [1, 1]", "give at least one, each once"),
        ("base: a.yaml\nseeds: 3", "seeds: expected a list of integers, got '3'"),
        ("base: a.yaml\nseeds: [one]", "expected an integer, got 'one'"),
        ("base: a.yaml\naxes: {model.loop_count: 2}", "expected a list of values or a mapping"),
        ("base: a.yaml\naxes: {model.loop_count: []}", "is empty"),
        ("base: a.yaml\naxes: {model.loop_count: [1, 1]}", "a value twice"),
        (
            "base: a.yaml\naxes: {training.seed: [1, 2]}",
            ":2: axes.training.seed: training.seed is set by the sweep; use seeds",
        ),
        ("base: a.yaml\nset: {output_dir: x}", ":2: set.output_dir: output_dir is set by the sweep"),
        ("base: a.yaml\nset: {training: {seed: 7}}", ":2: set.training: training.seed is set by the sweep"),
        ("base: a.yaml\naxes: {r: {a: {}, b: {}}}\nbaseline: c", "baseline: 'c' is not one of a, b"),
        ("base: a.yaml\naxes: {r: {a: {}}}\ncompare: s", "there is no axis 's'; the axes are r"),
        ("base: a.yaml\naxes: {r: {a: {}}}\nquestions: {q: [a]}", "questions.q: expected two labels"),
        ("base: a.yaml\naxes: {r: {a: {}}}\nquestions: {q: [a, c]}", "questions.q: 'c' is not one of a"),
        ("base: a.yaml\nname: a/b", "name: must be a folder name"),
        ("base: a.yaml\nname: ..", "name: must be a folder name"),
        ("base: a.yaml\ntolerance: 2", ":2: tolerance must be below 1, got 2.0"),
        ("base: a.yaml\ndecode: {batch: 4}", ":2: unknown key decode.batch; did you mean decode.batch_size?"),
        ("base: a.yaml\nbase: b.yaml", "base is given twice"),
        ("model: {num_layers: 4}", ":1: unknown key model; it is a setting of a run (plt train, plt submit)"),
        ("base: a.yaml\nhorizons: [1]", ":2: unknown key horizons; it is a setting of a study (plt study)"),
        ("base: [", "not valid YAML"),
        ("", "base is missing"),
        ("base: a.yaml\nhold_equal: tokens", ":2: hold_equal is now called match_budget"),
        ("- a", "expected `key: value` lines"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        read_sweep(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing.yaml"):
        read_sweep(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_make_plans(path):
    sweep = read_sweep(path, CORPUS)
    plan = make_plan(sweep, check_files=False)
    rows = 1
    for axis in sweep.axes.values():
        rows *= len(axis.choices)
    assert len(plan.runs) == rows * len(sweep.seeds) == len({run.name for run in plan.runs})
    assert plan.match_budget is not None and all(abs(run.deviation) <= 0.02 for run in plan.runs)


def test_the_ablation_has_the_documented_rows():
    """docs/model.md states each row's overrides; `loop_count=2` there is the default's name for PLT-2."""
    text = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| ([^|]+) \| `(model\.[^`]+)` \|$", text.split("## The paper's ablation")[1], re.M)
    (axis,) = read_sweep(ROOT / "configs/sweeps/paper_ablation.yaml").axes.values()
    ours = [sorted(choice.overrides) for choice in axis.choices[: len(documented)]]
    assert ours == [sorted(overrides.split()) for _, overrides in documented] and len(documented) == 5
    assert [choice.overrides for choice in axis.choices[5:]] == [("model.loop_count=3",)]


def test_the_ablation_is_large_enough_to_mean_something():
    plan = make_plan(read_sweep(ROOT / "configs/sweeps/paper_ablation.yaml", CORPUS), check_files=False)
    assert all(run.non_embedding_parameters >= 1_000_000 and run.tokens >= 5_000_000 for run in plan.runs)
    assert len({run.seed for run in plan.runs}) == 3


def test_the_documentation_names_every_key_preset_and_status():
    text = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    keys = [f.name for f in dataclasses.fields(SweepFile) if f.init]
    missing = [key for key in [*keys, *typing.get_args(Hold)] if not re.search(rf"\b{key}\b", text)]
    missing += [path.name for path in PRESETS if path.name not in text]
    missing += [status for status in typing.get_args(Status) if not re.search(rf"^\| .*{status}.* \|", text, re.M)]
    assert missing == []


def test_the_documented_sweep_is_one(tmp_path):
    text = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = write(tmp_path, text.replace("../runs", str(ROOT / "configs/runs")))
    plan = make_plan(read_sweep(path, [*CORPUS, "tolerance=0.05"]), check_files=False)
    assert len(plan.runs) == 3 * 2 * 3 and plan.questions


# ---------------------------------------------------------------- studies


def test_a_file_and_the_command_line(tmp_path):
    study = read_study(write_study(tmp_path), ["budget=2d", "seeds=[3]", "optimizer.lr=1e-3"])
    assert study.name == "study" and str(study.folder) == "runs/studies/study"
    assert float(study.budget) == 48.0 and study.seeds == [3]
    assert study.overrides == ("optimizer.lr_warmup_iters=4", "optimizer.lr=1e-3")
    assert study.variants["naive loop"].keys() >= {"model.share_kv"} and study.variants["PLT"] == ()
    assert study.decide.latency_ms == 0.0006 and study.decide.batch_size == 1


@pytest.mark.parametrize(("text", "hours"), [("90min", 1.5), ("45 m", 0.75), ("40h", 40.0), ("1.5d", 36.0)])
def test_budgets_are_times(tmp_path, text, hours):
    assert float(read_study(write_study(tmp_path), [f"budget={text}"]).budget) == hours


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("loops: [1, 2, 3]", "loops: [2, 3]", 11, "loops: give 1 and at least one more"),
        ("loops: [1, 2, 3]", "loops: [1, 2, 9]", 11, r"loops\[2\] must be at most 8"),
        ("[1280, 2560, 5120]", "[1280, 5120]", 12, "horizons: give at least 3"),
        ("[1280, 2560, 5120]", "[5120, 2560, 1280]", 12, "horizons: give them ascending"),
        ("  M: {model.hidden_size: 32, model.ffn_hidden_size: 64}\n", "", 7, "sizes: give at least 3"),
        ("seeds: [1, 2]", "seeds: [1, 1]", 13, "seeds: give at least one, each once"),
        ("budget: 0.12min", "budget: 20", 14, "budget: expected a time as in 40h"),
        ("budget: 0.12min", "budget: 0h", 14, "budget: expected a time as in 40h"),
        ("latency_ms: 0.0006", "latency: 0.0006", 15, "did you mean decide.latency_ms"),
        ("confidence: 0.999", "confidence: 0.4", 15, "decide.confidence must be above 0.5"),
        ("context_length: 64", "gpu: abacus", 15, "no card 'abacus' in the table"),
        ("PLT: {}", "PLT: {model.loop_count: 2}", 5, "model.loop_count is set by the study; use loops"),
        ("lr_warmup_iters: 4", "lr_decay_iters: 4", 3, "optimizer.lr_decay_iters is set by the study; use horizons"),
        (
            "S: {model.hidden_size: 16",
            "S: {training.train_iters: 16",
            8,
            "train_iters is set by the study; use horizons",
        ),
        ("budget:", "bugdet:", 14, "bugdet"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, old, new, line, said):
    assert old in STUDY
    path = write_study(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"study\.yaml:{line}: .*{said}") as error:
        read_study(path)
    assert "\n" not in str(error.value)


def test_a_file_without_its_base(tmp_path):
    with pytest.raises(UserError, match="base is missing"):
        read_study(write_study(tmp_path, STUDY.replace("base: base.yaml", "")))
