"""Reading recorded metrics: final figures, and files that are not what they should be."""

from __future__ import annotations

import json

import pytest

from plt_megatron.errors import UserError
from plt_megatron.experiments.run_metrics import load_run


def write(folder, *records, tail=""):
    text = "".join((json.dumps(record) if isinstance(record, dict) else record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def train(step, loss, **more):
    return {"kind": "train", "step": step, "tokens": step * 100, "loss": loss, "grad_norm": 1.0, **more}


def validation(step, loop_count, loss):
    record = {"kind": "validation", "step": step, "tokens": step * 100}
    return {**record, "loop_count": loop_count, "loss": loss}


def test_final_figures(tmp_path):
    records = [train(step, 5.0 - step / 10) for step in range(1, 21)]
    records += [validation(10, 1, 4.5), validation(10, 2, 4.0), validation(20, 1, 3.5), validation(20, 2, 3.0)]
    run = load_run(write(tmp_path, *records, {"kind": "gates", "step": 3}))
    assert run.train[-1].tokens == 2000
    assert run.final_train_loss() == pytest.approx((3.1 + 3.0) / 2)
    assert run.final_train_loss(share=1.0) == pytest.approx(sum(5.0 - s / 10 for s in range(1, 21)) / 20)
    assert run.final_validation_losses() == {1: 3.5, 2: 3.0}
    assert run.loop_counts() == [1, 2]


def test_a_single_record_is_its_own_final_loss(tmp_path):
    run = load_run(write(tmp_path, train(1, 7.0)))
    assert run.final_train_loss() == 7.0
    assert run.final_validation_losses() == {}


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    run = load_run(write(tmp_path, train(1, 7.0), train(2, 6.0), tail='{"kind": "train", "st'))
    assert [point.step for point in run.train] == [1, 2]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([train(1, 7.0), "not json", train(2, 6.0)], "not JSON"),
        ([validation(1, 2, 3.0)], "no training step yet"),
        ([], "no training step yet"),
        ([{"kind": "train", "step": 1}], "without tokens, loss"),
        ([train(1, 7.0), {"kind": "validation", "step": 1, "tokens": 1, "loss": 2.0}], "without loop_count"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, records, said):
    write(tmp_path, *records)
    with pytest.raises(UserError, match=said) as raised:
        load_run(tmp_path)
    assert str(tmp_path / "metrics.jsonl") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run that has begun"):
        load_run(tmp_path / "nothing")
