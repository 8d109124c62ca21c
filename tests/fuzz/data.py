"""The text of the search, made once: two sources of one tokenizer in build/fuzz, as `tiny.yaml` names them."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.training_jobs import make_data

FOLDER = Path("build/fuzz")
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def make() -> None:
    """Make it unless it is there."""
    done = FOLDER / ".complete"
    if not done.exists():
        one = make_data(FOLDER / "one", special=FIM_TOKENS)
        make_data(FOLDER / "two", seed=8, tokenizer=one.tokenizer)
        done.touch()
