"""What plt submit refuses: one line each, nothing written, nothing submitted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import namedtuple

import pytest
import yaml
from fake_slurm import CPU_PARTITION, GPU_PARTITION, RUN, write_tokenizer, write_tokens
from submitting import ROOT, refusal, submit_run, write_profile

from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.launcher import preflight
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.slurm import checks
from plt_megatron.slurm.submission import Options, submit

HUGE = (
    *("model.num_layers=96", "model.hidden_size=16384"),
    *("model.ffn_hidden_size=65536", "model.num_attention_heads=128"),
)
usage = namedtuple("usage", "total used free")


def assert_one_line(folder, slurm, lines, *words):
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not slurm.calls("sbatch")
    assert not (folder / "runs").exists()


LONG = "training.train_iters=100_000_000"
# Is not held against a size that is not to be had: with the right one, nothing else may be wrong.
UNFIT = ("parallel.tensor_model_parallel_size=4", "training.global_batch_size=3")
LEAVES_NO_TIME = ("no time for steps", "--signal-margin")
# By what is wrong: settings, options, and the words of the one line. `sinfo`: what differs in its answer; `profile`:
# of a cluster of CPUs.
LINES = {
    "unknown partition": (UNFIT, {"partition": "gpus"}, ("gpus", "did you mean gpu?", "gpu, cpu")),
    "more GPUs than a node": (UNFIT, {"gpus_per_node": "9"}, ("--gpus-per-node 9", "partition gpu", "8 GPUs")),
    "GPUs where none are": (UNFIT, {"gpus_per_node": "1", "partition": "cpu"}, ("partition cpu", "no GPUs")),
    "no GPUs, and none asked for": (UNFIT, {"partition": "cpu"}, ("partition cpu has no GPUs: for a CPU run",)),
    "another type": (UNFIT, {"gpus_per_node": "a100:7"}, ("a100:7", "no such nodes", "h100")),
    "too many nodes": (UNFIT, {"nodes": 17}, ("--nodes 17", "16 nodes")),
    "one is singular": ((), {"nodes": 2, "sinfo": ("|16|", "|1|")}, ("partition gpu has 1 node",)),
    "limit above the partition's": ((), {"time": "3-00:00:00"}, ("3-00:00:00", "2-00:00:00", "--chain")),
    **{
        state: ((), {"sinfo": ("|up|", f"|{state}|")}, (f"partition gpu is {state}: it accepts no jobs",))
        for state in ("drain", "inact", "inactive")
    },
    "no default partition": ((), {"sinfo": ("*", "")}, ("--partition", "gpu")),
    "layout that does not divide": (
        ("parallel.pipeline_model_parallel_size=3", "model.num_layers=6"),
        {},
        ("8 processes", "multiple of 3"),
    ),
    "batch that does not divide": (("training.global_batch_size=12",), {}, ("global_batch_size 12", "8")),
    "no data": (("data.sources=[{path: data/gone}]",), {}, ("data/gone.bin", "data/gone.idx", "not found")),
    "no tokenizer": (("data.tokenizer=data/gone.model",), {}, ("data.tokenizer", "data/gone.model")),
    "no tokenizer's file": (
        ("data.tokenizer=data/corpus.bin",),
        {},
        ("data.tokenizer: data/corpus.bin is not a sentencepiece model",),
    ),
    "memory": (
        (*HUGE, "checkpoint.enabled=false", "training.train_iters=1"),
        {},
        ("memory", "H100", "tensor_model_parallel_size"),
    ),
    "memory of a CPU node": (
        (),
        {"profile": {"processes_per_node": 4}, "sinfo": ("256000", "10")},
        ("memory", "4 processes", "10.0 MiB"),
    ),
    "limit too short for a checkpoint": (
        (LONG, "checkpoint.save_interval=50_000_000"),
        {},
        ("--time 01:00:00", "one checkpoint interval", "50,000,000 steps"),
    ),
    "long, saves only at its end": (
        (LONG, "checkpoint.save_interval=0"),
        {"chain": 900},
        ("one checkpoint interval", "set checkpoint.save_interval"),
    ),
    "long, without checkpoints": (
        (LONG, "checkpoint.enabled=false"),
        {"chain": 900},
        ("writes no checkpoints to resume from", "set checkpoint.enabled=true"),
    ),
    "limit within the margin": ((), {"time": "00:05:00"}, ("--time 00:05:00", *LEAVES_NO_TIME)),
    "limit before the first step": ((), {"time": "00:08:00"}, ("--time 00:08:00", *LEAVES_NO_TIME)),
    "the same, of unknown speed": ((), {"time": "00:08:00", "profile": {}}, ("--time 00:08:00", *LEAVES_NO_TIME)),
    "limit in minutes and seconds": ((), {"time": "05:00"}, ("--time 00:05:00",)),
    **{
        f"no time: {time}": ((), {"time": time}, ("--time",))
        for time in ("", "0", "1h", "-1", "1:2:3:4", "infinite", "24:00:00; rm -rf /")
    },
    "an output folder that is a file": (("output_dir=run.yaml",), {}, ("output_dir", "not a folder")),
    "members at a time of no array": ((), {"max_concurrent": 2}, ("--max-concurrent needs --array",)),
    "a chain of arrays": ((), {"array": "list.txt", "chain": 2}, ("--chain cannot be combined with --array",)),
}


@pytest.mark.parametrize(("settings", "options", "words"), LINES.values(), ids=LINES)
def test_it_is_refused_in_one_line(folder, slurm, settings, options, words):
    options = dict(options)
    if sinfo := options.pop("sinfo", None):
        slurm.answer("sinfo", *(line.replace(*sinfo) for line in (GPU_PARTITION, CPU_PARTITION)))
    if "profile" in options:
        options["cluster"] = write_profile(folder, **options.pop("profile"))
    assert_one_line(folder, slurm, refusal(*settings, **options), *words)


def test_a_partition_that_is_down_takes_jobs(folder, slurm, capsys):
    """For after the maintenance."""
    slurm.answer("sinfo", GPU_PARTITION.replace("|up|", "|down|"))
    submit_run()
    assert "note: partition gpu is down: the job waits" in capsys.readouterr().out


def test_fp8_that_the_clusters_card_has_no_kernel_for(folder, slurm):
    """Before submission, by the card that the partition has."""
    fp8 = ("training.fp8.format=hybrid", "model.backend=te", "model.hidden_size=64", "model.ffn_hidden_size=128")
    lines = refusal(*fp8, "training.fp8.recipe=mxfp8")
    rule = "training.fp8.recipe mxfp8 needs Blackwell (sm100), sm90 has no kernel; use tensorwise or delayed"
    assert lines[0].endswith(rule) and not slurm.calls("sbatch")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("corpus.bin", lambda old: old[:-2], ("data/corpus.bin has 1998 bytes", "2000")),
        ("corpus.idx", lambda old: old[:-8], ("data/corpus.idx is truncated",)),
        ("corpus.idx", lambda old: b"", ("data/corpus.idx is not an index",)),
        ("corpus.idx", lambda old: b"MMIDIDX\x00\x00", ("data/corpus.idx is not an index",)),
        ("corpus.idx", lambda old: b"#!/bin/sh\n" * 20, ("data/corpus.idx is not an index",)),
        ("corpus.loss_mask.bin", lambda old: b"\x01", ("data/corpus.loss_mask.bin has 1 bytes",)),
        ("corpus.manifest.json", lambda old: b'{"tokenizer', ("data/corpus.manifest.json",)),
        ("corpus.manifest.json", lambda old: b'{"tokenizer": []}', ("data/corpus.manifest.json cannot be read",)),
    ],
)
def test_damaged_data(folder, slurm, file, change, words):
    path = folder / "data" / file
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    assert_one_line(folder, slurm, refusal(), *words)


def test_data_that_left_its_mask_behind_or_has_nothing_to_say_of_its_tokenizer(folder, slurm):
    """Both problems are shown at once."""
    (folder / "data" / "corpus.manifest.json").write_text(json.dumps({"loss_mask_tokens": 1}))
    lines = refusal()
    assert len(lines) == 2 and "data/corpus.loss_mask.bin not found" in lines[1], lines


@pytest.mark.parametrize("load", ["empty", "run.yaml"])
def test_nothing_to_load_is_told_before_the_queue(folder, slurm, load):
    (folder / "empty/checkpoints").mkdir(parents=True)
    assert_one_line(folder, slurm, refusal(f"checkpoint.load={load}"), f"checkpoint.load: {load} holds no checkpoint")


def write_manifest(folder, sha256, vocab_size):
    made = {"tokenizer": {"path": "elsewhere.model", "sha256": sha256, "vocab_size": vocab_size}}
    (folder / "data" / "corpus.manifest.json").write_text(json.dumps(made))


# By what is wrong: the ids of the run's tokenizer, of the tokenizer that the data name, settings, and words.
VOCABULARIES = {
    "no tokens of filling in": (2, None, ("data.fim.rate=0.5",), ("data.fim.tokens", "words.json")),
    "another than the data's": (400, 300, (), ("another tokenizer", "elsewhere.model, 300 ids", "400 ids")),
    "a vocabulary smaller than the data's": (None, 513, (), ("513 ids", "512")),
    "a vocabulary smaller than the tokenizer's": (600, None, (), ("model.vocab_size 512", "600 ids")),
    "too large for 16-bit ids": (65537, None, ("model.vocab_size=null",), ("16-bit", "65537")),
}


@pytest.mark.parametrize(("ids", "of_data", "settings", "words"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_tokenizer_that_does_not_fit(folder, slurm, ids, of_data, settings, words):
    if ids is not None:
        settings = (*settings, f"data.tokenizer={write_tokenizer(folder / 'words.json', ids)}")
    if of_data is not None:
        write_manifest(folder, "0" * 64, of_data)
    assert_one_line(folder, slurm, refusal(*settings), *words)


def test_data_of_the_same_tokenizer_is_accepted(folder, slurm):
    path = write_tokenizer(folder / "words.json", 400)
    write_manifest(folder, hashlib.sha256(path.read_bytes()).hexdigest(), 400)
    submit_run(f"data.tokenizer={path}")
    assert len(slurm.calls("sbatch")) == 1


def test_32_bit_ids_for_a_larger_tokenizer_are_accepted(folder, slurm):
    write_tokens(folder / "data" / "corpus", code=4)
    submit_run(f"data.tokenizer={write_tokenizer(folder / 'words.json', 65537)}", "model.vocab_size=null")


def test_too_little_free_space(folder, slurm, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert_one_line(folder, slurm, refusal(), "output_dir", "1.00 MB free", "keep_last")


def test_too_little_free_space_for_the_job_to_start(folder, slurm, monkeypatch):
    """By preflight's own measure, though the checkpoints would fit."""
    for free in (preflight.LEAST_RUN_FOLDER - 1, preflight.LEAST_RUN_FOLDER):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(10**10, 10**10 - free, free))
        refused = preflight.shared_problem({"space": {"run": shutil.disk_usage("").free}})
        if refused is not None:
            assert "1024 MiB" in refused
            assert_one_line(folder, slurm, refusal(), "output_dir", "1.00 GiB", "make room")
    submit_run()


def test_exports_take_space_too(folder, slurm, capsys):
    """Six of them, of two bytes a parameter (bf16), on top of checkpoints, of which one more waits for its export."""
    steps = ("training.train_iters=600", "checkpoint.save_interval=100")
    sizes = []
    for more in (("keep_last=1",), ("keep_last=2",), ("keep_last=1", "exports.interval=100")):
        overrides = [*steps, *(f"checkpoint.{each}" for each in more)]
        submit(Options("run.yaml", time="01:00:00", dry_run=True, overrides=overrides), ROOT)
        (size,) = re.findall(r"up to ([\d.]+) MB more in total", capsys.readouterr().out)
        sizes.append(float(size) * 1e6)
    parameters = count_parameters(load_config("run.yaml").model, load_config("run.yaml").model.vocab_size).total
    assert sizes[2] - sizes[1] == pytest.approx(6 * 2 * parameters, abs=1e5)


def test_too_little_free_space_for_all_of_an_array(folder, slurm, monkeypatch, capsys):
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(RUN | {"name": name}))
    (folder / "list.txt").write_text("one.yaml\ntwo.yaml\n")
    submit(Options("run.yaml", time="01:00:00", dry_run=True), ROOT)
    (each,) = re.findall(r"up to ([\d.]+) MB more in total", capsys.readouterr().out)
    monkeypatch.setattr(checks, "LEAST_RUN_FOLDER", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, round(1.9e6 * float(each))))
    assert_one_line(folder, slurm, refusal(array="list.txt"), "the checkpoints of 2 runs", "together", "fewer runs")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, round(2.1e6 * float(each))))
    submit_run(array="list.txt")


@pytest.mark.parametrize("gpus", ["", "8x", "-1", "h100:", ":8", "h100:8 --wrap=id", "h100:8\n#SBATCH --wrap=id"])
def test_a_number_of_gpus_that_is_none(folder, slurm, gpus):
    with_lines = " ".join(refusal(gpus_per_node=gpus))
    assert "--gpus-per-node" in with_lines and not slurm.calls("sbatch")


def test_a_slurm_that_does_not_answer(folder, slurm):
    slurm.fail("sinfo", "sinfo: error: Unable to contact slurm controller (connect failure)")
    assert_one_line(folder, slurm, refusal(), "sinfo: Unable to contact slurm controller")


def test_no_slurm_at_all(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = refusal()
    assert len(lines) == 1 and "sinfo is not installed here" in lines[0]


@pytest.mark.parametrize(
    ("reason", "may_be_queued"),
    [
        ("Invalid account or account/partition combination", False),
        ("Socket timed out on send/recv operation", True),
        ("Zero Bytes were transmitted or received", True),
        ("Unable to contact slurm controller (receive failure)", True),
        ("Unable to contact slurm controller (connect failure)", False),
    ],
)
def test_sbatch_refuses(folder, slurm, reason, may_be_queued):
    slurm.fail("sbatch", f"sbatch: error: Batch job submission failed: {reason}")
    lines = refusal()
    assert len(lines) == 1 and reason in lines[0] and ("squeue --me" in lines[0]) == may_be_queued
    assert f"sbatch {folder}/runs/try/job.sbatch" in lines[0]


def test_all_problems_are_shown_at_once(folder, slurm):
    settings = ("data.sources=[{path: data/gone}]", "training.global_batch_size=12")
    assert len(refusal(*settings, partition="no", gpus_per_node="8")) == 3


@pytest.mark.parametrize("name", ["bad\nname", "bad\x1bname", "back\\slash", "lr:3e-4"])
def test_a_name_no_script_can_hold(folder, slurm, name):
    with pytest.raises(ValueError, match="line breaks|backslash|colon"):
        submit_run(name=name)
    assert not slurm.calls("sbatch")
    assert not (folder / "runs").exists()


def test_a_link_to_a_folder_with_a_colon(folder, slurm):
    """Its processes are given the link's target."""
    (folder / "10:00").mkdir()
    (folder / "runs").symlink_to("10:00")
    with pytest.raises(ValueError, match="colon"):
        submit_run()


def test_what_a_rehearsal_finds(folder, slurm):
    """It is the last check: a run with another problem is not rehearsed."""
    rehearsed = []

    def last_check(config, vocab_size, resources):
        rehearsed.append((vocab_size, resources.world_size))
        return ["rehearsal: wrong group"]

    def refused(*overrides):
        with pytest.raises(UserError) as caught:
            submit(Options(config="run.yaml", time="01:00:00", overrides=list(overrides)), ROOT, last_check)
        return str(caught.value).splitlines()

    assert_one_line(folder, slurm, refused(), "rehearsal: wrong group")
    assert len(rehearsed) == 1 and rehearsed[0][1] > 0
    assert_one_line(folder, slurm, refused("training.global_batch_size=7"), "global_batch_size")
    assert len(rehearsed) == 1
