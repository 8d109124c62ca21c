"""Files that are seen whole or not at all: at every moment of a write, and after every way it can fail."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest

from plt_megatron.errors import UserError, is_away
from plt_megatron.run_folder import files
from plt_megatron.slurm import run_files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_json_come_back_and_folders_are_made(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "text", "Zeile ü\n")
    files.write_bytes(tmp_path / "bytes", b"\xff\x00")
    files.write_json(tmp_path / "json", {"name": "ü", "list": [1]})
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "Zeile ü\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x00"
    assert (tmp_path / "json").read_text(encoding="utf-8") == '{\n "name": "ü",\n "list": [\n  1\n ]\n}\n'
    assert names(tmp_path) == ["a", "bytes", "json"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with files.replacing(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()], ids=["disk full", "interrupted"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, operation, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise error

    if operation == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if operation == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)), files.replacing(path) as file:
        file.write("new")
        if operation == "write":
            raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_everything_reaches_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def replaced(self, target):
        order.append("named")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write_text(tmp_path / "file", "four")
    assert order == [4, "named", "folder"]
    order.clear()
    (tmp_path / "new" / "inner").mkdir(parents=True)
    (tmp_path / "new" / "inner" / "file").write_text("three")
    files.publish(tmp_path / "new", tmp_path / "folder")
    assert order == ["folder", "folder", 5, "named", "folder"] and names(tmp_path / "folder" / "inner") == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    files.write_text(tmp_path / "ours", "")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_system_that_changes_no_permissions_is_written_all_the_same(tmp_path, monkeypatch):
    """As where access control lists rule."""
    monkeypatch.setattr(os, "chmod", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
    for text in ("first", "second"):
        files.write_text(tmp_path / "file", text)
        run_files.write_script(tmp_path, text)
    assert (tmp_path / "file").read_text() == (tmp_path / "job.sbatch").read_text() == "second"


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("of_folders", [True, False])
def test_a_folder_that_cannot_be_synced_is_no_failed_write_but_a_disk_that_fails_is(
    tmp_path, monkeypatch, call, code, of_folders
):
    """A folder in which everybody may write may not be opened to be read."""
    real = {"open": os.open, "fsync": os.fsync}[call]

    def fails(what, *arguments):
        if stat.S_ISDIR(os.stat(what).st_mode) is of_folders:
            raise OSError(code, os.strerror(code))
        return real(what, *arguments)

    (tmp_path / "new").write_text("x")
    monkeypatch.setattr(os, call, fails)
    fatal = not of_folders or code in (errno.EIO, errno.ENOSPC)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) if fatal else contextlib.nullcontext():
        files.publish(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").exists() is of_folders


def test_a_lock_that_fails_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(OSError, match="Stale file handle") as raised, files.locked(tmp_path, "training"):
        pass
    assert raised.value.filename == str(tmp_path / ".lock") and is_away(raised.value)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.replacing(tmp_path / "file") as first, files.replacing(tmp_path / "file") as second:
        first.write("first")
        second.write("second")
    assert (tmp_path / "file").read_text() == "first" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_json_object_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json"):
        files.read_json_object(tmp_path / "a.json")


def test_what_the_user_has_to_put_right_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "below"
    with pytest.raises(UserError, match=r"^cannot write .*file: (Not a directory|File exists)$") as raised:
        with files.writing(target):
            files.write_text(target, "x")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=rf"^cannot write {target}: No space left on device$"):
        with files.writing(target):
            raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match=rf"^cannot write {target}: No space left on device$"):  # not what is copied
        with files.writing(tmp_path):
            raise OSError(28, "No space left on device", "source", None, str(target))
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/link: .* gone,"):
        with files.writing(tmp_path):
            files.write_text(tmp_path / "link" / "file", "x")
