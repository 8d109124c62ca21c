"""The text of the search, made once: sources of one tokenizer in build/fuzz.

`tiny.yaml` names the first two, of which one is in two parts. Stages also name the third: a token in three counts in
the loss.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from plt_megatron.data.indexed import flat_tokens, mask_path, open_index
from plt_megatron.data.joining import join
from plt_megatron.data.preprocess import PreprocessOptions, preprocess, shard_prefix
from tests.distributed.training_jobs import make_data

FOLDER = Path("build/fuzz")
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def make() -> None:
    """Make it unless it is there."""
    masked = FOLDER / "masked/text"
    two = FOLDER / "two/text"
    if not mask_path(masked).exists() or not Path(f"{two}.parts.json").exists():
        shutil.rmtree(FOLDER, ignore_errors=True)  # what an earlier version made, or was stopped at
        one = make_data(FOLDER / "one", special=FIM_TOKENS)
        make_data(FOLDER / "two", seed=8, tokenizer=one.tokenizer)
        _divide(two)
        make_data(FOLDER / "masked", seed=9, tokenizer=one.tokenizer)
        (flat_tokens(open_index(masked)) % 3 == 0).astype(np.uint8).tofile(mask_path(masked))


def _divide(prefix: Path) -> None:
    """Make the source one in two parts."""
    made_with = json.loads(Path(f"{prefix}.manifest.json").read_text())["tokenizer"]["path"]
    corpus = [str(prefix.with_name("corpus.jsonl"))]
    for number in (1, 2):
        preprocess(PreprocessOptions(corpus, str(prefix), made_with, shard_bytes=4096, shard=(number, 2)))
    for suffix in (".bin", ".idx", ".manifest.json"):
        Path(f"{prefix}{suffix}").unlink()
    join([shard_prefix(str(prefix), number, 2) for number in (1, 2)], str(prefix))
