"""All checks of a configuration that work without torch, before a process group or a model exists.

`validate` collects all problems, so that one run of a command shows them all. Checks that relate settings to
one another assume that each setting is in its own range (`fields`), so they run only when all are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config import derived, loop_schedule, schedules
from plt_megatron.config.fields import find_type_problems
from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import place
from plt_megatron.config.rules import data, deepspeed, fp8, fusions, model, optimizer, parallel, run, uploads
from plt_megatron.config.schema import DataSource, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.extras import lacking

_LONGEST_NAME = 255  # bytes, on the usual file systems


def validate(
    config: RunConfig,
    *,
    world_size: int | None = None,
    check_files: bool = True,
    check_packages: bool | None = None,
    have_te: bool | None = None,
    capability: tuple[int, int] | None = None,
) -> None:
    """Raise one `UserError` with a line per problem, if there are any.

    `world_size`: number of processes the run gets; None: as many as the layout asks for (plt train).
    `check_files`: also check this machine: data files, tokenizer, folders.
    `check_packages`: also look for optional packages; None: with `check_files`. A container has packages of its own.
    `have_te`: whether Transformer Engine is installed; None: find out (without importing it).
    `capability`: the card's compute capability, if known: FP8 kernels depend on it.
    """
    problems = find_problems(
        config,
        world_size=world_size,
        check_files=check_files,
        check_packages=check_packages,
        have_te=have_te,
        capability=capability,
    )
    if problems:
        raise UserError("\n".join(problems))


def find_problems(
    config: RunConfig,
    *,
    world_size: int | None = None,
    check_files: bool = True,
    check_packages: bool | None = None,
    have_te: bool | None = None,
    capability: tuple[int, int] | None = None,
) -> list[str]:
    """Return the problems `validate` would raise, one line each, after the file and line of the first setting named."""
    problems = list(find_type_problems(config))
    if problems and (wrong := list(find_type_problems(config, ranges=False))):  # no other check could read them
        return place(config, wrong)
    problems += _check_required(config)
    if not problems:
        problems += schedules.batch_problems(config)
        problems += schedules.length_problems(config)
    if not problems:
        problems += model.find_problems(config)
        problems += parallel.find_problems(config, world_size)
        problems += optimizer.find_problems(config)
        problems += loop_schedule.find_problems(config)
        problems += run.find_problems(config, world_size)
        problems += uploads.find_problems(config)
        problems += data.find_problems(config)
        problems += deepspeed.find_problems(config, world_size)
        have = have_te if check_files else bool(have_te)
        problems += parallel.find_te_problems(config, have)
        problems += fp8.find_problems(config, capability)
        problems += fusions.find_problems(config)
    if check_files:
        problems += _check_files(config)
    if check_files if check_packages is None else check_packages:
        problems += package_problems(config, have_te)
    return place(config, problems)


def processes_on(config: RunConfig, devices: int) -> int:
    """Return how many processes a machine with this many devices runs: as many as the layout asks for and, if it leaves
    data parallelism open, copies of it on the other devices as far as the batch can be divided."""
    least = layout_of(config).world_size
    if config.parallel.data_parallel_size is None:
        for count in range(devices - devices % least, least, -least):
            if not find_problems(config, world_size=count, check_files=False):
                return count
    return least


# ---------------------------------------------------------------- each setting by itself


def _check_required(config: RunConfig) -> Iterator[str]:
    """Check settings by themselves, and those of which one must be given."""
    if config.training.train_iters is None and config.training.train_tokens is None:
        yield "training: give the run's length, either train_iters or train_tokens"
    if derived.split_shares(config.data.split) is None:
        yield f"data.split must be three numbers >= 0 with a positive sum, as in 95,5,0; got {config.data.split!r}"
    for key, path in (("output_dir", config.output_dir), ("data.index_cache", config.data.index_cache)):
        if path is not None and path.startswith(("~", "$")):
            yield f"{key} {path}: only a shell reads ~ and $NAME, at the start of a word; write the whole path"
    if config.data.tokenizer is None and config.model.vocab_size is None:
        yield "give data.tokenizer, or model.vocab_size if the tokenized data needs none"
    parts = Path(config.name).parts
    if not parts or Path(config.name).is_absolute() or ".." in parts or "\0" in config.name:
        yield f"name must be a folder name below output_dir, got {config.name!r}"
    elif too_long := next((part for part in parts if len(os.fsencode(part)) > _LONGEST_NAME), None):
        yield f"name: {too_long[:20]}... has {len(os.fsencode(too_long))} bytes, a folder name at most {_LONGEST_NAME}"


# ---------------------------------------------------------------- this machine


def _check_files(config: RunConfig) -> Iterator[str]:
    for key, source in schedules.all_sources(config.data):
        yield from _check_source(source, f"{key}.path")
    if config.data.tokenizer is not None:
        yield from _check_tokenizer(Path(config.data.tokenizer))
    load = config.checkpoint.load
    is_missing = load is not None and not uploads.is_url(load) and not Path(load).exists()
    if is_missing and not derived.has_checkpoints(config):  # a run reads its own first
        yield f"checkpoint.load: {load} not found"
    folder = None if config.evaluation is None else config.evaluation.include_path
    if folder is not None and not Path(folder).is_dir():
        yield f"evaluation.include_path: there is no folder {folder}"
    yield from _check_writable(derived.run_folder(config))


def _check_source(source: DataSource, key: str) -> Iterator[str]:
    missing = derived.missing_files(source.path)
    if not missing or not source.path:
        return
    root, suffix = os.path.splitext(source.path)
    if suffix in (".bin", ".idx") and Path(root + ".bin").is_file():
        yield f"{key}: give the prefix without {suffix}: {root}"
        return
    names = " and ".join(source.path + suffix for suffix in missing)
    yield (f"{key}: {names} not found (paths are relative to the current directory; plt preprocess makes them)")


def _check_tokenizer(path: Path) -> Iterator[str]:
    """Check that the library that will encode with the file, or with the folder's file, can read it."""
    file = next((path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()), path)
    if file.is_dir():
        yield f"data.tokenizer: the folder {path} holds neither tokenizer.model nor tokenizer.json"
        return
    if not file.is_file():
        yield (
            f"data.tokenizer: {path} not found (paths are relative to the current directory; "
            "plt train-tokenizer makes one)"
        )
        return
    try:
        if file.suffix == ".json":
            import tokenizers

            tokenizers.Tokenizer.from_file(str(file))
        else:
            import sentencepiece

            sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # neither library documents its exception types
        kind = "Hugging Face tokenizer.json" if file.suffix == ".json" else "sentencepiece model"
        yield f"data.tokenizer: {file} is not a {kind} ({' '.join(str(error).split())})"


def _check_writable(folder: Path) -> Iterator[str]:
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path())
    if not existing.is_dir():
        yield f"output_dir: the run folder {folder} cannot be created: {existing} is not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"output_dir: the run folder {folder} cannot be written: no permission for {existing}"


def package_problems(config: RunConfig, have_te: bool | None = None) -> Iterator[str]:
    """Yield each setting that needs modules that are not installed, and how to do without them. `have_te`: as for
    `validate`."""
    needs_te = config.model.backend == "te" and have_te is not True
    package = optimizer.optimizer_spec(config.optimizer).package
    used: list[tuple[object, str, tuple[str, ...], str]] = [
        (needs_te, "model.backend te", ("transformer_engine",), "model.backend=torch"),
        (config.evaluation, "evaluation", ("lm_eval", "accelerate", "transformers"), "evaluation=null"),
        (config.checkpoint.exports, "checkpoint.exports", ("transformers",), "checkpoint.exports=null"),
        (config.logging.straggler, "logging.straggler", ("nvidia_resiliency_ext",), "logging.straggler=null"),
        (config.logging.wandb_project, "logging.wandb_project", ("wandb",), "logging.wandb_project=null"),
        (package, f"optimizer.name {config.optimizer.name}", (package or "",), "optimizer.name=adam"),
        (config.deepspeed, "deepspeed", ("deepspeed",), "deepspeed=null"),
    ]
    unusable: dict[str, str | None] = {}  # of protocols
    for key, url in uploads.used_urls(config):
        if key == "checkpoint.load" and derived.has_checkpoints(config):  # a run reads its own
            continue
        modules, off = uploads.packages_for(uploads.protocol_of(url)), f"{key.removesuffix('.to')}=null"
        used.append((url, key, modules, off))  # uploads are off without their section
        unusable[key] = None if lacking(*modules) else uploads.protocol_problem(uploads.protocol_of(url))
    for is_used, setting, modules, off in used:
        if is_used and (why := lacking(*modules) or unusable.get(setting)):
            yield f"{setting} {why}, or set {off}"
