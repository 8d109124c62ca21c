"""Preprocessing that is killed, interrupted, or run twice at once: nothing is lost, and the result is the same."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from data_helpers import digest, documents, expected, make_texts, run_preprocess, tool_environment, train, write_jsonl

from plt_megatron.data import preprocess as module
from plt_megatron.data.preprocess import PreprocessOptions
from plt_megatron.errors import UserError
from tests.running import ROOT, run, wait_for, wait_until_gone


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command as from a terminal: what a shell puts into the background ignores Ctrl-C, and its children do too."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=tool_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Any, process: subprocess.Popen[str]) -> bool:
    """Wait; False if the process ends first."""
    wait_for(lambda: process.poll() is not None or condition(), interval=0.002)
    return process.poll() is None


def test_killed_and_resumed(bpe_model: Path, tmp_path: Path) -> None:
    """SIGKILL of the command at several moments: its workers end too, finished shards are skipped, and the result is
    that of an undisturbed run."""
    texts = make_texts(3000, seed=9)
    plain = write_jsonl(tmp_path / "a.jsonl", texts[:2000])
    packed = write_jsonl(tmp_path / "b.jsonl.gz", texts[2000:])
    run_preprocess([plain, packed], tmp_path / "whole", bpe_model, shard_bytes=40_000)
    arguments = ["--input", plain, packed, "--output-prefix", tmp_path / "x", "--tokenizer", bpe_model]
    arguments += ["--workers", 2, "--shard-mb", 0.04]
    work = tmp_path / "x.partial"
    stamps: dict[str, int] = {}
    kills = 0
    for wanted in (1, 6, 12):
        process = start(*arguments)
        if wait_until(lambda wanted=wanted: len(list(work.glob("0*.json"))) >= wanted, process):
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            kills += 1
            wait_until_gone(*(worker.pid for worker in workers))
        process.communicate()
        for path in work.glob("0*.json"):
            assert stamps.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert kills >= 2 and not (tmp_path / "x.bin").exists()
    process = start(*arguments)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert "resuming: " in error and "of the input is already encoded" in error
    assert digest(tmp_path / "x") == digest(tmp_path / "whole")
    assert not work.exists()


def test_killed_while_publishing(
    corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The .bin is in place and the .idx is not: the next run recognizes its own files and finishes."""
    run_preprocess([corpus], tmp_path / "whole", bpe_model)
    real = module.publish

    def publish(source: Any, target: Any) -> None:
        if str(target).endswith("x.idx"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "publish", publish)
        run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert digest(tmp_path / "x") == digest(tmp_path / "whole")


def test_changed_between_kill_and_resume(
    texts: list[str], bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Shards of an older input are not used."""
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Job, "merge", Mock(side_effect=KeyboardInterrupt))
        run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000)
    assert list((tmp_path / "x.partial").glob("0*.json"))
    write_jsonl(path, texts[::-1])
    run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000)
    assert "changed since the interrupted run: starting over" in capsys.readouterr().err
    assert documents(tmp_path / "x") == expected(bpe_model, texts[::-1])


def test_a_shard_lost_on_disk(
    texts: list[str], bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Job, "merge", Mock(side_effect=KeyboardInterrupt))
        run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000)
    damaged = tmp_path / "x.partial" / "000002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(UserError, match="000002.bin is damaged: run the same command again to redo it"):
        run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000)
    run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000)
    assert documents(tmp_path / "x") == expected(bpe_model, texts)


def test_two_at_once(corpus: Path, bpe_model: Path, tmp_path: Path) -> None:
    job = module._Job(PreprocessOptions([str(corpus)], str(tmp_path / "x"), str(bpe_model)))
    with job.locked(), pytest.raises(UserError, match=r"x\.partial: another plt preprocess is running there"):
        run_preprocess([corpus], tmp_path / "x", bpe_model)


@pytest.mark.parametrize("what", ["trained again", "removed"])
def test_a_tokenizer_that_changes_before_the_workers_load_it(
    what: str, corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest would name the tokenizer that the command has loaded, and runs would take the text for its own."""
    model = tmp_path / "tokenizer.model"
    shutil.copy(bpe_model, model)
    other = train(corpus, tmp_path / "other", 400)
    real = module._Job.encode

    def encode(self: Any) -> None:
        shutil.copy(other, model) if what == "trained again" else model.unlink()
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(module._Job, "encode", encode)
        message = "changed while this command was starting" if what == "trained again" else "no such tokenizer"
        with pytest.raises(UserError, match=rf"tokenizer\.model\b.* {message}|tokenizer\.model: {message}"):
            run_preprocess([corpus], tmp_path / "x", model)
    shutil.copy(bpe_model, model)
    run_preprocess([corpus], tmp_path / "x", model)
    run_preprocess([corpus], tmp_path / "whole", bpe_model)
    assert digest(tmp_path / "x") == digest(tmp_path / "whole")


def die(shard: Any) -> str:
    os._exit(9)


def test_a_killed_worker(corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_in_worker", die)
    with pytest.raises(UserError, match="a worker process was killed"):
        run_preprocess([corpus], tmp_path / "x", bpe_model)


def test_a_script_whose_workers_would_begin_it_again(corpus: Path, bpe_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from plt_megatron.data.preprocess import PreprocessOptions, preprocess\n"
        f"preprocess(PreprocessOptions([{str(corpus)!r}], 'x', {str(bpe_model)!r}))\n"
    )
    done = run([sys.executable, script], tmp_path, status=1, env=tool_environment(PYTHONPATH=str(ROOT)))
    *_, last = done.stderr.strip().splitlines()
    assert "UserError" in last and "__main__" in last and "memory" not in last


def test_disk_full(corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device", "/data/x")
    monkeypatch.setattr(module, "concatenate", Mock(side_effect=full))
    said = "/data/x: No space left on device: the same command continues where this one stopped"
    with pytest.raises(UserError, match=said):
        run_preprocess([corpus], tmp_path / "x", bpe_model)


def test_a_fatal_line_ends_the_reading_of_other_inputs(
    texts: list[str], bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For their hashes, in a thread whose end the process waits for: here a minute."""
    broken, large = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", texts)
    broken.write_text("nonsense\n")
    until, blocks = time.monotonic() + 60, []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            blocks.append(size)
            time.sleep(0.01)
            return b"x" if time.monotonic() < until else b""

    def open_slowly(path: Any, *mode: Any, **options: Any) -> Any:
        return Slow() if (path, *mode) == (str(large), "rb") else open(path, *mode, **options)

    monkeypatch.setattr(module, "open", open_slowly, raising=False)
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=r"a\.jsonl:1: broken JSON"):
        run_preprocess([broken, large], tmp_path / "x", bpe_model, fail_on_bad_line=True)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread
    assert blocks and time.monotonic() < until


def test_a_finished_command_deletes_its_own_leftovers_alone(
    corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the work of another command that replaces its output."""
    work = tmp_path / "x.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert (work / "plan.json").exists() and (tmp_path / "x.idx").exists()
    run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert not work.exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Job, "merge", Mock(side_effect=KeyboardInterrupt))
        run_preprocess([corpus], tmp_path / "x", bpe_model, append_eod=False, overwrite=True)
    kept = sorted(work.iterdir())
    run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert sorted(work.iterdir()) == kept and any(path.suffix == ".bin" for path in kept)


def test_interrupted_by_the_user(bpe_model: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of the terminal: one line, status 130, no worker left, and finished work kept."""
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(4000, seed=2) * 15)  # seconds of work, of which little is done
    arguments = ["--input", path, "--output-prefix", tmp_path / "x", "--tokenizer", bpe_model, "--workers", 1]
    process = start(*arguments, "--shard-mb", 0.02)
    assert wait_until(lambda: list((tmp_path / "x.partial").glob("0*.json")), process)
    process.send_signal(signal.SIGSTOP)  # so that it does not finish while its workers are looked up
    workers = psutil.Process(process.pid).children(recursive=True)
    for member in [*workers, psutil.Process(process.pid)]:
        member.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert error == "interrupted: the same command continues where this one stopped\n"
    wait_until_gone(*(worker.pid for worker in workers))
    assert list((tmp_path / "x.partial").glob("0*.json"))
