"""The sweep command: plan, say what will be done, do it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.experiments.demo_data import prepare_demo_corpus
from plt_megatron.experiments.running import RunOptions, launch, submit_dry
from plt_megatron.experiments.sweep_file import SweepFile, read_sweep
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, check_unpacked, make_plan, merge, save_plan
from plt_megatron.experiments.sweep_status import (
    State,
    check_same_data,
    measured_flops_rate,
    note_finished,
    remaining_seconds,
    remaining_tokens,
    state_of,
)
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.text import format_duration, format_table, plural
from plt_megatron.slurm.profile import ClusterProfile, load_profile
from plt_megatron.slurm.submission import Options


def run_sweep(path: str, settings: Sequence[str], options: RunOptions) -> int:
    """Print the plan, then run or submit the unfinished runs.

    Returns the exit status: 0 done (or submitted, or a dry run), 1 a run failed, 75 stopped, the running ones saved.
    Raises `UserError` for what is wrong with the sweep, before anything runs.
    """
    sweep = read_sweep(path, settings)
    check_unpacked(sweep.folder)
    makes_data = sweep.demo_corpus is not None
    plan = make_plan(
        sweep,
        sweep.demo_corpus.vocab_size if sweep.demo_corpus else None,
        check_files=not options.dry_run and not makes_data,
    )
    asked = [run.name for run in plan.runs]
    with locked(plan.folder, "sweep or study") if not options.dry_run else contextlib.nullcontext():
        plan = merge(plan)
        states = {run.name: state_of(run) for run in plan.runs}
        todo = [run for run in plan.runs if run.name in asked and states[run.name] != "finished"]
        print(describe(plan, states))
        print(describe_time(plan, todo, sweep, options), flush=True)
        if options.dry_run:
            return _dry_run(plan, todo, sweep, options)
        finished = [run for run in plan.runs if states[run.name] == "finished"]
        note_finished(finished)
        if todo and sweep.demo_corpus is not None:
            prepare_demo_corpus(sweep.demo_corpus)
        check_run_files(todo)
        check_same_data(todo, finished)
        save_plan(plan)
        return _start(plan, todo, options)


def check_run_files(runs: Sequence[PlannedRun]) -> None:
    """Raise `UserError` for missing files, each named once. A sweep's own corpus is made after the plan."""
    problems = _problems(runs)
    if problems:
        raise UserError("\n".join(problems))


def _problems(runs: Sequence[PlannedRun]) -> list[str]:
    """What keeps runs from starting on this machine, each once."""
    return list(dict.fromkeys(problem for run in runs for problem in find_problems(run.config)))


def _dry_run(plan: SweepPlan, todo: Sequence[PlannedRun], sweep: SweepFile, options: RunOptions) -> int:
    """After the plan, print what this machine lacks for a real run, or if nothing, do the cluster's checks."""
    problems = _problems(todo)
    for problem in problems if sweep.demo_corpus is None else []:
        print(f"note: {problem}")
    if options.submit is not None and todo:
        if problems:
            print("note: the job can be checked once the data is there")
        else:
            submit_dry(plan, todo, options.submit)
    return 0


def _start(plan: SweepPlan, todo: list[PlannedRun], options: RunOptions) -> int:
    report = f"report: plt report {plan.folder}"
    if not todo:
        print(f"every run is finished; {report}")
        return ExitStatus.FINISHED
    launched = launch(plan, todo, options)
    if launched is None:
        print(f"{plural(len(todo), 'run')} submitted; {report}")
        return ExitStatus.FINISHED
    status, local = launched
    counts = [f"{list(local.outcome.values()).count(state)} {state}" for state in ("finished", "failed", "interrupted")]
    waiting = f", {len(local.waiting)} not started" if local.waiting else ""
    print(f"{', '.join(counts)}{waiting}; the same command continues the unfinished runs; {report}")
    return status


# ---------------------------------------------------------------- what the user reads


def describe(plan: SweepPlan, states: dict[str, State]) -> str:
    """The plan as a table: one line for each row, its seeds together."""
    header = ["row", "runs", "done", "tokens", "training FLOPs", "parameters", "non-embedding"]
    if plan.match_budget:
        header.append(f"held: {plan.match_budget}")
    table = []
    rows: dict[str, list[PlannedRun]] = {}
    for run in plan.runs:
        rows.setdefault(run.row(), []).append(run)
    for label, runs in rows.items():
        first = runs[0]
        cells = [label, str(len(runs)), str(sum(states[run.name] == "finished" for run in runs))]
        cells += [f"{first.tokens:,}", f"{first.total_flops:.3g}", f"{first.parameters:,}"]
        cells.append(f"{first.non_embedding_parameters:,}")
        if plan.match_budget:
            cells.append(f"{first.deviation:+.2%}" + (f" ({first.change})" if first.change else ""))
        table.append(cells)
    return f"{plan.title or plan.name}: {plan.folder}\n{format_table(table, header=header)}"


def describe_time(plan: SweepPlan, todo: Sequence[PlannedRun], sweep: SweepFile, options: RunOptions) -> str:
    """One line: what is left to do, and how long it will take."""
    tokens = sum(remaining_tokens(run) for run in todo)
    flops = sum(remaining_tokens(run) * run.flops_per_token for run in todo)
    seeds = ", ".join(map(str, sweep.seeds))
    line = (
        f"{len(todo)} of {len(plan.runs)} runs to do (seeds {seeds}): {tokens:,} tokens, {flops:.3g} training FLOPs; "
    )
    if not todo:
        return line + "nothing"
    rate = measured_flops_rate(plan.runs) if options.submit is None else None
    if rate is None:
        return line + _paper_time(todo, options)
    seconds = remaining_seconds(todo, rate, options.jobs)
    return line + f"about {format_duration(seconds)} at the {rate / 1e9:.0f} GFLOP/s a run that runs here reached"


def _paper_time(todo: Sequence[PlannedRun], options: RunOptions) -> str:
    """An estimate before anything is measured. Finished parts of runs are not subtracted."""
    from plt_megatron.predict.run_estimate import estimate_run

    gpu = options.gpu or ("cpu" if options.submit is None else _card_of(options.submit))
    if gpu is None:
        return "on a cluster without GPUs, for which plt submit alone estimates times"
    estimates = [estimate_run(run.config, gpu=gpu, vocab_size=run.vocab) for run in todo]
    if options.submit is not None:
        hours = sum(estimate.gpu_hours for estimate in estimates)
        longest = max(estimate.total_seconds for estimate in estimates)
        kind = "process" if gpu == "cpu" else "GPU"
        return f"on paper {hours:,.1f} {kind} hours on {gpu}, the longest run {format_duration(longest)}"
    seconds = sum(estimate.total_seconds for estimate in estimates) / options.jobs
    means = "one core at its nominal rate a run" if gpu == "cpu" else gpu
    return f"on paper {format_duration(seconds)} ({means}; estimated from measured speed once a run has begun)"


def _card_of(submit: Options) -> str | None:
    """The card of a cluster's profile, as far as that names one; None: the runs get no GPUs."""
    profile = load_profile(submit.cluster) if submit.cluster else ClusterProfile()
    if submit.gpus_per_node is None and (profile.gpus_per_node == 0 or profile.processes_per_node):
        return None
    return profile.gpu or "h100"
