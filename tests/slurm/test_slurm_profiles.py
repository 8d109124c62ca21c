"""Ways in which a cluster's profile can be wrong, each on the real cluster: the job ends at once, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.slurm import run_files
from plt_megatron.slurm.status import report
from plt_megatron.slurm.submission import Options, submit
from tests.running import ROOT, wait_for
from tests.slurm.runs import SlurmRun, make_config

LMOD = 'module() { echo "Lmod has detected the following error: unknown: $2" >&2; return 1; }'
# What is wrong -> the profile, and what the reason names.
WRONG = {
    "a variable that is not set": (
        "setup: [set -u, 'export LD_LIBRARY_PATH=/opt/x/lib:$NOT_SET']",
        ["`export LD_LIBRARY_PATH=/opt/x/lib:$NOT_SET`", "NOT_SET: unbound variable"],
    ),
    "no modules here": ("modules: [cuda/12.6]", ["`module load cuda/12.6 || exit`", "module: command not found"]),
    "a scratch folder without its variable": (
        "setup: [unset USER]\nscratch: /scratch/$USER",
        ['`export TMPDIR="/scratch/$USER"`', "USER: unbound variable"],
    ),
    "a setup that ends": ("setup: [exit 3]", ["setup failed at `exit 3`"]),
    "a setup that ends well": ("setup: ['true', exit]", ["setup failed at `exit`"]),
    "a setup with a trap of its own": ("setup: [trap true EXIT, exit 3]", ["setup failed"]),
    "a setup that becomes another program": ("setup: [exec true]", ["setup failed"]),
    "a folder that is not there": (
        "setup: [set -e, cd /nosuch]",
        ["`cd /nosuch`", "/nosuch: No such file or directory"],
    ),
    "a file that is not there": (
        "setup: [source /nosuch/profile || exit]",
        ["`source /nosuch/profile || exit`", "/nosuch/profile: No such file or directory"],
    ),
    "a module that is not there": (
        f"setup: ['{LMOD}']\nmodules: [cuda/12.6]",
        ["`module load cuda/12.6 || exit`", "Lmod has detected the following error: unknown: cuda/12.6"],
    ),
    "a scratch folder that cannot be": ("scratch: /proc/nosuch", ["preflight", "/proc/nosuch: missing"]),
    "an image without its variable": (
        "container: {runtime: apptainer, image: $IMAGES/x.sif, mounts: [/]}",
        ["CONTAINER=(", "IMAGES: unbound variable"],
    ),
    "a container without its program": (
        "setup: [IMAGES=/nosuch]\ncontainer: {runtime: apptainer, image: $IMAGES/x.sif, mounts: [/]}",
        ["the launchers did not start", "apptainer: No such file or directory"],
    ),
    "an environment without Slurm's commands": (
        "environment: {PATH: /nosuch}",
        ["the launchers did not start", "srun: "],
    ),
    "an environment that Python cannot start in": (
        "environment: {PYTHONHOME: /nosuch}",
        ["in_job.py", "No module named 'encodings'"],
    ),
    "no Python there": ("python: /nosuch/python", ["the launchers did not start", "/nosuch/python: No such file"]),
}
QUICK = "no modules here"
PASSED_OVER = """
setup: [cd /nosuch, source /nosuch/profile, 'export LD_LIBRARY_PATH=/opt/x/lib:$NOT_SET']
environment: {MINE: $NOT_SET_EITHER}
python: /nosuch/python
"""


@pytest.fixture
def submit_with(slurm, slurm_data, tmp_path, monkeypatch):
    """`submit_with(name, profile)`: a run of that name, submitted with that profile."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "code"
    run_files.snapshot_code(ROOT, tmp_path)
    monkeypatch.setattr(run_files, "snapshot_code", lambda root, run: run_files.link_code(run, code))

    def submit_it(name: str, profile: str, **options) -> SlurmRun:
        config = make_config(name, tmp_path, slurm_data, parallel={"tensor_model_parallel_size": 1,
                                                                   "pipeline_model_parallel_size": 1})  # fmt: skip
        save_config(config, tmp_path / f"{name}.yaml")
        path = tmp_path / f"{name}.cluster.yaml"
        path.write_text(f"gpus_per_node: 0\nprocesses_per_node: 1\ncpus_per_process: 1\n{profile}\n")
        submission = submit(Options(str(tmp_path / f"{name}.yaml"), cluster=str(path), time="30", **options), ROOT)
        assert submission is not None
        run = SlurmRun(slurm, config)
        ((run.job,),) = submission.job_ids
        return run

    return submit_it


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param([QUICK], id="one"),
        pytest.param([what for what in WRONG if what != QUICK], id="the rest", marks=pytest.mark.slurm_faults),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(slurm, submit_with, wrong):
    """With a requeue, which none of these is worth."""
    runs = {
        # A node alone could be the one at fault.
        what: submit_with(f"run{number}", WRONG[what][0], requeue=True, nodes=1 + ("/proc/nosuch" in WRONG[what][0]))
        for number, what in enumerate(wrong)
    }
    passed_over = submit_with("passed_over", PASSED_OVER)
    wait_for(lambda: not slurm.jobs(), "all jobs to end", 300, lambda: slurm.run("squeue"), interval=0.5)
    for what, run in runs.items():
        reason = run.why().splitlines()[0]
        assert all(words in reason for words in WRONG[what][1]), (what, run.why())
        assert run.statuses() == ["failed"] and run.events("stop")[0]["reason"] == reason, (what, run.outputs())
        shown = report([str(run.folder)], "runs", False)
        assert " failed " in shown and f"  {reason}\n" in shown, (what, shown)
        assert "sbatch" not in shown or "fix" in shown, (what, shown)
        assert (slurm.job(run.job)["Restarts"], slurm.job(run.job)["ExitCode"] != "0:0") == ("0", True), what
    warned(passed_over)


def warned(run: SlurmRun) -> None:
    """What a setup passes over does not end the job, and is told wherever its end is."""
    lines = [f"the job's setup went on after status 1 of: {line}" for line in ("cd /nosuch", "source /nosuch/profile")]
    lines.append("environment: NOT_SET_EITHER is not set, and is empty in MINE")
    output = Path(RunFolder(run.folder).logs / f"slurm-{run.job}.out").read_text()
    for text in (output, run.why(), report([str(run.folder)], "runs", False)):
        assert all(f"warning: {line}\n" in text for line in lines), text
    assert "the launchers did not start" in run.why().splitlines()[0]
