"""A run in legs, stopped, killed and rolled back, in one layout or several, is the run that nothing disturbed.

Bit for bit where its legs have its layout, else to what other sums of the same numbers can do.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.run_folder.checkpoints import checkpoint_folders, step_of
from plt_megatron.run_folder.folder import RunFolder
from tests.distributed.pool import DistributedFailure
from tests.distributed.whole_runs import folder, numbers
from tests.fuzz import data, draw
from tests.fuzz.parity import find_problems as parity_problems
from tests.fuzz.search import Kind

STEPS = 8
TOLERANCE = 2e-4  # of another layout, after so many steps
ROUNDING = 0.2  # of it, by which layouts that nothing disturbs may differ
_SECTIONS = ("model", "parallel", "data", "training", "optimizer", "validation", "checkpoint", "logging")
_LEG, _BAD = "leg.", "bad."  # settings of a case that are none of a configuration
_LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"data_parallel_size": 2},
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
)
# What a run that fails says of its last checkpoint.
_SAVED = re.compile(r"The last checkpoint is intact: \S+|There is no checkpoint yet")
_NUMBER = re.compile(r"\d+\.\d+(e[+-]?\d+)?")
_HOW = ("stop", "stop", "kill", "kill while saving", "kill after saving")


class Case(NamedTuple):
    """The parts of a case's settings: the configuration's, its legs, and what its losses are.

    `bad`: `nonfinite` and `spikes` are the samples whose steps are bad; `planned`: only the run's schedules move its
    other losses, and none of those steps may be refused.
    """

    settings: draw.Settings
    legs: list[dict[str, Any]]
    bad: dict[str, Any]


def parts(settings: draw.Settings) -> Case:
    own = {key: value for key, value in settings.items() if not key.startswith((_LEG, _BAD))}
    legs = [settings[key] for key in sorted(settings) if key.startswith(_LEG)]
    samples = {name: settings.get(_BAD + name, []) for name in ("nonfinite", "spikes")}
    return Case(own, legs, {**samples, "planned": settings.get(_BAD + "planned", False)})


def find_problems(config: RunConfig) -> Iterator[str]:
    """Say what is no case of this kind, one line each."""
    yield from parity_problems(config)
    if not config.checkpoint.enabled:
        yield "checkpoint.enabled=false: nothing resumes"
    if layout_of(config).world_size > 4:
        yield " and ".join(sorted(draw.SIZES)) + ": too many processes"


class Resume(Kind):
    """See the module's docstring."""

    name = "resume"

    def draw(self, seed: int, number: int) -> draw.Settings:
        for turn in itertools.count():
            title = f"{seed} {self.name} {turn}"
            settings = draw.draw(title, number, self.fixed, find_problems, sections=_SECTIONS)
            if "training.train_tokens" not in settings:
                settings["training.train_iters"] = STEPS
            settings |= _draw_course(random.Random(f"{title} {number} legs"), draw.load(settings))
            if self.accepts(settings):
                break
        return settings

    def accepts(self, settings: draw.Settings) -> bool:
        case = parts(settings)
        if draw.refusals(case.settings, find_problems):
            return False
        config = draw.load(case.settings)
        legs = [_of_leg(config, leg) for leg in case.legs]
        if any(draw.problems(leg, find_problems) for leg in legs):
            return False
        if config.training.precision == "bf16" and any(leg.parallel != config.parallel for leg in legs):
            return False  # another order of sums is another number
        return not _rolls_back(config, case) or all(_stops_at_a_save(config, leg) for leg in case.legs)

    def check(self, settings: draw.Settings) -> str | None:
        case = parts(settings)
        place = Path(tempfile.mkdtemp(dir=data.FOLDER))
        try:
            config = dataclasses.replace(draw.load(case.settings), output_dir=str(place))
            whole, disturbed = (dataclasses.replace(config, name=name) for name in ("whole", "disturbed"))
            expected, refused = self._leg(whole, None, case.bad)
            wrong = _of_a_whole_run(whole, expected, refused)
            if wrong is not None:
                return wrong
            ended = self._in_legs(disturbed, case)
            exact = all(_of_leg(config, leg).parallel == config.parallel for leg in case.legs)
            if not _same_end(ended, expected, exact):
                return f"ends otherwise: {ended}\nand undisturbed: {expected}"
            wrong = _difference(disturbed, whole, 0.0 if exact else TOLERANCE)
            if wrong is None or exact or self._differs_by_layout(whole, case) is None:
                return wrong
            self.note("the layout of a leg alone moves it", wrong)
            return None
        finally:
            shutil.rmtree(place)

    def _differs_by_layout(self, whole: RunConfig, case: Case) -> str | None:
        """Where the undisturbed run in a leg's layout is another, by a part of what is allowed: rounding grows."""
        for number, leg in enumerate(case.legs):
            other = dataclasses.replace(_of_leg(whole, leg), name=f"layout_{number}")
            if other.parallel != whole.parallel:
                self._leg(other, None, case.bad)
                differs = _difference(other, whole, TOLERANCE * ROUNDING)
                if differs is not None:
                    return differs
        return None

    def _in_legs(self, config: RunConfig, case: Case) -> bool | str:
        for leg in case.legs:
            try:
                ended, _ = self._leg(_of_leg(config, leg), leg, case.bad)
            except DistributedFailure as failure:
                if leg["how"].startswith("kill") and "died, exit code -9" in str(failure):
                    continue
                raise
            if isinstance(ended, str):
                return ended
        return self._leg(config, None, case.bad)[0]

    def _leg(self, config: RunConfig, leg: Any, bad: Any) -> tuple[bool | str, int]:
        return self.run(run_leg, layout_of(config).world_size, config, leg, bad, timeout_s=600)


def run_leg(config: RunConfig, leg: Any, bad: Any) -> tuple[bool | str, int]:
    """`resume_job.run_leg`; this process does not import torch."""
    from tests.fuzz import resume_job

    return resume_job.run_leg(config, leg, bad)


# ---------------------------------------------------------------- what happens to it


def _draw_course(rng: random.Random, config: RunConfig) -> draw.Settings:
    """One to three legs, and sometimes bad steps."""
    legs, other = rng.choice((1, 2, 2, 3)), rng.random() < 0.4
    course: draw.Settings = {}
    steps = sorted(rng.choices(range(1, STEPS), k=legs))
    for number, step in enumerate(steps):
        leg = {"how": rng.choice(_HOW), "step": step, "rank": rng.randrange(8)}
        if other and rng.random() < 0.7:
            leg["layout"] = rng.choice(_LAYOUTS)
        course[f"{_LEG}{number}"] = leg
    samples = range(config.training.global_batch_size, STEPS * config.training.global_batch_size)
    for name in ("nonfinite", "spikes"):
        if rng.random() < 0.4:
            course[_BAD + name] = sorted(rng.sample(samples, rng.choice((1, 2))))
    return course | (_draw_planned_changes(rng) if rng.random() < 0.4 else {})


def _draw_planned_changes(rng: random.Random) -> draw.Settings:
    """A guard that looks for spikes, and schedules that it must not take for some."""
    schedules = ("data.stages", "data.length_schedule", "training.batch_schedule", "training.loop_schedule")
    settings = {key: rng.choice(draw.SCALED[key]) for key in rng.sample(schedules, rng.choice((1, 1, 2)))}
    window, action = rng.choice((4, 8)), rng.choice(("skip", "rollback"))
    return {**settings, "training.spikes.window": window, "training.spikes.action": action, _BAD + "planned": True}


def _of_leg(config: RunConfig, leg: Mapping[str, Any]) -> RunConfig:
    """The configuration of a leg: of another layout, if it has one."""
    if "layout" not in leg:
        return config
    names = [*(key.partition(".")[2] for key in draw.SIZES), "sequence_parallel"]
    one_process = {name: getattr(ParallelConfig(), name) for name in names} | {"data_parallel_size": 1}
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **one_process | leg["layout"]))


def _rolls_back(config: RunConfig, case: Case) -> bool:
    training = config.training
    spikes = training.spikes is not None and training.spikes.action == "rollback"
    return bool(case.bad["nonfinite"] and training.on_nonfinite == "rollback") or spikes


def _stops_at_a_save(config: RunConfig, leg: Mapping[str, Any]) -> bool:
    """Else a run that is rolled back has a later checkpoint than the undisturbed one."""
    interval = config.checkpoint.save_interval
    return leg["how"] != "stop" or (interval > 0 and leg["step"] % interval == 0)


# ---------------------------------------------------------------- what is compared


def _of_a_whole_run(config: RunConfig, ended: bool | str, refused: int) -> str | None:
    """Say what an undisturbed run lacks, whatever it is compared with."""
    found = RunFolder(folder(config))
    if found.bad_steps() != refused:
        return f"{refused} steps were not accepted: {found.bad_steps()} reports"
    if config.checkpoint.exports is not None:
        interval = config.checkpoint.exports.interval
        last = max([record["step"] for record in numbers(config)], default=0)
        due = {*range(interval, last + 1, interval), *([last] if ended is True else [])}
        missing = sorted(due - {int(name[5:]) for name in _exports(config)})
        if missing:
            return f"exports are missing: of steps {missing}"
        waiting = checkpoint_folders(found.exporting)
        if ended is True and waiting:
            return f"is finished, and exports wait: {waiting}"
    return None


def _same_end(ended: bool | str, expected: bool | str, exact: bool) -> bool:
    """Messages name folders, and the last checkpoint: a run that was stopped may have saved one more. In another layout
    their numbers are a little other ones, which incidents have too."""
    if isinstance(ended, str) and isinstance(expected, str):
        texts = [_SAVED.sub("", text.replace("/disturbed/", "/whole/")) for text in (ended, expected)]
        return len({text if exact else _NUMBER.sub("", text) for text in texts}) == 1
    return ended == expected


def _difference(config: RunConfig, whole: RunConfig, tolerance: float) -> str | None:
    """Where two runs differ by more; None: nowhere."""
    exact = tolerance == 0
    wrong = (
        _first_difference(_records(config, exact), _records(whole, exact), tolerance, "records")
        or _first_difference(_incidents(config, exact), _incidents(whole, exact), tolerance, "incidents")
        or _other_tensors(config, whole, tolerance)
        or _first_difference(_exports(config), _exports(whole), tolerance, "exports")
    )
    return wrong and f"is not the undisturbed run: {wrong}"


def _records(config: RunConfig, exact: bool) -> list[dict[str, Any]]:
    """Without what is measured over a rank's first microbatch, unless all have the same."""
    return [
        {name: value for name, value in record.items() if exact or not isinstance(value, list)}
        for record in numbers(config)
    ]


def _incidents(config: RunConfig, exact: bool) -> dict[str, Any]:
    """The reports by their files' names; without the ranks' microbatches, unless all have the same."""
    reports = {path.name: json.loads(path.read_text()) for path in RunFolder(folder(config)).incidents.glob("step_*")}
    for report in reports.values() if not exact else ():
        del report["microbatches"], report["problem"]  # a text with numbers
    return reports


def _exports(config: RunConfig) -> list[str]:
    """Those that are made, and those that a run which failed leaves to the job that goes on with it."""
    found = RunFolder(folder(config))
    made = [path.name for path in found.exports.glob("step_*")]
    return sorted({*made, *(path.name for path in checkpoint_folders(found.exporting))})


def _other_tensors(config: RunConfig, whole: RunConfig, tolerance: float) -> str | None:
    """Compare the undisturbed run's last checkpoint: weights, the optimizer's and the moving average.

    A run that fails may have saved a later one where it was stopped, and keeps so many.
    """
    from plt_megatron.train.checkpoint.reading import read_weights

    theirs_at, ours_at = (RunFolder(folder(run)).latest_checkpoint(verify=False) for run in (whole, config))
    if theirs_at is None:
        return None
    if ours_at is None or step_of(ours_at) < step_of(theirs_at):
        return f"the last checkpoint is {ours_at}, undisturbed {theirs_at}"
    ours_at = ours_at.with_name(theirs_at.name)
    if not ours_at.is_dir():
        return None
    for part in ("weights", "main weights", *(["ema"] if whole.training.ema_decay is not None else [])):
        ours, theirs = (dict(read_weights(at, verify=False, part=part)) for at in (ours_at, theirs_at))
        if ours.keys() != theirs.keys():
            return f"{part}: other names"
        for name, tensor in theirs.items():
            off = float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12))
            if not off <= tolerance:
                return f"{part} {name} are off by {off:.1e}"
    return None


def _first_difference(ours: Any, theirs: Any, tolerance: float, at: str) -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"{at}: {sorted(ours)}, undisturbed {sorted(theirs)}"
        pairs: list[tuple[Any, Any, Any]] = [(name, ours[name], theirs[name]) for name in theirs]
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"{at}: {len(ours)}, undisturbed {len(theirs)}"
        pairs = [(index, *pair) for index, pair in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(ours, float) and isinstance(theirs, float):
        close = math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance * 1e-2)
        return None if close or (ours != ours and theirs != theirs) else f"{at}: {ours}, undisturbed {theirs}"
    else:
        return None if ours == theirs else f"{at}: {ours}, undisturbed {theirs}"
    return next(filter(None, (_first_difference(*pair, tolerance, f"{at}[{name}]") for name, *pair in pairs)), None)
