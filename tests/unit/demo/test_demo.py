"""The demo around its commands, which are faked: order, skipping, failure, and the table at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.demo import run as demo
from plt_megatron.demo import steps as demo_data
from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import save_config
from plt_megatron.runtime.local_processes import die_with_parent


class Commands:
    """Stands in for the project's commands: makes the files they would, and notes the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken = ""

    def start(self, command: str, *arguments: str) -> None:
        self.calls.append(command)
        if command == self.broken:
            raise UserError(f"{command} ended with status 1")
        assert not any("RunFolder(" in argument for argument in arguments)
        {"train": self.train, "export": self.export, "generate": lambda arguments: None}[command](arguments)

    def corpus(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part, path in demo.CORPUS.items():
            path.write_text(json.dumps({"text": part}) + "\n")

    def tokenizer(self, texts: Sequence[Path], folder: Path, vocab_size: int) -> None:
        self.calls.append("tokenizer")
        for name in demo_data.TOKENIZER_FILES:
            (folder / name).write_text("pieces")

    def tokens(self, text: Path, prefix: Path, tokenizer: Path) -> None:
        self.calls.append("tokenize")
        prefix.parent.mkdir(exist_ok=True)
        for suffix in (".bin", ".idx"):
            Path(f"{prefix}{suffix}").write_text(text.read_text())

    def train(self, arguments: tuple[str, ...]) -> None:
        config = load_config(arguments[0], arguments[1:])
        folder = Path(config.output_dir, config.name)
        save_config(config, folder / "config.yaml")
        loops = config.model.loop_count
        records = [
            {"kind": "train", "step": step, "tokens": step * 1000, "loss": 9 - loops - step / 20}
            for step in range(1, 21)
        ]
        records += [
            {"kind": "validation", "step": 20, "tokens": 20000, "loop_count": count, "loss": 5.0 - count / 4}
            for count in config.validation.loop_counts
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text("step_00000020\n")

    def export(self, arguments: tuple[str, ...]) -> None:
        folder = Path(arguments[arguments.index("--output") + 1])
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("{}")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The fake commands, in an empty folder: the configurations are the shipped ones."""
    monkeypatch.chdir(tmp_path)
    fake = Commands()
    monkeypatch.setattr(demo, "start", fake.start)
    monkeypatch.setattr(demo_data, "write_corpus", fake.corpus)
    monkeypatch.setattr(demo_data, "make_tokenizer", fake.tokenizer)
    monkeypatch.setattr(demo_data, "tokenize_text", fake.tokens)
    return fake


ALL = ["tokenizer", "tokenize", "tokenize", "train", "train", "export"]
SAMPLE = ["generate"]  # each time


def test_all_is_done_once_and_in_order(commands, capsys):
    demo.run_demo()
    assert commands.calls == ALL + SAMPLE
    first = capsys.readouterr().out
    demo.run_demo()
    assert commands.calls == ALL + SAMPLE + SAMPLE
    second = capsys.readouterr().out
    assert second.count("already done") == 6 and "already done" not in first
    assert second.split("\n\n")[1] == first.split("\n\n")[1]  # the same table


def test_both_models_see_the_same_tokens_and_differ_in_the_loop_only(commands):
    demo.run_demo()
    looped, plain = (run.folder.config() for run in demo.DEMO_RUNS)
    assert (looped.model.loop_count, plain.model.loop_count) == (2, 1)
    assert looped.validation.loop_counts == [1, 2]
    assert looped.parallel.data_parallel_size == 2
    plain.model.loop_count, plain.name = looped.model.loop_count, looped.name
    plain.validation.loop_counts = looped.validation.loop_counts
    assert plain == looped


@pytest.mark.parametrize(("gpus", "processes"), [("", 2), ("0", 1), ("0,1", 2)])
def test_a_machine_with_one_gpu_trains_on_it(gpus, processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for run in demo.DEMO_RUNS:
        assert load_config(demo.CONFIG, run.all_overrides()).parallel.data_parallel_size == processes


def test_the_data_that_the_configuration_reads_is_what_the_demo_makes(commands):
    config = load_config(demo.CONFIG)
    sources = [*config.data.sources, *config.data.train_sources, *config.data.validation_sources]
    assert {source.path for source in sources} <= {str(prefix) for prefix in demo.DATA.values()}
    assert config.data.tokenizer == str(demo.TOKENIZER)


def test_the_table_and_where_things_lie(commands, capsys):
    demo.run_demo()
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(("model", "PLT", "1 loop"))]
    header, looped, plain = (re.split(r" {2,}", line) for line in table[:3])
    assert header == [
        *("model", "parameters", "tokens", "train loss"),
        *("val. loss, 1 loop", "val. loss, 2 loops", "time"),
    ]
    assert looped[2:6] == ["20,000", "6.025", "4.750", "4.500"]
    assert plain[2:6] == ["20,000", "7.025", "4.750", "-"]
    parameters = [int(cells[1].replace(",", "")) for cells in (looped, plain)]
    config = load_config(demo.CONFIG)
    # Of the preset's loop input; its attention has no gates.
    assert parameters[0] - parameters[1] == config.model.hidden_size and parameters[1] > 1_000_000
    assert str(demo.FOLDER / "loss.png") in out and (demo.FOLDER / "loss.png").stat().st_size > 10_000
    for run in demo.DEMO_RUNS:
        assert str(run.folder.path / "checkpoints") in out


def test_a_failed_step_ends_it_and_the_next_try_goes_on_there(commands):
    commands.broken = "train"
    with pytest.raises(UserError, match="status 1"):
        demo.run_demo()
    assert commands.calls == ALL[:4]
    commands.broken, commands.calls = "", []
    demo.run_demo()
    assert commands.calls == ALL[3:] + SAMPLE


def test_another_corpus_means_all_of_it_again(commands):
    demo.run_demo()
    commands.calls = []
    demo.CORPUS["train"].write_text(json.dumps({"text": "another Python's"}) + "\n")
    demo.run_demo()
    assert commands.calls == SAMPLE  # the stamp put the corpus right, and the rest follows from it
    (demo.FOLDER / "stamps" / "tokenizer.json").unlink()
    demo.run_demo()
    assert commands.calls == SAMPLE + ALL[:1] + SAMPLE


def test_a_command_that_fails_is_named(capfd):
    with pytest.raises(UserError, match=r"plot --fast ended with status 2: see above, then run the demo again"):
        demo.start("plot", "--fast")
    assert "RUN" in capfd.readouterr().err


def test_a_killed_demo_leaves_no_training_behind(monkeypatch):
    started = Mock(return_value=Mock(wait=lambda: 0))
    monkeypatch.setattr(demo.subprocess, "Popen", started)
    demo.start("train")
    assert started.call_args.kwargs["preexec_fn"] is die_with_parent
