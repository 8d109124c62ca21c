"""Text generation with an exported model, by transformers' own `generate`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.extras import require

_LONGEST = 10  # times the model's own context


@dataclass(frozen=True)
class Generated:
    """Result of `generate`.

    Attributes:
        text: the prompt and its continuation; in a chat, only the answer.
        seconds: duration of decoding.
        has_chat_template: whether there is a chat template, so that the model may have been trained on chats.
    """

    text: str
    seconds: float
    has_chat_template: bool


def generate(
    folder: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, *, chat: bool = False
) -> Generated:
    """Continue a text, or answer it (`chat`: in the tokenizer's chat template), on a GPU if there is one.

    Raises:
        UserError: `folder` is not a complete export, the prompt is empty, there is no chat template, or transformers is
            missing.
    """
    require("generating", "transformers")
    import torch
    from transformers import set_seed

    from plt_megatron.hf.loading import check_chat_template, load_export

    tokenizer, model = load_export(Path(folder))
    if torch.cuda.is_available():
        model.cuda()
    if chat:
        check_chat_template(tokenizer, Path(folder))
    inputs = _inputs(tokenizer, prompt, chat).to(model.device)
    if not prompt or not inputs["input_ids"].numel():
        raise UserError("the prompt is empty")
    _check_length(model.config.max_position_embeddings, inputs["input_ids"].shape[1], max_new_tokens)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {}
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output[inputs["input_ids"].shape[1] :] if chat else output, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generated(text, seconds, bool(tokenizer.chat_template))


def _check_length(context: int, given: int, new: int) -> None:
    """Print a note if a text will be longer than the model was made for; raise `UserError` if it will be so much longer
    that it must be a mistake."""
    if given + new > _LONGEST * context:
        raise UserError(
            f"--max-new-tokens {new:,} after a prompt of {given:,} tokens: the model was made for {context:,}; "
            f"ask for at most {_LONGEST} times as many"
        )
    if given + new > context:
        print(
            f"note: {given + new:,} tokens are more than the {context:,} that the model was made for: text beyond them "
            "may be worse",
            file=sys.stderr,
        )


def _inputs(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
