"""Copies of folders at a place: whole or not there, resumed, checked. The place is a folder of this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec.implementations.local
import pytest

from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.storage import copies, places
from plt_megatron.storage.copies import download_part, find_checkpoint, index_of, read_index, read_manifest, upload
from plt_megatron.storage.places import Place, redacted
from tests.files import contents


class Killed(BaseException):
    """The process ends here: nothing that handles errors may catch it and tidy up."""


def an_export(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(("README.md", "config.json", "model-1.safetensors", "model-2.safetensors")):
        (folder / name).write_bytes(bytes([number + seed]) * (1000 + number))
    return folder


def a_checkpoint(folder: Path, step: int) -> Path:
    """With the manifest that publishing writes, made here anew."""
    path = folder / checkpoints.folder_name(step)
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "progress.json"):
        (path / name).write_text(f"{name} of {step}")
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    return path


def place_at(folder: Path) -> Place:
    return Place(f"file://{folder}")


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """Names of files in the order they are sent; at the `kill` of a name nothing of it, or half, arrives."""
    import fsspec.implementations.local as local

    names: list[str] = []
    whole = local.LocalFileSystem.put_file

    def put_file(self: Any, source: str, target: str, **how: Any) -> None:
        names.append(Path(target).name)
        whole(self, source, target, **how)

    monkeypatch.setattr(local.LocalFileSystem, "put_file", put_file)
    return names


def kill_at(monkeypatch: Any, name: str) -> None:
    """The process is killed while it sends this file: half of it has arrived."""
    import fsspec.implementations.local as local

    put_file = local.LocalFileSystem.put_file

    def killed(self: Any, source: str, target: str, **how: Any) -> None:
        if Path(target).name != name:
            return put_file(self, source, target, **how)
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2])
        # A kill leaves no time to write a journal either.
        monkeypatch.setattr(places.Place, "write_text", lambda *_: (_ for _ in ()).throw(Killed()))
        raise Killed

    monkeypatch.setattr(local.LocalFileSystem, "put_file", killed)


def test_an_upload_is_a_copy_with_an_index_that_is_written_last(tmp_path, sent):
    export, target = an_export(tmp_path / "step_00000004"), tmp_path / "there"
    uploaded = upload(export, place_at(target))
    there = contents(target)
    index = json.loads(there.pop("upload.json"))
    assert there == contents(export)
    assert index["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in there.items()
    }
    assert (uploaded.files, uploaded.bytes, uploaded.sent_files) == (4, 4006, 4)
    newest = max(target.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "upload.json"
    del sent[:]
    assert upload(export, place_at(target)).sent_files == 0 and sent == []


def test_only_what_has_changed_in_a_folder_is_sent_again(tmp_path, sent):
    """Such as the card and the scores of an evaluated export, and not its weights."""
    export, target = an_export(tmp_path / "export"), tmp_path / "there"
    upload(export, place_at(target))
    (export / "README.md").write_text("other")
    (export / "evaluation.json").write_text("{}")
    (export / "config.json").unlink()
    del sent[:]
    assert upload(export, place_at(target)).sent_files == 2 and sent == ["README.md", "evaluation.json"]
    there = contents(target)
    assert json.loads(there.pop("upload.json"))["files"].keys() == there.keys() and there == contents(export)


def a_killed_upload(folder, monkeypatch):
    """An export, and where its upload was killed in the midst of the second file."""
    monkeypatch.setattr(copies, "_JOURNAL_EVERY_S", 0.0)
    export, target = an_export(folder / "export"), folder / "there"
    with monkeypatch.context() as patch:
        kill_at(patch, "model-2.safetensors")
        with pytest.raises(Killed):
            upload(export, place_at(target))
    return export, target


def test_a_killed_upload_shows_no_index_and_sends_only_what_has_not_arrived(tmp_path, sent, monkeypatch):
    export, target = a_killed_upload(tmp_path, monkeypatch)
    assert not (target / "upload.json").exists() and (target / "model-2.safetensors").stat().st_size == 501
    del sent[:]
    upload(export, place_at(target))
    assert sent == ["model-2.safetensors"]
    there = contents(target)
    assert there.pop("upload.json") and there == contents(export), "and no journal is left"


def test_a_journal_that_cannot_be_read_is_said_and_nothing_is_sent(tmp_path, sent, monkeypatch):
    export, target = a_killed_upload(tmp_path, monkeypatch)
    del sent[:]
    place = place_at(target)

    def cat_file(path):
        raise PermissionError(path)

    monkeypatch.setattr(place._fs, "cat_file", cat_file)
    with pytest.raises(UserError, match=copies.JOURNAL):
        upload(export, place)
    assert sent == []


@pytest.mark.parametrize("damaged", [b"{", b"\0" * 9, b"\xff{", b"[]", b"[" * 200_000, b"1" * 5000], ids=len)
def test_a_damaged_journal_is_an_empty_one(tmp_path, sent, monkeypatch, damaged):
    export, target = a_killed_upload(tmp_path, monkeypatch)
    (target / copies.JOURNAL).write_bytes(damaged)
    del sent[:]
    upload(export, place_at(target))
    assert set(sent) == contents(export).keys()


def test_what_was_changed_there_meanwhile_is_sent_again(tmp_path, sent, monkeypatch):
    """A wrong byte in a file that had arrived, with its size right."""
    export, target = a_killed_upload(tmp_path, monkeypatch)
    (target / "model-1.safetensors").write_bytes(b"x" * 1002)
    del sent[:]
    upload(export, place_at(target))
    assert sent == ["model-1.safetensors", "model-2.safetensors"]
    (target / "config.json").write_bytes(b"y" * 1001)
    del sent[:]
    upload(export, place_at(target))
    assert sent == [], "a complete copy is trusted"
    upload(export, place_at(target), verify=True)
    assert sent == ["config.json"] and (target / "config.json").read_bytes() == (export / "config.json").read_bytes()


def test_another_export_takes_the_place_of_the_first_and_is_never_mixed_with_it(tmp_path, monkeypatch):
    first, second = an_export(tmp_path / "first"), an_export(tmp_path / "second", seed=5)
    (first / "evaluation.json").write_text("{}")
    target = tmp_path / "there"
    upload(first, place_at(target))
    with monkeypatch.context() as patch:
        kill_at(patch, "config.json")
        with pytest.raises(Killed):
            upload(second, place_at(target))
    assert not (target / "upload.json").exists(), "half of another export is not the first any more"
    upload(second, place_at(target))
    there = contents(target)
    del there["upload.json"]
    assert there == contents(second)


def test_somebody_elses_files_are_neither_replaced_nor_removed(tmp_path, monkeypatch):
    first, second = an_export(tmp_path / "first"), an_export(tmp_path / "second", seed=5)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"home is not empty and does not hold an upload \(config\.json\)"):
        upload(first, place_at(home))
    assert contents(home) == {"config.json": b"mine"}
    (home / "config.json").unlink()
    with monkeypatch.context() as patch:
        kill_at(patch, "README.md")  # the first one
        with pytest.raises(Killed):
            upload(first, place_at(home))
    upload(first, place_at(home))
    (home / "notes.txt").write_text("mine")
    (second / "README.md").unlink()
    upload(second, place_at(home))
    there = contents(home)
    assert there.pop("notes.txt") == b"mine" and there.pop("upload.json") and there == contents(second)


def test_a_checkpoint_has_its_manifest_as_index_and_comes_back_whole(tmp_path, sent):
    checkpoint, target = a_checkpoint(tmp_path, 4), tmp_path / "there" / "step_00000004"
    upload(checkpoint, place_at(target))
    assert contents(target) == contents(checkpoint)
    assert "manifest.json" not in sent
    index, loaded = read_manifest(place_at(target)), tmp_path / "loaded"
    loaded.mkdir()
    for part in range(2):
        download_part(place_at(target), index, loaded, part, 2)
    (loaded / index.name).write_text(index.text)
    assert contents(loaded) == contents(checkpoint)
    assert checkpoints.damage(loaded) is None


def test_a_damaged_checkpoint_is_neither_sent_nor_taken(tmp_path, sent, monkeypatch):
    checkpoint, target = a_checkpoint(tmp_path, 4), tmp_path / "there" / "step_00000004"
    upload(checkpoint, place_at(target))
    file = target / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    partial = tmp_path / "loaded"
    partial.mkdir()
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged, its SHA-256 is not that of manifest\.json"):
        download_part(place_at(target), read_manifest(place_at(target)), partial)
    assert not (partial / "__0_0.distcp").exists()
    (checkpoint / "progress.json").write_text("progress.json of 5")
    del sent[:]
    with pytest.raises(UserError, match=r"progress\.json is damaged"):
        upload(checkpoint, place_at(tmp_path / "elsewhere"))
    assert sent == []


def test_a_download_goes_on_where_it_was_cut_short(tmp_path, monkeypatch):
    target = tmp_path / "there" / "step_00000004"
    upload(a_checkpoint(tmp_path, 4), place_at(target))
    fetched: list[str] = []
    get = Place.get
    monkeypatch.setattr(Place, "get", lambda self, name, local: fetched.append(name) or get(self, name, local))
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / ".metadata").write_bytes((target / ".metadata").read_bytes())
    (partial / "__0_0.distcp").write_bytes((target / "__0_0.distcp").read_bytes()[:5])
    download_part(place_at(target), read_manifest(place_at(target)), partial)
    assert fetched == ["__0_0.distcp", "progress.json"]


@pytest.mark.parametrize(("cut", "after"), [(0, b""), (20, b""), (20, b"\xff")])
def test_the_checkpoint_that_a_url_means(tmp_path, cut, after):
    """As in a run's folder here: the latest, else the one before, never an incomplete one or one that was given up."""
    run = tmp_path / "bucket" / "run"
    for step in (2, 4, 6, 8):
        upload(a_checkpoint(tmp_path, step), place_at(run / "checkpoints" / f"step_{step:08d}"))
    (run / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    upload(a_checkpoint(tmp_path, 10), place_at(run / "checkpoints" / "step_00000010"))
    manifest = run / "checkpoints" / "step_00000010" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:cut] + after)  # a disk was full
    assert find_checkpoint(f"file://{run}").url.endswith("run/checkpoints/step_00000008")
    (run / "checkpoints" / "latest").write_text("step_00000006\n")
    for url in (run, run / "checkpoints", f"{run}/checkpoints/step_00000004/"):
        assert find_checkpoint(f"file://{url}").url.endswith("run/checkpoints/step_00000004")
    with pytest.raises(UserError, match=r"step_00000006: no complete checkpoint there, manifest\.json is missing"):
        find_checkpoint(f"file://{run}/checkpoints/step_00000006")
    with pytest.raises(UserError, match="nowhere: no complete checkpoint there"):
        find_checkpoint(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        pytest.param("[" * 200_000, "is damaged", id="deep"),
        pytest.param("1" * 5000, "is damaged", id="long"),
        ('{"format": 1, "files": {"a": {"bytes": 1e999, "sha256": "00"}}}', "is damaged"),
        ('{"format": 1, "files": {"a": {"bytes": 1}}}', "is damaged"),
        ('{"format": 1, "files": {"a": {"bytes": "many", "sha256": "00"}}}', "is damaged"),
        ('{"format": 99, "files": {}}', "newer than this program"),
        ('{"format": 1, "files": {"../../.ssh/keys": {"bytes": 1, "sha256": "00"}}}', "outside its folder"),
        ('{"format": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": "00"}}}', "outside its folder"),
    ],
)
def test_an_index_from_elsewhere_is_not_trusted(text, problem):
    with pytest.raises(UserError, match=f"there: .*{problem}"):
        read_index("there", "manifest.json", text)


def test_what_there_is_nothing_of_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        index_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        index_of(tmp_path / "empty")


def test_every_file_of_a_folder_is_sent_but_the_marks_of_the_copy_that_it_may_be(tmp_path):
    export = an_export(tmp_path / "export")
    (export / "deeper").mkdir()
    for name in ("upload.json", "upload.partial.json"):
        (export / name).write_text("an earlier copy's")
        (export / "deeper" / name).write_text("a file like any other")
    expected = contents(export).keys() - {"upload.json", "upload.partial.json"}
    upload(export, place_at(tmp_path / "there"))
    there = contents(tmp_path / "there")
    assert json.loads(there.pop("upload.json"))["files"].keys() == there.keys() == expected


@pytest.mark.parametrize("target", ["gone", ".", "link"], ids=["nowhere", "a folder", "itself"])
def test_a_link_to_no_file_is_not_left_out(tmp_path, target):
    export = an_export(tmp_path / "export")
    (export / "link").symlink_to(target)
    with pytest.raises(UserError, match="export/link: cannot be read"):
        upload(export, place_at(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("url", "problem"), [("nope://bucket/folder", "Protocol not known: nope"), ("gs://bucket/folder", "gcsfs")]
)
def test_a_protocol_that_is_unknown_or_lacks_its_package_is_one_line(url, problem):
    with pytest.raises(UserError, match=problem) as caught:
        Place(url)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(url)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    place = place_at(tmp_path / "there")
    place.write_text("upload_id", "mine")
    full = Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="there/upload_id cannot be written"):
        place.write_text("upload_id", "theirs")
    assert contents(tmp_path / "there") == {"upload_id": b"mine"}


def test_folders_are_made_wherever_paths_begin_with_a_slash(tmp_path, monkeypatch):
    """As over SFTP, whose file system names no root."""
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "root_marker", "")
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "auto_mkdir", False, raising=False)
    (tmp_path / "name").write_text("text")
    Place(f"file://{tmp_path}/new/folder").put(tmp_path / "name", "deeper/name")
    assert (tmp_path / "new/folder/deeper/name").read_text() == "text"


@pytest.mark.parametrize("url", ["file://{}", "memory://runs"])
def test_a_removed_folder_leaves_those_that_its_name_would_match_as_a_pattern(tmp_path, url):
    root = url.format(tmp_path)
    others = [Place(f"{root}/{name}/step") for name in ("ab", "a")]
    for place in others:
        place.write_text("deeper/file", "kept")
    for name in ("a*", "a?", "a[b]"):
        place = Place(f"{root}/{name}/step")
        place.write_text("deeper/file", "gone")
        place.remove_all()
        assert not place.files() and not Place(f"{root}/{name}").folders()
        place.remove_all()  # there is none
    assert all(place.read_text("deeper/file") == "kept" for place in others)


@pytest.mark.parametrize(
    ("error", "kind"), [(ConnectionResetError(104, "reset"), AttemptFailed), (PermissionError(13, "denied"), UserError)]
)
def test_a_network_that_does_not_answer_may_answer_the_next_attempt(tmp_path, monkeypatch, error, kind):
    place = place_at(tmp_path)
    monkeypatch.setattr(place._fs, "get_file", Mock(side_effect=error))
    with pytest.raises(UserError, match="file cannot be read") as raised:
        place.get("file", tmp_path / "copy")
    assert type(raised.value) is kind


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=r"needs the package s3fs: pip install 'plt-megatron\[upload\]'"):
        Place("s3://bucket/folder")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written") as caught:
        place_at(tmp_path / "file" / "below").write_text("upload_id", "1")
    assert "\n" not in str(caught.value)


def test_secrets_are_not_repeated(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("SOME_TOKEN", "ab")  # would be in every word
    said = redacted(
        "https://me:pass@host/key?X-Amz-Signature=1f&b=2 wJalrXUtnFEMI hf_abcdefghij cab s3://bucket/cab is there?"
        " s3://AK:a/b@bucket/x sftp://host:22/a@b"
    )
    assert said == ("https://***host/key*** *** *** cab s3://bucket/cab is there? s3://***bucket/x sftp://host:22/a@b")
