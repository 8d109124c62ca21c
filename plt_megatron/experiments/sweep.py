"""The sweep command, which runs a sweep or study on this machine, or on Slurm as one job array.

On this machine, several runs may run at a time, and are stopped cleanly. Each run is `plt train` on its resolved
configuration, in its own process group, with its output in `train.log` in its folder. If a run fails, this is noted and
the others continue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from plt_megatron.config.layout import layout_of
from plt_megatron.config.validation import find_problems
from plt_megatron.demo.steps import prepare_demo_corpus
from plt_megatron.errors import UserError, go_on_without_readers
from plt_megatron.experiments.files import SweepFile, read_sweep
from plt_megatron.experiments.records import (
    RunRecord,
    State,
    check_same_data,
    data_fingerprint,
    failure_of,
    forget_failure,
    forget_note_of_failure,
    measured_flops_rate,
    note_finished,
    read_record,
    remaining_seconds,
    remaining_tokens,
    state_of,
    write_record,
)
from plt_megatron.experiments.sweep_plan import (
    PlannedRun,
    SweepPlan,
    check_unpacked,
    config_path,
    has_plan,
    make_plan,
    merge,
    save_plan,
)
from plt_megatron.installation import ROOT, own_python, python_path
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import ExitStatus, describe_exit
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.text import first_few, format_duration, format_table, plural
from plt_megatron.runtime.local_processes import die_with_parent, local_gpus, signals_handled, threads_per_process
from plt_megatron.slurm import resources, submission
from plt_megatron.slurm.profile import ClusterProfile, load_profile

LIST = "array.txt"
TRAIN = (*own_python(), "-m", "plt_megatron", "train")
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line for whether and where to run.

    Attributes:
        submit: submit to Slurm with these options; None: run on this machine.
        jobs: number of runs at a time on this machine.
        gpu: card to estimate times for; None: on a cluster its profile's, else h100; here one core of this machine's
            CPU.
    """

    dry_run: bool = False
    submit: submission.Options | None = None
    jobs: int = 1
    gpu: str | None = None


def launch(plan: SweepPlan, todo: Sequence[PlannedRun], options: RunOptions) -> tuple[int, LocalSweep] | None:
    """Run `todo` here and return the exit status and the sweep with its outcomes; None if submitted to Slurm.

    Raises `UserError` like `submit` and `LocalSweep`.
    """
    if options.submit is not None:
        submit(plan, todo, options.submit)
        for run in todo:  # from now on its job says how it ended
            forget_note_of_failure(run)
        return None
    local = LocalSweep(plan, todo, options.jobs)
    return local.run(), local


def check_jobs(runs: Sequence[PlannedRun], jobs: int) -> None:
    """Raise `UserError` if one of several runs at a time has several processes."""
    large = [run.name for run in runs if layout_of(run.config).world_size > 1]
    if jobs > 1 and large:
        raise UserError(f"--jobs {jobs} needs runs of one process each; {large[0]} has more: use --jobs 1")


@dataclass
class _Running:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    started: float
    record: RunRecord
    gpu: str | None
    log_start: int = 0  # size of its log before it


class LocalSweep:
    """Runs `runs` of a saved plan here, in this order, `jobs` at a time: several only of one process each."""

    def __init__(self, plan: SweepPlan, runs: Sequence[PlannedRun], jobs: int = 1) -> None:
        check_jobs(runs, jobs)
        self.plan = plan
        self.jobs = jobs
        self.waiting = list(runs)
        self.running: list[_Running] = []
        self.outcome: dict[str, str] = {}
        self._gpus = local_gpus() if jobs > 1 else []
        self._numbers = {run.name: number for number, run in enumerate(runs, start=1)}
        self._signals: list[int] = []
        self._reported = time.monotonic()

    def run(self) -> int:
        """Run all of them, or until asked to stop.

        Returns the exit status: 0 all finished, 75 stopped with the running ones saved, 1 some failed. A second SIGINT
        kills the running ones. After an error they are saved, too.
        """
        go_on_without_readers()  # as the runs do
        with signals_handled(_SIGNALS, self._hear):
            try:
                while self.running or (self.waiting and not self._signals):
                    self._start_some()
                    for item in [item for item in self.running if item.process.poll() is not None]:
                        self.running.remove(item)
                        self._note_end(item)
                    self._report()
                    if self._signals.count(signal.SIGINT) > 1:
                        break
                    time.sleep(_POLL_SECONDS)
            finally:
                self._end_all()
        if self._signals:
            return ExitStatus.PREEMPTED
        has_failed = any(status != "finished" for status in self.outcome.values())
        return ExitStatus.FAILED if has_failed else ExitStatus.FINISHED

    def _start_some(self) -> None:
        while self.waiting and len(self.running) < self.jobs and not self._signals:
            run = self.waiting[0]
            fingerprint = data_fingerprint(run)
            if self._signals:  # heard while the data were read
                return
            self.waiting.pop(0)
            if failure_of(run) is not None:  # here or in a job
                forget_failure(run)
            record = read_record(run.folder) or RunRecord()
            record.status, record.reason, record.exit_status = "started", "", None
            record.attempts += 1
            record.fingerprint = fingerprint
            _write_note(run, record)
            # One GPU each if several run at a time; all of them for a single run.
            gpu = min(self._gpus, key=[item.gpu for item in self.running].count, default=None)
            own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
            with run.folder.sweep_log.open("ab") as log:
                log_start = log.tell()
                process = subprocess.Popen(
                    [*TRAIN, str(config_path(self.plan, run))],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self._threads() | own | {"PYTHONPATH": python_path()},
                    process_group=0,
                    preexec_fn=die_with_parent,
                )
            self.running.append(_Running(run, process, time.monotonic(), record, gpu, log_start))
            if self._signals:  # heard before it was among the running
                process.send_signal(signal.SIGTERM)
            print(f"{self._place(run)} {run.name}: started, {run.tokens:,} tokens", flush=True)

    def _threads(self) -> dict[str, str]:
        """Return the setting of each run's share of the cores, unless the user has set the number of threads."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(threads_per_process(self.jobs))}

    def _note_end(self, item: _Running) -> None:
        run, record, status = item.run, item.record, item.process.returncode
        record.exit_status = status
        record.seconds += time.monotonic() - item.started
        record.status = {0: "finished", int(ExitStatus.PREEMPTED): "interrupted"}.get(status, "failed")
        if self._signals and (status < 0 or status > 128):
            record.status = "interrupted"  # stopped before its handlers were set, or killed by a second request
        if record.status == "finished" and state_of(run) != "finished":
            record.status, record.reason = "failed", "ended with status 0 before its last step was validated and saved"
        elif record.status == "failed":
            record.reason = _reason(run.folder.sweep_log, status, item.log_start)
        _write_note(run, record)
        self.outcome[run.name] = record.status
        detail = _final_loss(run) if record.status == "finished" else record.reason
        detail = f", {detail}" if detail else ""
        taken = format_duration(record.seconds)
        print(f"{self._place(run)} {run.name}: {record.status} after {taken}{detail}", flush=True)

    def _place(self, run: PlannedRun) -> str:
        return f"[{self._numbers[run.name]}/{len(self._numbers)}]"

    def _report(self) -> None:
        """Once a minute, print the progress of the running runs and the time left."""
        if time.monotonic() - self._reported < _REPORT_SECONDS or not self.running:
            return
        self._reported = time.monotonic()
        runs, left = [item.run for item in self.running], ""
        with contextlib.suppress(OSError, UserError):  # a disk that does not answer costs a line, not the sweep
            rate = measured_flops_rate(self.plan.runs)
            if rate:
                left = f"; about {format_duration(remaining_seconds([*runs, *self.waiting], rate, self.jobs))} left"
            print(f"      {', '.join(map(_progress, runs))}{left}", flush=True)

    # Being stopped.

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if len(self._signals) == 1:
            self._ask_to_save()
            with contextlib.suppress(OSError):  # nobody reads it; print is not safe in a signal handler
                os.write(2, b"stopping: waiting for the running runs to save; interrupt again to kill them\n")

    def _ask_to_save(self) -> None:
        for item in self.running:
            item.process.send_signal(signal.SIGTERM)

    def _end_all(self) -> None:
        """End what still runs: after an error save it, after a second SIGINT kill it."""
        if self.running and not self._signals:
            self._ask_to_save()
            self._signals.append(signal.SIGTERM)  # ours: a run without handlers yet is interrupted, not failed
        while self._signals.count(signal.SIGINT) < 2 and any(item.process.poll() is None for item in self.running):
            time.sleep(_POLL_SECONDS)
        for item in self.running:
            if item.process.poll() is None:
                os.killpg(item.process.pid, signal.SIGKILL)
                item.process.wait()
        for item in self.running:
            self._note_end(item)
        self.running = []


def _write_note(run: PlannedRun, record: RunRecord) -> None:
    """Write the sweep's note on a run, or warn: other runs are running."""
    try:
        write_record(run.folder, record)
    except OSError as error:
        print(f"warning: cannot write {run.folder.sweep_note}: {error.strerror or error}", flush=True)


def _progress(run: PlannedRun) -> str:
    train = run.folder.metrics().train
    if not train:
        return f"{run.name} begins"
    return f"{run.name} {train[-1]['tokens'] / run.tokens:.0%} (loss {train[-1]['loss']:.3f})"


def _final_loss(run: PlannedRun) -> str:
    own = run.folder.metrics().final_validation_losses().get(run.config.model.loop_count)
    return "" if own is None else f"validation loss {own:.4f}"


def _reason(log: Path, status: int, start: int) -> str:
    """Return how the run ended, with its own last error line, from byte `start` of the log on, if there is one."""
    lines = json_lines.tail(log, 20000, start).decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    how = describe_exit(status)
    if status == ExitStatus.USER_ERROR and not errors:
        how += " (a setting)"
    return f"{how}: {errors[-1].removeprefix('error: ')}" if errors else f"{how}; see {log}"


# ---------------------------------------------------------------- Slurm


def submit(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Submit `runs`; the list of their configurations is kept in the sweep's folder.

    Raises `UserError` if the submission is refused or fails.
    """
    listing = plan.folder / LIST
    listing.write_text("".join(f"{config_path(plan, run).resolve()}\n" for run in runs), encoding="utf-8")
    submission.submit(dataclasses.replace(options, config=None, array=str(listing), name=plan.name), ROOT)


def submit_dry(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Check `runs` as a submission does and show the job script; write and submit nothing.

    Raises `UserError` if the submission is refused.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-dry-run-") as folder:
        copy = dataclasses.replace(plan, folder=Path(folder), runs=list(runs))
        save_plan(copy)
        submit(copy, runs, dataclasses.replace(options, dry_run=True))


# ---------------------------------------------------------------- the command


def run_sweep(path: str, settings: Sequence[str], options: RunOptions) -> int:
    """Print the plan, then run or submit the unfinished runs.

    Returns the exit status: 0 done (or submitted, or a dry run), 1 a run failed, 75 stopped, with the running ones
    saved. Raises `UserError` for any mistake in the sweep, before anything runs.
    """
    sweep = read_sweep(path, settings)
    check_unpacked(sweep.folder)
    check_files = not options.dry_run and sweep.demo_corpus is None
    plan = make_plan(sweep, check_files=check_files, check_packages=not options.dry_run)
    asked = [run.name for run in plan.runs]
    with locked(plan.folder, "sweep or study") if not options.dry_run else contextlib.nullcontext():
        plan = merge(plan)
        states = {run.name: state_of(run) for run in plan.runs}
        todo = [run for run in plan.runs if run.name in asked and states[run.name] != "finished"]
        print(describe(plan, states))
        print(describe_time(plan, todo, sweep, options), flush=True)
        if options.dry_run:
            return dry_run(plan, todo, options, makes_corpus=sweep.demo_corpus is not None)
        finished = [run for run in plan.runs if states[run.name] == "finished"]
        note_finished(finished)
        if todo and sweep.demo_corpus is not None:
            prepare_demo_corpus(sweep.demo_corpus, is_read=has_plan(plan.folder))
        check_run_files(todo)
        check_same_data(todo, finished)
        save_plan(plan)
        others = [name for name, state in states.items() if name not in asked and state != "finished"]
        return _start(plan, todo, options, others)


def run_file_problems(runs: Sequence[PlannedRun], *, makes_files: bool = False) -> list[str]:
    """List the problems that keep runs from starting on this machine, each once: missing files, unless the files will
    be made, and packages."""
    found = (find_problems(run.config, check_files=not makes_files, check_packages=True) for run in runs)
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def check_run_files(runs: Sequence[PlannedRun]) -> None:
    """Raise `UserError` for `run_file_problems`. A sweep's own corpus is made after the plan."""
    problems = run_file_problems(runs)
    if problems:
        raise UserError("\n".join(problems))


def dry_run(plan: SweepPlan, todo: Sequence[PlannedRun], options: RunOptions, *, makes_corpus: bool) -> int:
    """After the plan, print what this machine lacks for a real run; if nothing, do the cluster's checks.

    `makes_corpus`: a real run makes the files that are missing.
    """
    if options.submit is None:
        check_jobs(todo, options.jobs)
    problems = run_file_problems(todo)
    for problem in run_file_problems(todo, makes_files=True) if makes_corpus else problems:
        print(f"note: {problem}")
    if options.submit is not None and todo:
        if problems:
            print("note: the job can be checked once the data is there")
        else:
            submit_dry(plan, todo, options.submit)
    return 0


def _start(plan: SweepPlan, todo: list[PlannedRun], options: RunOptions, unfinished: list[str]) -> int:
    report = f"report: plt report {plan.folder}"
    if not todo:
        others = f"every run asked for is finished; earlier calls also asked for {first_few(unfinished, 3)}"
        print(f"{others if unfinished else 'every run is finished'}; {report}")
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
    """Format the plan as a table with one line for each row, its seeds together."""
    header = ["row", "runs", "done", "tokens", "training FLOPs", "parameters", "non-embedding"]
    header += [f"held: {plan.match_budget}"] if plan.match_budget else []
    table = []
    rows: dict[str, list[PlannedRun]] = {}
    for run in plan.runs:
        rows.setdefault(run.row(), []).append(run)
    for label, runs in rows.items():
        first = runs[0]
        done = sum(states[run.name] == "finished" for run in runs)
        cells = [label, str(len(runs)), str(done), f"{first.tokens:,}", f"{first.total_flops:.3g}"]
        cells += [f"{first.parameters:,}", f"{first.non_embedding_parameters:,}"]
        change = f" ({first.change})" if first.change else ""
        cells += [f"{first.deviation:+.2%}{change}"] if plan.match_budget else []
        table.append(cells)
    return f"{plan.title or plan.name}: {plan.folder}\n{format_table(table, header=header)}"


def describe_time(plan: SweepPlan, todo: Sequence[PlannedRun], sweep: SweepFile, options: RunOptions) -> str:
    """Describe in one line what is left to do and how long it will take."""
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
    return line + f"about {format_duration(seconds)} at the {rate / 1e9:.0f} GFLOP/s per run of its earlier runs"


def _paper_time(todo: Sequence[PlannedRun], options: RunOptions) -> str:
    """Estimate the time before anything is measured. Finished parts of runs are not subtracted."""
    from plt_megatron.predict.run_estimate import estimate_run

    gpu = card_of(options)
    estimates = [estimate_run(run.config, gpu=gpu, vocab_size=run.vocab) for run in todo]
    if options.submit is not None:
        hours = sum(estimate.gpu_hours for estimate in estimates)
        longest = max(estimate.total_seconds for estimate in estimates)
        kind = "process" if gpu == "cpu" else "GPU"
        return f"estimated {hours:,.1f} {kind} hours on {gpu}, the longest run {format_duration(longest)}"
    seconds = sum(estimate.total_seconds for estimate in estimates) / options.jobs
    means = "one core per run at its nominal rate" if gpu == "cpu" else gpu
    return f"estimated {format_duration(seconds)} ({means}; from measured speed once a run has started)"


def card_of(options: RunOptions) -> str:
    """Return the card to estimate times for: the one given, the cluster's, or this machine's CPU."""
    if options.gpu is not None or options.submit is None:
        return options.gpu or "cpu"
    profile = load_profile(options.submit.cluster) if options.submit.cluster else ClusterProfile()
    kind, gpus = None, 0 if profile.gpus_per_node == 0 or profile.processes_per_node else 1
    if options.submit.gpus_per_node is not None:
        kind, gpus = resources.parse_gpus(options.submit.gpus_per_node)
    return resources.card(profile, gpus, [kind] if kind else [], [])
