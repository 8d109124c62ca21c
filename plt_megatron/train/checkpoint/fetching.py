"""Fetches the checkpoint that a run starts from, if it is not on this machine, into the run's folder.

The ranks share the files. A download that was cut short goes on: what has arrived and is right is not fetched again.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_text
from plt_megatron.storage.copies import Index, download_part, find_checkpoint, finish_download, read_manifest
from plt_megatron.storage.places import Place
from plt_megatron.train.checkpoint.collective import any_rank, describe, first_of_all_ranks, on_rank_0

_SOURCE = "source"  # a file with the URL
_TURN_S = 0.2


def fetch_checkpoint(url: str, directory: Path, beat: Callable[[], None]) -> Path:
    """The checkpoint that `url` means, in `directory`, which all ranks share. Collective.

    Args:
        url: of a checkpoint, or of a run's folder or a folder of checkpoints for the last complete one.
        directory: for this checkpoint alone; what it has of another one is removed.
        beat: called while files arrive.

    Raises:
        UserError: on all ranks. There is no complete checkpoint, or it could not be read.
    """
    at, index, folder, there = on_rank_0(partial(_begin, url, directory))
    if there:
        return folder
    part = folder.with_suffix(".tmp")
    problem = _in_turns(partial(_fetch, at, index, part), beat)
    if problem is not None:
        raise UserError(problem)
    on_rank_0(partial(finish_download, index, part, folder))
    return folder


def _begin(url: str, directory: Path) -> tuple[str, Index, Path, bool]:
    """The checkpoint's URL, its index, its folder here, and whether that is complete."""
    place = find_checkpoint(url)
    folder, source = directory / place.url.rpartition("/")[2], directory / _SOURCE
    if not source.is_file() or source.read_text(encoding="utf-8").strip() != place.url:
        shutil.rmtree(directory, ignore_errors=True)
        write_text(source, place.url + "\n")
    index = read_manifest(place)
    there = folder.is_dir() and (folder / index.name).read_text(encoding="utf-8") == index.text
    if not there:
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before it was trained again
        folder.with_suffix(".tmp").mkdir(exist_ok=True)
    return place.url, index, folder, there


def _fetch(url: str, index: Index, folder: Path) -> None:
    download_part(Place(url), index, folder, dist.get_rank(), dist.get_world_size())


def _in_turns(work: Callable[[], None], beat: Callable[[], None]) -> str | None:
    """Work in a thread, however long it takes; the first rank's problem with it. Collective."""
    problems: list[str] = []

    def try_it() -> None:
        try:
            work()
        except Exception as error:  # the other ranks must hear of it, whatever it is
            problems.append(describe(error))

    thread = threading.Thread(target=try_it, name="download", daemon=True)
    thread.start()
    while any_rank(thread.is_alive()):
        beat()
        time.sleep(_TURN_S)  # in all ranks alike, whether theirs is done or not
    return first_of_all_ranks(problems[0] if problems else None)
