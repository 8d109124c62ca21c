"""What the tests of the data part share: a small corpus, and ways to run the tools."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from plt_megatron.config.schema import DataConfig, RunConfig, TrainingConfig
from plt_megatron.data.indexed import write_index
from plt_megatron.data.preprocess import PreprocessOptions, preprocess
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

Tool = Callable[..., "subprocess.CompletedProcess[str]"]

WORDS = (
    "the of loop attention window gate hidden state parallel token while for return def class self.value "
    "x=1 (a+b) [0, 1] {'k': 3.25} \u00fcber na\u00efve \u65e5\u672c\u8a9e \U0001f600 12,345 CamelCase snake_case -- ==="
).split(" ")

_SYLLABLES = ("ka", "lo", "mi", "ter", "ing", "ex", "pro", "un", "st", "ary", "ed", "que", "vor", "sh", "ple", "ond")
_rng = random.Random(42)
WORDS += ["".join(_rng.choices(_SYLLABLES, k=_rng.randrange(1, 5))) for _ in range(400)]


ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# ChatML as most models have it; with marks, transformers tells the answers itself.
CHATML, MARKED_CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}" + begin + "{{ m['content'] }}<|im_end|>" + end + "{% else %}"
    "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}" + ASK
    for begin, end in (("", ""), ("{% generation %}", "{% endgeneration %}"))
)


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


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Compressed, if it is named `.gz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def train(corpus: Path, folder: Path, vocab_size: int = 560, threads: int | None = 1, **settings: Any) -> Path:
    return train_tokenizer(TrainingOptions([str(corpus)], str(folder), vocab_size, threads=threads, **settings)).model


def build(
    data: DataConfig, counts: tuple[int, int, int], cache: Path, tokenizer: Tokenizer | None = None, seed: int = 1
) -> Any:
    """`build_datasets`, with parts that are there."""
    from plt_megatron.data.datasets import build_datasets  # slow to import

    return build_datasets(run_of(data, cache, seed), counts, tokenizer)


def run_of(data: DataConfig, cache: Path, seed: int = 1) -> RunConfig:
    """A run of this data, with its sample index in `cache`."""
    return RunConfig(data=dataclasses.replace(data, index_cache=str(cache)), training=TrainingConfig(seed=seed))


def write_source(prefix: Path, tokens: Any, lengths: Any, dtype: Any = np.uint16) -> str:
    """A tokenized source without a manifest; its prefix."""
    np.asarray(tokens, dtype).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), dtype, lambda: [np.asarray(lengths, np.int32)])
    return str(prefix)


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int | None = None, **options: Any) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), path, row_group_size=row_group_size, **options)
    return path


def tool_environment(**added: str) -> dict[str, str]:
    """No PYTHONPATH: the tools find the package by themselves."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1"} | added


def run_preprocess(inputs: list[Path], prefix: Path, model: Path, **settings: Any) -> dict[str, Any]:
    return preprocess(PreprocessOptions([str(path) for path in inputs], str(prefix), str(model), **settings))


def documents(prefix: Path) -> list[list[int]]:
    """What is in the files, read with nothing of ours but the format's description."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0"
    code = raw[17]
    count = int(np.frombuffer(raw, "<u8", 1, 18)[0])
    lengths = np.frombuffer(raw, "<i4", count, 34)
    pointers = np.frombuffer(raw, "<i8", count, 34 + 4 * count)
    dtype = np.dtype({8: "<u2", 4: "<i4"}[code])
    tokens = np.frombuffer(Path(f"{prefix}.bin").read_bytes(), dtype)
    starts = pointers // dtype.itemsize
    assert lengths.sum() == len(tokens)
    return [tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


def bad_lines(prefix: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, Path(f"{prefix}.bad_lines.jsonl").read_text().splitlines()))


def reference(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def expected(model: Path, texts: list[str]) -> list[list[int]]:
    processor = reference(model)
    return [processor.encode(text) + [processor.eos_id()] for text in texts]


def digest(prefix: Path) -> list[str]:
    return [hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest() for suffix in (".bin", ".idx")]


def chat_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level BPE with ChatML's tokens and a template, as transformers saves one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rng = random.Random(1)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([make_text(rng, 60) for _ in range(40)], trainer)
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder
