"""JSON lines: appended to by one program, read by others at any moment, torn by crashes."""

from __future__ import annotations

import json
import math
import os
import random
import tracemalloc

import pytest

from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines


def record(step: int) -> dict:
    return {"step": step, "text": "ü\n" * (step % 3), "values": [1.5, None]}


def test_records_come_back_as_appended(tmp_path):
    path = tmp_path / "file.jsonl"
    records = [record(step) for step in range(5)]
    for each in records:
        json_lines.append(path, each, sync=True)
    assert json_lines.read(path) == records
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


def test_every_reader_of_json_can_read_numbers_that_are_not_finite(tmp_path):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json_lines.append(tmp_path / "file.jsonl", {"loss": math.nan, "by": {"1": [math.inf, 2.5]}, "norm": -math.inf})
    found = json.loads((tmp_path / "file.jsonl").read_text(), parse_constant=refuse)
    assert found == {"loss": None, "by": {"1": [None, 2.5]}, "norm": None}


def test_nothing_there_is_no_record(tmp_path):
    assert json_lines.read(tmp_path / "none") == json_lines.last(tmp_path / "none", 3) == []
    json_lines.rewind(tmp_path / "none", lambda record: True)
    assert json_lines.Follower(tmp_path / "none").lines() == [] and not (tmp_path / "none").exists()


def test_a_file_in_anothers_place_is_told_once(tmp_path):
    path = tmp_path / "file.jsonl"
    json_lines.append(path, record(1))
    follower = json_lines.Follower(path)
    assert follower.lines() and not follower.replaced
    json_lines.rewind(path, lambda record: True)
    assert follower.lines() == [] and follower.replaced
    path.unlink()
    assert follower.lines() == [] and not follower.replaced


def test_wherever_a_crash_has_torn_a_line_the_others_stay_readable(tmp_path):
    """Cut the file at every byte of its last record: it is left out, and the next one is not lost with it."""
    path = tmp_path / "file.jsonl"
    for step in (1, 2):
        json_lines.append(path, record(step))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert json_lines.read(path) == json_lines.last(path, 5) == [record(1)]
        json_lines.append(path, record(3))
        assert json_lines.read(path, skip_broken=True)[::2] in ([record(1), record(3)], [record(1)])
        assert json_lines.last(path, 1) == [record(3)]


@pytest.mark.parametrize("line", ["not json", "[1]", "3", "", '{"a": 1} {"b": 2}', "\x00\x00"])
def test_a_broken_line_within_is_named_or_left_out(tmp_path, line):
    path = tmp_path / "file.jsonl"
    path.write_text(f"{json.dumps(record(1))}\n{line}\n{json.dumps(record(2))}\n")
    with pytest.raises(UserError, match=r"file\.jsonl: line 2 is not a JSON object$"):
        json_lines.read(path)
    assert json_lines.read(path, skip_broken=True) == json_lines.last(path, 9) == [record(1), record(2)]
    json_lines.rewind(path, lambda record: True)
    assert json_lines.read(path) == [record(1), record(2)]


def test_the_last_records_of_a_long_file_are_those_that_are_wanted(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps({"step": step, "more": "x" * 200}) + "\n" for step in range(5000)))
    found = json_lines.last(path, 3, lambda record: record["step"] % 2 == 0)
    assert [each["step"] for each in found] == [4994, 4996, 4998]
    steps = [each["step"] for each in json_lines.last(path, 5000)]
    assert steps == list(range(steps[0], 5000)) and 100 < len(steps) < 1000


def test_a_record_may_be_longer_than_what_is_searched_first(tmp_path):
    path = tmp_path / "file.jsonl"
    for step in range(3):
        json_lines.append(path, {"step": step, "more": "x" * 300_000})
    assert [each["step"] for each in json_lines.last(path, 1)] == [2]


def test_a_rewind_holds_one_record_at_a_time(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps({"step": step, "more": "x" * 10_000}) + "\n" for step in range(1000)))
    tracemalloc.start()
    json_lines.rewind(path, lambda record: record["step"] < 900)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 20 and len(json_lines.read(path)) == 900


def test_a_reader_sees_the_file_before_a_rewind_or_after_it(tmp_path, monkeypatch):
    path = tmp_path / "file.jsonl"
    for step in range(4):
        json_lines.append(path, record(step))
    with path.open("a") as file:
        file.write('{"step": 4, "te')
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(json_lines.read(path)), fsync(descriptor)))
    json_lines.rewind(path, lambda record: record["step"] < 2)
    assert seen == [[record(0), record(1), record(2), record(3)], [record(0), record(1)]]
    json_lines.append(path, record(2))
    assert json_lines.read(path) == [record(0), record(1), record(2)]


@pytest.mark.parametrize("seed", range(5))
def test_a_follower_gets_every_line_once_and_whole_however_the_bytes_come(tmp_path, seed):
    path, draw = tmp_path / "file", random.Random(seed)
    lines = [f"line {number} " + "ü" * draw.randrange(20) for number in range(50)]
    data = "".join(line + "\n" for line in lines).encode()
    follower, got, at = json_lines.Follower(path), [], 0
    while at < len(data):
        size = draw.randrange(1, 60)
        with path.open("ab") as file:
            file.write(data[at : at + size])
        at += size
        got += follower.lines()
    assert got == lines and follower.lines() == []


def test_a_follower_goes_on_at_the_end_of_a_file_that_was_rewound(tmp_path):
    path = tmp_path / "file.jsonl"
    for step in range(3):
        json_lines.append(path, {"step": step})
    follower = json_lines.Follower(path, from_end=True)
    assert follower.lines() == []
    json_lines.append(path, {"step": 3})
    assert follower.lines() == ['{"step": 3}'] and not follower.replaced
    json_lines.rewind(path, lambda record: record["step"] < 2)
    assert follower.lines() == [] and follower.replaced
    json_lines.append(path, {"step": 2})
    assert follower.lines() == ['{"step": 2}'] and not follower.replaced
