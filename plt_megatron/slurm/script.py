"""Render a run's job.sbatch from slurm/job.sbatch, with values quoted so that user input never becomes code."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from plt_megatron.errors import UserError
from plt_megatron.launcher.job import COPY, JobSettings, fields_of
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.client import time_option
from plt_megatron.slurm.profile import ClusterProfile, Container, SbatchOptions
from plt_megatron.slurm.run_files import RUNS

TEMPLATE = Path("plt_megatron") / "slurm" / "job.sbatch"
_MARK = re.compile(r"#(?:SBATCH @DIRECTIVES|LEFTOVERS @LEFTOVERS|SETUP @SETUP|SCRATCH @SCRATCH)@|@[A-Z_]+@")
# How long srun waits for the other nodes' launchers once one has ended; a dead node's launcher never ends.
_WAIT_SECONDS = 60
_LEFTOVERS = """\
unset SLURM_STEP_NODELIST SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_GPU
unset SLURM_GPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_BIND SLURM_CLUSTERS
unset SLURM_GPUS SLURM_GPUS_PER_SOCKET SLURM_NTASKS_PER_SOCKET SLURM_NTASKS_PER_CORE SLURM_OVERCOMMIT
unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE SLURM_MEM_BIND SLURM_GPU_BIND
grep -qE '^#SBATCH --(hint|threads-per-core)' "$0" || unset SLURM_HINT SLURM_THREADS_PER_CORE"""
# What has a special meaning within double quotes: variables, which have a name, and single characters.
_SPECIAL = re.compile(r"""\$(?P<name>\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)|[\\"`$]""")


def expandable(text: str) -> str:
    """Quote `text` as one shell word in which only `$NAME` and `${NAME}` are expanded."""
    if not variables(text):
        return quote(text)
    return '"' + _SPECIAL.sub(lambda found: found[0] if found["name"] else "\\" + found[0], text) + '"'


def variables(text: str) -> list[str]:
    """Return the names that `expandable` expands in `text`, each once."""
    return list(dict.fromkeys(found["name"].strip("{}") for found in _SPECIAL.finditer(text) if found["name"]))


def directive(option: str, value: str | int | None = None) -> str:
    """Format an `#SBATCH` line. sbatch quotes like the shell, except that backslashes escape even within quotes. Raises
    `UserError` if such a line cannot contain the value."""
    if value is None:
        return f"#SBATCH {option}"
    check_one_line(str(value), option)
    if "\\" in str(value):
        raise UserError(f"{option}: a job script cannot contain a backslash, got {value}")
    return f"#SBATCH {option}={quote(str(value))}"


def check_one_line(text: str, what: str) -> None:
    """Raise `UserError` if `text` contains line breaks or other control characters."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UserError(f"{what} must not contain line breaks or control characters, got {text!r}")


def _export(name: str, value: str) -> list[str]:
    """Return lines that export a variable, and a copy of it for the launcher: an image's own value would replace the
    variable, and srun makes TMPDIR /tmp on a node where it cannot create the folder."""
    return [f"export {name}={expandable(value)}", f'export {COPY}{name}="${name}"']


@dataclass(frozen=True)
class Array:
    """A job array: line i of `folder`/runs.txt is the run folder of member i."""

    folder: Path  # absolute
    name: str  # the job's name
    members: int
    max_concurrent: int | None = None


@dataclass(frozen=True)
class Script:
    """Everything a job script depends on."""

    settings: JobSettings
    profile: ClusterProfile
    run: Path  # absolute; for an array, the array's folder
    workdir: Path  # absolute; the paths in a configuration are relative to it
    array: Array | None = None
    gpu_type: str | None = None  # as in --gpus-per-node=h100:8
    command: str = ""  # shell command that srun starts, for templates with @COMMAND@

    def render(self, template: str) -> str:
        """Render the job script from the text of slurm/job.sbatch or slurm/preprocess.sbatch. Raises `UserError` if it
        cannot contain one of the values."""
        for path in (self.run, self.workdir):
            check_one_line(str(path), "the path of the run folder and of the working directory")
        # A colon separates the paths of PYTHONPATH, which has the resolved one: processes would import other code.
        if ":" in f"{self.run}{os.path.realpath(self.run)}":
            raise UserError(f"{self.run}: the folder of a job cannot have a colon in its path")
        run = quote(str(self.run))
        if self.array is not None:
            run = f'"$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {quote(str(self.run / RUNS))})"'
        values = {
            "#SBATCH @DIRECTIVES@": "\n".join(self._directives()),
            "#LEFTOVERS @LEFTOVERS@": _LEFTOVERS,
            "#SETUP @SETUP@": "\n".join(self._setup()),
            "#SCRATCH @SCRATCH@": self._scratch(),
            "@RUN@": run,
            "@PYTHON@": quote(self.settings.python),
            "@HOST_PYTHON@": quote(sys.executable),  # outside any container
            "@SRUN_OPTIONS@": " ".join(self._srun_options()),
            "@CONTAINER@": " ".join(self._container_command()),
            "@COMMAND@": self.command,
        }
        # In one pass, so that values that look like marks are kept.
        return _MARK.sub(lambda match: values[match[0]], template)

    def _directives(self) -> list[str]:
        settings, profile, array = self.settings, self.profile, self.array
        pattern = "slurm-%A_%a.out" if array else "slurm-%j.out"
        values: dict[str, str | int | None] = {
            "--job-name": array.name if array else settings.job_name,
            **{f"--{name}": value for name, value in fields_of(SbatchOptions, profile).items()},
            "--mem": profile.memory_per_node,
            "--nodes": settings.nodes,
            "--ntasks-per-node": 1,
            "--cpus-per-task": settings.cpus_per_process * settings.processes_per_node,
            "--gpus-per-node": self._gpus(),
            "--time": time_option(settings.time_limit_seconds),
            "--signal": None if self.command else f"B:USR1@{settings.signal_margin_seconds}",
            "--open-mode": "append",
            "--output": f"{str(RunFolder(self.run).logs).replace('%', '%%')}/{pattern}",
            "--chdir": str(self.workdir),
        }
        if array is None:  # one job at a time may write into a run's folder
            values["--dependency"] = "singleton"
        else:
            values["--array"] = f"1-{array.members}" + (f"%{array.max_concurrent}" if array.max_concurrent else "")
        lines = [directive(option, value) for option, value in values.items() if value]
        lines.append(directive("--requeue" if settings.requeue else "--no-requeue"))
        for option in profile.sbatch_options:
            check_one_line(option, "sbatch_options")
            name, equals, value = option.partition("=")
            lines.append(directive(name, value if equals else None))
        return lines

    def _gpus(self) -> str | None:
        count = self.settings.gpus_per_node
        return (f"{self.gpu_type}:{count}" if self.gpu_type else str(count)) if count else None

    def _setup(self) -> list[str]:
        lines = list(self.profile.setup)
        lines += [f"module load {quote(module)} || exit" for module in self.profile.modules]
        for name, value in self.settings.environment.items():
            for used in variables(value):
                lines.append(f'[[ -v {used} ]] || warn "environment: {used} is not set, and is empty in {name}"')
            lines += _export(name, value)
        return lines or ["# The cluster's profile has no setup."]

    def _scratch(self) -> str:
        if not self.settings.scratch:
            return "# The cluster's profile has no scratch."
        return "\n".join(_export("TMPDIR", self.settings.scratch))

    def _srun_options(self) -> list[str]:
        settings = self.settings
        options = [
            f"--nodes={settings.nodes}",
            f"--ntasks={settings.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={settings.cpus_per_process * settings.processes_per_node}",
            "--kill-on-bad-exit=0",
            f"--wait={_WAIT_SECONDS}",
            "--mpi=none",
            "--export=ALL",  # also where sbatch's --export=NONE would have srun leave out what the job sets
        ]
        if gpus := self._gpus():
            options.append(f"--gpus-per-node={quote(gpus)}")
        container = self.profile.container
        if container is not None and container.runtime == "pyxis":
            mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in self._mounts(container))
            options += [
                f"--container-image={expandable(container.image)}",
                f"--container-mounts={expandable(mounts)}",
                f"--container-workdir={quote(str(self.workdir))}",
                *map(expandable, container.options),
            ]
        return options

    def _container_command(self) -> list[str]:
        container = self.profile.container
        if container is None or container.runtime != "apptainer":
            return []
        command = ["apptainer", "exec"]
        if self.settings.gpus_per_node:
            command.append("--nv")
        for mount in self._mounts(container):
            command += ["--bind", expandable(mount)]
        command += ["--pwd", quote(str(self.workdir)), *map(expandable, container.options)]
        return [*command, expandable(container.image)]

    def _mounts(self, container: Container) -> list[str]:
        """Return the profile's mounts, plus the working directory, the run's parent folder, where links in these two
        lead, and the scratch folder's fixed part unless already below one."""
        own = [str(self.workdir), str(self.run.parent)]
        own += [str(Path(path).resolve()) for path in own] + [str(self.run.resolve().parent)]
        for path in own:
            if "," in path or ":" in path or "$" in path:
                raise UserError(f"{path}: a container cannot mount a path with a comma, colon or dollar sign")
        if scratch := self.settings.scratch:  # /scratch of /scratch/$USER, which the launcher makes in the container
            fixed = scratch.partition("$")[0].rpartition("/")[0] if "$" in scratch else scratch
            own.append(fixed or scratch)
        mounts = list(container.mounts)
        for path in own:
            seen = [Path(mount) for mount in mounts if ":" not in mount]
            if not any(Path(path).is_relative_to(other) for other in seen):
                mounts.append(path)
        return mounts
