"""A configuration is refused before a process starts, in lines that name a setting and say what helps, or it trains.

Of each case many configurations are loaded and checked as they come, and one that is accepted is trained to its end by
the trainer, on real text.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from plt_megatron.commands.train import describe
from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import validate
from plt_megatron.errors import UserError
from plt_megatron.predict.run_estimate import estimate_run
from plt_megatron.run_folder.folder import save_config
from tests.distributed.training_jobs import train
from tests.fuzz import data, draw
from tests.fuzz.search import Kind

_VOCAB_SIZE = 380  # the tokenizer's
_WILD = 50  # configurations of a case that are checked only
_SECTIONS = ("model", "parallel", "data", "training", "optimizer", "validation", "checkpoint", "logging")
_SETTING = r"(?:[a-z_0-9]+\.)*[a-z_0-9]+=(?:\[[^\]]*\]|[^\s,;:()\[\]]+)"


class Refusals(Kind):
    """See the module's docstring."""

    name = "refusals"
    often = 3
    names = {key.rpartition(".")[2] for key, _ in draw.leaves()}

    def draw(self, seed: int, number: int) -> draw.Settings:
        words = f"{seed} {self.name}"
        for turn in range(_WILD):
            settings = draw.wild(words, number * _WILD + turn)
            try:
                wrong = self.refusal(settings)
            except Exception:
                return settings  # `check` raises it again
            if wrong is not None:
                return settings
        return draw.draw(words, number, self.fixed, lambda config: (), sections=_SECTIONS)

    def accepts(self, settings: draw.Settings) -> bool:
        return True

    def check(self, settings: draw.Settings) -> str | None:
        wrong = self.refusal(settings)
        if wrong is not None:
            return wrong or None  # an empty line is no problem
        config = draw.load(settings)
        if not draw.is_drawn(settings) or layout_of(config).world_size > draw.MOST_RANKS:
            return None  # it would take all memory, or all day
        folder = Path(tempfile.mkdtemp(dir=data.FOLDER))
        try:
            config = dataclasses.replace(config, output_dir=str(folder))
            ended = self.run(train, layout_of(config).world_size, config, timeout_s=300)
            return None if ended is True else f"does not finish: {ended}"
        finally:
            shutil.rmtree(folder)

    def refusal(self, settings: draw.Settings) -> str | None:
        """Say what is wrong with how it is refused; an empty string: nothing; None: it is not refused.

        What describes one that is not (`plt train --dry-run`, `plt estimate`, its config.yaml) must not fail either.
        """
        try:
            config = draw.load(settings)
            validate(config, check_files=False)
        except UserError as error:
            lines = str(error).splitlines()
            unclear = [line for line in lines if not self.names & set(draw.words(line))]
            if unclear:
                return f"is refused without the name of a setting: {unclear[0]}"
            vain = ((line, way) for line in lines for way in ways(line) if _core(line) in _refused(settings, way))
            return next((f"is refused after {' '.join(way)} as before: {line}" for line, way in vain), "")
        ranks = layout_of(config).world_size
        describe(config, ranks, 0, {}, [])
        estimate_run(config, world_size=ranks, vocab_size=config.model.vocab_size or _VOCAB_SIZE)
        folder = Path(tempfile.mkdtemp())
        try:
            save_config(config, folder / "config.yaml")
            return None if load_config(folder / "config.yaml") == config else "config.yaml: is read as another"
        finally:
            shutil.rmtree(folder)


def ways(line: str) -> Iterator[list[str]]:
    """Yield what a refusal says to set: the settings of each alternative that has nothing but settings."""
    for sentence in re.split(r"[;:,] (?:and |or )?set |, or | or (?:set )?", line)[1:]:
        if re.fullmatch(rf"{_SETTING}(?:(?:,| and|, and)? {_SETTING})*", sentence):
            yield re.findall(_SETTING, sentence)


def _refused(settings: draw.Settings, way: Sequence[str]) -> set[str]:
    try:
        validate(load_config(draw.TINY, [*draw.overrides(settings), *way]), check_files=False)
    except UserError as error:
        return {_core(line) for line in str(error).splitlines()}
    return set()


def _core(line: str) -> str:
    """A refusal without its place and numbers."""
    return re.sub(r"\d[\d,.]*", "#", re.sub(r"^\S+:\d+: ", "", line))
