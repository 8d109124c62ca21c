"""Destinations of uploads that are refused by their looks, one line each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.rules.uploads import checkpoints_of, exports_of
from plt_megatron.config.schema import CheckpointConfig, DataConfig, DataSource, RunConfig, TrainingConfig
from plt_megatron.config.validation import find_problems
from tests.unit.config.test_validation import good


def a_config(**checkpoint: Any) -> RunConfig:
    return RunConfig(
        name="mine",
        output_dir="/shared/runs",
        data=DataConfig(sources=[DataSource(path="data/text")], tokenizer="tokenizer.model"),
        training=TrainingConfig(train_iters=8),
        checkpoint=CheckpointConfig(save_interval=2, export_interval=2, **checkpoint),
    )


def problems(**checkpoint: Any) -> list[str]:
    return find_problems(a_config(**checkpoint), check_files=False)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"export_upload_to": "hf://owner/some.model-1", "upload_to": "s3://bucket"},
        {"export_upload_to": "file:///shared/backup", "upload_to": "gs://bucket/deep/folder/"},
        {"load": "s3://bucket/runs/other/checkpoints/step_00000100"},
        {"upload_to": "sftp://user@host/folder"},
    ],
)
def test_what_looks_right(checkpoint):
    assert problems(**checkpoint) == []


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"upload_to": "bucket/folder"}, "checkpoint.upload_to: bucket/folder is not a URL, such as s3://"),
        ({"upload_to": "file://folder"}, "file://folder is not absolute: file:///folder has three slashes"),
        ({"upload_to": "s3://bucket/a?versionId=1"}, "s3://... contains one of :: ? # *; give a plain URL"),
        ({"upload_to": "simplecache::s3://bucket/a"}, "simplecache::s3://bucket/a is not a URL"),
        ({"upload_to": "hf://owner/model"}, "checkpoint.upload_to: a hub holds models, not checkpoints"),
        ({"export_upload_to": "hf://model"}, "hf://model is not a repository, such as hf://owner/name"),
        ({"export_upload_to": "hf://owner/model@main"}, "is not a repository, such as hf://owner/name"),
        ({"load": "hf://owner/model"}, "checkpoint.load: a hub holds models, not checkpoints"),
        ({"load": "s3:/bucket?"}, None),  # a folder of that name, which a machine may have
        ({"upload_to": "file:///shared/runs"}, "contains the run's own folder, or lies in it"),
        ({"upload_to": "file:///shared/runs/mine/backup"}, "contains the run's own folder, or lies in it"),
        ({"upload_to": "s3://b", "enabled": False, "export_interval": 0}, "checkpoint.enabled=false writes none"),
        ({"export_upload_to": "s3://b", "export_interval": 0}, "set checkpoint.export_interval"),
        ({"upload_to": "s3://b", "upload_keep_last": 0}, "checkpoint.upload_keep_last must be at least 1, got 0"),
    ],
)
def test_what_does_not(checkpoint, expected):
    config = a_config()
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, value)
    found = find_problems(config, check_files=False)
    assert found == [] if expected is None else (len(found) == 1 and expected in found[0])


def test_a_password_in_a_url_is_refused_and_not_repeated():
    (problem,) = problems(upload_to="sftp://me:s3cret@host/folder")
    assert "a password, which belongs in the environment" in problem and "s3cret" not in problem


def test_packages_that_are_missing_are_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("s3fs", "huggingface_hub") else find_spec(name)
    )
    config = a_config(upload_to="s3://bucket", export_upload_to="hf://owner/model")
    assert [line for line in find_problems(config) if "upload" in line] == [
        "checkpoint.upload_to needs the package s3fs: pip install 'plt-megatron[upload]', or set "
        "checkpoint.upload_to=null",
        "checkpoint.export_upload_to needs the package huggingface_hub: pip install 'plt-megatron[upload]', or set "
        "checkpoint.export_upload_to=null",
    ]


def test_a_url_to_load_from_is_not_looked_for_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = good()
    config.checkpoint.load = "s3://bucket/runs/other"
    assert not any("checkpoint.load" in line for line in find_problems(config))


def test_each_run_has_a_folder_of_its_name_and_a_hub_one_repository():
    config = a_config(export_upload_to="hf://owner/model", upload_to="s3://bucket/runs/")
    assert exports_of(config) == "hf://owner/model" and checkpoints_of(config) == "s3://bucket/runs/mine"
    assert exports_of(a_config()) is None and checkpoints_of(a_config()) is None
    assert Path(checkpoints_of(config) or "").name == "mine"
