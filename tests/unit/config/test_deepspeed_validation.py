"""What `engine: deepspeed` refuses, one line each with the alternative, and what DeepSpeed is told."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest

from plt_megatron.config import deepspeed_settings as settings
from plt_megatron.config.deepspeed_settings import deepspeed_config
from plt_megatron.config.deepspeed_validation import find_package_problem
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.schema import DataSource, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError


def config_with(**changes: object) -> RunConfig:
    """A good configuration of this engine; keys are dotted, `__` for the dot."""
    config = RunConfig(engine="deepspeed")
    config.data.sources, config.data.tokenizer = [DataSource("corpus")], "tokenizer.model"
    config.training.train_iters = 100
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        target = getattr(config, section) if section else config
        assert hasattr(target, name), key
        setattr(target, name, value)
    return config


def problems(world_size: int | None = None, **changes: object) -> list[str]:
    return find_problems(config_with(**changes), world_size=world_size, check_files=False)


def raw(section: dict) -> list[str]:
    return problems(deepspeed=section)


def test_what_the_engine_can_do_passes():
    assert problems() == []
    for stage in (1, 2, 3):
        assert problems(zero__stage=stage, zero__offload_optimizer="cpu") == []
    assert problems(zero__stage=3, zero__offload_param="cpu", training__precision="fp32") == []
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    for recompute in ("none", "selective", "full"):
        assert problems(world_size=4, parallel__recompute_granularity=recompute, **layout) == []


@pytest.mark.parametrize(
    ("changes", "expected", "alternative"),
    [
        ({"parallel__pipeline_model_parallel_size": 2}, "parallel.pipeline_model_parallel_size 2", "engine=megatron"),
        ({"parallel__context_parallel_size": 2}, "parallel.context_parallel_size 2", "engine=megatron"),
        ({"parallel__overlap_grad_reduce": True}, "parallel.overlap_grad_reduce true: set it to false", "megatron"),
        ({"zero__stage": 0}, "zero.stage 0", "set zero.stage=1, or engine=megatron"),
        ({"zero__offload_param": "cpu"}, "zero.offload_param cpu needs zero.stage=3", "zero.offload_param=none"),
        (
            {"zero__offload_param": "cpu", "zero__stage": 2},
            "zero.offload_param cpu needs zero.stage=3",
            "offload_param",
        ),
    ],
)
def test_what_it_cannot_do_is_one_line_with_the_alternative(changes, expected, alternative):
    (line,) = problems(**changes)
    assert expected in line and alternative in line and "\n" not in line
    if "zero__stage" not in changes and "zero__offload_param" not in changes:
        config = config_with(**changes)
        config.engine = "megatron"
        assert find_problems(config, check_files=False) == []


def test_averages_are_refused():
    (line,) = problems(training__ema_decay=0.999)
    assert line.startswith("engine deepspeed: training.ema_decay 0.999: averages are not proven")
    assert line.endswith("set it to null, or set engine=megatron")


def test_fp8_and_experts_are_refused():
    config = config_with(training__fp8="hybrid", model__backend="te")
    lines = [line for line in find_problems(config, check_files=False, have_te=True) if "engine deepspeed" in line]
    assert lines == ["engine deepspeed: training.fp8 hybrid: set it to none for BF16, or set engine=megatron"]
    lines = problems(model__num_moe_experts=4)
    assert lines == ["engine deepspeed: model.num_moe_experts 4: mixture of experts needs engine=megatron"]


def test_an_optimizer_that_deepspeed_does_not_run_is_refused():
    lines = problems(optimizer__name="sgd", deepspeed={"optimizer": {"params": {"betas": [0.9, 0.95]}}})
    assert lines == ["engine deepspeed: optimizer.name sgd: set it to adam, or set engine=megatron"]


def test_there_are_three_stages():
    assert problems(zero__stage=-1) == ["zero.stage must be at least 0, got -1"]
    assert problems(zero__stage=4) == ["zero.stage must be at most 3, got 4"]


def test_the_megatron_engine_does_not_pass_over_the_sections_in_silence():
    (line,) = problems(engine="megatron", zero__stage=2)
    assert line.startswith("zero: this section is for engine=deepspeed")
    (line,) = problems(engine="megatron", deepspeed={"steps_per_print": 1})
    assert line.startswith("deepspeed: this section is for engine=deepspeed")


# ---------------------------------------------------------------- the raw section


def test_the_raw_section_may_add():
    assert raw({"wall_clock_breakdown": True, "zero_optimization": {"sub_group_size": 5e8}}) == []
    section = {"zero_optimization": {"stage3_prefetch_bucket_size": 1e6, "offload_param": {"pin_memory": True}}}
    config = config_with(zero__stage=3, zero__offload_param="cpu", deepspeed=section)
    assert find_problems(config, check_files=False) == []
    told = deepspeed_config(config)["zero_optimization"]
    assert told["stage3_prefetch_bucket_size"] == 1_000_000 and isinstance(told["stage3_prefetch_bucket_size"], int)
    assert told["offload_param"] == {"pin_memory": True, "device": "cpu"} and told["stage"] == 3


def test_the_raw_section_may_repeat_what_is_decided_and_nothing_else():
    for name, value in settings.written(config_with()).items():
        nested = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        assert raw(nested) == [], name


@pytest.mark.parametrize("key", settings.DECIDED_BY)
def test_each_decision_names_the_setting_it_follows_from(key):
    section: dict = {}
    place = section
    *parts, last = key.split(".")
    for part in parts:
        place = place.setdefault(part, {})
    place[last] = "something else"
    (line,) = raw(section)
    assert line.startswith(f"deepspeed.{key} something else contradicts {settings.DECIDED_BY[key]}")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"train_batch_size": 32},
            "deepspeed.train_batch_size 32 contradicts training.global_batch_size, which makes it 8: set that",
        ),
        ({"gradient_clipping": 0.5}, "contradicts optimizer.clip_grad, which makes it 1"),
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage 3 contradicts zero.stage"),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage true contradicts zero.stage"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled cannot be set here: set training.precision=bf16"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm cannot be set here: it reduces gradients before"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "leave it out: all of the optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler.type cannot be set here: set the optimizer"),
        ({"zero_optimization": {"contiguous_gradients": False}}, "must be true here: leave it out"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 1}},
            "DeepSpeed would silently ignore it; did you mean zero_optimization.reduce_bucket_size?",
        ),
        ({"wibble": 1}, "deepspeed.wibble is unknown"),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization is a section: set its keys"),
        ({"zero_optimization": {"sub_group_size": -1}}, "expected a whole number of at least 0, got -1"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "expected a whole number of at least 1, got 0"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "expected a whole number of at least 0, got 1.5"),
        ({"zero_optimization": {"reduce_bucket_size": float("nan")}}, "expected a whole number of at least 1, got nan"),
        ({"zero_optimization": {"reduce_bucket_size": float("inf")}}, "expected a whole number of at least 1, got inf"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "expected a whole number of at least 1, got auto"),
        ({"wall_clock_breakdown": 1}, "deepspeed.wall_clock_breakdown: expected true or false, got 1"),
        ({"steps_per_print": None}, "deepspeed.steps_per_print: expected a whole number of at least 1, got null"),
    ],
)
def test_the_raw_section_may_not_contradict_nor_be_misspelled(section, expected):
    (line,) = raw(section)
    assert expected in line and "\n" not in line


def test_all_problems_are_shown_at_once():
    assert len(raw({"train_batch_size": 1, "fp16": {"enabled": True}, "wibble": 0})) == 3
    assert len(problems(zero__stage=0, parallel__pipeline_model_parallel_size=2, deepspeed={"wibble": 0})) == 3


def test_the_batch_follows_from_the_processes_there_are():
    section = {"gradient_accumulation_steps": 2}
    assert problems(world_size=4, deepspeed=section) == []
    (line,) = problems(world_size=2, deepspeed=section)
    assert "gradient_accumulation_steps 2 contradicts training.global_batch_size, which makes it 4" in line


# ---------------------------------------------------------------- from a file to DeepSpeed


def test_the_section_is_read_merged_and_written_back(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "deepspeed: {zero_optimization: {sub_group_size: 1e6, reduce_scatter: false}}\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text("include: base.yaml\nengine: deepspeed\ndeepspeed:\n  zero_optimization: {sub_group_size: 2e6}\n")
    config = load_config(path, ["deepspeed.steps_per_print=5", "zero.stage=2"])
    assert config.deepspeed == {
        "zero_optimization": {"sub_group_size": 2e6, "reduce_scatter": False},
        "steps_per_print": 5,
    }
    assert config.zero.stage == 2
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepspeed: 3", "deepspeed is a section of its own keys"),
        ("deepspeed: [a]", "deepspeed is a section of its own keys"),
        ("deepspeed: {a.b: 1}", "expected a setting's name below deepspeed"),
        ("deepspeed: {[a]: 1}", "expected a setting's name below deepspeed"),
        ("zero: {stage: two}", "zero.stage"),
        ("engine: horovod", "engine"),
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
        zero__stage=2, zero__offload_optimizer="cpu", optimizer__lr=1e-3, optimizer__clip_grad=0.0,
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
    config = config_with(deepspeed=section)
    deepspeed_config(config)["zero_optimization"]["sub_group_size"] = 1
    assert config.deepspeed == {"zero_optimization": {"sub_group_size": 5e8}}


def test_every_name_and_every_least_value_is_deepspeeds_own():
    """It passes over names of other sections that it does not know; one that it no longer has would do nothing."""
    module = pytest.importorskip("deepspeed.runtime.zero.config", reason="DeepSpeed is not installed")
    section: dict = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    least = {"bool": True, "count": 0, "positive": 1}
    for key, kind in settings.ADDABLE.items():
        if key.startswith("zero_optimization."):
            _, *parts, last = key.split(".")
            place = section
            for part in parts:
                place = place[part]
            place[last] = least[kind]
    read = module.DeepSpeedZeroConfig(**section)  # unknown names are an error within this section
    assert read.stage == 3 and read.param_persistence_threshold == 0 and read.offload_param.pin_memory is True
    written = deepspeed_config(config_with(zero__stage=3))["zero_optimization"]
    assert module.DeepSpeedZeroConfig(**written).reduce_bucket_size == 40_000_000


def test_the_documentation_lists_what_may_be_added():
    text = (Path(__file__).resolve().parents[3] / "docs/deepspeed.md").read_text(encoding="utf-8")
    listed = text.partition("These keys are accepted, and no others:")[2].partition("\nA key")[0]
    assert sorted(re.findall(r"`([\w.]+)`", listed)) == sorted(settings.ADDABLE)


# ---------------------------------------------------------------- the package


@pytest.mark.parametrize("version", ["0.18.3", "0.20.0", "1.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    line = find_package_problem(config_with())
    assert line is not None and f"needs DeepSpeed >=0.19,<0.20, found {version}" in line and "engine=megatron" in line
    assert find_package_problem(config_with(engine="megatron")) is None


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    line = find_package_problem(config_with())
    assert line is not None and "'plt-megatron[deepspeed]', or set engine=megatron" in line


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8"])
def test_the_supported_versions(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert find_package_problem(config_with()) is None
