"""Study files: what they say, and where what is wrong with them stands."""

from __future__ import annotations

import pytest

from plt_megatron.errors import UserError
from plt_megatron.experiments.study.study_file import read_study
from tests.unit.experiments.study.study_helpers import STUDY, write_study


def test_a_file_and_the_command_line(tmp_path):
    study = read_study(write_study(tmp_path), ["budget=2d", "seeds=[3]", "optimizer.lr=1e-3"])
    assert study.name == "study" and str(study.folder) == "runs/studies/study"
    assert float(study.budget) == 48.0 and study.seeds == [3]
    assert study.overrides == ["optimizer.lr_warmup_iters=4", "optimizer.lr=1e-3"]
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
        ("PLT: {}", "PLT: {model.loop_count: 2}", 5, "model.loop_count is the study's own; use loops"),
        ("lr_warmup_iters: 4", "lr_decay_iters: 4", 3, "optimizer.lr_decay_iters is the study's own; use horizons"),
        (
            "S: {model.hidden_size: 16",
            "S: {training.train_iters: 16",
            8,
            "train_iters is the study's own; use horizons",
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
