"""What the tests of the data part share: a small corpus, and ways to run the tools."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

ROOT = Path(__file__).resolve().parents[3]

Tool = Callable[..., "subprocess.CompletedProcess[str]"]

WORDS = (
    "the of loop attention window gate hidden state parallel token while for return def class self.value "
    "x=1 (a+b) [0, 1] {'k': 3.25} \u00fcber na\u00efve \u65e5\u672c\u8a9e \U0001f600 12,345 CamelCase snake_case -- ==="
).split(" ")

_SYLLABLES = ("ka", "lo", "mi", "ter", "ing", "ex", "pro", "un", "st", "ary", "ed", "que", "vor", "sh", "ple", "ond")
_rng = random.Random(42)
WORDS += ["".join(_rng.choices(_SYLLABLES, k=_rng.randrange(1, 5))) for _ in range(400)]


def make_text(rng: random.Random, words: int) -> str:
    """Prose, code-like lines, indentation and rare characters."""
    pieces = []
    for _ in range(words):
        pieces.append(rng.choice(WORDS))
        pieces.append(rng.choice((" ", " ", " ", " ", "\n", "\n    ", "\t", "  ")))
    return "".join(pieces)


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [make_text(rng, rng.randrange(1, 2 * words)) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def train(corpus: Path, folder: Path, **settings: object) -> Path:
    options = TrainingOptions([str(corpus)], str(folder), 560, threads=1, **settings)  # type: ignore[arg-type]
    return train_tokenizer(options).model


def tool_environment() -> dict[str, str]:
    """No PYTHONPATH: the tools find the package by themselves."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}
