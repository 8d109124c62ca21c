"""Submitting from a test."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from plt_megatron.errors import UserError
from plt_megatron.slurm.submission import Options, Submission, submit
from tests.running import ROOT, run

LAUNCHER = "plt_megatron/launcher/in_job.py"
IN_JOB = """
import json, os, signal, sys, time
told = []
if sys.argv[1] == "check":
    sys.exit(int(os.environ.get("BUSY", "0")))
if sys.argv[1] == "node":
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    open("ready", "w").close()
    while os.environ.get("WAIT") and not told:
        time.sleep(0.01)
with open("seen", "a") as file:
    print("VERSION", sys.argv[1:], os.environ.get("PROFILE_VARIABLE"), os.environ.get("TMPDIR"), file=file)
with open("told", "w") as file:
    json.dump({name: os.environ.get(f"PLT_SETUP_{name}") for name in ("FAILED", "WARNINGS")}, file)
if sys.argv[1] == "node":
    sys.exit(75 if told else int(os.environ.get("STATUS", "0")))
ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGUSR1, signal.SIGTERM)]
sys.exit(int(sys.argv[4]) if all(ignored) else 99)
"""
# As srun: options first, then the command; USR1 is passed on, TERM ends it.
SRUN = """#!/bin/bash
while [[ ${1-} == --* ]]; do printf '%s\\n' "$1" >>srun.options; shift; done
trap 'kill -USR1 "$task"' USR1
"$@" & task=$!
until wait "$task"; status=$?; ! kill -0 "$task" 2>/dev/null; do :; done
exit "$status"
"""


def submit_run(*overrides: str, root: Path = ROOT, **options: Any) -> Submission:
    """`plt submit run.yaml OVERRIDES`, an hour on one node unless `options` say otherwise."""
    config = None if {"array", "branch_from"} & set(options) else "run.yaml"
    defaults: dict[str, Any] = {"config": config, "time": "01:00:00"}
    submission = submit(Options(overrides=list(overrides), **(defaults | options)), root)
    assert submission is not None
    return submission


def submitted(*overrides: str, **options: Any) -> Path:
    """The folder of the run that `submit_run` submits."""
    (run,) = submit_run(*overrides, **options).runs
    return run


def write_profile(folder: Path, **profile: Any) -> str:
    """A cluster's profile in the current folder, as `--cluster` takes it; of CPUs unless `profile` says otherwise."""
    cpus = {} if "container" in profile else {"processes_per_node": 2, "partition": "cpu"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(cpus | profile))
    return "./mine.yaml"


def refusal(*overrides: str, **options: Any) -> list[str]:
    """The lines a submission is refused with."""
    with pytest.raises(UserError) as caught:
        submit_run(*overrides, **options)
    return str(caught.value).splitlines()


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines, read as sbatch reads them: up to the first command, words with shell quotes."""
    found = {}
    for line in script.read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            for word in shlex.split(line)[1:]:
                name, _, value = word.partition("=")
                found[name] = value
    return found


def command(folder: Path, name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, ROOT / "launch" / name, *arguments], folder, status=None, env=os.environ | env)
