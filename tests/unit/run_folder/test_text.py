"""Durations, sizes, counts and tables as people read them."""

from __future__ import annotations

import pytest

from plt_megatron.run_folder.text import format_bytes, format_duration, format_memory, format_table, plural


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (0.0421, "0.042 s"), (0.994, "0.99 s"), (0.996, "1.0 s"), (9.94, "9.9 s"), (9.96, "10 s")),
        *((59.4, "59 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min")),
        *((9600, "2 h 40 min"), (172_769, "47 h 59 min"), (172_771, "2.0 days"), (3e5, "3.5 days")),
        (1e9, "11,574.1 days"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text", "binary"),
    [
        *((0, "0 B", "0 B"), (999, "999 B", "999 B"), (1000, "1.00 kB", "1000 B"), (1024, "1.02 kB", "1.00 KiB")),
        *((999_400, "999 kB", "976 KiB"), (999_600, "1.00 MB", "976 KiB"), (12_345_678, "12.3 MB", "11.8 MiB")),
        *((80 * 2**30, "85.9 GB", "80.0 GiB"), (3e12, "3.00 TB", "2.73 TiB"), (5e18, "5000 PB", "4441 PiB")),
    ],
)
def test_sizes(size, text, binary):
    assert (format_bytes(size), format_memory(size)) == (text, binary)


def test_counts():
    assert [plural(1, "run"), plural(2, "process"), plural(1000, "node")] == ["1 run", "2 processes", "1,000 nodes"]


def test_tables_align_numbers_to_the_right_and_words_to_the_left():
    rows = [["1", "12", "no", "-1.5"], ["a longer name", "1,000 of 5", "yes, it is", "-"], ["short row"]]
    assert format_table(rows, header=["row", "steps", "kept", "loss"]).splitlines() == [
        "row                 steps  kept        loss",
        "-------------------------------------------",
        "1                      12  no          -1.5",
        "a longer name  1,000 of 5  yes, it is     -",
        "short row",
    ]
    assert format_table([["a", "b"]], indent=2) == "  a  b"
    assert format_table([]) == ""


def test_tables_are_as_wide_as_they_need_and_take_any_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    long = "/a/path/" + "x" * 300
    lines = format_table([[long, "[red]no markup[/red] :smile:"], ["b", "日本"]]).splitlines()
    assert lines == [f"{long}  [red]no markup[/red] :smile:", f"b{' ' * (len(long) + 1)}日本"]
