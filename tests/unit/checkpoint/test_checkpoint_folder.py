"""Checkpoints as folders: which one counts, what is kept, what a crash at any point leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.checkpoints import latest_checkpoint
from tests.checkpoints import read_progress


def _save(directory: Path, step: int, keep_last: int = 100, keep_every: int = 0, content: str = "x" * 1000) -> Path:
    temporary = checkpoints.prepare(directory, step)
    (temporary / "__0_0.distcp").write_text(content)
    (temporary / checkpoints.PROGRESS).write_text(json.dumps({"step": step, "format": checkpoints.FORMAT}))
    published = checkpoints.publish(temporary, {"__0_0.distcp": checkpoints.sha256(temporary / "__0_0.distcp")})
    checkpoints.prune(published, keep_last, keep_every)
    return published


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def _step(path: Path | None) -> int | None:
    return None if path is None else checkpoints.step_of(path)


def test_names_sort_by_step_beyond_eight_digits(tmp_path):
    steps = [100, 99_999_999, 100_000_000]
    for step in steps:
        _save(tmp_path, step)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoint_folders(tmp_path)] == steps
    assert (tmp_path / "step_00000100" / "manifest.json").is_file()
    assert _step(latest_checkpoint(tmp_path)) == 100_000_000


def test_the_manifest_lists_every_file(tmp_path):
    path = _save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {"__0_0.distcp", "progress.json"}
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    assert manifest["files"]["__0_0.distcp"] == {"bytes": 1000, "sha256": digest}
    assert checkpoints.damage(path) is None


@pytest.mark.parametrize("where", ["run", "checkpoints", "checkpoint"])
def test_a_run_its_checkpoints_or_one_of_them_can_be_asked_for(tmp_path, where):
    path = _save(tmp_path / "checkpoints", 5)
    asked = {"run": tmp_path, "checkpoints": tmp_path / "checkpoints", "checkpoint": path}[where]
    assert latest_checkpoint(asked) == path
    assert read_progress(asked)["step"] == 5


def test_nothing_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_12").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_folder_whose_file_system_is_not_mounted_is_not_an_empty_one(tmp_path):
    """Else a run would begin anew."""
    (tmp_path / "checkpoints").symlink_to("/scratch/not/mounted")
    for path in (tmp_path / "checkpoints", tmp_path):
        with pytest.raises(AttemptFailed, match="/scratch/not/mounted"):
            latest_checkpoint(path)


def test_each_damaged_one_is_named_until_a_whole_one_is_found(tmp_path, caplog):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / "step_00000003" / "__0_0.distcp").write_text("x" * 999 + "y")
    (tmp_path / "step_00000002" / "progress.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert _step(latest_checkpoint(tmp_path)) == 1
    assert [record.getMessage().split("checkpoints/")[-1].split("/")[-1] for record in caplog.records] == [
        "step_00000003: __0_0.distcp is damaged, its SHA-256 is not the manifest's",
        "step_00000002: progress.json is missing",
    ]
    assert _step(latest_checkpoint(tmp_path, verify=False)) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', "\x00\xff", "[" * 99_999])
def test_a_manifest_of_nonsense_is_damage_not_a_crash(tmp_path, content):
    path = _save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    problem = checkpoints.damage(path)
    assert problem is not None and "\n" not in problem and str(path) in problem


def test_ranks_share_the_checksums_but_each_sees_sizes(tmp_path):
    path = _save(tmp_path, 1)
    (path / "__0_0.distcp").write_text("y" * 1000)  # the first of two files
    assert checkpoints.damage(path, 0, 2) is not None and checkpoints.damage(path, 1, 2) is None
    (path / "__0_0.distcp").write_text("y")
    assert checkpoints.damage(path, 1, 2) is not None


def test_keep_last_and_every(tmp_path):
    for step in range(10, 80, 10):
        _save(tmp_path, step, keep_last=2, keep_every=30)
    assert _names(tmp_path) == ["step_00000030", "step_00000060", "step_00000070"]


def test_after_going_back_the_given_up_course_neither_counts_nor_stays(tmp_path):
    for step in (10, 20, 30):
        _save(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000010\n")
    assert _step(latest_checkpoint(tmp_path)) == 10
    _save(tmp_path, 15, keep_last=2, keep_every=10)
    assert _names(tmp_path) == ["step_00000010", "step_00000015"]
    assert _step(latest_checkpoint(tmp_path)) == 15


@pytest.mark.parametrize("pointer", [None, "", "step_00000099\n", "../../etc\n", b"\xff\xfe"])
def test_without_a_usable_pointer_the_last_step_counts(tmp_path, pointer):
    for step in (1, 2):
        _save(tmp_path, step)
    (tmp_path / "latest").unlink()
    if isinstance(pointer, bytes):
        (tmp_path / "latest").write_bytes(pointer)
    elif pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert _step(latest_checkpoint(tmp_path)) == 2


def test_saving_a_step_again_replaces_it(tmp_path):
    _save(tmp_path, 1, content="old")
    path = _save(tmp_path, 1, content="new")
    assert (path / "__0_0.distcp").read_text() == "new" and checkpoints.damage(path) is None
    assert _names(tmp_path) == ["step_00000001"]


class _Crash(BaseException):
    """Nothing in the program handles it: what a SIGKILL at that point leaves."""


@pytest.mark.parametrize(
    ("present", "step"),
    [((1, 2), 3), ((1, 2), 2), ((2,), 2)],
    ids=["a new step", "the last again", "the only one again"],
)
def test_a_crash_at_any_rename_removal_or_write_leaves_a_whole_checkpoint(tmp_path, monkeypatch, present, step):
    """Crash at the n-th operation on the disk, for every n until one save gets through."""
    crashes = 0
    while True:
        directory = tmp_path / f"crash {crashes}"
        for earlier in present:
            _save(directory, earlier, content=f"content {earlier}")
        with monkeypatch.context() as patch:
            left = iter([True] * crashes)

            def crash_after(function, left=left):
                def operation(*args, **kwargs):
                    if next(left, None) is None:
                        raise _Crash
                    return function(*args, **kwargs)

                return operation

            for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (os, "fsync")):
                patch.setattr(owner, name, crash_after(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", crash_after(shutil.rmtree))
            try:
                _save(directory, step, keep_last=1, content="content new")
                crashed = False
            except _Crash:
                crashed = True
        checkpoints.recover(directory)
        found = latest_checkpoint(directory)
        assert found is not None and checkpoints.damage(found) is None
        content = (found / "__0_0.distcp").read_text()
        assert content in ("content new", f"content {checkpoints.step_of(found)}")
        # The run goes on from there, saves the same step, and nothing is left over.
        _save(directory, step, keep_last=1, content="content new")
        assert _names(directory) == [checkpoints.folder_name(step)] and not checkpoints.leftovers(directory)
        if not crashed:
            break
        crashes += 1
    assert crashes >= 5


def test_what_cannot_be_removed_stops_no_save(tmp_path, monkeypatch):
    """A checkpoint that was moved elsewhere and linked, and a folder in which NFS keeps a file that is open."""
    directory, moved = tmp_path / "checkpoints", tmp_path / "moved"
    _save(directory, 1).rename(moved)
    (directory / "step_00000001").symlink_to(moved)
    (directory / "step_00000009.tmp").mkdir()

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    _save(directory, 2, keep_last=1)
    _save(directory, 3)
    assert _names(directory) == ["step_00000002", "step_00000003", "step_00000009.tmp"]
    assert checkpoints.damage(moved) is None


def test_processes_that_outlive_their_start_publish_nothing_of_another(tmp_path):
    """Slurm may start a job again while its node, which it has lost, goes on."""
    _save(tmp_path, 1)
    name = "__0_0.distcp"
    former = checkpoints.prepare(tmp_path, 2)
    (former / name).write_text("whole")
    sums = {name: checkpoints.sha256(former / name)}
    present = checkpoints.prepare(tmp_path, 2)
    (present / name).write_text("ha")
    with pytest.raises(OSError):
        checkpoints.publish(former, sums)
    (present / name).write_text("whole")
    published = checkpoints.publish(present, sums)
    assert checkpoints.damage(published) is None and latest_checkpoint(tmp_path) == published


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_the_last(tmp_path, monkeypatch):
    first, real = _save(tmp_path, 1), checkpoints.damage

    def slow(path: Path, *arguments, **options) -> str | None:
        if path == first:
            _save(tmp_path, 2, keep_last=1)
        return real(path, *arguments, **options)

    monkeypatch.setattr(checkpoints, "damage", slow)
    assert _step(latest_checkpoint(tmp_path)) == 2


def test_a_writers_file_that_is_not_there_is_an_error_before_publication(tmp_path):
    temporary = checkpoints.prepare(tmp_path, 1)
    with pytest.raises(FileNotFoundError):
        checkpoints.publish(temporary, {"__1_0.distcp": "0" * 64})
    assert latest_checkpoint(tmp_path) is None


def test_a_newer_format_is_refused(tmp_path):
    temporary = checkpoints.prepare(tmp_path, 1)
    (temporary / checkpoints.PROGRESS).write_text(json.dumps({"step": 1, "format": checkpoints.FORMAT + 1}))
    checkpoints.publish(temporary, {})
    with pytest.raises(UserError, match="is newer than this program"):
        read_progress(tmp_path)
