"""The demo's corpus with a vocabulary of another size, for sweeps that train on it. Done once, as in the demo."""

from __future__ import annotations

import sys
from pathlib import Path

from plt_megatron.data.demo_corpus import write_demo_corpus
from plt_megatron.errors import UserError
from plt_megatron.experiments.demo import run_tool
from plt_megatron.experiments.steps import Step, run_step
from plt_megatron.experiments.sweep_file import DemoCorpus

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("train", "validation")


def prepare_demo_corpus(settings: DemoCorpus) -> None:
    """Make corpus, tokenizer and tokenized data in `settings.folder`, unless they lie there as they should.

    The corpus itself is shared with `make demo`: it lies in the folder above, and either makes it for the other.
    Raises `UserError` when a step fails.
    """
    steps = demo_steps(settings)
    for number, step in enumerate(steps, start=1):
        stamps = Path(settings.folder).parent / "stamps"
        run_step(step, stamps, number, len(steps))


def demo_steps(settings: DemoCorpus) -> list[Step]:
    """Corpus (the same step as the demo's), tokenizer, data."""
    folder = Path(settings.folder)
    corpus = {part: folder.parent / "corpus" / f"{part}.jsonl" for part in PARTS}
    data = {part: folder / f"{part}_text_document" for part in PARTS}
    tokenizer = [folder / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")]

    def write_corpus() -> None:
        made = write_demo_corpus(corpus["train"].parent)
        print(f"      {made.documents:,} files, {made.bytes / 1e6:.1f} MB", flush=True)

    def train_tokenizer() -> None:
        arguments = ["--input", str(corpus["train"]), "--output", str(folder), "--overwrite"]
        _tool("train_tokenizer.py", *arguments, "--vocab-size", str(settings.vocab_size))

    def tokenize() -> None:
        for part in PARTS:
            arguments = ["--input", str(corpus[part]), "--output-prefix", str(data[part]), "--overwrite"]
            _tool("preprocess_data.py", *arguments, "--tokenizer", str(tokenizer[0]))

    tokens = [prefix.with_name(prefix.name + suffix) for prefix in data.values() for suffix in (".bin", ".idx")]
    source = "corpus: the Python sources of the standard library"
    return [
        Step("corpus", source, sys.version, [], list(corpus.values()), write_corpus),
        Step(
            name=f"{folder.name}_tokenizer",
            title=f"tokenizer: sentencepiece, {settings.vocab_size:,} pieces",
            settings=str(settings.vocab_size),
            inputs=list(corpus.values()),
            outputs=tokenizer,
            run=train_tokenizer,
        ),
        Step(
            name=f"{folder.name}_data",
            title="tokenized data in megatron-core's indexed format",
            settings="",
            inputs=[*corpus.values(), tokenizer[0]],
            outputs=tokens,
            run=tokenize,
        ),
    ]


def _tool(script: str, *arguments: str) -> None:
    try:
        run_tool(str(ROOT / "tools" / script), *arguments)
    except UserError as error:
        raise UserError(
            f"making the sweep's data: {error}".replace("run the demo again", "run the sweep again")
        ) from None
