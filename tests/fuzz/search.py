"""Runs cases one after another, and makes what it finds as short as it can."""

from __future__ import annotations

import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from tests.distributed.pool import DistributedFailure
from tests.fuzz import draw


class Kind:
    """A kind of case; `run` runs a function in a pool's processes.

    Attributes:
        fixed: settings that all its cases have.
        often: how often it has its turn.
        notes: what was seen that is no finding, and how often.
    """

    name: str
    fixed: Mapping[str, object] = {}
    often = 1

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.notes: dict[str, int] = {}

    def draw(self, seed: int, number: int) -> draw.Settings:
        """The settings of a case."""
        raise NotImplementedError

    def find_problems(self, config: RunConfig) -> Iterable[str]:
        """Say what is no case of this kind, one line each."""
        return ()

    def accepts(self, settings: draw.Settings) -> bool:
        """Tell whether `check` can be asked about them."""
        return not draw.refusals(settings, self.find_problems)

    def check(self, settings: draw.Settings) -> str | None:
        """Say what is wrong; None: nothing. Raises what the code under test does."""
        raise NotImplementedError

    def note(self, what: str, which: str) -> None:
        """Count something that is no finding."""
        print(f"{what}: {which}, in", file=sys.stderr, end=" ")
        self.notes[what] = self.notes.get(what, 0) + 1


@dataclass
class Finding:
    """A problem of a configuration, and the shortest of those that show the same."""

    case: str
    problem: str
    settings: draw.Settings
    shortest: draw.Settings = field(default_factory=dict)


def check(kind: Kind, settings: draw.Settings) -> str | None:
    """Check a case; errors are problems, too."""
    try:
        return kind.check(settings)
    except DistributedFailure as failure:
        known = str(failure).partition("\n--- the workers' output")[0]
        return f"failed: {_why(known)}\n{known}"
    except UserError as error:
        return f"was refused late: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"


def _why(failure: str) -> str:
    """The line of a job's failure that says most: its first error."""
    lines = [line for line in failure.splitlines() if re.match(r"[\w.]*(Error|Exception|Failed|Failure)\b", line)]
    return lines[0] if lines else failure.splitlines()[min(1, len(failure.splitlines()) - 1)]


def symptom(problem: str) -> str:
    """Reduce a problem to what findings of one cause have in common: an error's text without paths and numbers."""
    kind, _, text = problem.splitlines()[0].partition(": ")
    return kind + re.sub(r"\S*/\S*|[\d.]+|'[^']*'", "", text) if kind == "failed" else kind


def shortened(
    settings: draw.Settings, shows: Callable[[draw.Settings], bool], kept: Iterable[str], deadline: float
) -> draw.Settings:
    """The settings without those that the finding does not need: halves, quarters, single ones (ddmin), then pairs; and
    with smaller layouts. `deadline`: by `time.monotonic`."""
    kept = set(kept)
    parts = 2
    while time.monotonic() < deadline:
        droppable = [key for key in settings if key not in kept]
        if not droppable:
            break
        size = max(1, len(droppable) // parts)
        chunks = [droppable[start : start + size] for start in range(0, len(droppable), size)]
        for chunk in chunks:
            fewer = {key: value for key, value in settings.items() if key not in chunk}
            if time.monotonic() < deadline and shows(fewer):
                settings = fewer
                break
        else:
            if size == 1:
                break
            parts *= 2
            continue
        parts = max(2, parts - 1)
    for pair in itertools.combinations([key for key in settings if key not in kept], 2):  # one needs the other
        fewer = {key: value for key, value in settings.items() if key not in pair}
        if pair[0] in settings and pair[1] in settings and time.monotonic() < deadline and shows(fewer):
            settings = fewer
    for key in sorted(draw.SIZES & settings.keys()):
        if settings[key] > 2 and shows({**settings, key: 2}):
            settings = {**settings, key: 2}
    return settings


def find(kind: Kind, settings: draw.Settings, case: str, shrink_s: float = 300.0) -> Finding | None:
    """Check a case; what is wrong with it, shortened for so many seconds at most."""
    problem = check(kind, settings)
    if problem is None:
        return None

    def shows(fewer: draw.Settings) -> bool:
        found = check(kind, fewer) if kind.accepts(fewer) else None
        return found is not None and symptom(found) == symptom(problem)

    shortest = shortened(settings, shows, kind.fixed, time.monotonic() + shrink_s)
    return Finding(case, problem, settings, shortest)
