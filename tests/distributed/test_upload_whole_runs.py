"""Whole runs that upload as they go, and runs that start from what another has uploaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest

from plt_megatron.config.schema import DataConfig, ExportsConfig, RunConfig, UploadsConfig
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder.folder import RunFolder
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import numbers
from tests.files import contents
from tests.s3_server import SECRET, s3_server
from tests.unit.storage.test_upload_copies import a_checkpoint

TP = {"tensor_model_parallel_size": 2}
FOUR = {"train_iters": 4}


def check_and_train(config: RunConfig, environment: dict[str, str] | None = None) -> bool | str:
    """Check and train as the main program does. `environment`: the processes beside it have it too."""
    from plt_megatron.train.callbacks.uploads import check_destinations

    with mock.patch.dict(os.environ, environment or {}):
        try:
            check_destinations(config)
            return train(config)
        except UserError as error:
            return str(error)


@pytest.fixture(scope="module")
def uploaded(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Four steps on two ranks; in `bucket` are its last checkpoint and the permanent one of step 2."""
    folder = tmp_path_factory.mktemp("uploaded")
    checkpoint = {"save_interval": 2, "keep_every": 2, "uploads": UploadsConfig(f"file://{folder}/bucket", 1)}
    config = run_config("trunk", folder, data, training=FOUR, parallel=TP, checkpoint=checkpoint)
    assert run_distributed(check_and_train, 2, config) is True
    return config


@pytest.mark.slow
def test_a_runs_last_checkpoints_are_uploaded(uploaded):
    run, bucket = RunFolder.of(uploaded), Path(uploaded.output_dir) / "bucket" / "trunk"
    there = bucket / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    assert (there / "latest").read_text() == "step_00000004\n"
    assert contents(there / "step_00000004") == contents(run.checkpoints / "step_00000004")
    records = numbers(uploaded, "upload")
    assert records[-1].items() >= {"what": "checkpoint", "of_step": 4, "step": 4}.items()
    assert not any("error" in record for record in records)
    assert [path.name for path in run.uploading.rglob("step_*")] == []


@pytest.mark.slow
def test_a_run_starts_from_an_uploaded_checkpoint_bit_for_bit(uploaded, tmp_path, run_distributed):
    """In the trunk's layout, from its URL and a step's."""
    url = f"file://{uploaded.output_dir}/bucket/trunk/checkpoints/step_00000002"
    checkpoint = {"save_interval": 4, "load": url}
    config = run_config("again", tmp_path, uploaded.data, training=FOUR, parallel=TP, checkpoint=checkpoint)
    assert run_distributed(train, 2, config) is True
    ours, theirs = (numbers(of, "train") for of in (config, uploaded))
    assert [record["step"] for record in ours] == [3, 4] and ours == theirs[2:]
    assert not RunFolder.of(config).loaded.exists(), "the run has a checkpoint of its own"


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["no manifest", "a wrong byte"])
def test_a_damaged_upload_is_named_on_all_ranks(uploaded, tmp_path, run_distributed, harm):
    bucket = tmp_path / "bucket"
    shutil.copytree(Path(uploaded.output_dir) / "bucket" / "trunk" / "checkpoints", bucket)
    step = bucket / "step_00000004"
    if harm == "no manifest":
        (step / "manifest.json").unlink()
    else:
        file = next(step.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    checkpoint = {"enabled": False, "load": f"file://{step}"}
    config = run_config("harmed", tmp_path, uploaded.data, training=FOUR, parallel=TP, checkpoint=checkpoint)
    said = run_distributed(check_and_train, 2, config, all_ranks=True)
    problem = "manifest.json is missing" if harm == "no manifest" else "is damaged, its SHA-256"
    assert problem in said[0] and set(said) == {said[0]} and "\n" not in said[0]


def fetch(url: str, folder: Path) -> tuple[str, int]:
    """Fetch; return the path or the error on this rank, and how often it has given a sign of life."""
    from plt_megatron.train.checkpoint.store import fetch_checkpoint

    beats: list[None] = []
    try:
        return str(fetch_checkpoint(url, folder, lambda: beats.append(None))), len(beats)
    except UserError as error:
        return str(error), len(beats)


def fetch_and_lose_the_connection(url: str, folder: Path) -> str:
    """On the second rank, while files arrive. Returns the kind of error."""
    from plt_megatron.storage.places import Place
    from plt_megatron.train.checkpoint.store import fetch_checkpoint

    lost = mock.patch.object(Place, "get", side_effect=AttemptFailed("the server went away"))
    with lost if os.environ["RANK"] == "1" else contextlib.nullcontext():
        try:
            fetch_checkpoint(url, folder, lambda: None)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return "fetched"


def test_a_connection_that_is_lost_while_a_checkpoint_arrives_is_tried_again(tmp_path, run_distributed):
    a_checkpoint(tmp_path / "bucket" / "checkpoints", 4)
    said = run_distributed(
        fetch_and_lose_the_connection, 2, f"file://{tmp_path}/bucket", tmp_path / "loaded", all_ranks=True
    )
    assert said == ["AttemptFailed: the server went away"] * 2


def test_ranks_share_the_files_of_a_checkpoint_they_fetch(tmp_path, run_distributed):
    """A whole one, one with a wrong byte, the same once it is whole again, and another one of its step, of which a lost
    node then keeps half a file."""
    bucket, loaded = tmp_path / "bucket" / "checkpoints", tmp_path / "loaded"
    url = f"file://{tmp_path}/bucket"
    step = a_checkpoint(bucket, 4)
    found = run_distributed(fetch, 2, url, loaded, all_ranks=True)
    assert [path for path, _ in found] == [str(loaded / "step_00000004")] * 2
    assert contents(loaded / "step_00000004") == contents(step)
    file = a_checkpoint(bucket, 6) / "__0_0.distcp"
    right = file.read_bytes()
    file.write_bytes(b"?" + right[1:])
    said = run_distributed(fetch, 2, url, loaded, all_ranks=True)
    assert (
        "__0_0.distcp is damaged, its SHA-256 is not that of manifest.json" in said[0][0] and said[1][0] == said[0][0]
    )
    assert not (loaded / "step_00000004").exists(), "one checkpoint at a time"
    file.write_bytes(right)
    (bucket / "step_00000006" / ".metadata").unlink()  # it has arrived
    run_distributed(fetch, 2, url, loaded)
    assert sorted(path.name for path in (loaded / "step_00000006").iterdir()) == [
        *(".metadata", "__0_0.distcp", "manifest.json", "progress.json")
    ]
    shutil.rmtree(bucket / "step_00000006")
    trained_again = a_checkpoint(tmp_path, 7).rename(bucket / "step_00000006")
    for _ in range(2):
        run_distributed(fetch, 2, url, loaded)
        assert contents(loaded / "step_00000006") == contents(trained_again)
        os.truncate(loaded / "step_00000006" / "__0_0.distcp", 3)


def test_a_destination_that_cannot_be_written_ends_the_run_before_it_begins(tmp_path, run_distributed):
    (tmp_path / "file").write_text("no folder")
    config = run_config(
        "refused", tmp_path, DataConfig(), checkpoint={"uploads": UploadsConfig(f"file://{tmp_path}/file")}
    )
    said = run_distributed(check_and_train, 2, config, all_ranks=True)
    assert said[0].startswith(f"checkpoint.uploads.to: file://{tmp_path}/file/refused") and said[1] == said[0]
    assert not RunFolder.of(config).metrics_file.exists()


@pytest.mark.slow
def test_a_run_exports_twice_to_a_bucket_and_another_goes_on_from_there(data, tmp_path, run_distributed, monkeypatch):
    """On moto's S3 server: exports of steps 2 and 4, the last checkpoint, and a run in another layout from its URL."""
    import fsspec

    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        to = "s3://models/runs"
        checkpoint = {"save_interval": 2, "exports": ExportsConfig(2, to), "uploads": UploadsConfig(to)}
        config = run_config("trunk", tmp_path, data, training=FOUR, checkpoint=checkpoint)
        said = run_distributed(check_and_train, 1, config, environment)
        assert "models" in said and "bucket does not exist" in said
        files = fsspec.filesystem("s3")
        files.mkdir("models")
        assert run_distributed(check_and_train, 1, config, environment, timeout_s=240) is True
        run, there = RunFolder.of(config), "models/runs/trunk/"
        files.invalidate_cache()
        found = {path.removeprefix(there): files.cat_file(path) for path in files.find(there)}
        for step in ("step_00000002", "step_00000004"):
            names = [name for name in found if name.startswith(f"exports/{step}/")]
            export = {name.rpartition("/")[2]: found[name] for name in names}
            index = json.loads(export.pop("upload.json"))
            assert export == contents(run.exports / step) and index["files"].keys() == export.keys()
        assert {name for name in found if re.match("checkpoints/step_0+4/", name)} == {
            f"checkpoints/step_00000004/{name}" for name in contents(run.checkpoints / "step_00000004")
        }
        text = run.path.joinpath("metrics.jsonl").read_text() + run.uploads_file.read_text()
        assert SECRET not in text
        checkpoint = {"load": "s3://models/runs/trunk", "weights_only": True}
        other = run_config("other", tmp_path, data, parallel=TP, checkpoint=checkpoint)
        assert run_distributed(check_and_train, 2, other, environment) is True
