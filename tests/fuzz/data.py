"""The text of the search, made once: sources of one tokenizer in build/fuzz.

`tiny.yaml` names the first two, stages also the third, of which a token in three counts in the loss.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from plt_megatron.data.indexed import flat_tokens, open_index
from plt_megatron.data.loss_mask import mask_path
from tests.distributed.training_jobs import make_data

FOLDER = Path("build/fuzz")
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def make() -> None:
    """Make it unless it is there."""
    masked = FOLDER / "masked/text"
    if not mask_path(masked).exists():
        shutil.rmtree(FOLDER, ignore_errors=True)  # what an earlier version made, or was stopped at
        one = make_data(FOLDER / "one", special=FIM_TOKENS)
        make_data(FOLDER / "two", seed=8, tokenizer=one.tokenizer)
        make_data(FOLDER / "masked", seed=9, tokenizer=one.tokenizer)
        (flat_tokens(open_index(masked)) % 3 == 0).astype(np.uint8).tofile(mask_path(masked))
