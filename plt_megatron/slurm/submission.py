"""plt submit: from a configuration to a queued job, with all checks before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from plt_megatron.config.loader import setting
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.installation import is_checkout
from plt_megatron.launcher.job import JobSettings
from plt_megatron.predict.cards import find_gpu_spec
from plt_megatron.run_folder.files import LOCK, locked
from plt_megatron.run_folder.folder import RunFolder, load_run
from plt_megatron.run_folder.resuming import branch_config
from plt_megatron.run_folder.status import read_run_status
from plt_megatron.run_folder.text import format_table
from plt_megatron.slurm import arrays, checks, client, run_files
from plt_megatron.slurm.arrays import Member
from plt_megatron.slurm.profile import ClusterProfile, SbatchOptions, complete, load_profile
from plt_megatron.slurm.resources import Resources, parse_gpus, resolve
from plt_megatron.slurm.script import TEMPLATE, Array, Script
from plt_megatron.slurm.start_checks import data_problems, mount_problems, open_tokenizer, start_problems


@dataclass(frozen=True)
class Options(SbatchOptions):
    """Options of the command line. None: the cluster's profile decides, else Slurm."""

    config: str | None  # None with `array` and `branch_from`
    overrides: list[str] = field(default_factory=list)
    branch_from: str | None = None
    decay_steps: int | None = None
    cluster: str | None = None
    nodes: int = 1
    time: str | None = None
    gpus_per_node: str | None = None
    chain: int = 1
    requeue: bool = False
    signal_margin: int | None = None
    array: str | None = None
    max_concurrent: int | None = None
    name: str | None = None
    accept_changes: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Submission:
    """Submitted runs and their jobs."""

    runs: list[Path]  # absolute run folders
    job_ids: list[list[str]]  # of each run, in the order of `runs`; several in a chain


# Takes a valid configuration, its vocabulary size and the job's resources; returns one line per problem.
Check = Callable[[RunConfig, int, Resources], list[str]]


def submit(options: Options, root: Path, last_check: Check | None = None) -> Submission | None:
    """Check, write the run folders, submit, and print what was done. Return what was submitted; None after a dry run.
    Raises `UserError`, with one line per problem, if nothing was submitted.

    Args:
        root: the checkout whose code the job runs.
        last_check: called for each run that has no problem so far, since it is slow (a rehearsal takes a minute).
    """
    plan = _Plan(options, root, last_check)
    plan.check()
    plan.describe()
    if options.dry_run:
        print(f"\n{plan.job_script()}", end="")
        return None
    return plan.carry_out()


class _Plan:
    """A submission in progress."""

    def __init__(self, options: Options, root: Path, last_check: Check | None) -> None:
        _check_options(options)
        self.options, self.root, self.last_check = options, root, last_check
        profile = complete(load_profile(options.cluster) if options.cluster else ClusterProfile(), options)
        margin = options.signal_margin or profile.signal_margin_seconds
        self.profile = dataclasses.replace(profile, signal_margin_seconds=margin)
        self.limit = self.profile.limit_seconds(options.time)
        self.workdir = run_files.working_directory()
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.members: list[Member] = []
        self.array: Array | None = None

    # Checks.

    def check(self) -> None:
        """Find all problems and raise `UserError` if there are any."""
        options = self.options
        self.resources, self.problems = self._resources()
        self.notes += self.resources.notes
        configs = self._configs()
        runs = [run_files.absolute_run_folder(config) for config in configs]
        if options.array is not None:
            arrays.check_distinct(runs)
        for config, run in zip(configs, runs, strict=True):
            found = self._check_run(config, run)
            self.problems += [f"{config.name}: {line}" if options.array else line for line in found]
        if options.array is not None:
            self.problems += checks.storage_problems_of_all([(member.run, member.ahead) for member in self.members])
            self.array = arrays.plan_array(options.array, runs, options.name, options.max_concurrent, self._job_of)
        for run in runs:
            self._check_active(run)
        if self.problems:
            raise UserError("\n".join(dict.fromkeys(self.problems)))

    def _resources(self) -> tuple[Resources, list[str]]:
        available = None
        try:
            available = client.partitions()
        except client.SlurmError as error:
            if not self.options.dry_run:
                raise
            self.notes.append(f"partition and GPUs are not checked: {error}")
        gpus = parse_gpus(self.options.gpus_per_node) if self.options.gpus_per_node is not None else None
        return resolve(self.profile, available, nodes=self.options.nodes, seconds=self.limit, gpus=gpus)

    def _configs(self) -> list[RunConfig]:
        options = self.options
        if options.array is not None:
            return [load_run(path, options.overrides) for path in arrays.config_paths(options.array)]
        named = [setting("name", options.name)] if options.name else []
        settings = [*options.overrides, *named]
        if options.branch_from is not None:
            return [branch_config(options.branch_from, settings, options.decay_steps)]
        assert options.config is not None
        return [load_run(options.config, settings)]

    @cached_property
    def _jobs(self) -> list[client.Job]:
        try:
            return run_files.active_jobs()
        except client.SlurmError as error:
            self.problems.append(str(error))
            return []

    def _job_of(self, folder: Path) -> client.Job | None:
        return run_files.job_of(folder, lambda: self._jobs)

    def _check_run(self, config: RunConfig, run: Path) -> list[str]:
        """List the problems of one run; it becomes a member if its configuration is valid enough for a forecast."""
        world_size = None if self.resources.guessed else self.resources.world_size
        container, packages_are_here = self.profile.container, self.profile.packages_are_here
        have_te = None if packages_are_here else True
        capability = find_gpu_spec(self.resources.card).capability
        check = partial(find_problems, config, world_size=world_size, have_te=have_te, capability=capability)
        problems, sound = check(check_packages=packages_are_here), not check(check_files=False)
        broken = any("data.tokenizer: " in line for line in problems)
        tokenizer, found = (None, []) if broken else open_tokenizer(config)
        problems += found + data_problems(config, tokenizer)
        if container is not None:
            problems += mount_problems(config, container, [self.workdir, run.parent])
        vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
        if not sound:
            return problems
        problems += run_files.resume_problems(config, run, self.options.accept_changes)
        if not problems:
            problems += start_problems(config, tokenizer, vocab_size)
        if vocab_size is None or self.resources.guessed:
            return problems
        ahead = checks.forecast(config, run, self.resources, vocab_size, self.profile.tflops_per_process)
        problems += checks.memory_problems(ahead, self.resources) + checks.storage_problems(ahead, run)
        problems += _finished(run, ahead)
        margin, options = self.profile.signal_margin_seconds, self.options
        problems += checks.time_problems(config, ahead, self.limit, margin)
        warnings = checks.time_warnings(ahead, self.limit, margin, requeue=options.requeue, chain=options.chain)
        self.warnings += [f"{config.name}: {line}" if options.array else line for line in warnings]
        self.members.append(Member(config, run, self._settings(config, run), ahead))
        if self.last_check is not None and not problems:
            problems += self.last_check(config, vocab_size, self.resources)
        return problems

    def _settings(self, config: RunConfig, run: Path) -> JobSettings:
        name, cluster = run_files.job_name(run, config.name), self.profile.name or None
        own = {"requeue": self.options.requeue, "chain": self.options.chain, "cluster": cluster}
        return self.profile.job_settings(self.resources, name, self.limit, **own)

    def _check_active(self, run: Path) -> None:
        """Refuse a run that a job or plt train is training: both would overwrite each other's work."""
        job = self._job_of(run)
        if job is not None:
            problem = run_files.advice(run, job)
            if "_" not in job.id:  # jobs of the run's own script wait for one another
                problem += f"; to queue one more behind it: {RunFolder(run).resubmit}"
            self.problems.append(problem)
        if (run / LOCK).exists():  # plt train has been there
            try:
                with locked(run, "training"):
                    pass
            except UserError as error:
                self.problems.append(str(error))

    # Output.

    def describe(self) -> None:
        """Print a summary of the runs and their cost, with notes and warnings."""
        options, resources, first = self.options, self.resources, self.members[0]
        rows = [("job", checks.describe_job(resources, self.limit, options.chain, options.requeue, self.profile.name))]
        if self.array is None:
            rows += checks.describe_run(first.config, first.run, resources, first.ahead)
        else:
            rows += arrays.describe_array(self.array, self.members, resources)
        print(format_table(rows))
        for note in dict.fromkeys(self.notes):
            print(f"note: {note}")
        for warning in self.warnings:
            print(f"warning: {warning}")

    # Submitting.

    def job_script(self) -> str:
        """Render the script that is given to sbatch."""
        return self._script(self.members[0], self.array)

    def _script(self, member: Member, array: Array | None = None) -> str:
        folder = array.folder if array else member.run
        script = Script(member.settings, self.profile, folder, self.workdir, array, self.resources.gpu_type)
        return script.render((self.root / TEMPLATE).read_text(encoding="utf-8"))

    def carry_out(self) -> Submission:
        """Write the folders, submit, and print how to continue."""
        scripts = [self._script(member) for member in self.members]
        job_script = self.job_script()  # rendered before anything is written, since an invalid value raises
        code, runs = None, [member.run for member in self.members]
        # Until Slurm shows the job, only the lock tells another submission that the array's folder is in use.
        with locked(self.array.folder, "plt submit") if self.array is not None else contextlib.nullcontext():
            if self.array is not None:
                code = arrays.write_array(self.array, runs, job_script, self.root)
            for member, script in zip(self.members, scripts, strict=True):
                run_files.write_run(member.config, member.run, member.settings, script, root=self.root, code=code)
            submitted = self._submit_array(self.array) if self.array is not None else self._submit_chain()
        return Submission(runs, submitted)

    def _submit_chain(self) -> list[list[str]]:
        run, ids = self.members[0].run, []
        script = RunFolder(run).job_script
        for _ in range(self.options.chain):
            try:
                ids.append(client.submit(script))
            except client.SlurmError as error:
                if not ids:
                    raise UserError(f"{error} (the run folder is ready: {RunFolder(run).resubmit})") from error
                print(f"warning: only {len(ids)} of {self.options.chain} jobs were submitted: {error}")
                break
            run_files.record_submission(run, ids[-1])
        self._say_submitted(ids, run, RunFolder(run).logs / f"slurm-{ids[0]}.out", script)
        return [ids]

    def _submit_array(self, array: Array) -> list[list[str]]:
        folder = RunFolder(array.folder)
        job_id = client.submit(folder.job_script)
        ids = [f"{job_id}_{index}" for index in range(1, array.members + 1)]
        for member, member_id in zip(self.members, ids, strict=True):
            run_files.record_submission(member.run, member_id)
        self._say_submitted([job_id], array.folder.parent, folder.logs / f"slurm-{ids[0]}.out", folder.job_script)
        return [[member_id] for member_id in ids]

    def _say_submitted(self, ids: Sequence[str], watched: Path, log: Path, script: Path) -> None:
        status = f"python {shlex.quote(_shown(self.root / 'launch' / 'status.py'))}"
        stop = f"touch {shlex.quote(_shown(RunFolder(watched).stop_file))}   # saves and exits"
        rows = [
            ("submitted", f"job{'s' if len(ids) > 1 else ''} {' '.join(ids)}"),
            ("watch", f"{status if is_checkout(self.root) else 'plt status'} {shlex.quote(_shown(watched))}"),
            ("log", f"tail -F {shlex.quote(_shown(log))}"),
            ("stop", stop if not self.array else ""),
            ("cancel", f"scancel {' '.join(ids)}"),
            ("resubmit", f"sbatch {shlex.quote(_shown(script))}"),
        ]
        print("\n" + format_table([row for row in rows if row[1]]), flush=True)


def _check_options(options: Options) -> None:
    if options.array is not None and options.chain > 1:
        raise UserError(
            "--chain cannot be combined with --array: use --requeue, and each member continues until it is finished"
        )
    if options.array is None and options.max_concurrent is not None:
        raise UserError("--max-concurrent needs --array")
    if [options.config, options.branch_from, options.array].count(None) != 2:
        raise UserError("give a configuration, as in configs/runs, or --branch-from RUN@STEP, or --array with several")
    if options.branch_from is None and options.decay_steps is not None:
        raise UserError("--decay-steps needs --branch-from")


def _finished(run: Path, ahead: checks.Forecast) -> list[str]:
    if ahead.start_step < ahead.steps or not read_run_status(run).finished:
        return []
    return [f"{run} is finished: step {ahead.start_step:,} of {ahead.steps:,}; give another --name to run it again"]


def _shown(path: Path) -> str:
    """Return a path as one would type it in the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
