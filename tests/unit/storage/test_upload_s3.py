"""Uploads to a real S3 server on this machine, moto's, through s3fs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from plt_megatron.commands import upload as command
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.storage import copies
from plt_megatron.storage.copies import download_part, find_checkpoint, read_manifest, upload
from plt_megatron.storage.places import Place
from plt_megatron.storage.queue import CHECKPOINT, UploadQueue
from tests.files import contents
from tests.s3_server import KEY_ID, SECRET, s3_server
from tests.unit.storage.test_upload_copies import Killed, an_export
from tests.unit.storage.test_upload_runs import a_run, saved, uploads


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A client's."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(environment, monkeypatch) -> Iterator[str]:
    """An empty bucket's name; credentials and endpoint are in the environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3")
    files.mkdir("models")
    yield "models"
    files.rm("models", recursive=True)
    type(files).clear_instance_cache()


def stored(prefix: str) -> dict[str, bytes]:
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    return {path.removeprefix(f"{prefix}/"): files.cat_file(path) for path in files.find(prefix)}


def test_an_export_is_uploaded_and_a_killed_upload_goes_on(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(copies, "_JOURNAL_EVERY_S", 0.0)
    export, place = an_export(tmp_path / "export"), Place(f"s3://{bucket}/some/export")
    files, sent = fsspec.filesystem("s3"), []
    put_file = files.put_file

    def until_killed(source: str, target: str) -> None:
        sent.append(Path(target).name)
        if len(sent) == 3:
            patch.setattr(files, "pipe_file", None)  # a kill leaves no time for a journal
            raise Killed
        put_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", until_killed)
        with pytest.raises(Killed):
            upload(export, place)
    assert stored("models/some/export").keys() == {"README.md", "config.json", copies.JOURNAL}
    del sent[:]
    monkeypatch.setattr(files, "put_file", lambda *names: sent.append(Path(names[1]).name) or put_file(*names))
    upload(export, place)
    assert sent == ["model-1.safetensors", "model-2.safetensors"]
    there = stored("models/some/export")
    assert there.pop("upload.json") and there == contents(export)


@pytest.mark.slow
def test_checkpoints_are_kept_there_and_come_back(tmp_path, bucket):
    run = a_run(tmp_path, to=f"s3://{bucket}/runs", export_to=None, upload_keep_last=2)
    for step in (2, 4, 6):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
    assert uploads(run).work()
    names = {path.split("/")[1] for path in stored("models/runs/mine") if path.startswith("checkpoints/step")}
    assert names == {"step_00000004", "step_00000006"}
    place = find_checkpoint(f"s3://{bucket}/runs/mine")
    index, loaded = read_manifest(place), tmp_path / "loaded"
    loaded.mkdir()
    download_part(place, index, loaded)
    (loaded / index.name).write_text(index.text)
    assert contents(loaded) == contents(run.checkpoints / "step_00000006")
    assert checkpoints.damage(loaded) is None


def test_a_removed_folder_leaves_those_that_its_name_would_match_as_a_pattern(bucket):
    kept, gone = Place(f"s3://{bucket}/ab/step"), Place(f"s3://{bucket}/a[b]/step")
    for place in (kept, gone):
        place.write_text("deeper/file", "text")
    gone.remove_all()
    assert stored(bucket) == {"ab/step/deeper/file": b"text"}


def test_a_missing_bucket_is_refused_and_not_made(tmp_path, bucket, capsys):
    run = a_run(tmp_path, to="s3://no-such-bucket/runs", export_to=None)
    assert command.main([str(run.path), "--check"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint.uploads.to: s3://no-such-bucket/runs/mine/upload_id cannot be written: " in said
    assert "bucket does not exist" in said and said.count("\n") == 1
    assert fsspec.filesystem("s3").ls("", refresh=True) == ["models"]


def test_what_is_not_allowed_is_one_line_without_the_key(tmp_path, bucket, monkeypatch, capsys):
    """Whatever the server says, it is told without the secrets."""

    def refuse(*_: Any) -> None:
        raise PermissionError(f"The AWS Access Key Id {KEY_ID} with {SECRET} is not allowed\n to PutObject")

    monkeypatch.setattr(fsspec.filesystem("s3"), "pipe_file", refuse)
    run = a_run(tmp_path, to=f"s3://{bucket}/runs", export_to=None)
    assert command.main([str(run.path), "--check"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not allowed to PutObject" in said
    assert KEY_ID not in said and SECRET not in said


def test_a_server_that_is_away_is_no_mistake_of_the_users(tmp_path, bucket, monkeypatch, capsys):
    def reset(*_: Any) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(fsspec.filesystem("s3"), "pipe_file", reset)
    run = a_run(tmp_path, to=f"s3://{bucket}/runs", export_to=None)
    assert command.main([str(run.path), "--check"]) == 1
    assert "checkpoint.uploads.to: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_cannot_be_read_back_is_one_line(tmp_path, bucket):
    with pytest.raises(UserError, match=r"s3://models/nowhere/file cannot be read: ."):
        Place(f"s3://{bucket}/nowhere").get("file", tmp_path / "file")


def test_a_server_that_is_away_may_answer_the_next_attempt(bucket, monkeypatch):
    """The client's own error is no OSError; the refused connection, from which it came, is."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*closed.getsockname()))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(AttemptFailed, match=f"s3://{bucket}/run/file cannot be read"):
            Place(f"s3://{bucket}/run").read_text("file")
