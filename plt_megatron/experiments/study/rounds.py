"""The study command: rounds of runs, each chosen by what is known, until the decision is made or the budget spent.

A study keeps its whole state in its plan and its runs' folders, so that the same command continues after a kill
anywhere: it finishes runs, evaluates them, and starts the next round.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from plt_megatron.demo.steps import prepare_demo_corpus
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import StudyFile, read_study
from plt_megatron.experiments.law import what_is_missing
from plt_megatron.experiments.records import (
    check_same_data,
    first_few,
    note_finished,
    read_record,
    state_of,
    write_record,
)
from plt_megatron.experiments.solver import Observation, looped_variants, to_arrays
from plt_megatron.experiments.study.decision import contrast
from plt_megatron.experiments.study.design import (
    Arm,
    Design,
    choose_runs,
    estimated_noise,
    expected_theta,
)
from plt_megatron.experiments.study.grid import Grid, make_grid, source_of
from plt_megatron.experiments.study.knowledge import Knowledge, is_ready, learn, priced_arms, seconds_of
from plt_megatron.experiments.study.report import write_report
from plt_megatron.experiments.sweep import RunOptions, check_run_files, launch, submit_dry
from plt_megatron.experiments.sweep_plan import (
    FILE_NAME,
    PlannedRun,
    SweepPlan,
    check_unpacked,
    load_plan,
    plan_differences,
    records_of,
    refuse_other,
    save_plan,
)
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import ExitStatus, last_attempt
from plt_megatron.run_folder.files import locked, writing
from plt_megatron.run_folder.text import format_duration, format_table, plural


@dataclass(frozen=True)
class StudyOptions(RunOptions):
    """Options of the command line besides the study's file and its settings.

    Attributes:
        retry_failed: retry failed runs; else they are left out.
        report_only: report on existing runs, and run nothing.
    """

    retry_failed: bool = False
    report_only: bool = False


def run_study(path: str, settings: Sequence[str], options: StudyOptions) -> int:
    """Run a study, or continue it.

    Returns the exit status: 0 decided, the budget spent, or submitted; 1 runs failed; 75 stopped, with the running ones
    saved.

    Raises:
        UserError: the study's file or a run's settings are wrong, or the folder holds another study.
    """
    study = read_study(path, settings)
    if not options.report_only:
        check_unpacked(study.folder)
    elif not _has_plan(study):
        raise UserError(f"{study.folder} has no study to report on: leave out --report to start it, or set output_dir")
    vocab = study.demo_corpus.vocab_size if study.demo_corpus else None
    grid = make_grid(study, vocab, check_files=False)
    with contextlib.nullcontext() if options.dry_run else locked(study.folder, "sweep or study"):
        if study.demo_corpus is not None and not (options.dry_run or options.report_only):
            prepare_demo_corpus(study.demo_corpus)
        return _Study(grid, options).run()


@dataclass
class _Study:
    grid: Grid
    options: StudyOptions
    failed: set[str] = field(default_factory=set)  # left out: failed, or not finished when this command ran them

    @property
    def study(self) -> StudyFile:
        return self.grid.study

    def run(self) -> int:
        plan = self._load_plan()
        if plan is not None and not (self.options.dry_run or self.options.report_only):
            save_plan(plan)  # with the study's present folder
            if self.options.retry_failed:
                _forget_failures(plan)
        while True:
            if plan is not None and not self.options.report_only:
                status = self._finish(plan)
                if status is not None:
                    return status
            known = learn(self.grid, plan)
            ended = self._ended(plan, known)
            if plan is not None and not self.options.dry_run:
                self._report(plan, known, ended)
            if ended and self.options.dry_run:
                print(f"{ended}: there is nothing to run")
            if ended or self.options.report_only:
                return self._status()
            arms = priced_arms(self.grid, known.rates, self._gpu())
            design = self._design(plan, known, arms)
            number = _rounds(plan) + 1
            print(self._describe(design, arms, number, known), flush=True)
            if not design.chosen:
                print("the budget does not pay for another run")
                return self._status()
            before = plan.runs if plan is not None else []
            runs = self.grid.planned(design.chosen, number, before)
            plan = SweepPlan(self.study.name, self.study.folder, [*before, *runs], self.study.title or self.study.name)
            if self.options.dry_run:
                return self._dry_run(plan, runs)
            check_run_files([run for run in runs if run.config.checkpoint.load is None])
            save_plan(plan)

    def _status(self) -> int:
        return ExitStatus.FAILED if self.failed and not self.options.dry_run else ExitStatus.FINISHED

    def _gpu(self) -> str | None:
        return self.options.gpu or ("h100" if self.options.submit is not None else None)

    # What is there.

    def _load_plan(self) -> SweepPlan | None:
        """Load the plan in the study's folder, if any. Raises `UserError` if the study's file gives other runs now."""
        if not _has_plan(self.study):
            return None
        plan, places, problems = _here(load_plan(self.study.folder)), self.grid.places(), []
        again: list[PlannedRun] = []
        for run in plan.runs:
            if run.name not in places:
                problems.append(f"{run.name} is no longer one of its runs")
                continue
            (own,) = self.grid.planned([places[run.name]], int(run.labels["round"]), again)
            again.append(own)
            changes = plan_differences(run.config, own.config)
            changes.pop("checkpoint.load", None)  # a study may have been moved
            problems += [f"{run.name}: {text}" for text in changes.values()]
        refuse_other(plan.folder, "study", problems)
        return plan

    def _ended(self, plan: SweepPlan | None, known: Knowledge) -> str:
        """Return why the study has ended; empty if it needs another round."""
        if known.answer is not None and known.answer.decided:
            return "decided"
        if plan is not None and _rounds(plan) >= self.study.rounds:
            return f"not decided after {plural(_rounds(plan), 'round')}"
        return ""

    # A round.

    def _design(self, plan: SweepPlan | None, known: Knowledge, arms: Sequence[Arm]) -> Design:
        """Choose the next round's runs, with an equal share of the remaining budget for each remaining round."""
        places, spent = self.grid.places(), 0.0
        done: dict[int, list[float]] = {}
        closed: set[int] = set()
        used = {result.run.name for result in known.results if result.status == "used"}
        for run in plan.runs if plan is not None else []:
            arm, tokens = places[run.name]
            spent += seconds_of(run, arms[arm])
            if run.name in used:
                done.setdefault(arm, []).append(tokens)
            else:
                closed.add(arm)  # an arm with a failed run is not tried for longer
        left = max(0.0, 3600 * float(self.study.budget) - spent) / (self.study.rounds - _rounds(plan))
        variants = list(self.study.variants)
        theta, noise, rows = self._believed(known, arms), self.study.noise, None
        if known.fit is not None:
            noise = estimated_noise(known.fit)
            if known.answer is not None and list(known.fit.data.variants) == variants:
                rows = contrast(known.fit, known.answer)
        return choose_runs(
            arms,
            self.grid.horizons,
            theta,
            variants,
            left,
            noise=noise,
            done=done,
            closed=closed,
            contrasts=rows,
        )

    def _believed(self, known: Knowledge, arms: Sequence[Arm]) -> np.ndarray:
        """Return theta of the law, as far as it is known."""
        variants = list(self.study.variants)
        theta = expected_theta([arm.looped for arm in arms], self.grid.horizons.tokens, len(variants))
        if known.fit is not None:
            theta[:5] = np.maximum(known.fit.theta[:5], 1e-3)
            for place, name in enumerate(variants):
                if name in known.fit.data.variants:
                    theta[5 + place] = known.fit.theta[known.fit.phi_column(name)]
        return theta

    def _finish(self, plan: SweepPlan) -> int | None:
        """Run unfinished runs, trunks before their branches; return an exit status if the command ends here."""
        while True:
            states = {run.name: state_of(run) for run in plan.runs}
            if not self.options.retry_failed:
                self.failed |= {name for name, state in states.items() if state == "failed"}
            finished = [run for run in plan.runs if states[run.name] == "finished"]
            rest = [run for run in plan.runs if states[run.name] != "finished" and run.name not in self.failed]
            todo = [run for run in rest if is_ready(run)]
            if self.failed and (self.options.dry_run or (self.options.submit is not None and todo)):
                _name_failed(plan)  # otherwise the report does
            if not todo:
                if not self.options.dry_run:
                    note_finished(finished)
                return None
            check_same_data(todo, finished)
            if self.options.dry_run:
                print(self._describe_rest(plan, rest), flush=True)
                return self._dry_run(plan, todo)
            launched = launch(plan, todo, self.options)
            if launched is None:
                print(f"{plural(len(todo), 'run')} submitted; when they have ended, the same command continues")
                return ExitStatus.FINISHED
            status, local = launched
            if status == ExitStatus.PREEMPTED:
                print("stopped; the same command continues")
                return ExitStatus.PREEMPTED
            self.failed |= {name for name, status in local.outcome.items() if status != "finished"}

    # What the user reads.

    def _describe(self, design: Design, arms: Sequence[Arm], number: int, known: Knowledge) -> str:
        chosen: dict[int, list[float]] = {}
        for index, tokens in design.chosen:
            chosen.setdefault(index, []).append(tokens)
        rows = []
        for index, horizons in chosen.items():
            arm, own = arms[index], self.grid.arms[index]
            lengths = ", ".join(self.grid.run_name(index, t).rpartition("-")[2] for t in sorted(horizons))
            rows.append([own.name, lengths, f"{arm.once + arm.looped:,.0f}", f"{1 / arm.seconds_per_token:,.0f}"])
        table = format_table(rows, header=["arm", "tokens", "non-embedding", "tokens/s"])
        lacks = self._lacks(design, known)
        return (
            f"round {number} of at most {self.study.rounds}: {plural(len(design.chosen), 'run')}, "
            f"{format_duration(design.seconds)} of training\n{table}\n"
            f"{f'this budget does not determine a law: {lacks}' if lacks else design.in_words()}"
        )

    def _describe_rest(self, plan: SweepPlan, rest: Sequence[PlannedRun]) -> str:
        """Describe what is left of the rounds so far: runs that can start, and those that wait for them."""
        coming: dict[str, list[str]] = {}
        names: set[str] = set()
        for run in rest:  # a trunk is before its branches
            if is_ready(run) or source_of(run) in names:
                names.add(run.name)
                arm, _, tokens = run.name.rpartition("-")
                coming.setdefault(arm, []).append(tokens)
        rows = [[arm, ", ".join(tokens)] for arm, tokens in coming.items()]
        return (
            f"round {_rounds(plan)} of at most {self.study.rounds}, left to run: {len(names)} of "
            f"{plural(len(plan.runs), 'run')}\n{format_table(rows, header=['arm', 'tokens'])}"
        )

    def _lacks(self, design: Design, known: Knowledge) -> str | None:
        """Describe what the law will lack even after the chosen runs; None: nothing."""
        coming = [
            Observation(arm.variant, arm.once, arm.looped, arm.loops, tokens, 1.0, f"{index}", arm.seed)
            for index, tokens in design.chosen
            for arm in [self.grid.arms[index].arm]
        ]
        seen = [*known.observations, *coming]
        data = to_arrays(seen, looped_variants(seen))
        return what_is_missing(data, np.arange(len(data.variants)))

    def _dry_run(self, plan: SweepPlan, runs: Sequence[PlannedRun]) -> int:
        ready = [run for run in runs if is_ready(run)]
        if self.options.submit is not None and ready:
            submit_dry(plan, ready, self.options.submit)
        return ExitStatus.FINISHED

    def _report(self, plan: SweepPlan, known: Knowledge, ended: str) -> None:
        page = write_report(self.grid, plan, known, ended)
        for problem in known.problems():
            print(f"note: {problem}")
        _name_failed(plan)
        print(known.answer.text if known.answer is not None else known.no_law)
        print(f"{f'{ended}; ' if ended else ''}report: {page}", flush=True)


def _has_plan(study: StudyFile) -> bool:
    return (records_of(study.folder) / FILE_NAME).exists()


def _rounds(plan: SweepPlan | None) -> int:
    return max((int(run.labels["round"]) for run in plan.runs), default=0) if plan is not None else 0


def _here(plan: SweepPlan) -> SweepPlan:
    """Return the plan with branches' start checkpoints in its present folder: a study may have been moved."""

    def moved(run: PlannedRun) -> PlannedRun:
        load = run.config.checkpoint.load
        if load is None:
            return run
        here = str(plan.folder.joinpath(*load.split("/")[-3:]))
        checkpoint = dataclasses.replace(run.config.checkpoint, load=here)
        return dataclasses.replace(run, config=dataclasses.replace(run.config, checkpoint=checkpoint))

    return dataclasses.replace(plan, runs=[moved(run) for run in plan.runs])


def _forget_failures(plan: SweepPlan) -> None:
    """Turn failed runs into interrupted ones, which are resumed. A job's reason is moved to where its next attempt
    would put it."""
    for run in plan.runs:
        folder = run.folder
        if state_of(run) != "failed":
            continue
        if folder.why_file.is_file():
            with writing(folder.logs):
                folder.logs.mkdir(exist_ok=True)
                folder.why_file.replace(folder.logs / f"why-before-attempt-{last_attempt(folder.attempts()) + 1}.txt")
        if folder.attempts_file.is_file():
            json_lines.append(folder.attempts_file, {"event": "again"})
        record = read_record(folder)
        if record is not None and record.status == "failed":
            record.status, record.reason = "interrupted", ""
            write_record(folder, record)


def _name_failed(plan: SweepPlan) -> None:
    failed = [run.name for run in plan.runs if state_of(run) == "failed"]
    if failed:
        print(f"note: failed and left out: {first_few(failed)}; --retry-failed tries them again")
