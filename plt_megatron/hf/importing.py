"""Imports a Hugging Face folder or GGUF file as a training checkpoint, for continued pretraining of a public model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from plt_megatron.config import derived, yaml_nodes
from plt_megatron.config.fields import MAX_LOOP_COUNT
from plt_megatron.config.presets import LOOP_PRESETS, PARAMETERISATION
from plt_megatron.config.rules import model as model_rules
from plt_megatron.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError, first_line
from plt_megatron.extras import require
from plt_megatron.hf.arguments import is_gguf, published_folder
from plt_megatron.hf.checkpoint_writer import LazyTensor, padded, write_checkpoint
from plt_megatron.hf.config_keys import read_config
from plt_megatron.hf.conversion import ParamMapping, mappings_for
from plt_megatron.hf.safetensors_files import SafetensorsFolder
from plt_megatron.hf.sources import CARD, PRECISIONS, check_hf_tensors, hf_precision, read_lineage
from plt_megatron.hf.switches import IMPORT_OPTIONS, new_loops_problem
from plt_megatron.hf.tokenizer_files import copy_tokenizer, read_generation_config, token_ids
from plt_megatron.run_folder.folder import MODEL_YAML
from plt_megatron.run_folder.text import first_few, format_bytes

if TYPE_CHECKING:
    from gguf import GGUFReader

_LICENSE = "general.license"


def unpack(path: Path, folder: Path) -> None:
    """Write the model at `path` to `folder`: weights in fp32, configuration, tokenizer with its chat template, card.

    The card has the license that the file names.

    Raises:
        UserError: the file is broken, of a model that transformers does not know or reads wrongly or in part, or a
            package is missing; or the weights cannot be written.
    """
    require("reading a GGUF file", "gguf", "accelerate", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    license_name, tokenizer, model = _load(path)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    # transformers holds a layer's experts in one tensor, and its folders, which `import_model` reads, in one each.
    model._weight_conversions = None  # not back to GGUF's names
    weights = {name: t.contiguous() for name, t in revert_weight_conversion(model, model.state_dict()).items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError on a full disk either
        size = format_bytes(sum(tensor.nbytes for tensor in weights.values()))
        raise UserError(
            f"{folder.parent}: {first_line(error)}; the weights of {path.name} take {size} there: if that is too much, "
            "set TMPDIR to another folder"
        ) from error
    vars(model.config).pop("quantization_config", None)  # not every transformers sets it
    model.config.save_pretrained(folder)
    if license_name is not None:
        front = yaml.safe_dump({"license": license_name})
        (folder / CARD).write_text(f"---\n{front}---\n", encoding="utf-8")


def _load(path: Path) -> tuple[Any, Any, Any]:
    """Return the license that the file names, or None, its tokenizer, and its model in fp32."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: Any = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    try:
        reader = GGUFReader(path)
        _check_attention(reader, path)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        end = reader.get_field("tokenizer.ggml.eos_token_id")
        if end is not None and tokenizer.eos_token_id != end.contents():  # before 5.18, of some Llamas
            raise UserError(
                f"{path}: transformers {version('transformers')} takes token {tokenizer.eos_token_id} for the end of a "
                f"text, the file {end.contents()}: update transformers"
            )
        config = AutoConfig.from_pretrained(**source)
        width = reader.get_field(f"{reader.fields['general.architecture'].contents()}.expert_feed_forward_length")
        if width is not None:  # transformers would take its default
            config.moe_intermediate_size = width.contents()
        source |= {"config": config, "dtype": torch.float32, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source)
    except UserError:
        raise
    except Exception as error:  # tokenizers' and the configurations' checks raise types of their own
        raise UserError(f"{path}: transformers cannot read it ({first_line(error)})") from error
    model, info = loaded
    _check_read(reader, model, info["missing_keys"], path)
    license_field = reader.get_field(_LICENSE)
    return None if license_field is None else license_field.contents(), tokenizer, model


def _check_read(reader: GGUFReader, model: Any, missing: set[str], path: Path) -> None:
    """Raise `UserError` if the model lacks a tensor, which is random then, or the file has more than the model."""
    if missing:
        raise UserError(f"{path}: no tensor there that transformers reads as {first_few(sorted(missing), 1)}")
    held, read = sum(int(tensor.n_elements) for tensor in reader.tensors), model.num_parameters()
    if held != read:
        raise UserError(
            f"{path}: its tensors have {held:,} numbers, but transformers' {type(model).__name__} reads {read:,}: it "
            "would leave some out, such as biases that it does not expect"
        )


def _check_attention(reader: GGUFReader, path: Path) -> None:
    """Raise `UserError` if the file's attention has a window or scaled RoPE: transformers reads the model without."""
    names = (name for name in reader.fields if ".rope." in name or name.endswith(".attention.sliding_window"))
    values = {name.partition(".")[2]: reader.fields[name].contents() for name in names}
    if window := values.get("attention.sliding_window"):
        raise UserError(f"{path}: attention.sliding_window {window} is not supported, only 0")
    # As llama.cpp reads them: a factor without a type is linear, and 0 is none.
    kind = values.get("rope.scaling.type", "linear")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear")) or 1.0
    tables = any(tensor.name.startswith(("rope_freqs.", "rope_factors_")) for tensor in reader.tensors)
    if tables or kind not in ("none", "linear") or (kind == "linear" and factor != 1.0):
        raise UserError(
            f"{path}: its RoPE is scaled, which transformers does not read from GGUF; import the original folder"
        )


_TRAINABLE = ("fp32", "bf16")


@dataclass(frozen=True)
class ImportOptions:
    """Options for importing. See `plt import --help`.

    Attributes:
        loop_count: number of loops; None: the model's own, 1 for a dense model.
        preset: how the loops added to a one-loop model are parameterized (config/presets.py), keeping its logits at
            first; None: as in the paper, which changes them.
        switches: values of `IMPORT_OPTIONS`; None: as without the option.
        precision: fp32 or bf16; None: the files', or fp32 if that is fp16 (which bf16 would round).
    """

    model: Path
    output: Path
    loop_count: int | None = None
    preset: str | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None


@dataclass(frozen=True)
class ImportResult:
    """The output.

    Attributes:
        checkpoint: the published folder.
        model: the imported model's settings.
        new_loops: whether the files have a one-loop model and the import has several loops.
        fresh: number of tensors that the files lack and that start as in a new model: gates, their norms, loop scales.
        dropped: number of tensors that the model does not use, of those that the files have by their config.json.
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
    options = dataclasses.replace(options, model=Path(options.model), output=Path(options.output))
    if is_gguf(options.model):
        with TemporaryDirectory(prefix="plt-gguf-") as place:
            folder = Path(place) / options.model.stem
            unpack(options.model, folder)
            return import_model(dataclasses.replace(options, model=folder))
    source = read_config(options.model)
    data = DataConfig(sequence_length=source.max_position_embeddings)
    model = _model(options, source.model, data)
    files = SafetensorsFolder(options.model)
    theirs = {each.name: each for each in mappings_for(source.model, source.vocab_size, source.style)}
    check_hf_tensors(files, list(theirs.values()), source.model)
    precision = _precision(options, files)
    ours = {each.name: each for each in mappings_for(model, source.vocab_size)}
    rows = derived.padded_vocab_size(model, source.vocab_size)
    tensors = [padded(_tensor(mapping, theirs.get(name), files, model), rows) for name, mapping in ours.items()]
    with published_folder(options.output) as folder:
        tokenizer = copy_tokenizer(options.model, folder / "tokenizer", source.family, source.vocab_size, source.tokens)
        # Absolute: a run may start from any folder.
        published = options.output.absolute() / tokenizer.relative_to(folder) if tokenizer else None
        if published is not None:
            data.tokenizer = str(published)
        training = TrainingConfig(precision="bf16" if precision == "bf16" else "fp32")
        config = RunConfig(options.output.name, str(options.output.parent), model=model, data=data, training=training)
        origin = f"{options.model.resolve().name} ({source.family})"
        tokens, _ = token_ids(source.tokens, read_generation_config(options.model))
        progress = {"imported_from": origin, "special_tokens": tokens, **read_lineage(options.model)}
        checkpoint = write_checkpoint(
            folder / "checkpoints", tensors, config, source.vocab_size, PRECISIONS[precision], progress
        )
        (folder / MODEL_YAML).write_text(_model_yaml(config, options.output.absolute()), encoding="utf-8")
    return ImportResult(
        output=options.output,
        checkpoint=options.output / checkpoint.relative_to(folder),
        family=source.family,
        model=model,
        new_loops=source.model.loop_count == 1 < model.loop_count,
        precision=precision,
        tensors=len(ours),
        fresh=len(ours.keys() - theirs.keys()),
        dropped=len(theirs.keys() - ours.keys()),
        tokenizer=published,
    )


def _model(options: ImportOptions, source: ModelConfig, data: DataConfig) -> ModelConfig:
    """Return the files' model with what the options change. Raises `UserError` if it cannot be."""
    model = dataclasses.replace(source)
    if options.loop_count is not None:
        if not 1 <= options.loop_count <= MAX_LOOP_COUNT:
            raise UserError(f"--loop-count must be from 1 to {MAX_LOOP_COUNT}, not {options.loop_count}")
        model.loop_count = options.loop_count
    for name, value in options.switches.items():
        if value is not None:
            option = IMPORT_OPTIONS[name]
            problem = option.problem(value, source, model)
            if problem is not None:
                raise UserError(f"--{name.replace('_', '-')} {problem}")
            model = dataclasses.replace(model, **{name: value}, **option.beside)
    if options.preset is not None:
        model = _with_preset(model, source, options.preset)
    # What a one-loop model leaves unused may contradict its new loops.
    for problem in model_rules.find_problems(RunConfig(model=model, data=data)):
        raise UserError(f"{options.model}: {problem}")
    return model


def _with_preset(model: ModelConfig, source: ModelConfig, preset: str) -> ModelConfig:
    """Return the model with the preset's parameterisation of loops; layers and what they attend to stay as they are.

    Raises:
        UserError: there are no new loops, or the preset's would change the first logits.
    """
    if problem := new_loops_problem(source, model, "settings of their own", "says how later loops are parameterized"):
        raise UserError(f"--preset {problem}")
    branches = {name: getattr(source, name) for name in ("residual_scaling", "residual_scale")}
    loops = {name: LOOP_PRESETS[preset][name] for name in PARAMETERISATION}
    loops |= {"gate_activation": "tanh", "loop_order": "stack"}
    model = dataclasses.replace(model, **{**loops, **branches})
    if not derived.starts_as_one_loop(model):
        read = f"{model.embedding_scale:g} E + {model.hidden_scale:g} h"
        raise UserError(
            f"--preset {preset}: later loops would read {read} instead of E, so the logits would differ from the "
            "model's at first; use --preset recommended"
        )
    return model


def _precision(options: ImportOptions, files: SafetensorsFolder) -> str:
    found = hf_precision(files)
    if options.precision is None:
        return found if found in _TRAINABLE else "fp32"
    if options.precision not in _TRAINABLE:
        raise UserError(f"--dtype must be {' or '.join(_TRAINABLE)}, as in training, not {options.precision}")
    return options.precision


def _tensor(
    mapping: ParamMapping, theirs: ParamMapping | None, files: SafetensorsFolder, model: ModelConfig
) -> LazyTensor:
    """Return a tensor of the checkpoint: the files' or, where they have none, a new model's."""

    def make() -> Tensor:
        if theirs is not None:
            return theirs.to_megatron([files.read(name) for name, _ in theirs.hf])
        value = mapping.parameter.constant(model)
        assert value is not None, mapping.name
        return torch.full(mapping.shape, value)

    return LazyTensor(mapping.name, mapping.shape, make)


def _model_yaml(config: RunConfig, output: Path) -> str:
    """Return the YAML for a run's configuration to include: all settings of the model, whatever is included before."""
    own = ("loop_preset", "backend", "fused_gated_window")  # the run's
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in own}
    settings = {"model": model, "checkpoint": {"load": str(output), "weights_only": True}}
    if config.data.tokenizer is not None:
        settings["data"] = {"tokenizer": config.data.tokenizer}
    header = f"# Include this in a run's configuration to continue training from the weights in {output}.\n"
    return header + yaml_nodes.dump(settings)
