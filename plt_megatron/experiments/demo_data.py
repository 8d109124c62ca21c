"""The demo's corpus, a tokenizer trained on it, and the tokenized data. Finished steps are skipped."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from plt_megatron.data.demo_corpus import write_demo_corpus
from plt_megatron.data.domain_corpus import DOMAINS, domain_files, write_domain
from plt_megatron.experiments.steps import Step, run_step
from plt_megatron.experiments.sweep_file import DemoCorpus
from plt_megatron.run_folder.text import format_bytes

PARTS = ("train", "validation")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def prepare_demo_corpus(settings: DemoCorpus) -> None:
    """Make what is missing or outdated of a sweep's corpus, tokenizer and tokenized data.

    The corpus, in the folder above `settings.folder`, is that of `make demo`, whose texts are code; each reuses the
    other's. Further domains lie beside it, and beside its data as `prose_train_text_document` and so on.
    Raises `UserError` when a step fails.
    """
    folder = Path(settings.folder)
    steps = data_steps(
        folder.parent / "corpus",
        folder,
        folder,
        vocab_size=settings.vocab_size,
        prefix=f"{folder.name}_",
        domains=settings.domains,
    )
    for number, step in enumerate(steps, start=1):
        run_step(step, folder.parent / "stamps", number, len(steps))


def data_steps(
    corpus: Path, tokenizer: Path, data: Path, *, vocab_size: int, prefix: str = "", domains: Sequence[str] = ()
) -> list[Step]:
    """Corpus, further domains, tokenizer, data.

    Args:
        corpus, tokenizer, data: folders.
        prefix: of the stamps' names, where several tokenizers share a corpus and a folder of stamps.
        domains: of `domain_corpus.DOMAINS`, beside the demo's.
    """
    code = [corpus / f"{part}.jsonl" for part in PARTS]
    others = {domain: domain_files(corpus, domain) for domain in domains}
    texts = [*code, *(path for files in others.values() for path in files.values())]
    tokenizer_files = [tokenizer / name for name in TOKENIZER_FILES]
    data_prefixes = [data / f"{text.stem}_text_document" for text in texts]

    def tokenize() -> None:
        for text, data_prefix in zip(texts, data_prefixes, strict=True):
            tokenize_text(text, data_prefix, tokenizer_files[0])

    return [
        Step(
            name="corpus",
            title="corpus: the Python sources of the standard library",
            settings=sys.version,
            inputs=[],
            outputs=code,
            run=lambda: write_corpus(corpus),
        ),
        *(
            Step(
                name=f"corpus_{domain}",
                title=f"corpus: {domain}, the documentation of {', '.join(DOMAINS[domain])}",
                settings=_versions(domain),
                inputs=[],
                outputs=list(files.values()),
                run=functools.partial(write_domain, corpus, domain),
            )
            for domain, files in others.items()
        ),
        Step(
            name=f"{prefix}tokenizer",
            title=f"tokenizer: sentencepiece, {vocab_size:,} pieces",
            settings=str(vocab_size),
            inputs=texts,
            outputs=tokenizer_files,
            run=lambda: make_tokenizer(texts[:: len(PARTS)], tokenizer, vocab_size),
        ),
        Step(
            name=f"{prefix}data",
            title="tokenized data in megatron-core's indexed format",
            settings="",
            inputs=[*texts, tokenizer_files[0]],
            outputs=[Path(f"{path}{suffix}") for path in data_prefixes for suffix in (".bin", ".idx")],
            run=tokenize,
        ),
    ]


def write_corpus(folder: Path) -> None:
    made = write_demo_corpus(folder)
    print(f"      {made.documents:,} files, {format_bytes(made.bytes)}", flush=True)


def _versions(domain: str) -> str:
    """What the domain's texts depend on."""
    return " ".join([sys.version, *(version(package) for package in DOMAINS[domain])])


def make_tokenizer(texts: Sequence[Path], folder: Path, vocab_size: int) -> None:
    from plt_megatron.data.tokenizer_training import TrainingOptions, describe, train_tokenizer

    options = TrainingOptions([str(text) for text in texts], str(folder), vocab_size, overwrite=True)
    print(describe(train_tokenizer(options)), flush=True)


def tokenize_text(text: Path, prefix: Path, tokenizer: Path) -> None:
    from plt_megatron.data.preprocess import PreprocessOptions, preprocess

    workers = os.cpu_count() or 1
    preprocess(PreprocessOptions([str(text)], str(prefix), str(tokenizer), workers=workers, overwrite=True))
