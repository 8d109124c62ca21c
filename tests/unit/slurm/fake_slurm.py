"""A Slurm that only remembers what it was asked, data to train on, and what a trainer leaves in a run's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plt_megatron.config.schema import RunConfig
from plt_megatron.data.mix import training_fingerprint, training_samples
from plt_megatron.run_folder import resuming

# Answers from files; sbatch counts job ids up.
_COMMAND = """#!/bin/bash
name=${0##*/}
cd "$FAKE_SLURM" || exit 9
{ printf '%s' "$name"; printf '\\t%s' "$@"; printf '\\n'; } >>calls
env -0 >"env.$name"
if [[ -f $name.fails ]]; then cat "$name.fails" >&2; exit 1; fi
if [[ $name == sbatch ]]; then
  id=$(<next_id); echo $((id + 1)) >next_id
  if [[ -f sbatch.lines ]]; then printf "$(<sbatch.lines)\n" "$id"; else echo "$id"; fi
  if [[ -f sbatch.says ]]; then cat sbatch.says >&2; fi
else
  cat "$name.answer"
fi
"""

GPU_PARTITION = "gpu*|up|2-00:00:00|16|128|2000000|gpu:h100:8(S:0-1)"
CPU_PARTITION = "cpu|up|infinite|4|64|256000|(null)"


class FakeSlurm:
    """sbatch, sinfo and squeue on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "sinfo", "squeue"):
            (self.bin / name).write_text(_COMMAND)
            (self.bin / name).chmod(0o755)
        (folder / "next_id").write_text("100\n")
        self.answer("sinfo", GPU_PARTITION, CPU_PARTITION)
        self.answer("squeue")

    def answer(self, name: str, *lines: str) -> None:
        (self.folder / f"{name}.answer").write_text("".join(line + "\n" for line in lines))

    def fail(self, name: str, message: str) -> None:
        (self.folder / f"{name}.fails").write_text(message + "\n")

    def says(self, message: str, answer: str = "%s") -> None:
        """What sbatch says to the user beside its answer, in which %s is the job's id."""
        (self.folder / "sbatch.says").write_text(message)
        (self.folder / "sbatch.lines").write_text(answer)

    def jobs(self, *jobs: tuple[str, str, str]) -> None:
        """What squeue shows: id, state and name of each job."""
        self.answer("squeue", *(f"{i}|{state}|None|1:00|30:00|N/A|node[1-2]|{name}" for i, state, name in jobs))

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\t")[1:] for line in lines if line.split("\t")[0] == name]

    def environment(self, name: str) -> dict[str, str]:
        """Of the last call."""
        entries = (self.folder / f"env.{name}").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def write_tokens(prefix: Path, lengths: Sequence[int] = (300, 500, 200), code: int = 8) -> None:
    """A .bin and .idx of megatron-core's format; 8: 16-bit ids."""
    size = {8: 2, 4: 4}[code]
    offsets = [size * sum(lengths[:index]) for index in range(len(lengths))]
    count = len(lengths)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".bin").write_bytes(bytes(size * sum(lengths)))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, count, count + 1)
        + struct.pack(f"<{count}i", *lengths)
        + struct.pack(f"<{count}q", *offsets)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )


def write_tokenizer(path: Path, words: int = 2) -> Path:
    """A tokenizer of so many ids, or a sentencepiece model of three, as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        vocabulary = {"</s>": 0, "<unk>": 1} | {f"w{index}": index for index in range(2, words)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        path.write_text(json.dumps({"version": "1.0", "model": model}))
        return path
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    for piece, kind in (("<unk>", "UNKNOWN"), ("</s>", "CONTROL"), ("a", "NORMAL")):
        proto.pieces.add(piece=piece, score=0, type=proto.SentencePiece.Type.Value(kind))
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.pad_id = -1, 1, -1
    path.write_bytes(proto.SerializeToString())
    return path


RUN: dict[str, Any] = {
    "name": "try",
    "model": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "vocab_size": 512},
    "data": {"sources": [{"path": "data/corpus"}], "sequence_length": 256},
    "training": {"train_iters": 1000, "micro_batch_size": 1, "global_batch_size": 64},
    "checkpoint": {"save_interval": 100},
}


def write_progress(run: Path, steps: Sequence[int], checkpoint: int = 0, rate: float = 1000.0, **fields: Any) -> None:
    """What a trainer leaves: records of steps, and one checkpoint's folder."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            record = {"kind": "train", "step": step, "tokens": step * 64, "loss": 2.0, "tokens_per_second": rate}
            file.write(json.dumps(record | fields) + "\n")
    if checkpoint:
        name = f"step_{checkpoint:08d}"
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / "latest").write_text(name + "\n")


def write_checkpoint(folder: Path, config: RunConfig, step: int, **fields: Any) -> Path:
    """One that a run of this configuration has left, but for its tensors. `fields`: of its progress."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    tokens = config.training.global_batch_size * config.data.sequence_length
    progress = {
        "format": 1,
        "step": step,
        "consumed_tokens": step * tokens,
        "config": dataclasses.asdict(config),
        "schedule": resuming.schedule(config, tokens),
        "schedule_step_tokens": tokens,
        "vocab_size": config.model.vocab_size,
    } | fields
    if "data_fingerprint" not in fields:
        progress["data_fingerprint"] = training_fingerprint(config, None, training_samples(config))
    (path / "progress.json").write_text(json.dumps(progress))
    content = (path / "progress.json").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"progress.json": entry}}))
    (folder / "latest").write_text(path.name + "\n")
    return path


def write_attempt(run: Path, attempt: int = 1, job_id: str = "100", **end: Any) -> None:
    """An attempt's start in attempts.jsonl, and its end, if there is one."""
    write_event(run, event="start", attempt=attempt, job_id=job_id, step=0)
    if end:
        write_event(run, event="end", attempt=attempt, job_id=job_id, **end)


def write_event(run: Path, **event: Any) -> None:
    """A line of attempts.jsonl."""
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "restart_count": 0, "nodes": ["node1", "node2"], **event}) + "\n")
