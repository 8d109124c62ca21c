"""Whole runs for the tests of the trainer: real text, tokenizer and data set, a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from plt_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from plt_megatron.run_folder.folder import RunFolder
from tests.settings import changed


def make_data(folder: Path, seed: int = 7, tokenizer: str | None = None, special: Sequence[str] = ()) -> DataConfig:
    """Tokenize a small corpus, with a tokenizer trained on it (with `special` tokens) unless one is given, by the
    tools' own functions."""
    from plt_megatron.data.preprocess import PreprocessOptions, preprocess
    from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

    rng = random.Random(seed)
    words = [f"{first}{second}" for first in ("lo", "ka", "min", "ter", "a") for second in ("op", "ra", "el", "us")]
    texts = [" ".join(rng.choices(words, k=rng.randrange(5, 60))) + "." for _ in range(400)]
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if tokenizer is None:
        options = TrainingOptions([str(corpus)], str(folder), 380, control_symbols=special, threads=1)
        tokenizer = str(train_tokenizer(options).model)
    preprocess(PreprocessOptions([str(corpus)], str(folder / "text"), tokenizer, workers=1))
    return DataConfig(
        sources=[DataSource(path=str(folder / "text"))], split="80,20,0", tokenizer=tokenizer, sequence_length=32
    )


def run_config(
    name: str, output_dir: Path, data: DataConfig, kind: Mapping[str, Any] | None = None, **changes: Any
) -> RunConfig:
    """A run of six steps; `changes` replace settings of sections, as in `training={"train_iters": 3}`; so does `kind`
    before them."""
    sections: dict[str, Any] = {
        "model": ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, window_size=8),
        "parallel": ParallelConfig(),
        "training": TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=6, precision="fp32"),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=3e-4, lr_warmup_iters=2),
        "validation": ValidationConfig(interval=3, iters=1, loop_counts=[1, 2]),
        "checkpoint": CheckpointConfig(save_interval=2),
        "logging": LoggingConfig(log_interval=1, tensorboard=False, peak_tflops=0.1),
    }
    for section, settings in [*(kind or {}).items(), *changes.items()]:
        sections[section] = changed(sections[section], settings)
    return RunConfig(name=name, output_dir=str(output_dir), data=data, **sections)


def diverging_config(output_dir: Path, data: DataConfig) -> RunConfig:
    """A run on two data-parallel ranks whose weights overflow in the first steps."""
    optimizer = {"lr": 1e25, "min_lr": 1e25, "lr_warmup_iters": 0, "clip_grad": 0.0}
    parallel, training = {"data_parallel_size": 2}, {"max_skipped_steps": 1}
    return run_config("diverging", output_dir, data, optimizer=optimizer, training=training, parallel=parallel)


def train_with_other_loss(config: RunConfig, first_sample: int) -> bool | str:
    """Train with losses about 2, and about 9 from the step on that begins with this sample."""

    def loss(trainer: Any, _: float) -> float:
        return (9.0 if trainer.clock.samples >= first_sample else 2.0) + 0.01 * (trainer.clock.step % 3)

    return train(config, judged=loss)


def train_beside_an_export(config: RunConfig, ends: bool) -> bool | str:
    """Train with a stand-in for exports that ends at once, or else never and asks the run to stop."""
    from plt_megatron.train.callbacks import exports

    class Export:
        def __init__(self, command: list[str], log: Path) -> None:
            log.touch()

        def poll(self) -> int | None:
            if not ends:
                RunFolder.of(config).stop_file.touch()
            return 0 if ends else None

        def end(self) -> None: ...

    with mock.patch.object(exports, "BesideProcess", Export):
        return train(config)


def train_in_turns(run: Callable[..., Any], ranks: int, config: RunConfig, stops: int = 1, bad_step: int = 0) -> None:
    """Have the pool train a run to its end, stopped after each of the first `stops` steps."""
    stop = RunFolder.of(config).stop_file
    stop.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(stops + 1):
        if turn < stops:
            stop.touch()
        assert run(train, ranks, config, max(0, bad_step - turn)) is (turn == stops)


def train(
    config: RunConfig, bad_step: int | Sequence[int] = 0, judged: Callable[[Any, float], float] | None = None
) -> bool | str:
    """Run a trainer to its end on this rank: whether it finished, or the message it failed with.

    The `bad_step`-th step run, or each of those, has a loss that is no number. `judged`: the loss that the guard is
    told, by the trainer and the step's own.
    """
    from megatron.core import parallel_state

    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.callbacks.base import TrainingFailed
    from plt_megatron.train.trainer import Trainer

    init_process_groups(config.parallel)
    trainer = Trainer(config)
    (guard,) = [callback.guard for callback in trainer.callbacks if callback.name == "guard"]  # type: ignore
    accept, calls = guard.accept, itertools.count(1)
    bad = [bad_step] if isinstance(bad_step, int) else bad_step

    def told(loss: float) -> float:
        return math.nan if next(calls) in bad else judged(trainer, loss) if judged else loss

    guard.accept = lambda loss, norm: accept(told(loss), norm)
    try:
        return trainer.run()
    except TrainingFailed as error:
        return str(error)
    finally:
        trainer.close()
        parallel_state.destroy_model_parallel()
