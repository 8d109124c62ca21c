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

from plt_megatron.config.validation import package_problems
from plt_megatron.demo.steps import prepare_demo_corpus
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import StudyFile, read_study
from plt_megatron.experiments.law import what_is_missing
from plt_megatron.experiments.records import check_same_data, forget_failure, note_finished, state_of
from plt_megatron.experiments.solver import looped_variants, to_arrays
from plt_megatron.experiments.study.decision import contrast
from plt_megatron.experiments.study.design import Arm, Design, choose_runs, estimated_noise, expected_theta
from plt_megatron.experiments.study.grid import Grid, GridArm, is_ready, make_grid, seconds_of, source_of
from plt_megatron.experiments.study.knowledge import Knowledge, learn, priced_arms
from plt_megatron.experiments.study.report import write_report
from plt_megatron.experiments.sweep import RunOptions, card_of, check_run_files, dry_run, launch
from plt_megatron.experiments.sweep_plan import (
    PlannedRun,
    SweepPlan,
    check_unpacked,
    has_plan,
    load_plan,
    plan_differences,
    refuse_other,
    save_plan,
)
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.text import first_few, format_duration, format_table, plural


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

    Raises `UserError` if the study's file or a run's settings are wrong, or the folder holds another study.
    """
    study = read_study(path, settings)
    if not options.report_only:
        check_unpacked(study.folder)
    elif not has_plan(study.folder):
        raise UserError(f"{study.folder} has no study to report on: leave out --report to start it, or set output_dir")
    grid = make_grid(study)
    if not (options.dry_run or options.report_only):
        _check_packages(grid)
    with contextlib.nullcontext() if options.dry_run else locked(study.folder, "sweep or study"):
        if study.demo_corpus is not None and not (options.dry_run or options.report_only):
            prepare_demo_corpus(study.demo_corpus, is_read=has_plan(study.folder))
        return _Study(grid, options).run()


def _check_packages(grid: Grid) -> None:
    """Raise `UserError` if runs need packages that are not installed, before anything is made for them."""
    problems = dict.fromkeys(problem for arm in grid.arms for problem in package_problems(arm.config))
    if problems:
        raise UserError("\n".join(problems))


@dataclass
class _Study:
    grid: Grid
    options: StudyOptions
    failed: set[str] = field(default_factory=set)  # left out: failed, or not finished when this command ran them

    @property
    def study(self) -> StudyFile:
        return self.grid.study

    def run(self) -> int:
        plan, options = self._load_plan(), self.options
        if plan.runs and not (options.dry_run or options.report_only):
            save_plan(plan)  # with the study's present folder
            if options.retry_failed:
                for run in plan.runs:
                    if state_of(run) == "failed":
                        forget_failure(run)
        while True:
            if plan.runs and not options.report_only:
                status = self._finish(plan)
                if status is not None:
                    return status
            known = learn(self.grid, plan)
            ended = self._ended(plan, known)
            if plan.runs and not options.dry_run:
                self._report(plan, known, ended)
            if ended and options.dry_run:
                print(f"{ended}: there is nothing to run")
            if ended or options.report_only:
                break
            arms = priced_arms(self.grid, known.rates, card_of(options))
            design = self._design(plan, known, arms)
            number = _rounds(plan) + 1
            print(self._describe(design, arms, number, known), flush=True)
            if not design.chosen:
                print("the budget does not pay for another run")
                break
            runs = self.grid.planned(design.chosen, number, plan.runs)
            plan = dataclasses.replace(plan, runs=[*plan.runs, *runs])
            if options.dry_run:
                return self._dry_run(plan, runs)
            check_run_files([run for run in runs if run.config.checkpoint.load is None])
            save_plan(plan)
        return ExitStatus.FAILED if self.failed and not options.dry_run else ExitStatus.FINISHED

    # What is there.

    def _load_plan(self) -> SweepPlan:
        """Load the plan in the study's folder, or begin one. Raises `UserError` if the study's file gives other runs
        now."""
        study = self.study
        if not has_plan(study.folder):
            return SweepPlan(study.name, study.folder, [], study.title or study.name)
        plan, places, problems = load_plan(study.folder), self.grid.places(), []
        runs: list[PlannedRun] = []
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
            here = dataclasses.replace(run.config, checkpoint=own.config.checkpoint)
            runs.append(dataclasses.replace(run, config=here))
        refuse_other(plan.folder, "study", problems)
        return dataclasses.replace(plan, runs=runs, title=study.title or study.name)

    def _ended(self, plan: SweepPlan, known: Knowledge) -> str:
        """Return why the study has ended; empty if it needs another round."""
        if known.answer is not None and known.answer.decided:
            return "decided"
        if _rounds(plan) >= self.study.rounds:
            return f"not decided after {plural(_rounds(plan), 'round')}"
        return ""

    # A round.

    def _design(self, plan: SweepPlan, known: Knowledge, arms: Sequence[Arm]) -> Design:
        """Choose the next round's runs, with an equal share of the remaining budget for each remaining round."""
        places, spent = self.grid.places(), 0.0
        done: dict[int, list[float]] = {}
        closed: set[int] = set()
        used = {result.run.name for result in known.results if result.status == "used"}
        for run in plan.runs:
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
        horizons = self.grid.horizons
        return choose_runs(arms, horizons, theta, variants, left, noise=noise, done=done, closed=closed, contrasts=rows)

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

    def _describe(self, design: Design, arms: Sequence[GridArm], number: int, known: Knowledge) -> str:
        chosen: dict[int, list[float]] = {}
        for index, tokens in design.chosen:
            chosen.setdefault(index, []).append(tokens)
        rows = []
        for index, horizons in chosen.items():
            arm = arms[index]
            lengths = ", ".join(self.grid.run_name(index, t).rpartition("-")[2] for t in sorted(horizons))
            rows.append([arm.name, lengths, f"{arm.once + arm.looped:,.0f}", f"{1 / arm.seconds_per_token:,.0f}"])
        table = format_table(rows, header=["arm", "tokens", "non-embedding", "tokens/s"])
        runs = [*known.observations, *(arms[index].trained(tokens) for index, tokens in design.chosen)]
        lacks = what_is_missing(to_arrays(runs, looped_variants(runs)))
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

    def _dry_run(self, plan: SweepPlan, runs: Sequence[PlannedRun]) -> int:
        ready = [run for run in runs if is_ready(run)]
        return dry_run(plan, ready, self.options, makes_corpus=self.study.demo_corpus is not None)

    def _report(self, plan: SweepPlan, known: Knowledge, ended: str) -> None:
        page = write_report(self.grid, plan, known, ended)
        for problem in known.problems():
            print(f"note: {problem}")
        _name_failed(plan)
        print(known.answer.text if known.answer is not None else known.no_law)
        print(f"{f'{ended}; ' if ended else ''}report: {page}", flush=True)


def _rounds(plan: SweepPlan) -> int:
    return max((int(run.labels["round"]) for run in plan.runs), default=0)


def _name_failed(plan: SweepPlan) -> None:
    failed = [run.name for run in plan.runs if state_of(run) == "failed"]
    if failed:
        print(f"note: failed and left out: {first_few(failed)}; --retry-failed tries them again")
