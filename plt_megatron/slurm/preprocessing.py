"""Tokenizing on a cluster: an array of `plt preprocess --shard` jobs, then jobs that join and index their output."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.installation import ROOT
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import CODE, RunFolder
from plt_megatron.slurm import client
from plt_megatron.slurm.profile import SbatchOptions, complete, load_profile
from plt_megatron.slurm.resources import resolve
from plt_megatron.slurm.run_files import active_jobs, advice, job_name, jobs_of, snapshot_code, working_directory
from plt_megatron.slurm.script import Array, Script
from plt_megatron.slurm.start_checks import unseen

_TEMPLATE = Path(__file__).with_name("preprocess.sbatch")
_FOLLOWING_SECONDS = 4 * 3600  # joining and the sample index read the index, 20 bytes per document, and no tokens
SUFFIX = ".slurm"  # suffix of the folder with scripts and logs


def submit_preprocessing(
    arguments: Sequence[str],
    following: Mapping[str, Sequence[str]],
    output_prefix: str,
    *,
    reads: Sequence[tuple[str, str]] = (),
    cluster: str,
    nodes: int,
    time: str | None = None,
    workers: int | None = None,
) -> tuple[list[str], Path]:
    """Submit the jobs; return their ids, and the folder of their scripts and logs.

    A killed node loses only the shards it was working on: Slurm restarts its array member.

    Args:
        arguments: arguments of `plt preprocess`, without `--shard` and `--workers`.
        following: arguments of each `plt preprocess` that follows, one after another, by the names of their scripts.
        reads: paths that the jobs read, each after its name.
        nodes: number of array members, each on its own node.
        time: time limit of each job; None: the profile's.
        workers: processes per member; None: all of a node's CPUs.

    Raises:
        UserError: profile, options or partition do not fit, the profile's container does not see a path, earlier jobs
            of this output are active, or Slurm refuses.
    """
    profile = complete(load_profile(cluster), SbatchOptions())
    profile = replace(profile, gpus_per_node=None, processes_per_node=1, cpus_per_process=workers)
    workdir = working_directory()
    folder = Path(os.path.normpath(workdir / f"{output_prefix}{SUFFIX}"))
    problems = unseen(reads, profile.container, [workdir, folder.parent]) if profile.container else []
    if problems:
        raise UserError("\n".join(problems))
    for job in jobs_of(folder, active_jobs()):
        raise UserError(advice(folder, job))
    seconds = profile.limit_seconds(time)
    # One process with all of its CPUs.
    resources, problems = resolve(profile, client.partitions(), nodes=1, seconds=seconds, gpus=(None, 0))
    if problems:
        raise UserError("\n".join(problems))
    settings = profile.job_settings(resources, job_name(folder, folder.stem), seconds, requeue=True)
    # The code as submitted, since a container does not see the checkout, which may change until the job starts.
    path = f'PYTHONPATH={shlex.quote(str(folder / CODE))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    plt = f"env {path} {shlex.quote(settings.python)} -P -m plt_megatron preprocess"
    shard = shlex.join([*arguments, "--workers", str(settings.cpus_per_process)])
    command, members = f'{plt} {shard} --shard "$SLURM_ARRAY_TASK_ID/{nodes}"', Array(folder, settings.job_name, nodes)
    array = Script(settings, profile, folder, workdir, members, command=command)
    shorter = min(settings.time_limit_seconds, _FOLLOWING_SECONDS)
    scripts = {"shard": array}
    for name, words in following.items():
        # All of the node's CPUs for an index, since memory mostly comes with them: it takes 24 bytes a document.
        cpus = settings.cpus_per_process if name == "index" else 1
        size = replace(settings, cpus_per_process=cpus, time_limit_seconds=shorter)
        scripts[name] = replace(array, settings=size, array=None, command=f"{plt} {shlex.join(words)}")
    return _submit(folder, scripts), folder


def _submit(folder: Path, scripts: Mapping[str, Script]) -> list[str]:
    """Write and submit the scripts; each starts once the one before, with all members of an array, has succeeded."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    with writing(folder):
        RunFolder(folder).logs.mkdir(parents=True, exist_ok=True)
        snapshot_code(ROOT, folder)
        for name, script in scripts.items():
            write_text(folder / f"{name}.sbatch", script.render(template))
    ids: list[str] = []
    for name in scripts:
        # If a job fails, those after it are cancelled; running the same command again continues all.
        after = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        ids.append(client.submit(folder / f"{name}.sbatch", *after))
    return ids
