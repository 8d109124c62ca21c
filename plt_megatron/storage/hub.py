"""Upload models to a Hugging Face hub: one branch per revision, which gets its final name once it is complete."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.extras import require
from plt_megatron.run_folder.checkpoints import NAME
from plt_megatron.storage.copies import INDEX, Uploaded, files_in, index_of
from plt_megatron.storage.places import failing

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
        owner = self.owner()
        if owner not in (None, run_id):
            raise UserError(f"{self.url} has another run's exports in its branches: choose another repository")

    def owner(self) -> str | None:
        """Return the id of the run whose exports the branches hold; None if there is none."""
        with failing(f"{self.url} cannot be read"):
            steps = [name for name in self._branches() if NAME.fullmatch(name)]
            text = self._read(_OWNER, max(steps)) if steps else None
            return text.strip() if text else None

    def upload(self, folder: Path, revision: str, run_id: str | None = None) -> Uploaded:
        """Make the branch `revision` a copy of a folder; files that the hub already has are not sent again.

        `main`, which cannot be replaced, is written in place and keeps files that are not from an upload.

        Raises:
            UserError: the folder is empty, the branch belongs to someone else, or the hub refuses; the next attempt
                continues from there.
        """
        from huggingface_hub import CommitOperationAdd

        index = index_of(folder)
        with failing(f"{self.url}@{revision} cannot be written"):
            branches = self._branches()
            before = self._read(INDEX, revision) if revision in branches else None
            if before == index.text:
                return index.uploaded([])
            if revision in branches and revision != MAIN and before is None:
                raise UserError(f"{self.url} has a branch {revision} that is not an upload; give another revision")
            partial = MAIN if revision == MAIN else _PARTIAL + revision
            # A branch starts as a copy of main, none of which may stay; in main only an earlier upload is removed.
            stale = "*" if revision != MAIN else sorted(files_in(INDEX, before) - index.files.keys())
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
        from huggingface_hub.errors import EntryNotFoundError

        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self._api.hf_hub_download(self._name, name, revision=revision, local_dir=folder)
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8")
