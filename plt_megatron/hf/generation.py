"""Text from an exported model, by transformers' own `generate`."""

from __future__ import annotations

import time
from pathlib import Path

from plt_megatron.errors import UserError


def generate(folder: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> tuple[str, float]:
    """The prompt and its continuation, and the seconds that decoding took, on a GPU where there is one.

    Raises:
        UserError: `folder` is no export, or transformers is missing.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no exported model there (config.json is missing); see plt-export")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("generating needs transformers: pip install 'plt-megatron[hf]'") from error
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    if torch.cuda.is_available():
        model.cuda()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {}
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return text, seconds
