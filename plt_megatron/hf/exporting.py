"""Exports a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import CONFIG, parse_size, published_folder
from plt_megatron.hf.config_keys import loopcoder_keys, plt_keys
from plt_megatron.hf.conversion import ParamMapping, Style, mappings_for, to_hf
from plt_megatron.hf.model_card import model_card
from plt_megatron.hf.safetensors_files import SafetensorsWriter
from plt_megatron.hf.sources import PRECISIONS, ModelSource, open_source
from plt_megatron.hf.tokenizer_files import GENERATION_CONFIG, check_vocabulary, write_tokenizer
from plt_megatron.hf.verification import TOLERANCE, largest_difference
from plt_megatron.model.parameters import is_buffer
from plt_megatron.run_folder.checkpoints import MADE_ELSEWHERE
from plt_megatron.run_folder.files import write_json

MODEL_FILES = ("configuration_plt.py", "modeling_plt.py")


@dataclass(frozen=True)
class ExportOptions:
    """Options for exporting. See `plt export --help`.

    Attributes:
        precision: a key of `PRECISIONS`; None: the checkpoint's.
        ema: export the moving average of the weights.
    """

    checkpoint: Path
    output: Path
    precision: str | None = None
    style: Style = "plt"
    max_shard_size: str = "5GB"
    verify: bool = False
    tokenizer: Path | None = None
    ema: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The output. `difference` (see `largest_difference`) and the number of `tokens` compared are None without
    verification."""

    output: Path
    checkpoint: Path
    tensors: int
    total_bytes: int
    files: int
    difference: float | None = None
    tokens: int | None = None


def export(options: ExportOptions, say: Callable[[str], None] = print) -> ExportResult:
    """Export a checkpoint: write the folder, completely or not at all.

    Raises:
        UserError: the checkpoint, its tokenizer or the target is unusable, a tensor is missing or unknown, or the
            verification failed.
    """
    options = replace(options, checkpoint=Path(options.checkpoint), output=Path(options.output))
    shard_size = parse_size(options.max_shard_size)
    source = open_source(options.checkpoint, options.tokenizer and Path(options.tokenizer), ema=options.ema)
    mappings = mappings_for(source.model, source.vocab_size, options.style)
    precision = options.precision or source.precision
    if source.tokenizer is not None:
        check_vocabulary(source.tokenizer, source.vocab_size, source.trained_tokenizer)
    else:
        say("no tokenizer: this model was trained on token ids alone")
    rows = source.progress["config"]["data"]["sequence_length"] if source.progress else source.max_position_embeddings
    if source.max_position_embeddings > rows:
        say(
            f"max_position_embeddings is {source.max_position_embeddings:,}, that of the model it started from; it was "
            f"trained on rows of {rows:,}"
        )
    with published_folder(options.output) as folder:
        if source.tokenizer is not None:
            # plt preprocess puts none around texts; a public model, or data made elsewhere, may have them.
            known = not source.progress or source.progress.keys() & {"imported_from", MADE_ELSEWHERE}
            write_tokenizer(source.tokenizer, folder, adds_tokens=bool(known))
        _write_configs(source, folder, options.style, str(PRECISIONS[precision]).removeprefix("torch."))
        what = "the moving average of the weights of " if source.ema else ""
        say(f"exporting {what}{source.path} as {precision}")
        total_bytes, files = _write_weights(source, mappings, folder, precision, shard_size)
        card = model_card(source, options.output.name, mappings, options.style)
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = tokens = None
        if options.verify:
            say("verifying: the same text through both models, in fp32")
            difference, tokens = largest_difference(source, folder, precision, options.style)
            say(f"largest difference of logits over {tokens} tokens: {difference:.2e} of the largest logit")
            if not difference <= TOLERANCE:
                raise UserError(
                    f"the export does not match the training model: logits differ by up to {difference:.2e} of the "
                    f"largest, more than {TOLERANCE:g}; nothing is written"
                )
    tensors = sum(len(mapping.hf) for mapping in mappings)
    return ExportResult(options.output, source.path, tensors, total_bytes, files, difference, tokens)


def _write_weights(
    source: ModelSource, mappings: list[ParamMapping], folder: Path, precision: str, shard_size: int
) -> tuple[int, int]:
    """Write the weights and return (bytes of tensors, number of files)."""
    shapes = [pair for mapping in mappings for pair in mapping.hf]
    buffers = {name for name, _ in shapes if is_buffer(name)}
    writer = SafetensorsWriter(folder, shapes, PRECISIONS[precision], shard_size, buffers)
    for name, tensor in to_hf(source.weights(), mappings):  # all of them, or an error
        writer.write(name, tensor)
    return writer.total_size, len(writer.files)


def _write_configs(source: ModelSource, folder: Path, style: Style, dtype: str) -> None:
    keys_of = loopcoder_keys if style == "loopcoder" else plt_keys
    write_json(folder / CONFIG, keys_of(source, dtype), indent=2)
    generation = {**source.tokens, **source.generation, "transformers_version": version("transformers")}
    if "eos_token_id" in generation and "pad_token_id" not in generation:
        # It fills rows of a batch that end before the others.
        ends = generation["eos_token_id"]
        generation["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    write_json(folder / GENERATION_CONFIG, generation, indent=2)
    if style == "plt":
        for name in MODEL_FILES:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
