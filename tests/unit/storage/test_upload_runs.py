"""What waits in a run's folder goes where its configuration says: plt upload, on folders of this machine."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from plt_megatron.commands import upload as command
from plt_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    ExportsConfig,
    RunConfig,
    TrainingConfig,
    UploadsConfig,
)
from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.storage import places, run_uploads
from plt_megatron.storage.places import Place
from plt_megatron.storage.queue import CHECKPOINT, EXPORT, UploadQueue
from plt_megatron.storage.run_uploads import RunUploads
from tests.files import contents
from tests.running import wait_for
from tests.unit.storage.test_upload_copies import a_checkpoint, an_export


def a_run(
    folder: Path, export_to: str | None = "", to: str | None = "", upload_keep_last: int = 2, **checkpoint: Any
) -> RunFolder:
    """Named `mine`, uploading both to `there` unless told otherwise."""
    there = f"file://{folder}/there"
    exports = ExportsConfig(2, there if export_to == "" else export_to)
    uploads = None if to is None else UploadsConfig(to or there, upload_keep_last)
    settings: dict[str, Any] = {"save_interval": 2, "exports": exports, "uploads": uploads, **checkpoint}
    config = RunConfig(
        name="mine",
        output_dir=str(folder / "runs"),
        data=DataConfig(sources=[DataSource(path="data/text")], tokenizer="tokenizer.model"),
        training=TrainingConfig(train_iters=8),
        checkpoint=CheckpointConfig(**settings),
    )
    run = RunFolder.of(config)
    run.path.mkdir(parents=True, exist_ok=True)
    run.save_config(config)
    return run


def saved(run: RunFolder, step: int) -> Path:
    """A checkpoint of the run, its latest."""
    path = a_checkpoint(run.checkpoints, step)
    (run.checkpoints / "latest").write_text(path.name + "\n")
    return path


def uploads(run: RunFolder) -> RunUploads:
    return RunUploads(run.config(), run, say=lambda line: None)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_by_hand_everything_goes_to_a_folder_of_the_runs_name(tmp_path, capsys):
    run = a_run(tmp_path)
    export, checkpoint = an_export(run.exports / "step_00000002"), saved(run, 4)
    assert command.main([str(run.path)]) == 0
    there = tmp_path / "there" / "mine"
    assert contents(there / "checkpoints" / "step_00000004") == contents(checkpoint)
    assert contents(export).items() <= contents(there / "exports" / "step_00000002").items()
    assert (there / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert not UploadQueue(run).waiting() and export.is_dir() and checkpoint.is_dir()
    first, second = json_lines.read(run.uploads_file)
    assert first.items() >= {"what": "export", "step": 2, "files": 4, "bytes": 4006}.items()
    assert second["to"] == f"file://{there}/checkpoints/step_00000004"
    capsys.readouterr()
    assert command.main([str(run.path), "--verify"]) == 0
    assert capsys.readouterr().out.count("nothing new") == 2


def test_there_are_as_many_checkpoints_as_are_to_be_kept(tmp_path):
    run = a_run(tmp_path, upload_keep_last=2, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
        assert uploads(run).work()
    there = tmp_path / "there" / "mine" / "checkpoints"
    assert steps(there) == [4, 8, 10]
    assert (there / "latest").read_text() == "step_00000010\n"


def test_what_was_rolled_back_is_not_the_latest_and_goes_once_the_run_has_come_so_far(tmp_path):
    """Not before: the run's folder might be an older one that was restored."""
    run = a_run(tmp_path)
    for step in (4, 6):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
    uploads(run).work()
    shutil.rmtree(run.checkpoints / "step_00000006")
    there = tmp_path / "there" / "mine" / "checkpoints"
    for step, kept in ((5, [4, 5, 6]), (8, [6, 8]), (9, [8, 9])):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
        uploads(run).work()
        assert steps(there) == kept and (there / "latest").read_text() == f"step_{step:08d}\n"


def test_an_older_checkpoint_that_comes_late_does_not_become_the_latest(tmp_path, monkeypatch):
    run = a_run(tmp_path, keep_every=2)
    for step in (2, 4):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
    whole = run_uploads.upload
    with monkeypatch.context() as patch:

        def breaks(folder: Path, place: Place, **how: Any) -> Any:
            if "00000002" in place.url:
                (tmp_path / "there" / "mine" / "checkpoints" / "step_00000002").mkdir(parents=True)
                raise UserError("the network is down")
            return whole(folder, place, **how)

        patch.setattr(run_uploads, "upload", breaks)
        assert not uploads(run).work()
    there = tmp_path / "there" / "mine" / "checkpoints"
    assert steps(there) == [2, 4], "what is begun is left for the next try"
    assert [(entry.kind, entry.step) for entry in UploadQueue(run).waiting()] == [(CHECKPOINT, 2)]
    assert json_lines.read(run.uploads_file)[0]["error"] == "the network is down"
    assert uploads(run).work()
    assert (there / "latest").read_text() == "step_00000004\n" and steps(there) == [2, 4]


def test_what_comes_meanwhile_is_uploaded_too_and_what_was_begun_comes_first(tmp_path):
    run = a_run(tmp_path)
    queue = UploadQueue(run)
    for step in (2, 4, 6):
        queue.add(EXPORT, an_export(run.exports / f"step_{step:08d}", seed=step))
    queue.begin(queue.waiting()[1])  # and its process was killed
    order: list[str] = []

    def say(line: str) -> None:
        order.append(line.split(":")[1].rpartition("/")[2])
        if len(order) == 2:
            queue.add(EXPORT, an_export(run.exports / "step_00000008"))

    RunUploads(run.config(), run, say).work()
    assert order == [f"step_{step:08d}" for step in (4, 2, 6, 8)]


def test_the_queue_holds_links_and_of_checkpoints_the_newest(tmp_path):
    run = a_run(tmp_path, keep_every=4)
    queue = UploadQueue(run)
    for step in (2, 4, 6):
        queue.add(CHECKPOINT, saved(run, step))
    taken = queue.begin(queue.waiting()[0])
    queue.add(CHECKPOINT, saved(run, 8))
    queue.drop_older_checkpoints(8, keep_every=4)
    assert [entry.step for entry in queue.waiting()] == [2, 4, 8]
    shutil.rmtree(run.checkpoints / "step_00000002")
    assert (taken.folder / "progress.json").read_text() == "progress.json of 2"
    queue.drop_after(4)
    assert [entry.step for entry in queue.waiting()] == [2, 4]
    queue.put_back(taken)
    assert [entry.folder.name for entry in queue.waiting()] == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC])
def test_where_links_are_refused_the_queue_holds_copies(tmp_path, monkeypatch, code):
    """As between file systems; a full disk is no such place."""
    run = a_run(tmp_path)
    folder = saved(run, 2)
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(code, os.strerror(code))))
    monkeypatch.setattr(os, "chmod", Mock(side_effect=OSError(errno.EPERM, "permissions are fixed here")))
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space"):
            UploadQueue(run).add(CHECKPOINT, folder)
        assert list((run.uploading / "checkpoints").iterdir()) == [], "its part would fill the disk"
        return
    with pytest.raises(TimeoutError, match="takes too long"):  # the run's other ranks would wait
        UploadQueue(run).add(CHECKPOINT, folder, seconds=-1)
    assert list((run.uploading / "checkpoints").iterdir()) == []
    UploadQueue(run).add(CHECKPOINT, folder)
    (entry,) = UploadQueue(run).waiting()
    assert {path.name: path.read_bytes() for path in entry.folder.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_kill_while_an_entry_is_replaced_leaves_no_part_of_it(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    export = an_export(run.exports / "step_00000002")
    UploadQueue(run).add(EXPORT, export)

    def killed(folder: Path, **how: Any) -> None:
        if folder.is_dir():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        UploadQueue(run).add(EXPORT, export)
    assert UploadQueue(run).waiting() == []


def test_a_folder_that_cannot_be_emptied_is_in_nobodys_way(tmp_path, monkeypatch):
    """As NFS keeps one in which another process has a file open; at the next start it goes."""
    queue = UploadQueue(a_run(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for _ in range(2):
            folder = an_export(queue.path / "exports" / "step_00000002")
            queue.done(queue.waiting()[0])
            assert not queue.waiting() and not folder.exists()
    for left in (queue.path / "exports").iterdir():
        os.utime(left, (0, 0))
    queue.clear_leftovers()
    assert not list((queue.path / "exports").iterdir())


def test_another_run_of_that_name_is_refused_and_a_run_that_goes_on_from_its_uploads_is_not(tmp_path, capsys):
    models = f"file://{tmp_path}/models"
    run = a_run(tmp_path, models)
    an_export(run.exports / "step_00000002")
    saved(run, 2)
    assert command.main([str(run.path)]) == 0
    shutil.rmtree(run.path)
    assert command.main([str(a_run(tmp_path, models).path), "--check"]) == 2
    assert "has the uploads of another run" in capsys.readouterr().err
    again = a_run(tmp_path, models, load=f"file://{tmp_path}/there/mine")
    assert command.main([str(again.path), "--check"]) == 0
    assert capsys.readouterr().out == "all destinations can be written\n"
    # Without it, before the first save, the run would begin anew and replace its own uploads.
    assert command.main([str(a_run(tmp_path, models).path), "--check"]) == 2
    assert f"continue from them with checkpoint.load=file://{tmp_path}/there/mine" in capsys.readouterr().err


def test_the_place_of_a_run_that_ended_before_its_first_upload_can_be_had(tmp_path, capsys):
    """It may also be one that trains elsewhere."""
    run = a_run(tmp_path)
    assert command.main([str(run.path), "--check"]) == 0
    shutil.rmtree(run.path)
    again = a_run(tmp_path)
    saved(again, 2)
    assert command.main([str(again.path), "--check"]) == 2
    (tmp_path / capsys.readouterr().err.rpartition(f"remove file://{tmp_path}/")[2].strip()).unlink()
    assert command.main([str(again.path)]) == 0 and steps(tmp_path / "there" / "mine" / "checkpoints") == [2]


def test_a_marker_that_a_full_disk_left_empty_is_nobodys(tmp_path):
    run = a_run(tmp_path)
    saved(run, 2)
    (tmp_path / "there" / "mine").mkdir(parents=True)
    (tmp_path / "there" / "mine" / "upload_id").touch()
    assert command.main([str(run.path)]) == 0 and steps(tmp_path / "there" / "mine" / "checkpoints") == [2]


def test_a_full_destination_stops_a_new_run_and_not_one_that_has_checkpoints(tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path)
    monkeypatch.setattr(places, "write_bytes", Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")))
    assert command.main([str(run.path), "--check"]) == 2
    saved(run, 2)
    assert command.main([str(run.path), "--check"]) == 1
    assert capsys.readouterr().err.count("mine/upload_id cannot be written") == 2


@pytest.mark.parametrize("cut", [0, 20])
def test_a_manifest_that_was_cut_short_displaces_no_checkpoint(tmp_path, cut):
    run = a_run(tmp_path, upload_keep_last=1)
    there = tmp_path / "there" / "mine" / "checkpoints"
    for step in (2, 4):
        UploadQueue(run).add(CHECKPOINT, saved(run, step))
    first, second = UploadQueue(run).waiting()
    shutil.copytree(second.folder, there / "step_00000004")
    os.truncate(there / "step_00000004" / "manifest.json", cut)
    UploadQueue(run).done(second)
    assert uploads(run).work()
    assert steps(there) == [first.step] and (there / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "nowhere not found"),
        (["empty"], "empty is not a run's folder: give --to URL"),
        (["empty", "--check"], "empty is not a run's folder: --check and --waiting"),
        (["empty", "--to", "file:///tmp/x", "--check"], "empty is not a run's folder: --check and --waiting"),
        (["config.yaml"], "/mine/config.yaml is a file: give its folder, "),
        (["nowhere", "--to", "file:///tmp/x"], "nowhere: no such folder"),
        (["nowhere", "--to", "bucket/x"], "--to: bucket/x is not a URL"),
        (["nowhere", "--to", "file:///"], "--to: file:/// names no folder"),
        (["nowhere", "--to", "s3:///"], "--to: s3:/// names no folder"),
        (["nowhere", "--to", "hf://owner/name"], "hf://owner/name names no revision"),
        (["nowhere", "--to", "hf://owner/name@main", "--verify"], "a hub compares SHA-256 itself; leave --verify out"),
        (["run", "--to", "file:///tmp/x"], "--to is for one export or checkpoint"),
        (["plain"], "neither checkpoint.exports.upload_to nor checkpoint.uploads.to"),
    ],
)
def test_a_command_that_means_nothing_is_one_line(tmp_path, capsys, arguments, problem):
    runs = {"run": a_run(tmp_path), "plain": a_run(tmp_path / "other", export_to=None, to=None)}
    (tmp_path / "empty").mkdir()
    paths = {name: run.path for name, run in runs.items()}
    paths |= {"empty": tmp_path / "empty", "config.yaml": runs["run"].config_file}
    arguments = [str(paths.get(part, part)) for part in arguments]
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


def test_one_folder_by_hand(tmp_path, capsys):
    export = an_export(tmp_path / "exported")
    assert command.main([str(export), "--to", f"file://{tmp_path}/there"]) == 0
    assert capsys.readouterr().out.startswith(f"uploaded file://{tmp_path}/there: 4 files, 4.01 kB, 4.01 kB sent in ")
    assert json.loads((tmp_path / "there" / "upload.json").read_text())["files"].keys() == contents(export).keys()


def test_a_destination_that_is_down_does_not_hold_up_the_other(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    run = a_run(tmp_path, export_to=f"file://{tmp_path}/file")
    an_export(run.exports / "step_00000002")
    saved(run, 4)
    assert command.main([str(run.path)]) == 1
    assert steps(tmp_path / "there" / "mine" / "checkpoints") == [4]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"failed: export of step 2: file://{tmp_path}/file/mine/upload_id cannot be ")
    assert said[1].startswith("uploaded file://") and len(said) == 2


def test_two_at_once_are_refused(tmp_path, capsys):
    run = a_run(tmp_path)
    with locked(UploadQueue(run).path, "upload"):
        assert command.main([str(run.path)]) == 2
    assert "another upload is running there" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trainings_own_upload_waits_for_one_by_hand(tmp_path):
    """What is being uploaded has not failed."""
    run = a_run(tmp_path)
    UploadQueue(run).add(EXPORT, an_export(run.exports / "step_00000002"))
    script = "import sys; from plt_megatron.commands.upload import main; sys.exit(main(sys.argv[1:]))"
    with locked(UploadQueue(run).path, "upload") as lock:
        waiting = subprocess.Popen([sys.executable, "-c", script, str(run.path), "--waiting"])
        inode = os.fstat(lock.fileno()).st_ino
        wait_for(lambda: re.search(rf"-> .* {waiting.pid} .*:{inode} ", Path("/proc/locks").read_text()), "the lock")
        assert UploadQueue(run).waiting()
    assert waiting.wait(60) == 0
    assert not UploadQueue(run).waiting()
