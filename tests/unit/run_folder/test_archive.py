"""An archive of records: what is put in comes out, the same bytes each time, and a broken one is a line."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from plt_megatron.errors import UserError
from plt_megatron.run_folder.archive import ARCHIVE, unpack_command, unpacked, write_archive
from plt_megatron.run_folder.folder import runs_named
from tests.files import contents

RECORDS = {
    "sweep.yaml": b"format: 1\n",
    "plan/a b.yaml": b"model: {}\n" * 300,
    "a b/config.yaml": b"model: {}\n" * 300,
    "a b/metrics.jsonl": os.urandom(3000),
    "a b/sweep_run.json": b"{}",
    "a b/incidents/step_00000042_sample_0000000336.json": b"",
    f"deep/{'long' * 60}/metrics.jsonl": "Zeile ü\n".encode(),
}
LEFT_OUT = ["README.md", "rates.png", ".lock", "report/rows.csv", "a b/train.log", "a b/checkpoints/latest", ARCHIVE]
LEFT_OUT += ["averaged/checkpoints/step_1/__0_0.distcp", "exported/model.safetensors"]
LEFT_OUT += ["a b/.former_config.yaml", "a b/exports/step_1/config.json", "logs/1.out", "a b/metrics.png"]
LEFT_OUT += [f"a b/{name}" for name in ("environment.txt", "git.txt", "job.sbatch", "job.yaml", "wandb/run.yaml")]
LEFT_OUT += ["a b/why.txt", "a b/submissions.jsonl", "a b/upload_id", "a b/incidents/hang_rank_0000.txt"]
LEFT_OUT += ["code.1/a.yaml", *(f"deep.array/{name}" for name in ("job.sbatch", "code/a.yaml", "logs/1.out"))]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_records_come_out_as_they_went_in_and_nothing_else(tmp_path):
    folder = write(tmp_path / "sweep", RECORDS | dict.fromkeys(LEFT_OUT, b"other"))
    assert write_archive(folder, tmp_path / "kept" / ARCHIVE) == len(RECORDS)
    assert contents(unpacked(tmp_path / "kept" / ARCHIVE)) == RECORDS


def test_sweeps_and_runs_may_be_called_like_a_runs_own_folders(tmp_path):
    for name in ("code", "report", "logs/run"):
        write(tmp_path / "runs" / name, {"config.yaml": b"", "metrics.jsonl": b"", "code/a/config.yaml": b""})
    write(tmp_path / "runs" / "logs", {"sweep.yaml": b"", "code/a/config.yaml": b""})
    write_archive(tmp_path / "runs", tmp_path / ARCHIVE)
    kept = {path.rpartition("/")[0] for path in contents(unpacked(tmp_path / ARCHIVE))}
    assert kept == {"code", "report", "logs", "logs/run"}
    found = runs_named([], str(tmp_path / "runs"), print)
    assert [path.relative_to(tmp_path / "runs").as_posix() for path in found] == ["code", "logs/run", "report"]


def test_the_same_records_give_the_same_bytes(tmp_path):
    one = write(tmp_path / "one", RECORDS)
    two = write(tmp_path / "two", dict(reversed(RECORDS.items())))
    for path in two.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    for folder in (one, two):
        write_archive(folder, folder / ARCHIVE)
    assert (one / ARCHIVE).read_bytes() == (two / ARCHIVE).read_bytes()
    copy = write(tmp_path / "copy", contents(unpacked(one / ARCHIVE)))
    write_archive(copy, copy / ARCHIVE)
    assert (copy / ARCHIVE).read_bytes() == (one / ARCHIVE).read_bytes()


def test_runs_behind_links_are_records_too(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", {"metrics.jsonl": b"{}\n"})
    folder = write(tmp_path / "sweep", {"sweep.yaml": b""})
    (folder / "run").symlink_to(elsewhere)
    write_archive(folder, tmp_path / ARCHIVE)
    assert contents(unpacked(tmp_path / ARCHIVE)) == {"sweep.yaml": b"", "run/metrics.jsonl": b"{}\n"}


def test_links_to_nowhere_and_to_folders_that_they_lie_in_are_left_out(tmp_path):
    """As the code of an array's member, once the array's own folder is deleted."""
    folder = write(tmp_path / "sweep", {"sweep.yaml": b"", "run/metrics.jsonl": b"{}\n"})
    (folder / "run/code").symlink_to("../run.array/code")
    (folder / "run/self").symlink_to(folder)
    (folder / "run/there").symlink_to("../back")  # in a circle of two
    (folder / "back").mkdir()
    (folder / "back/again").symlink_to("../run")
    write_archive(folder, tmp_path / ARCHIVE)
    found = contents(unpacked(tmp_path / ARCHIVE))
    assert found == dict.fromkeys(("run/metrics.jsonl", "back/again/metrics.jsonl"), b"{}\n") | {"sweep.yaml": b""}


def test_a_shell_unpacks_it_by_the_command_that_is_told(tmp_path):
    folder = write(tmp_path / "my sweep", RECORDS)
    write_archive(folder, tmp_path / "it's kept" / ARCHIVE)
    subprocess.run(unpack_command(tmp_path / "it's kept"), shell=True, check=True)
    (tmp_path / "it's kept" / ARCHIVE).unlink()
    assert contents(tmp_path / "it's kept") == RECORDS


def test_it_is_unpacked_once_and_again_after_a_change(tmp_path):
    folder, archive = write(tmp_path / "sweep", RECORDS), tmp_path / ARCHIVE
    write_archive(folder, archive)
    assert unpacked(archive) == unpacked(tmp_path / "sweep" / ".." / ARCHIVE)
    write(folder, {"sweep.yaml": b"format: 2\n"})
    write_archive(folder, archive)
    os.utime(archive, ns=(0, archive.stat().st_mtime_ns + 1))  # clocks of file systems are coarse
    assert contents(unpacked(archive))["sweep.yaml"] == b"format: 2\n"


def test_a_folder_without_records_replaces_no_archive(tmp_path):
    kept = write(tmp_path, {ARCHIVE: b"kept", "README.md": b"", "report/index.html": b""})
    with pytest.raises(UserError, match=str(kept)):
        write_archive(kept, kept / ARCHIVE)
    assert (kept / ARCHIVE).read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["n" * 300, "a/b"])
def test_names_that_no_file_can_have_are_an_error_that_names_the_archive(tmp_path, name):
    archive = tmp_path / ARCHIVE
    with tarfile.open(archive, "w:xz") as packed:
        packed.addfile(tarfile.TarInfo("a"))
        packed.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=ARCHIVE):
        unpacked(archive)


def test_a_full_temporary_folder_is_not_a_broken_archive(tmp_path, monkeypatch):
    archive = tmp_path / ARCHIVE
    write_archive(write(tmp_path / "sweep", RECORDS), archive)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tarfile.TarFile, "extractall", Mock(side_effect=full))
    with pytest.raises(UserError, match="No space left.*TMPDIR"):
        unpacked(archive)


@pytest.mark.parametrize("harm", ["cut", "changed", "other", "empty"])
def test_a_broken_archive_is_an_error_that_names_it(tmp_path, harm):
    archive = tmp_path / ARCHIVE
    write_archive(write(tmp_path / "sweep", RECORDS), archive)
    content = archive.read_bytes()
    middle = len(content) // 2
    archive.write_bytes(
        {
            "cut": content[:middle],
            "changed": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "other": b"version https://git-lfs.github.com/spec/v1\n",
            "empty": b"",
        }[harm]
    )
    with pytest.raises(UserError, match=ARCHIVE):
        unpacked(archive)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_an_archive_writes_nothing_outside_of_its_copy(tmp_path, name):
    archive = tmp_path / ARCHIVE
    with tarfile.open(archive, "w:xz") as packed:
        entry = tarfile.TarInfo(name)
        entry.size = 3
        packed.addfile(entry, io.BytesIO(b"bad"))
    if name.startswith("/"):  # taken as below the copy
        assert contents(unpacked(archive)) == {name[1:]: b"bad"}
    else:
        with pytest.raises(UserError, match=ARCHIVE):
            unpacked(archive)
