"""Conversion of a GGUF file to a Hugging Face folder: transformers reads it, but would save it still quantized."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from plt_megatron.errors import UserError
from plt_megatron.extras import require
from plt_megatron.hf.lineage import CARD

SUFFIX = ".gguf"
_LICENSE = "general.license"


def unpack(path: Path, folder: Path) -> None:
    """Write the model at `path` to `folder`: weights in fp32, configuration, tokenizer with its chat template, card.

    The card has the license that the file names.

    Raises:
        UserError: the file is broken, of a model that transformers does not know, or a package is missing.
    """
    require("reading a GGUF file", "gguf", "safetensors")
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        license_field = GGUFReader(path).get_field(_LICENSE)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, LookupError, OSError, NotImplementedError) as error:
        raise UserError(f"{path}: transformers cannot read it ({str(error).splitlines()[0]})") from error
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    if license_field is not None:
        front = yaml.safe_dump({"license": license_field.contents()})
        (folder / CARD).write_text(f"---\n{front}---\n", encoding="utf-8")
