"""Imports a Hugging Face folder as a training checkpoint, for continued pretraining of a public model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from plt_megatron.config import derived, yaml_nodes
from plt_megatron.config.presets import LOOP_PRESETS
from plt_megatron.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.hf import gguf
from plt_megatron.hf.checkpoint_writer import LazyTensor, padded, write_checkpoint
from plt_megatron.hf.config_keys import HFModelConfig, read_config
from plt_megatron.hf.lineage import read_lineage
from plt_megatron.hf.param_mapping import ParamMapping, mappings_for
from plt_megatron.hf.publishing import check_target, published_folder
from plt_megatron.hf.safetensors_files import SafetensorsFolder
from plt_megatron.hf.sources import PRECISIONS, check_hf_tensors, hf_precision
from plt_megatron.hf.tokenizer_files import copy_tokenizer

MODEL_YAML = "model.yaml"
_TRAINABLE = ("fp32", "bf16")


@dataclass(frozen=True)
class ImportOptions:
    """Options for importing. See `plt import --help`.

    Attributes:
        loop_count: number of loops; None: the model's own, 1 for a dense model.
        preset: how the loops added to a one-loop model are parameterized (config/presets.py), keeping its logits at
            first; None: as in the paper, which changes them.
        loop_span: (first, last), the layers of a one-loop model that will loop; None: all.
        key_shift: keys and values get a learned share of the previous token's, initially zero.
        precision: fp32 or bf16; None: the files', or fp32 if that is fp16 (which bf16 would round).
    """

    model: Path
    output: Path
    loop_count: int | None = None
    preset: str | None = None
    loop_span: Sequence[int] | None = None
    key_shift: bool = False
    precision: str | None = None


@dataclass(frozen=True)
class ImportResult:
    """The output.

    Attributes:
        checkpoint: the published folder.
        model: the imported model's settings.
        new_loops: whether the files have a one-loop model and the import has several loops.
        fresh: number of tensors that the files lack and that start as in a new model: gates, their norms, loop scales.
        dropped: number of tensors in the files that the model does not use.
        tokenizer: the copy that training reads, None if there was none.
    """

    output: Path
    checkpoint: Path
    family: str
    model: ModelConfig
    new_loops: bool
    precision: str
    tensors: int
    fresh: int
    dropped: int
    tokenizer: Path | None


def import_model(options: ImportOptions) -> ImportResult:
    """Write a run's folder with one weights-only checkpoint at step 0, completely or not at all.

    Raises:
        UserError: the folder is not a known model, is broken, or the target exists.
    """
    check_target(options.output)
    if options.model.suffix == gguf.SUFFIX:
        with TemporaryDirectory(prefix="plt-gguf-") as place:
            folder = Path(place) / options.model.stem
            gguf.unpack(options.model, folder)
            return import_model(dataclasses.replace(options, model=folder))
    described = read_config(options.model)
    target = read_config(options.model, options.loop_count)
    if options.loop_span is not None:
        target.model = _with_span(target.model, described.model, list(options.loop_span))
    if options.preset is not None:
        target.model = _with_preset(target.model, described.model, options.preset)
    if options.key_shift:
        target.model = _with_key_shift(target.model)
    files = SafetensorsFolder(options.model)
    source_mappings = mappings_for(described.model, described.vocab_size, described.style)
    check_hf_tensors(files, source_mappings, described.model)
    precision = _precision(options, files)
    mappings = mappings_for(target.model, target.vocab_size)
    tensors, fresh = _tensors(files, source_mappings, mappings, target)
    names = {mapping.name for mapping in mappings}
    with published_folder(options.output) as folder:
        tokenizer = copy_tokenizer(options.model, folder / "tokenizer", target.family, target.vocab_size, target.tokens)
        # Absolute: a run may start from any folder.
        published = options.output.absolute() / tokenizer.relative_to(folder) if tokenizer else None
        config = _run_config(options, target, precision, published)
        origin = f"{options.model.resolve().name} ({target.family})"
        progress = {"imported_from": origin, "special_tokens": target.tokens, **read_lineage(options.model)}
        checkpoint = write_checkpoint(
            folder / "checkpoints", tensors, config, target.vocab_size, PRECISIONS[precision], progress
        )
        (folder / MODEL_YAML).write_text(_model_yaml(config, options.output.absolute()), encoding="utf-8")
    return ImportResult(
        output=options.output,
        checkpoint=options.output / checkpoint.relative_to(folder),
        family=target.family,
        model=target.model,
        new_loops=described.model.loop_count == 1 < target.model.loop_count,
        precision=precision,
        tensors=len(mappings),
        fresh=fresh,
        dropped=sum(mapping.name not in names for mapping in source_mappings),
        tokenizer=published,
    )


def _with_preset(model: ModelConfig, source: ModelConfig, preset: str) -> ModelConfig:
    """Return the model with the preset's loops around the source's layers, which stay as they are.

    Raises:
        UserError: there are no new loops, or the preset's would change the first logits.
    """
    if source.loop_count > 1:
        raise UserError(
            f"--preset is for one-loop models; this model's {source.loop_count} loops have settings of their own"
        )
    if model.loop_count == 1:
        raise UserError("--preset says how later loops are parameterized: also give --loop-count 2 or more")
    branches = {name: getattr(source, name) for name in ("residual_scaling", "residual_scale")}
    model = dataclasses.replace(model, **{**LOOP_PRESETS[preset], **branches, "gate_activation": "tanh"})
    if not derived.starts_as_one_loop(model):
        read = f"{model.embedding_scale:g} E + {model.hidden_scale:g} h"
        raise UserError(
            f"--preset {preset}: later loops would read {read} instead of E, so the logits would differ from the "
            "model's at first; use --preset recommended"
        )
    return model


def _with_span(model: ModelConfig, source: ModelConfig, span: list[int]) -> ModelConfig:
    """Return the model with new loops over some of the source's layers.

    Raises:
        UserError: there are no new loops, or no such layers.
    """
    if source.loop_count > 1:
        raise UserError(f"--loop-span is for one-loop models; this model's {source.loop_count} loops have their layers")
    if model.loop_count == 1:
        raise UserError("--loop-span says which layers loop: also give --loop-count 2 or more")
    if not 0 <= span[0] < span[1] <= model.num_layers:
        first, last = span
        raise UserError(f"--loop-span {first} {last}: give 0 <= FIRST < LAST <= {model.num_layers}, the model's layers")
    return dataclasses.replace(model, loop_span=span)


def _with_key_shift(model: ModelConfig) -> ModelConfig:
    """Return the model with learned shares of the previous token's keys and values, initially zero.

    Raises:
        UserError: the model has shifted keys already.
    """
    if model.key_shift != "none":
        raise UserError(f"--key-shift: the model has key_shift {model.key_shift} already; leave it out")
    return dataclasses.replace(model, key_shift="learned")


def _precision(options: ImportOptions, files: SafetensorsFolder) -> str:
    found = hf_precision(files)
    if options.precision is None:
        return found if found in _TRAINABLE else "fp32"
    if options.precision not in _TRAINABLE:
        raise UserError(f"--dtype must be {' or '.join(_TRAINABLE)}, as in training, not {options.precision}")
    return options.precision


def _tensors(
    files: SafetensorsFolder, source_mappings: list[ParamMapping], mappings: list[ParamMapping], target: HFModelConfig
) -> tuple[list[LazyTensor], int]:
    """Return the checkpoint's tensors, and how many of them the files lack."""
    by_name = {mapping.name: mapping for mapping in source_mappings}
    rows = derived.padded_vocab_size(target.model, target.vocab_size)
    tensors, fresh = [], 0
    for mapping in mappings:
        make: Callable[[], Tensor]
        if mapping.name in by_name:
            make = partial(_convert, files, by_name[mapping.name])
        else:
            make = partial(_fresh, mapping, target.model)
            fresh += 1
        tensors.append(padded(LazyTensor(mapping.name, mapping.shape, make), rows))
    return tensors, fresh


def _convert(files: SafetensorsFolder, mapping: ParamMapping) -> Tensor:
    return mapping.to_megatron([files.read(name) for name, _ in mapping.hf])


def _fresh(mapping: ParamMapping, model: ModelConfig) -> Tensor:
    """Return the initial values that a new model has."""
    value = mapping.parameter.constant(model)
    assert value is not None, mapping.name
    return torch.full(mapping.shape, value)


def _run_config(options: ImportOptions, target: HFModelConfig, precision: str, tokenizer: Path | None) -> RunConfig:
    return RunConfig(
        name=options.output.name,
        output_dir=str(options.output.parent),
        model=target.model,
        data=DataConfig(
            tokenizer=None if tokenizer is None else str(tokenizer), sequence_length=target.max_position_embeddings
        ),
        training=TrainingConfig(precision="bf16" if precision == "bf16" else "fp32"),
    )


def _model_yaml(config: RunConfig, output: Path) -> str:
    """Return the YAML for a run's configuration to include."""
    defaults = dataclasses.asdict(ModelConfig())
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if value != defaults[name]}
    model["loop_count"] = config.model.loop_count
    settings = {"model": model, "checkpoint": {"load": str(output), "weights_only": True}}
    if config.data.tokenizer is not None:
        settings["data"] = {"tokenizer": config.data.tokenizer}
    header = f"# Include this in a run's configuration to continue training from the weights in {output}.\n"
    return header + yaml_nodes.dump(settings)
