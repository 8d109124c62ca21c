"""Upload what is queued in a run's folder to the destinations in its configuration.

On a Hugging Face hub each revision is a branch, which gets its final name once it is complete.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from plt_megatron.config.rules import uploads as upload_rules
from plt_megatron.config.rules.uploads import HUB, protocol_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.extras import require
from plt_megatron.run_folder import checkpoints, json_lines
from plt_megatron.run_folder.checkpoints import NAME
from plt_megatron.run_folder.files import locked, write_text, writing
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import format_bytes, format_duration, plural
from plt_megatron.storage.copies import INDEX, Uploaded, files_in, has_manifest, index_of, latest_step, steps_in, upload
from plt_megatron.storage.places import Place, failing
from plt_megatron.storage.queue import CHECKPOINT, EXPORT, UploadQueue, Waiting

MAIN = "main"
_PARTIAL = "uploading-"  # prefix of an incomplete branch's name
_PROBE = "upload-check"
_OWNER = "upload_id"  # file in each branch with the id of the run it belongs to


class Repository:
    """A model repository, hf://owner/name. All methods raise `UserError`, one line without secrets.

    `huggingface_hub` decides who writes and to which hub: by `HF_TOKEN` or `hf auth login`, and `HF_ENDPOINT`.
    """

    def __init__(self, url: str) -> None:
        require("hf://...", "huggingface_hub")
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.url = url
        self._name = url.removeprefix("hf://")
        self._api = HfApi()

    def claim(self, run_id: str) -> None:
        """Ensure that the repository exists (a new one is private), can be written, and has no other run's steps."""
        with failing(f"{self.url} cannot be written"):
            self._api.create_repo(self._name, private=True, exist_ok=True)
            self._api.create_branch(self._name, branch=_PROBE, exist_ok=True)
            self._api.delete_branch(self._name, branch=_PROBE)
        with failing(f"{self.url} cannot be read"):
            steps = [name for name in self._branches() if NAME.fullmatch(name)]
            owner = (self._read(_OWNER, max(steps)) or "").strip() if steps else ""
        if owner not in ("", run_id):
            raise UserError(f"{self.url} has another run's exports in its branches: choose another repository")

    def upload(self, folder: Path, revision: str, run_id: str | None = None) -> Uploaded:
        """Make the branch `revision` a copy of a folder; files that the hub already has are not sent again, though
        they count as sent: huggingface_hub does not say which they are.

        `main`, which cannot be replaced, is written in place and keeps files that are not from an upload.

        Raises:
            UserError: the folder is empty, the branch belongs to someone else, or the hub refuses; the next attempt
                continues from there.
        """
        from huggingface_hub import CommitOperationAdd

        index = index_of(folder)
        with failing(f"{self.url}@{revision} cannot be written"):
            if run_id is None:  # by hand: nothing has claimed it
                self._api.create_repo(self._name, private=True, exist_ok=True)
            branches = self._branches()
            before = self._read(INDEX, revision) if revision in branches else None
            if before == index.text:
                return index.uploaded([])
            if revision in branches and revision != MAIN and before is None:
                raise UserError(f"{self.url} has a branch {revision} that is not an upload; give another revision")
            partial = MAIN if revision == MAIN else _PARTIAL + revision
            # A branch starts as a copy of main, none of which may stay; in main only an earlier upload is removed.
            stale = "*" if revision != MAIN else sorted(files_in(INDEX, before).keys() - index.files.keys())
            self._api.create_branch(self._name, branch=partial, exist_ok=True)
            to: dict[str, Any] = {"repo_id": self._name, "revision": partial}
            message = f"Upload {revision}"
            self._api.upload_folder(**to, folder_path=folder, delete_patterns=stale or None, commit_message=message)
            last = {INDEX: index.text, **({} if run_id is None else {_OWNER: run_id + "\n"})}
            additions = [CommitOperationAdd(name, text.encode()) for name, text in last.items()]
            self._api.create_commit(**to, operations=additions, commit_message=f"{revision} is complete")
            if partial != MAIN:
                if revision in branches:
                    self._api.delete_branch(self._name, branch=revision)
                self._api.create_branch(self._name, branch=revision, revision=partial)
                self._api.delete_branch(self._name, branch=partial)
        return index.uploaded(index.files)

    def _branches(self) -> list[str]:
        return [branch.name for branch in self._api.list_repo_refs(self._name).branches]

    def _read(self, name: str, revision: str) -> str | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self._api.hf_hub_download(self._name, name, revision=revision, local_dir=folder)
            except LocalEntryNotFoundError:  # is one too, and means that the hub did not answer
                raise
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8")


class RunUploads:
    """The uploads of one run, to `checkpoint.exports.upload_to` and `checkpoint.uploads.to`.

    Raises `UserError` if the configuration has neither.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, say: Callable[[str], None] = print) -> None:
        self.config, self.folder, self._say = config, folder, say
        self.queue = UploadQueue(folder)
        self._claimed: set[str] = set()
        self._to = {EXPORT: upload_rules.exports_of(config), CHECKPOINT: upload_rules.checkpoints_of(config)}
        if not any(self._to.values()):
            raise UserError(
                f"{folder.config_file} sets neither checkpoint.exports.upload_to nor checkpoint.uploads.to; upload "
                "an export or a checkpoint of the run with --to"
            )

    def check(self) -> None:
        """Raise `UserError` if a destination cannot be written, has another run's uploads, or this run's checkpoints
        while its folder has none and it does not continue from them.

        If a run that has checkpoints cannot write there, it is an `AttemptFailed`: as during training, it goes on.
        """
        for kind, key in ((CHECKPOINT, "checkpoint.uploads.to"), (EXPORT, "checkpoint.exports.upload_to")):
            try:
                self._claim(self._to[kind])
            except UserError as error:
                goes_on = isinstance(error.__cause__, OSError) and self._last_step() is not None
                raise (AttemptFailed if goes_on else type(error))(f"{key}: {error}") from error
        to = self._to[CHECKPOINT]
        if to is None or self._last_step() is not None or self._loads_from(to):
            return
        if steps_in(Place(to) / checkpoints.FOLDER):
            raise UserError(
                f"checkpoint.uploads.to: {to} has this run's checkpoints, its folder has none: continue from them with "
                f"checkpoint.load={to}, or give this run another name"
            )

    def _claim(self, to: str | None) -> None:
        """Mark a destination as this run's, once; this also shows that it can be written."""
        if to is None or to in self._claimed:
            return
        if protocol_of(to) == HUB:
            Repository(to).claim(self._id())
        else:
            _claim_place(Place(to), self._id())
        self._claimed.add(to)

    def add_all(self) -> None:
        """Queue the exports and last checkpoints that the folder has."""
        have = {EXPORT: self.folder.exports, CHECKPOINT: self.folder.checkpoints}
        waiting = {(entry.kind, entry.step) for entry in self.queue.waiting()}
        for kind, to in self._to.items():
            found = {checkpoints.step_of(path): path for path in checkpoints.checkpoint_folders(have[kind]) if to}
            old = self._superseded(found, self._last_step() or 0) if kind == CHECKPOINT and found else ()
            for step, path in found.items():
                if step not in old and (kind, step) not in waiting:
                    with writing(self.queue.path):
                        self.queue.add(kind, path)

    def work(self, *, verify: bool = False, wait: bool = False) -> bool:
        """Upload all entries, also those added meanwhile; failed ones stay in the queue. Return whether none failed.

        Raises:
            UserError: another process is already uploading, and this one is not to `wait` for its end.
        """
        tried: set[tuple[str, int]] = set()
        failed = False
        with locked(self.queue.path, "upload", wait=wait):
            while left := [entry for entry in self.queue.waiting() if (entry.kind, entry.step) not in tried]:
                tried.add((left[0].kind, left[0].step))
                entry = self.queue.begin(left[0])
                if entry is not None:
                    failed |= not self._upload(entry, verify)
        return not failed

    def _upload(self, entry: Waiting, verify: bool) -> bool:
        started = time.monotonic()
        record: dict[str, Any] = {"time": time.time(), "what": entry.kind, "step": entry.step, "seconds": 0.0}
        try:
            target, uploaded = self._send(entry, verify)
        except UserError as error:
            self.queue.put_back(entry)
            record["error"] = str(error)
            said = f"failed: {entry.kind} of step {entry.step}: {error}"
        else:
            self.queue.done(entry)
            record |= {"to": target, "files": uploaded.files, "bytes": uploaded.bytes}
            said = describe(target, uploaded, time.monotonic() - started)
        record["seconds"] = round(time.monotonic() - started, 3)
        json_lines.append(self.folder.uploads_file, record)
        self._say(said)
        return "error" not in record

    def _send(self, entry: Waiting, verify: bool) -> tuple[str, Uploaded]:
        to, name = self._to[entry.kind], checkpoints.folder_name(entry.step)
        if to is None:
            raise UserError("the configuration no longer has a destination for it")
        self._claim(to)
        if protocol_of(to) == HUB:
            return f"{to}@{name}", Repository(to).upload(entry.folder, name, self._id())
        place = Place(to) / ("exports" if entry.kind == EXPORT else checkpoints.FOLDER)
        target = place / name
        uploaded = upload(entry.folder, target, verify=verify, owned=True)
        if entry.kind == CHECKPOINT:
            self._settle_checkpoints(place)
        return target.url, uploaded

    def _settle_checkpoints(self, place: Place) -> None:
        """Update `latest` at the destination, and remove checkpoints that need not be kept.

        Checkpoints after the run's own last one stay until the run gets there: its folder may have been restored from
        an older copy, and the destination may have the only copy of them.
        """
        last = self._last_step()
        steps = [step for step in steps_in(place) if last is None or step <= last]
        folders = {step: place / checkpoints.folder_name(step) for step in steps}
        complete = [step for step in folders if has_manifest(folders[step])]
        if complete and latest_step(place) != max(complete):
            place.write_text(checkpoints.LATEST, checkpoints.folder_name(max(complete)) + "\n")
        unfinished = {entry.step for entry in self.queue.waiting() if entry.kind == CHECKPOINT}
        old = self._superseded(complete, max(complete, default=0))
        for step in sorted(old | folders.keys() - set(complete) - unfinished):
            folders[step].remove(checkpoints.MANIFEST)  # first, so that half a checkpoint never looks complete
            folders[step].remove_all()

    def _superseded(self, steps: Collection[int], last: int) -> set[int]:
        settings = self.config.checkpoint
        assert settings.uploads is not None, "only for uploads of checkpoints"
        return checkpoints.superseded(steps, last, settings.uploads.keep_last, settings.keep_every)

    def _last_step(self) -> int | None:
        """Return the step of the run's own last checkpoint."""
        latest = checkpoints.latest_checkpoint(self.folder.path, verify=False)
        return None if latest is None else checkpoints.step_of(latest)

    def _loads_from(self, to: str) -> bool:
        """Return whether the run continues from a checkpoint at this destination."""
        return f"{(self.config.checkpoint.load or '').rstrip('/')}/".startswith(f"{to}/")

    def _id(self) -> str:
        """Return the id that marks this run's uploads. A run that continues from its destination takes the id there."""
        path = self.folder.upload_id_file
        own = path.read_text(encoding="ascii").strip() if path.exists() else None
        places = [Place(to) for to in self._to.values() if to and protocol_of(to) != HUB and self._loads_from(to)]
        theirs = [text.strip() for text in (place.read_text(_OWNER) for place in places) if text]
        run_id = (theirs or [own or secrets.token_hex(8)])[0]
        if run_id != own:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, run_id + "\n")
        return run_id


def upload_folder(folder: Path, url: str, *, verify: bool = False) -> Uploaded:
    """Upload one folder to a given URL: a folder in a bucket or another file system, or hf://owner/name@revision.

    Raises:
        UserError: the URL or the folder is unusable, or the destination cannot be written.
    """
    is_hub = protocol_of(url) == HUB
    where, _, revision = url.partition("@") if is_hub else (url, "", "")
    problem = upload_rules.url_problem(where)
    if problem is None and is_hub and not revision:
        problem = f"{url} names no revision; give one, as hf://owner/name@main"
    if problem is None and is_hub and verify:
        problem = "a hub compares SHA-256 itself; leave --verify out"
    if problem is not None:
        raise UserError(f"--to: {problem}")
    if is_hub:
        return Repository(where).upload(folder, revision)
    return upload(folder, Place(url), verify=verify)


def describe(target: str, uploaded: Uploaded, seconds: float) -> str:
    """Describe an upload in one line."""
    sent = "nothing new" if uploaded.sent_files == 0 else f"{format_bytes(uploaded.sent_bytes)} sent"
    took = format_duration(seconds)
    return f"uploaded {target}: {plural(uploaded.files, 'file')}, {format_bytes(uploaded.bytes)}, {sent} in {took}"


def _claim_place(place: Place, run_id: str) -> None:
    owner = (place.read_text(_OWNER) or "").strip()  # empty: the disk was full when it was written
    if owner and owner != run_id:
        folders = place.folders()
        if not folders:
            raise UserError(
                f"{place.url} is another run's, which has uploaded nothing yet: give this run another name or, if the "
                f"other one is gone, remove {place.url}/{_OWNER}"
            )
        go_on = f", or continue from them with checkpoint.load={place.url}" if checkpoints.FOLDER in folders else ""
        raise UserError(f"{place.url} has the uploads of another run: give this run another name{go_on}")
    place.write_text(_OWNER, run_id + "\n")
