"""Loads an exported model with this installation's code. Python code in its folder is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.hf.sources import open_source


def load_export(folder: Path) -> tuple[Any, Any]:
    """Return (tokenizer, model), loaded by transformers: the model in the files' precision, on the CPU.

    Raises:
        UserError: the files are damaged, lack tensors or a tokenizer, or are of a model that neither transformers nor
            we have code for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    source = open_source(folder)  # checks the tensors
    if source.tokenizer is None:
        raise UserError(f"{folder}: the model has no tokenizer")
    logging.disable_progress_bar()
    kind = PLTForCausalLM if source.family == PLTConfig.model_type else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=False)
    except (OSError, ValueError) as error:  # such as weights with LoopCoder's names, which have no code
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: transformers cannot load it ({reason})") from error
    return tokenizer, model.eval()


def check_chat_template(tokenizer: Any, folder: Path) -> None:
    """Raise `UserError` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: its tokenizer has no chat template; leave --chat out")
