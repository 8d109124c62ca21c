"""The demo's corpus, a tokenizer trained on it, and the tokenized data, in steps that run once.

Each step leaves a stamp, and is skipped as long as the stamp is valid: while everything that the step depends on (its
settings, the content of its input files) is unchanged and its outputs exist with the same sizes. An interrupted step
runs again on its partial outputs, so that it can continue where it stopped; if something that it depends on has
changed, its outputs are removed first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from plt_megatron.config.fields import Size
from plt_megatron.data.demo_corpus import DOMAINS, SOURCES, domain_files, write_demo_corpus, write_domain
from plt_megatron.data.tokenizer import TOKENIZER_FILES
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.text import format_bytes, format_duration
from plt_megatron.runtime.local_processes import usable_cores

PARTS = ("train", "validation")


@dataclass(frozen=True)
class DemoCorpus:
    """Data of `make demo` with a tokenizer of another size, and data of further domains, made before the first run."""

    vocab_size: Size = 2048
    folder: str = ".demo/vocab_2048"
    domains: list[Literal["torch", "manuals", "prose", "mathematics"]] = field(default_factory=list)


def prepare_demo_corpus(settings: DemoCorpus, *, is_read: bool) -> None:
    """Make whatever is missing or outdated of a sweep's corpus, tokenizer and tokenized data. `is_read`: runs of
    this one have read it, so that what is whole is kept, as what other sweeps have prepared is.

    The corpus, in the folder above `settings.folder`, is the code corpus of `make demo`; each reuses the other's.
    Further domains are stored beside it, and beside its data as `prose_train_text_document` and so on.
    Raises `UserError` when a step fails, or would replace data that runs have read.
    """
    folder = Path(settings.folder)
    prefix, corpus = f"{folder.name}_", folder.parent / "corpus"
    steps = data_steps(corpus, folder, folder, vocab_size=settings.vocab_size, prefix=prefix, domains=settings.domains)
    stamps = folder.parent / "stamps"
    for name, stamp in run_steps(steps, stamps, is_read=is_read).items():
        if not stamp.is_read:
            _write(stamps / f"{name}.json", replace(stamp, is_read=True))


def data_steps(
    corpus: Path, tokenizer: Path, data: Path, *, vocab_size: int, prefix: str = "", domains: Sequence[str] = ()
) -> list[Step]:
    """Return the steps for corpus, further domains, tokenizer and data.

    Args:
        corpus, tokenizer, data: folders.
        prefix: prefix of the stamps' names, if several tokenizers share a corpus and a folder of stamps.
        domains: names in `demo_corpus.DOMAINS`, in addition to the demo's corpus.
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
                title=f"corpus: {_described(domain)}",
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
    documents, size = write_demo_corpus(folder)
    print(f"      {documents:,} files, {format_bytes(size)}", flush=True)


def _described(domain: str) -> str:
    return f"{domain}, the {'sources' if domain in SOURCES else 'documentation'} of {', '.join(DOMAINS[domain])}"


def _versions(domain: str) -> str:
    """Return the versions that the domain's texts depend on."""
    return " ".join([sys.version, *(version(package) for package in DOMAINS[domain])])


def make_tokenizer(texts: Sequence[Path], folder: Path, vocab_size: int) -> None:
    from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

    options = TrainingOptions([str(text) for text in texts], str(folder), vocab_size, overwrite=True)
    print(train_tokenizer(options).summary, flush=True)


def tokenize_text(text: Path, prefix: Path, tokenizer: Path) -> None:
    from plt_megatron.data.preprocess import PreprocessOptions, preprocess

    preprocess(PreprocessOptions([str(text)], str(prefix), str(tokenizer), workers=usable_cores(), overwrite=True))


# ---------------------------------------------------------------- steps that run once


@dataclass(frozen=True)
class Step:
    """One piece of work.

    Attributes:
        name: name of its stamp.
        title: description shown to the user.
        settings: whatever the result depends on besides the inputs, as text.
        inputs: files whose content it depends on; they exist when the step's turn comes.
        outputs: files or folders that only this step makes.
        run: does the work; may be called again after an interruption.
        folder: holds the outputs, and what others add; removed with them before the step runs anew.
    """

    name: str
    title: str
    settings: str
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    run: Callable[[], None]
    folder: Path | None = None


@dataclass
class Stamp:
    """Record of a step's last run. `seconds` is its working time, interrupted attempts included. `is_read`: runs may
    have read the outputs since, of any sweep that shares them."""

    key: str
    finished: bool
    seconds: float
    sizes: dict[str, int]
    is_read: bool = False


def run_steps(steps: Sequence[Step], stamps: Path, *, is_read: bool = False) -> dict[str, Stamp]:
    """Run the steps in order, as `run_step` does; return their stamps by name."""
    total = len(steps)
    return {step.name: run_step(step, stamps, number, total, is_read) for number, step in enumerate(steps, start=1)}


def run_step(step: Step, stamps: Path, number: int, total: int, is_read: bool = False) -> Stamp:
    """Run the step unless it has a valid stamp in the folder `stamps`; print which is the case.

    Raises whatever `step.run` raises, and `UserError` if an output is missing afterwards, or one that `is_read` would
    have to be replaced.
    """
    path = stamps / f"{step.name}.json"
    key, stamp = _key(step), _read(path)
    print(f"[{number}/{total}] {step.title}", flush=True)
    sizes = _sizes(step)
    # An earlier version's stamp has other outputs: the folder that they lie in.
    is_former = stamp is not None and len(sizes) == len(step.outputs) and sizes.keys().isdisjoint(stamp.sizes)
    if stamp is not None and stamp.key == key and stamp.finished and (stamp.sizes == sizes or is_former):
        print("      already done", flush=True)
        return stamp
    is_read = is_read or (stamp is not None and stamp.is_read)
    if is_read and sizes and (stamp is None or stamp.finished):
        if stamp is None or stamp.sizes != sizes or step.inputs:
            raise UserError(f"{_difference(step, path, stamp, sizes)}, or give another demo_corpus.folder and name")
        print("      kept, since runs have read it: what this machine has would be other text", flush=True)
        return stamp
    if stamp is None or stamp.key != key or stamp.finished:
        _remove([step.folder] if step.folder else step.outputs)
        stamp = Stamp(key, finished=False, seconds=0.0, sizes={})
    _write(path, stamp)
    begun = time.monotonic()
    try:
        step.run()
    finally:
        stamp.seconds += time.monotonic() - begun
        _write(path, stamp)
    missing = [str(output) for output in step.outputs if not output.exists()]
    if missing:
        raise UserError(f"step {step.name} did not make {', '.join(missing)}")
    stamp.finished, stamp.sizes = True, _sizes(step)
    _write(path, stamp)
    print(f"      done in {format_duration(stamp.seconds)}", flush=True)
    return stamp


def _difference(step: Step, path: Path, stamp: Stamp | None, sizes: dict[str, int]) -> str:
    """Describe why outputs that runs have read are not the step's, and how to mend that. `path`: of the stamp."""
    if stamp is None:
        return f"{next(iter(sizes))} has no valid stamp {path}, and runs have read it: copy the stamp, too"
    changed = [name for name in map(str, step.outputs) if stamp.sizes.get(name) != sizes.get(name)]
    if changed:
        return f"{changed[0]} is not as {path} records it, and runs have read it: restore both"
    made = "was made with another vocabulary or from other text"
    return f"{step.outputs[0]} {made}, and runs have read it: restore that"


def _key(step: Step) -> str:
    digest = hashlib.sha256(step.settings.encode())
    for path in step.inputs:
        digest.update(f"\0{path.name}\0".encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def _sizes(step: Step) -> dict[str, int]:
    """Return the bytes of each output, a folder as the sum of its files. Missing outputs are left out."""
    sizes = {}
    for output in step.outputs:
        if output.is_dir():
            sizes[str(output)] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        elif output.exists():
            sizes[str(output)] = output.stat().st_size
    return sizes


def _remove(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.is_dir() and not output.is_symlink():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def _read(path: Path) -> Stamp | None:
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # no stamp, or one of another version
        return None


def _write(path: Path, stamp: Stamp) -> None:
    write_json(path, asdict(stamp), indent=None)
