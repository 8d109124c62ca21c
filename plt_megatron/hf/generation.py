"""Text from an exported model, by transformers' own `generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError, import_optional

_LONGEST = 10  # times the model's own context


def generate(folder: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> tuple[str, float]:
    """The prompt and its continuation, and the seconds that decoding took, on a GPU if there is one.

    Raises:
        UserError: `folder` is not a complete export, the prompt is empty, or transformers is missing.
    """
    import_optional("transformers", "generating", "hf")
    import torch
    from transformers import set_seed

    tokenizer, model = _load(Path(folder))
    if torch.cuda.is_available():
        model.cuda()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise UserError("the prompt is empty")
    _check_length(model.config.max_position_embeddings, inputs["input_ids"].shape[1], max_new_tokens)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {}
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return text, seconds


def _check_length(context: int, given: int, new: int) -> None:
    """Say that a text will be longer than the model's were; `UserError` if it is so much longer that it cannot be
    meant."""
    if given + new > _LONGEST * context:
        raise UserError(
            f"--max-new-tokens {new:,} after a prompt of {given:,} tokens: the model was made for {context:,}; "
            f"ask for at most {_LONGEST} times as many"
        )
    if given + new > context:
        print(
            f"note: {given + new:,} tokens are more than the {context:,} that the model was made for: what comes later "
            "may be worse",
            file=sys.stderr,
        )


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model. The files are checked first: transformers would fill in missing weights at random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from plt_megatron.hf.sources import open_source

    if open_source(folder).tokenizer is None:
        raise UserError(f"{folder}: the model has no tokenizer")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError) as error:  # such as weights with LoopCoder's names, which have no code
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: transformers cannot load it ({reason})") from error
    return tokenizer, model.eval()
