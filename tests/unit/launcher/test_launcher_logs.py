"""Logs that survive a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.launcher.logs import LogFile, stamp


def test_lines_are_appended(tmp_path):
    path = tmp_path / "logs" / "rank.log"
    LogFile(path).write(["a", "b"])
    LogFile(path).write(["c \ud800"])  # what no encoding has is replaced
    LogFile(path).write([])
    assert path.read_text() == "a\nb\nc ?\n"


def test_a_line_says_which_attempt_and_who():
    assert stamp(3, "rank 7", "text").endswith(" attempt 3 rank 7: text")


def test_lines_that_cannot_be_written_are_counted(tmp_path):
    path = tmp_path / "logs" / "rank.log"
    path.parent.touch()  # a file where the folder should be
    log = LogFile(path)
    log.write(["a", "b"])
    assert log.lost == 2
    path.parent.unlink()
    log.write(["c"])
    assert "2 lines are missing here" in path.read_text() and path.read_text().endswith("c\n")
    assert log.lost == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tmp_path):
    (tmp_path / "rank.log").symlink_to("/dev/full")
    log = LogFile(tmp_path / "rank.log")
    log.write(["a"])
    assert log.lost == 1
