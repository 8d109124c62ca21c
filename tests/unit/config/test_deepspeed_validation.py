"""What `deepspeed` refuses, one line each with the alternative, and what DeepSpeed is told."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

import pytest

from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.rules import deepspeed
from plt_megatron.config.rules.deepspeed import deepspeed_config
from plt_megatron.config.schema import DeepSpeedConfig, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from tests.running import ROOT
from tests.unit.config.test_validation import change, good


def config_with(**changes: object) -> RunConfig:
    """A good configuration of this engine; keys are dotted, `__` for the dot."""
    return change(good(), **{"deepspeed": DeepSpeedConfig(), **changes})


def problems(world_size: int | None = None, **changes: object) -> list[str]:
    return find_problems(config_with(**changes), world_size=world_size, check_files=False)


def raw(section: dict) -> list[str]:
    return problems(deepspeed__config=section)


def test_what_the_engine_can_do_passes():
    assert problems() == []
    for stage in (1, 2, 3):
        assert problems(deepspeed__zero_stage=stage, deepspeed__offload_optimizer="cpu") == []
    assert problems(deepspeed__zero_stage=3, deepspeed__offload_param="cpu", training__precision="fp32") == []
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    for recompute in ("none", "selective", "full"):
        assert problems(world_size=4, parallel__recompute_granularity=recompute, **layout) == []


@pytest.mark.parametrize(
    ("changes", "expected", "alternative"),
    [
        ({"parallel__pipeline_model_parallel_size": 2}, "parallel.pipeline_model_parallel_size", "=1"),
        ({"parallel__context_parallel_size": 2}, "parallel.context_parallel_size", "=1"),
        ({"parallel__overlap_grad_reduce": True}, "parallel.overlap_grad_reduce", "=false"),
        (
            {"training__ema_decay": 0.999},
            "training.ema_decay is not verified with deepspeed",
            "training.ema_decay=null",
        ),
        ({"model__moe__num_experts": 4}, "model.moe is not verified with deepspeed", "model.moe=null"),
        (
            {"deepspeed__offload_param": "cpu"},
            "deepspeed.offload_param cpu needs deepspeed.zero_stage=3",
            "deepspeed.offload_param=none",
        ),
        (
            {"deepspeed__offload_param": "cpu", "deepspeed__zero_stage": 2},
            "deepspeed.offload_param cpu needs deepspeed.zero_stage=3",
            "offload_param",
        ),
    ],
)
def test_what_it_cannot_do_is_one_line_with_the_alternative(changes, expected, alternative):
    (line,) = problems(**changes)
    assert expected in line and alternative in line and "\n" not in line
    if "deepspeed__zero_stage" not in changes and "deepspeed__offload_param" not in changes:
        config = config_with(**changes)
        config.deepspeed = None
        assert find_problems(config, check_files=False) == []


def test_fp8_is_refused():
    config = config_with(training__fp8__format="hybrid", model__backend="te")
    lines = [line for line in find_problems(config, check_files=False, have_te=True) if "deepspeed" in line]
    assert len(lines) == 1 and "training.fp8=null" in lines[0]


def test_an_optimizer_that_deepspeed_does_not_run_is_refused():
    (line,) = problems(optimizer__name="sgd", deepspeed__config={"optimizer": {"params": {"betas": [0.9, 0.95]}}})
    assert line.startswith("optimizer.name sgd") and "optimizer.name=adam" in line


def test_there_are_three_stages():
    assert problems(deepspeed__zero_stage=0) == ["deepspeed.zero_stage must be at least 1, got 0"]
    assert problems(deepspeed__zero_stage=4) == ["deepspeed.zero_stage must be at most 3, got 4"]


def test_the_raw_section_may_add():
    assert raw({"wall_clock_breakdown": True, "zero_optimization": {"sub_group_size": 5e8}}) == []
    section = {"zero_optimization": {"stage3_prefetch_bucket_size": 1e6, "offload_param": {"pin_memory": True}}}
    config = config_with(deepspeed__zero_stage=3, deepspeed__offload_param="cpu", deepspeed__config=section)
    assert find_problems(config, check_files=False) == []
    told = deepspeed_config(config)["zero_optimization"]
    assert told["stage3_prefetch_bucket_size"] == 1_000_000 and isinstance(told["stage3_prefetch_bucket_size"], int)
    assert told["offload_param"] == {"pin_memory": True, "device": "cpu"} and told["stage"] == 3


def test_the_raw_section_may_repeat_what_is_decided_and_nothing_else():
    for name, value in deepspeed.written(config_with()).items():
        nested = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        assert raw(nested) == [], name


@pytest.mark.parametrize("key", deepspeed.DECIDED_BY)
def test_each_decision_names_the_setting_it_follows_from(key):
    section: dict = {}
    place = section
    *parts, last = key.split(".")
    for part in parts:
        place = place.setdefault(part, {})
    place[last] = "something else"
    (line,) = raw(section)
    assert line.startswith(f"deepspeed.config.{key} something else contradicts {deepspeed.DECIDED_BY[key]}")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"train_batch_size": 32},
            "deepspeed.config.train_batch_size 32 contradicts training.global_batch_size, which makes it 8: set that",
        ),
        ({"gradient_clipping": 0.5}, "contradicts optimizer.clip_grad, which makes it 1"),
        (
            {"zero_optimization": {"stage": 3}},
            "deepspeed.config.zero_optimization.stage 3 contradicts deepspeed.zero_stage",
        ),
        (
            {"zero_optimization": {"stage": True}},
            "deepspeed.config.zero_optimization.stage true contradicts deepspeed.zero_stage",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled cannot be set here: set training.precision=bf16; leave this out"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm cannot be set here: it reduces gradients before"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "leave it out: all of the optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.config.scheduler.type cannot be set here: set the optimizer"),
        ({"zero_optimization": {"contiguous_gradients": False}}, "must be true here: leave it out"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 1}},
            "DeepSpeed would silently ignore it; did you mean zero_optimization.reduce_bucket_size?",
        ),
        ({"wibble": 1}, "deepspeed.config.wibble is unknown"),
        ({"zero_optimization": 3}, "deepspeed.config.zero_optimization is a section: set its keys"),
        ({"zero_optimization": {"sub_group_size": -1}}, "expected a whole number of at least 0, got -1"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "expected an even whole number of at least 2, got 0"),
        ({"zero_optimization": {"allgather_bucket_size": 5}}, "expected an even whole number of at least 2, got 5"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "expected a whole number of at least 0, got 1.5"),
        ({"zero_optimization": {"reduce_bucket_size": float("nan")}}, "expected a whole number of at least 1, got nan"),
        ({"zero_optimization": {"reduce_bucket_size": float("inf")}}, "expected a whole number of at least 1, got inf"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "expected a whole number of at least 1, got auto"),
        ({"wall_clock_breakdown": 1}, "deepspeed.config.wall_clock_breakdown: expected true or false, got 1"),
        (
            {"steps_per_print": None},
            "deepspeed.config.steps_per_print: expected a whole number of at least 1, got null",
        ),
    ],
)
def test_the_raw_section_may_not_contradict_nor_be_misspelled(section, expected):
    (line,) = raw(section)
    assert expected in line and "\n" not in line


def test_all_problems_are_shown_at_once():
    layout = {"parallel__context_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}
    assert len(raw({"train_batch_size": 1, "fp16": {"enabled": True}, "wibble": 0})) == 3
    assert len(problems(deepspeed__config={"wibble": 0}, **layout)) == 3


def test_the_batch_follows_from_the_processes_there_are():
    section = {"gradient_accumulation_steps": 2}
    assert problems(world_size=4, deepspeed__config=section) == []
    (line,) = problems(world_size=2, deepspeed__config=section)
    assert "gradient_accumulation_steps 2 contradicts training.global_batch_size, which makes it 4" in line


# ---------------------------------------------------------------- from a file to DeepSpeed


def test_the_section_is_read_merged_and_written_back(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "deepspeed: {config: {zero_optimization: {sub_group_size: 1e6, reduce_scatter: false}}}\n"
    )
    path = tmp_path / "run.yaml"
    named = "    named: ['1e4', '2e-4']\n"
    path.write_text(
        f"include: base.yaml\ndeepspeed:\n  config:\n    zero_optimization: {{sub_group_size: 2e6}}\n{named}"
    )
    config = load_config(path, ["deepspeed.config.steps_per_print=5", "deepspeed.zero_stage=2"])
    assert config.deepspeed is not None and config.deepspeed.config == {
        "zero_optimization": {"sub_group_size": 2e6, "reduce_scatter": False},
        "named": ["1e4", "2e-4"],
        "steps_per_print": 5,
    }
    assert config.deepspeed.zero_stage == 2
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepspeed: {config: 3}", "deepspeed.config is a section of its own keys"),
        ("deepspeed: [a]", "deepspeed is a section (deepspeed.zero_stage, "),
        ("deepspeed: {config: {a.b: 1}}", "expected a setting's name below deepspeed.config"),
        ("deepspeed: {[a]: 1}", "expected a setting's name below deepspeed"),
        ("deepspeed: {zero_stage: two}", "deepspeed.zero_stage"),
        ("engine: deepspeed", "the section deepspeed"),
    ],
)
def test_a_bad_section_names_file_line_and_key(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\n{text}\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert f"{path}:2" in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)


def test_deepspeed_is_told_what_our_configuration_says():
    config = config_with(
        deepspeed__zero_stage=2, deepspeed__offload_optimizer="cpu", optimizer__lr=1e-3, optimizer__clip_grad=0.0,
        training__global_batch_size=32, training__micro_batch_size=2,
    )  # fmt: skip
    told = deepspeed_config(config, 4)
    assert json.loads(json.dumps(told)) == told
    assert (told["train_batch_size"], told["train_micro_batch_size_per_gpu"]) == (32, 2)
    assert told["gradient_accumulation_steps"] == 4 and told["gradient_clipping"] == 0.0
    assert told["optimizer"]["params"]["lr"] == 1e-3 and told["optimizer"]["params"]["torch_adam"] is True
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert told["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert told["data_types"] == {"grad_accum_dtype": "fp32"} and told["communication_data_type"] == "fp32"
    assert "communication_data_type" not in deepspeed_config(config_with(training__precision="fp32"))


def test_the_raw_section_is_not_changed_by_being_used():
    section = {"zero_optimization": {"sub_group_size": 5e8}}
    config = config_with(deepspeed__config=section)
    deepspeed_config(config)["zero_optimization"]["sub_group_size"] = 1
    assert config.deepspeed is not None and config.deepspeed.config == {"zero_optimization": {"sub_group_size": 5e8}}


def test_every_name_and_every_least_value_is_deepspeeds_own():
    """It passes over names of other sections that it does not know; one that it no longer has would do nothing."""
    module = pytest.importorskip("deepspeed.runtime.zero.config", reason="DeepSpeed is not installed")
    section: dict = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    least = {"bool": True, "count": 0, "positive": 1, "even": 2}
    for key, kind in deepspeed.ADDABLE.items():
        if key.startswith("zero_optimization."):
            _, *parts, last = key.split(".")
            place = section
            for part in parts:
                place = place[part]
            place[last] = least[kind]
    read = module.DeepSpeedZeroConfig(**section)  # unknown names are an error within this section
    assert read.stage == 3 and read.param_persistence_threshold == 0 and read.offload_param.pin_memory is True
    written = deepspeed_config(config_with(deepspeed__zero_stage=3))["zero_optimization"]
    assert module.DeepSpeedZeroConfig(**written).reduce_bucket_size == 40_000_000


def test_the_documentation_lists_what_may_be_added():
    text = (ROOT / "docs/deepspeed.md").read_text(encoding="utf-8")
    listed = text.partition("These keys are accepted, and no others:")[2].partition("\nA key")[0]
    assert sorted(re.findall(r"`([\w.]+)`", listed)) == sorted(deepspeed.ADDABLE)


# ---------------------------------------------------------------- the package


@pytest.mark.parametrize("version", ["0.18.3", "0.20.0", "1.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    lines = find_problems(config_with(), check_files=False, check_packages=True)
    (line,) = (line for line in lines if version in line)
    assert all(part in line for part in ("deepspeed", ">=0.19", "<0.20", "deepspeed=null"))
    assert not any(version in line for line in find_problems(good(), check_files=False, check_packages=True))


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    lines = find_problems(config_with(), check_files=False, check_packages=True)
    assert any("'plt-megatron[deepspeed]', or set deepspeed=null" in line for line in lines)


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8"])
def test_the_supported_versions(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    lines = find_problems(config_with(), check_files=False, check_packages=True)
    assert not any("deepspeed" in line for line in lines)
