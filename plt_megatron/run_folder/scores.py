"""The scores of an evaluated export, in a file of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_json

# {"tasks": [...], "limit": rows or null, "chat_template": whether it was used, "scores": {"task/metric": ...}}
SCORES = "evaluation.json"


def write_scores(
    folder: Path, scores: Mapping[str, float], *, tasks: Sequence[str], limit: int | None, chat: bool = False
) -> None:
    """Keep the scores of an export. `limit`: rows of each task; None: all. `chat`: asked in its chat template."""
    how = {"tasks": list(tasks), "limit": limit, "chat_template": chat}
    write_json(folder / SCORES, {**how, "scores": dict(scores)})


def read_scores(folder: Path) -> dict[str, float]:
    """The scores of an export by `task/metric`. Raises `UserError` if they are missing or broken."""
    try:
        return dict(json.loads((folder / SCORES).read_text(encoding="utf-8"))["scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SCORES}: not an evaluation's scores ({error})") from error
