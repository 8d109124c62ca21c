"""Destinations of uploads that are refused by their looks, one line each."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.rules.uploads import checkpoints_of, exports_of
from plt_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    ExportsConfig,
    RunConfig,
    TrainingConfig,
    UploadsConfig,
)
from plt_megatron.config.validation import find_problems
from tests.unit.config.test_validation import good


def a_config(
    export_interval: int | None = 2, export_to: str | None = None, to: str | None = None, **checkpoint: Any
) -> RunConfig:
    return RunConfig(
        name="mine",
        output_dir="/shared/runs",
        data=DataConfig(sources=[DataSource(path="data/text")], tokenizer="tokenizer.model"),
        training=TrainingConfig(train_iters=8),
        checkpoint=CheckpointConfig(
            save_interval=2,
            exports=None if export_interval is None else ExportsConfig(export_interval, export_to),
            uploads=None if to is None else UploadsConfig(to),
            **checkpoint,
        ),
    )


def problems(**checkpoint: Any) -> list[str]:
    return find_problems(a_config(**checkpoint), check_files=False)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"export_to": "hf://owner/some.model-1", "to": "s3://bucket"},
        {"export_to": "file:///shared/backup", "to": "gs://bucket/deep/folder/"},
        {"load": "s3://bucket/runs/other/checkpoints/step_00000100"},
        {"to": "sftp://user@host/folder"},
        {"to": "sftp://host:22/folder@noon"},
    ],
)
def test_what_looks_right(checkpoint):
    assert problems(**checkpoint) == []


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"to": "bucket/folder"}, "checkpoint.uploads.to: bucket/folder is not a URL, such as s3://"),
        ({"to": "file://folder"}, "file://folder is not absolute: file:///folder has three slashes"),
        ({"to": "s3://bucket/a?versionId=1"}, "s3://... contains one of :: ? # *; give a plain URL"),
        ({"to": "simplecache::s3://bucket/a"}, "simplecache::s3://bucket/a is not a URL"),
        ({"to": "hf://owner/model"}, "checkpoint.uploads.to: a hub holds models, not checkpoints"),
        ({"export_to": "hf://model"}, "hf://model is not a repository, such as hf://owner/name"),
        ({"export_to": "hf://owner/model@main"}, "is not a repository, such as hf://owner/name"),
        ({"load": "hf://owner/model"}, "checkpoint.load: a hub holds models, not checkpoints"),
        ({"load": "s3:/bucket?"}, None),  # a folder of that name, which a machine may have
        ({"to": "file:///shared/runs"}, "contains the run's own folder, or lies in it"),
        ({"to": "file:///shared/runs/mine/backup"}, "contains the run's own folder, or lies in it"),
        ({"to": "s3://b", "enabled": False, "export_interval": None}, "checkpoint.enabled=false writes none"),
    ],
)
def test_what_does_not(checkpoint, expected):
    found = problems(**checkpoint)
    assert found == [] if expected is None else (len(found) == 1 and expected in found[0])


@pytest.mark.parametrize("name", ["a*", "a[b]", "a?", "a#1", "a::b"])
def test_a_runs_name_that_its_destination_would_read_as_more_than_a_name(name):
    found = find_problems(dataclasses.replace(a_config(to="gs://bucket"), name=name), check_files=False)
    assert len(found) == 1 and name in found[0] and "checkpoint.uploads.to" in found[0]
    assert (
        find_problems(dataclasses.replace(a_config(export_to="hf://owner/model"), name=name), check_files=False) == []
    )


@pytest.mark.parametrize(
    "url",
    [
        "sftp://me:s3cret@host/a",
        "s3://me:s3c/s3cret@b/a",
        "S3://me:s3cret@b/a",
        "hf://me:s3cret@a/b",
        "x::s3://m:s3cret@b",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    (problem,) = problems(to=url)
    assert "a password, which belongs in the environment" in problem and "s3cret" not in problem


def test_packages_that_are_missing_are_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("s3fs", "huggingface_hub") else find_spec(name)
    )
    config = a_config(to="s3://bucket", export_to="hf://owner/model")
    assert [line for line in find_problems(config) if "upload" in line] == [
        "checkpoint.uploads.to needs the package s3fs: pip install 'plt-megatron[upload]', or set "
        "checkpoint.uploads=null",
        "checkpoint.exports.upload_to needs the package huggingface_hub: pip install 'plt-megatron[upload]', or set "
        "checkpoint.exports.upload_to=null",
    ]


def test_a_url_to_load_from_is_not_looked_for_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = good()
    config.checkpoint.load = "s3://bucket/runs/other"
    assert not any("checkpoint.load" in line for line in find_problems(config))


def test_each_run_has_a_folder_of_its_name_and_a_hub_one_repository():
    config = a_config(export_to="hf://owner/model", to="s3://bucket/runs/")
    assert exports_of(config) == "hf://owner/model" and checkpoints_of(config) == "s3://bucket/runs/mine"
    assert exports_of(a_config()) is None and checkpoints_of(a_config()) is None
    assert Path(checkpoints_of(config) or "").name == "mine"
