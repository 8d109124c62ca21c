"""Uploads to a hub on this machine (`hub_server`), through huggingface_hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from plt_megatron.commands import upload as command
from plt_megatron.storage.queue import EXPORT, UploadQueue
from tests.files import contents
from tests.unit.storage.hub_server import TOKEN, Hub
from tests.unit.storage.test_upload_copies import an_export
from tests.unit.storage.test_upload_runs import a_run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """huggingface_hub reads its settings when it is imported."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{path[1]}{path[2]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, in a binary
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


def test_each_export_is_a_branch_that_gets_its_name_once_it_is_complete(tmp_path, hub, capsys):
    run = a_run(tmp_path, export_to="hf://me/model", to=None)
    export = an_export(run.exports / "step_00000002")
    hub.die_at = 1
    assert command.main([str(run.path)]) == 1
    assert "failed: export of step 2: hf://me/model@step_00000002 cannot be written: " in capsys.readouterr().out
    branches = hub.branches["me/model"]
    assert "step_00000002" not in branches and len(hub.uploaded) == 1
    assert command.main([str(run.path)]) == 0
    assert len(hub.uploaded) == 2, "what had arrived was not sent again"
    assert branches.keys() == {"main", "step_00000002"} and branches["main"] == {".gitattributes": b""}
    there = dict(branches["step_00000002"])
    assert there.pop("upload.json") and there.pop("upload_id").decode() == run.upload_id_file.read_text()
    assert there == contents(export) | {".gitattributes": b""}
    del hub.commits[:]
    assert command.main([str(run.path)]) == 0 and hub.commits == []
    # The same step, trained again, without one of the files.
    shutil.rmtree(export)
    an_export(export, seed=5)
    (export / "README.md").unlink()
    UploadQueue(run).add(EXPORT, export)
    assert command.main([str(run.path)]) == 0
    assert branches.keys() == {"main", "step_00000002"}
    assert branches["step_00000002"].keys() - {"upload.json", "upload_id", ".gitattributes"} == contents(export).keys()


@pytest.mark.slow
def test_by_hand_a_revision_may_be_main(tmp_path, hub):
    export = an_export(tmp_path / "exported")
    hub.branches["me/model"] = {"main": {".gitattributes": b"", "old.safetensors": b"1"}}
    assert command.main([str(export), "--to", "hf://me/model@main"]) == 0
    assert hub.branches["me/model"].keys() == {"main"}
    others = {".gitattributes", "old.safetensors", "upload.json"}
    assert hub.branches["me/model"]["main"].keys() == contents(export).keys() | others
    assert [message for _, message in hub.commits] == ["Upload main", "main is complete"]
    (export / "README.md").unlink()
    assert command.main([str(export), "--to", "hf://me/model@main"]) == 0
    assert hub.branches["me/model"]["main"].keys() == contents(export).keys() | others
    hub.branches["me/model"]["v1"] = {"old.safetensors": b"1"}
    assert command.main([str(export), "--to", "hf://me/model@v1"]) == 2
    assert hub.branches["me/model"].keys() == {"main", "v1"}
    assert command.main([str(export), "--to", "hf://me/new@main"]) == 0
    assert hub.branches["me/new"]["main"].keys() >= contents(export).keys()


@pytest.mark.slow
def test_another_runs_repository_is_refused(tmp_path, hub, capsys):
    run = a_run(tmp_path, export_to="hf://me/model", to=None)
    an_export(run.exports / "step_00000002")
    assert command.main([str(run.path)]) == 0
    other = a_run(tmp_path / "other", export_to="hf://me/model", to=None)
    assert command.main([str(other.path), "--check"]) == 2
    assert "hf://me/model has another run's exports in its branches" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["read-only", "wrong token"])
def test_a_hub_that_refuses_is_one_line_without_the_token(tmp_path, hub, monkeypatch, capsys, trouble):
    hub.branches["me/model"] = {"main": {}}
    hub.read_only = trouble == "read-only"
    if trouble == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenThatIsWrong")
    run = a_run(tmp_path, export_to="hf://me/model", to=None)
    assert command.main([str(run.path), "--check"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: checkpoint.exports.upload_to: hf://me/model cannot be written: ")
    assert ("403" if hub.read_only else "401") in said and said.count("\n") == 1 and "hf_" not in said


def test_a_hub_that_does_not_answer_has_not_lost_the_earlier_upload(tmp_path, hub, capsys, monkeypatch):
    """Of which a file would stay in main for good."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its attempts
    export, to = an_export(tmp_path / "export"), ["--to", "hf://me/model@main"]
    assert command.main([str(export), *to]) == 0
    (export / "README.md").unlink()
    before, hub.overloaded = dict(hub.branches["me/model"]["main"]), True
    assert command.main([str(export), *to]) != 0
    assert "cannot be written" in capsys.readouterr().err and hub.branches["me/model"]["main"] == before
    hub.overloaded = False
    assert command.main([str(export), *to]) == 0
    assert "README.md" not in hub.branches["me/model"]["main"]
