"""One thread, no network, and a tiny tokenizer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For all tests of this folder."""


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 400 ids, with a tokenizer.json beside it."""
    from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["loop", "window", "gate ", "def f(x):\n", "    return x\n", "token", "the ", "\u00e9t\u00e9 ", "12,5 "]
    rng = random.Random(3)
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(rng.choices(words, k=4000)), encoding="utf-8")
    options = TrainingOptions([str(corpus)], str(folder / "out"), 400, threads=1)
    return train_tokenizer(options).model


@pytest.fixture
def run(tmp_path):
    """A run of a small PLT: (folder, model, weights)."""
    from convert_helpers import save_random

    return tmp_path / "run", *save_random(tmp_path / "run")
