"""lm-evaluation-harness on an exported model (the extra `eval`)."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError, first_line, is_away
from plt_megatron.run_folder.files import write_bytes, writing
from plt_megatron.run_folder.metrics import write_scores
from plt_megatron.run_folder.text import pipe_facts, plural
from plt_megatron.runtime.environment import FLASH_FIRST

_CARD, _HEADING = "README.md", "## Evaluation"


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    include_path: Path | None = None,
    *,
    limit: int | None = None,
    device: str = "cpu",
    download: bool = False,
    chat: bool = False,
) -> dict[str, float]:
    """Run tasks on an export. `keep` writes the scores to its folder.

    Args:
        folder: an export, with its tokenizer, in which `keep` can write.
        tasks: names that lm-evaluation-harness knows, or finds in `include_path`.
        include_path: a folder of task files.
        limit: rows of each task, at least one; None: all.
        download: download task data that the cache lacks from the Hugging Face hub; otherwise nothing is downloaded.
        chat: put prompts into the tokenizer's chat template.

    Returns:
        Scores by `task/metric`, including standard errors.

    Raises:
        UserError: no such tokenizer, chat template, task or device, a task is broken or its data is not on this
            machine, or the model cannot run a task.
    """
    # The packages read these when they are imported.
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "01"[not download])
    os.environ.setdefault(*FLASH_FIRST)
    _check_device(device)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: no permission to write scores there; evaluate a copy")
    from plt_megatron.hf.generation import random_states_kept

    harness, known = _harness(tasks, include_path)
    _load_data(known, tasks, download)
    model = _model(folder, device, chat)
    # Longer than the context, unsafe code, a package.
    errors: tuple[type[Exception], ...] = (AssertionError, ImportError, *_of_a_task())
    options = {"task_manager": known, "limit": limit, "apply_chat_template": chat, "log_samples": False}
    try:
        with random_states_kept():  # it seeds all of them
            found = harness.simple_evaluate(model=model, tasks=list(tasks), **options)
    except errors as error:
        print(file=sys.stderr)  # after a progress bar
        nameless = isinstance(error, AssertionError) and not str(error)
        reason = "a text is empty, or longer than the model's context" if nameless else _told(error)
        raise UserError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {reason}") from error
    return dict(_scores(found["results"]))


def weights_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and date of each file of an export's weights, which tell whether it is still the same model."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def check_same(folder: Path, weights: dict[str, tuple[int, int]]) -> None:
    """Raise `UserError` if a folder no longer has these weights, as where it was removed and exported again: it would
    get the scores of another model."""
    if weights_of(folder) != weights:
        raise UserError(f"{folder} was replaced or removed while it was evaluated: these scores are not kept there")


def keep(
    folder: Path, scores: Mapping[str, float], tasks: Sequence[str], *, limit: int | None = None, chat: bool = False
) -> None:
    """Write scores to an export's evaluation.json and model card, beside those of other tasks that ran on as many rows,
    in the same template. Raises `UserError` if they cannot be written."""
    with writing(folder), _alone_in(folder):
        kept = write_scores(folder, scores, tasks=tasks, limit=limit, chat=chat)
        _write_on_card(folder / _CARD, kept, limit, chat)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process writes scores to an export, in which no lock file is to remain."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system that locks no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _model(folder: Path, device: str, chat: bool) -> Any:
    """Load the export for lm-evaluation-harness, with our code instead of the folder's, which it would run."""
    from lm_eval.models.huggingface import HFLM

    from plt_megatron.hf.generation import check_chat_template, load_export
    from plt_megatron.hf.sources import first_end

    tokenizer, model = load_export(folder)
    if chat:
        check_chat_template(tokenizer, folder)
    # A text without a context is scored after the token that ends documents, which precedes texts in training; the
    # tokenizer's own end may be another. A <s> that the tokenizer does not put there itself was never seen.
    end = first_end(getattr(model.config, "eos_token_id", None))
    prefix = None if tokenizer("")["input_ids"] else tokenizer.eos_token_id if end is None else end
    options = {"backend": "causal", "batch_size": 8, "prefix_token_id": prefix, "softmax_dtype": "float32"}
    logger = logging.getLogger(HFLM.__module__)
    logger.disabled = True  # it warns about a model that is not a path
    try:
        return HFLM(pretrained=model.to(device), tokenizer=tokenizer, **options)
    finally:
        logger.disabled = False


def _check_device(device: str) -> None:
    """Raise `UserError` where lm-evaluation-harness would end with a traceback."""
    if device != "cpu":
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= count:
            raise UserError(f"--device {device}: torch finds {plural(count, 'GPU')} on this machine")


def _harness(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, Any]:
    """Return lm-evaluation-harness, and a task manager of it that knows these tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return lm_eval, own  # skips the files of lm-evaluation-harness's ten thousand tasks, which take seconds
    known = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in known.all_tasks]
    if unknown:
        where = "lm-evaluation-harness" + (f" or {include_path}" if include_path else "; give --include-path")
        raise UserError(f"there is no task {unknown[0]!r} in {where}")
    return lm_eval, known


def _load_data(known: Any, tasks: Sequence[str], download: bool) -> None:
    """Load the tasks' data before the model, which takes longer. Loading the data again is fast."""
    from huggingface_hub.errors import HTTPError  # of the client it was built on

    errors: tuple[type[Exception], ...] = (RuntimeError, ImportError, OSError, HTTPError, *_of_a_task())
    for task in tasks:
        try:
            known.load([task])
        except errors as error:
            if not _is_remote(error):
                raise UserError(f"the task {task} cannot be loaded: {_told(error)}{_cache_hint(error)}") from error
            message = f"the data of the task {task} is not on this machine: {first_line(error)}"
            if not download:
                message += "; nothing was downloaded: fill the cache (HF_HOME) on a machine with network access, with "
                message += f"plt evaluate --tasks {task} --download"
            raise UserError(message) from error


def _cache_hint(error: Exception) -> str:
    """What to do if the error is that of the libraries' cache, which cannot be written, and not the task's."""
    from datasets.config import HF_DATASETS_CACHE

    file, cache = str(getattr(error, "filename", None) or "\0"), str(HF_DATASETS_CACHE)
    return ": set HF_HOME to a folder that can be written" if cache.startswith(file) or file.startswith(cache) else ""


def _of_a_task() -> tuple[type[Exception], ...]:
    """The errors of what a task's file says or its data lacks: a template, a field, a split, a metric, a filter."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    return ArithmeticError, DatasetsError, LookupError, TemplateError, TypeError, ValueError, re.error


def _is_remote(error: Exception) -> bool:
    """Return whether the data is on a server, neither cached nor, with --download, within reach."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HTTPError

    if isinstance(error, HTTPError | DatasetNotFoundError) or is_away(error):
        return True
    return (isinstance(error, FileNotFoundError) and "://" in str(error)) or "Couldn't find cache" in str(error)


def _told(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == (None,):
        return "it has a metric that lm-evaluation-harness does not know"
    clear = isinstance(error, AssertionError | ImportError | OSError | RuntimeError | ValueError)
    return first_line(error) if clear else f"{type(error).__name__}: {first_line(error)}"


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield (`task/metric`, score); lm-evaluation-harness calls them `metric,filter`."""
    for task, values in results.items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, int | float):
                yield f"{task}/{metric}" + ("" if filtered == "none" else f" ({filtered})"), float(value)


def _write_on_card(card: Path, scores: Mapping[str, float], limit: int | None, chat: bool) -> None:
    """Write the scores to the card as a section that replaces an earlier one."""
    facts = [(name, f"{value:.4f}") for name, value in scores.items()]
    facts += [("rows of each task", str(limit))] if limit else []
    facts += [("asked in", "the chat template")] if chat else []
    section = f"{_HEADING}\n\nlm-evaluation-harness:\n\n{pipe_facts(facts)}\n"
    text = card.read_text(encoding="utf-8", errors="surrogateescape") if card.is_file() else ""  # keeps all bytes
    text = re.sub(rf"\n*^{_HEADING}\n.*?(?=^## |\Z)", "\n\n", text, flags=re.MULTILINE | re.DOTALL).rstrip()
    write_bytes(card, (f"{text}\n\n{section}" if text else section).encode(errors="surrogateescape"))
