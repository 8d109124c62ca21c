"""A sweep's plan: its runs with their resolved configurations, and `sweep.yaml`, which holds it.

The plan is at the top of the sweep's folder, beside one folder for each run:

    runs/sweeps/NAME/
      sweep.yaml            this plan
      plan/RUN.yaml         each run's resolved configuration
      RUN/                  an ordinary run folder

For an archived sweep, all of these are in one file, `records.tar.xz` (`run_folder.archive`).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from plt_megatron.config import derived, yaml_nodes
from plt_megatron.config.loader import config_differences, load_config, setting
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.experiments import matching
from plt_megatron.experiments.files import FileOfRuns, SweepFile
from plt_megatron.predict.run_estimate import known_vocab_size
from plt_megatron.run_folder.archive import ARCHIVE, unpack_command, unpacked
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.run_folder.text import plural

FILE_NAME = "sweep.yaml"
CONFIGS = "plan"  # the folder of the runs' configurations


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        labels: axis -> the label of its value.
        change: what `match_budget` changed, in words; `deviation`: relative distance from the target.
        vocab: size of the tokenizer's vocabulary.
    """

    name: str
    labels: dict[str, str]
    seed: int
    config: RunConfig
    vocab: int
    change: str = ""
    deviation: float = 0.0

    @property
    def tokens(self) -> int:
        return derived.run_tokens(self.config)

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token."""
        return matching.flops_per_token(self.config, self.vocab)

    @property
    def total_flops(self) -> float:
        return self.tokens * self.flops_per_token

    @property
    def parameters(self) -> int:
        return matching.parameters(self.config, self.vocab).total

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without the embedding table and the output layer."""
        return matching.parameters(self.config, self.vocab).non_embedding

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)

    def row(self) -> str:
        """Return the run's label without its seed."""
        return ", ".join(self.labels.values()) or plural(self.config.model.loop_count, "loop")


@dataclass
class SweepPlan:
    """The plan of a sweep or study.

    Attributes:
        compare: the axis whose values are compared; `baseline`: the label of its reference.
        questions: text -> labels [value, reference] of that axis, for the report.
    """

    name: str
    folder: Path
    runs: list[PlannedRun]
    title: str = ""
    match_budget: str | None = None
    tolerance: float = 0.02
    compare: str | None = None
    baseline: str | None = None
    questions: dict[str, list[str]] = field(default_factory=dict)

    def group_of(self, run: PlannedRun) -> tuple[str, ...]:
        """Return the run's labels of all axes but the compared one; runs are compared within a group."""
        return tuple(label for axis, label in run.labels.items() if axis != self.compare)


def make_plan(sweep: SweepFile, check_files: bool = True, check_packages: bool | None = None) -> SweepPlan:
    """Plan every combination of the axes' values and the seeds, with the budget held equal. `check_files`,
    `check_packages`: as for `find_problems`.

    Raises `UserError`, one line per problem, if a run's settings are wrong or the target cannot be met.
    """
    compare = sweep.compared_axis()
    baseline = sweep.baseline or (compare.choices[0].label if compare else None)
    rows: dict[tuple[str, ...], RunConfig] = {}
    for choices in itertools.product(*(axis.choices for axis in sweep.axes.values())):
        overrides = [*sweep.overrides, *(override for choice in choices for override in choice.overrides)]
        config = load_config(sweep.base, [*overrides, setting("output_dir", sweep.folder)])
        rows[tuple(choice.label for choice in choices)] = config
    problems = _problems(rows, check_files, check_packages)
    if sweep.match_budget == "decode_latency" and sweep.decode.table is not None:
        problems += matching.table_problems(rows.values(), sweep.decode.table)
    if problems:
        raise UserError("\n".join(problems))
    runs: list[PlannedRun] = []
    for row, config in rows.items():
        labels = dict(zip(sweep.axes, row, strict=True))
        held = matching.MatchedConfig(config, 0.0)
        vocab = vocab_of(config, sweep)
        if sweep.match_budget is not None and compare is not None:
            reference = rows[tuple({**labels, compare.name: str(baseline)}.values())]
            vocabs = vocab, vocab_of(reference, sweep)
            try:
                held = matching.match_budget(
                    config, reference, sweep.match_budget, vocabs, sweep.decode, sweep.tolerance
                )
            except UserError as error:
                problems.append(f"{', '.join(row)}: {error}")
        runs += _seeded(held, labels, sweep.seeds, vocab)
    problems += [f"{run.name}: {p}" for run in runs for p in find_problems(run.config, check_files=False)]
    problems += name_clashes([(run.name, ", ".join(run.labels.values())) for run in runs])
    if problems:
        raise UserError("\n".join(problems))
    runs.sort(key=lambda run: sweep.seeds.index(run.seed))  # stable: every row with the first seed comes first
    return SweepPlan(
        name=sweep.name,
        folder=sweep.folder,
        runs=runs,
        title=sweep.title or sweep.name,
        match_budget=sweep.match_budget,
        tolerance=sweep.tolerance,
        compare=compare.name if compare else None,
        baseline=baseline,
        questions=sweep.questions,
    )


def _problems(rows: Mapping[tuple[str, ...], RunConfig], check_files: bool, check_packages: bool | None) -> list[str]:
    """List the problems of the rows' configurations before anything is held equal, each distinct problem once."""
    found: dict[str, list[str]] = {}
    for row, config in rows.items():
        named = dataclasses.replace(config, name="run")
        for problem in find_problems(named, check_files=check_files, check_packages=check_packages):
            found.setdefault(problem, []).append(", ".join(row))
        if not config.validation.iters or config.model.loop_count not in derived.validation_loop_counts(config):
            problem = "validation: runs are compared by it; measure at model.loop_count (iters, loop_counts)"
            found.setdefault(problem, []).append(", ".join(row))
    return [p if len(named) == len(rows) else f"{named[0]}: {p}" for p, named in found.items()]


def vocab_of(config: RunConfig, file: FileOfRuns) -> int:
    """Return the run's vocabulary size; the tokenizer of the file's own corpus may not be trained yet."""
    if config.model.vocab_size is None and file.demo_corpus is not None:
        return file.demo_corpus.vocab_size
    return known_vocab_size(config, lambda path: load_tokenizer(path).vocab_size)


def _seeded(
    held: matching.MatchedConfig, labels: dict[str, str], seeds: Sequence[int], vocab: int
) -> Iterator[PlannedRun]:
    for seed in seeds:
        name = "-".join([*(slug(label) for label in labels.values()), f"seed{seed}"])
        training = dataclasses.replace(held.config.training, seed=seed)
        config = dataclasses.replace(held.config, name=name, training=training)
        yield PlannedRun(name, labels, seed, config, vocab, held.change, held.deviation)


def name_clashes(runs: Iterable[tuple[str, str]]) -> list[str]:
    """Describe each pair of labels whose runs would share a folder, in one line. `runs`: name and labels of each."""
    found: dict[str, str] = {}
    clashes = []
    for name, label in runs:
        if found.setdefault(name, label) != label:
            clashes.append(f"{found[name]!r} and {label!r} would both be {name}: they must differ in letters or digits")
    return clashes


def slug(label: str) -> str:
    """Convert a label to a part of a folder's name: `+ KV sharing` to `kv_sharing`; `loop_count=2` stays."""
    return re.sub(r"[^a-z0-9=.-]+", "_", label.lower()).lstrip("._").rstrip("_") or "x"


# ---------------------------------------------------------------- sweep.yaml


def save_plan(plan: SweepPlan) -> None:
    """Write `sweep.yaml` and the runs' configurations. Raises `UserError` if that fails."""
    for run in plan.runs:
        save_config(run.config, config_path(plan, run))
    content = {
        **{name: getattr(plan, name) for name in ("name", "title", *_IDENTITY, "tolerance", "questions")},
        "runs": [
            {
                "name": run.name,
                "labels": run.labels,
                "seed": run.seed,
                "vocab_size": run.vocab,
                "tokens": run.tokens,
                "training_flops": run.total_flops,
                "parameters": run.parameters,
                "change": run.change,
                "deviation": run.deviation,
            }
            for run in plan.runs
        ],
    }
    write_text(plan.folder / FILE_NAME, yaml_nodes.dump(content))


def load_plan(folder: str | Path) -> SweepPlan:
    """Load the plan of the sweep in `folder`, with its runs where their records are (`records_of`).

    Raises `UserError` if there is no plan, or it is broken.
    """
    folder = Path(folder)
    path, records = folder / FILE_NAME, records_of(folder)
    try:
        content: Any = yaml_nodes.load((records / FILE_NAME).read_text(encoding="utf-8"))
        if "hold_equal" in content:  # its old name
            content["match_budget"] = content["hold_equal"]
        runs = [
            PlannedRun(
                config=_recorded_config(records, entry["name"]),
                vocab=entry["vocab_size"],
                **{name: entry[name] for name in ("name", "labels", "seed", "change", "deviation")},
            )
            for entry in content["runs"]
        ]
        values = {name: content[name] for name in ("name", "title", *_IDENTITY, "tolerance")}
        values["questions"] = content.get("questions", {})
    except OSError as error:
        inside = f", nor is what {ARCHIVE} has; if that is several: {unpack_command(folder)}"
        hint = inside if _is_archived(folder) else " (plt sweep)"
        raise UserError(f"{path}: {error.strerror}: {folder} is not a sweep{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a sweep's plan ({error!r}); was it edited?") from error
    return SweepPlan(folder=folder, runs=runs, **values)


def records_of(folder: Path) -> Path:
    """Return the folder of a sweep's plan and runs: its own or, if they are archived, a temporary copy to read from."""
    return unpacked(folder / ARCHIVE) if _is_archived(folder) else folder


def has_plan(folder: Path) -> bool:
    """Return whether there is a sweep or study in `folder`, archived or not."""
    return (records_of(folder) / FILE_NAME).exists()


def check_unpacked(folder: Path) -> None:
    """Raise `UserError` if a sweep is archived, so that nothing can be added to it."""
    if _is_archived(folder):
        raise UserError(
            f"{folder}: its runs are in {ARCHIVE}, which is never added to: unpack them there "
            f"({unpack_command(folder)}), or in another folder and set output_dir"
        )


def _is_archived(folder: Path) -> bool:
    return (folder / ARCHIVE).is_file() and not (folder / FILE_NAME).exists()


def config_path(plan: SweepPlan, run: PlannedRun) -> Path:
    return plan.folder / CONFIGS / f"{run.name}.yaml"


_IDENTITY = ("match_budget", "compare", "baseline")  # what two sweeps in one folder must agree on


def merge(plan: SweepPlan) -> SweepPlan:
    """Merge the plan with the one already in its folder.

    More seeds or more values of an axis extend a sweep. Raises `UserError` if the two contradict each other: something
    else is held equal, or a run of the same name has other settings.
    """
    if not has_plan(plan.folder):
        return plan
    old = load_plan(plan.folder)
    problems = [
        f"{name} was {getattr(old, name)!r} there, and is {getattr(plan, name)!r} now"
        for name in _IDENTITY
        if getattr(old, name) != getattr(plan, name)
    ]
    before, now = (" x ".join(x.runs[0].labels) for x in (old, plan))
    if before != now:
        problems.append(f"axes were {before or 'none'} there, and are {now or 'none'} now")
    known = {run.name: run for run in old.runs}
    for run in plan.runs:
        if run.name in known:
            differences = plan_differences(known[run.name].config, run.config)
            problems += [f"{run.name}: {text}" for text in differences.values()]
    refuse_other(plan.folder, "sweep", problems)
    names = {run.name for run in plan.runs}
    return dataclasses.replace(plan, runs=[*plan.runs, *(run for run in old.runs if run.name not in names)])


def refuse_other(folder: Path, what: str, problems: Sequence[str]) -> None:
    """Raise `UserError` if the folder's plan differs from this one."""
    if problems:
        raise UserError(
            f"{folder} holds another {what}: {'; '.join(problems[:4])}{' ...' if len(problems) > 4 else ''}. "
            f"To go on with it, give it its former settings, as in {folder / CONFIGS}; else give this one another name "
            "(name=...)"
        )


def plan_differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Return `config_differences` without the runs' folders."""
    return {key: text for key, text in config_differences(before, now).items() if key != "output_dir"}


def _recorded_config(folder: Path, name: str) -> RunConfig:
    """Load a run's configuration, with its run folder in `folder`: a sweep may have been moved."""
    path = folder / CONFIGS / f"{name}.yaml"
    if not path.exists():
        raise UserError(
            f"{path} is missing, although {FILE_NAME} names it: restore it, or remove {folder / FILE_NAME} and repeat "
            "the command that made it; finished runs are kept"
        )
    config = load_config(path, accept_old_names=True)
    return dataclasses.replace(config, output_dir=str(folder))
