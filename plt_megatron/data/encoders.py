"""Encoders of documents to tokens and, for conversations, to loss masks.

A conversation is a line `{"messages": [{"role": ..., "content": ...}, ...]}`, with `"tools": [...]` if the chat
template takes them. Its tokens are those of transformers' `apply_chat_template`; only the assistant's answers,
including the tokens that end them, count in the loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import UserError, first_line
from plt_megatron.extras import require
from plt_megatron.run_folder.files import read_json_object

# What templates print as today's date, so that tokens do not depend on the day: that of Llama 3.1's without a clock.
_TODAY = datetime(2024, 7, 26)
_CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(["'])([^"']*)\1\s*\)""")
_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


class Encoded(NamedTuple):
    """Documents encoded as tokens."""

    flat: np.ndarray  # the tokens of all documents, one after the other, in the tokenizer's dtype
    lengths: np.ndarray  # int64, tokens of each document that has any
    mask: np.ndarray  # uint8, 1 where a token of `flat` counts in the loss; empty if all do
    bad: dict[int, tuple[str, str]]  # kind and reason of each text that could not be encoded, by its index


class Encoder(ABC):
    """Encodes texts in a preprocessing worker. `append_eod`: end each document with the tokenizer's `eod`."""

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool) -> None:
        self._tokenizer, self._append_eod = tokenizer, append_eod

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> Encoded: ...


class TextEncoder(Encoder):
    """Encodes plain text; every token counts in the loss."""

    def __call__(self, texts: Sequence[str]) -> Encoded:
        flat, lengths = self._tokenizer.encode_flat(texts)
        bad = {int(place): ("empty", "document has no token") for place in np.flatnonzero(lengths == 0)}
        if self._tokenizer.refused:
            numbers = np.repeat(np.arange(len(lengths)), lengths)
            refused = np.unique(numbers[np.isin(flat, self._tokenizer.refused)])
            bad |= {int(place): ("special token", "document spells a special token") for place in refused}
            flat, lengths[refused] = flat[~np.isin(numbers, refused)], 0
        lengths = lengths[lengths > 0]
        if self._append_eod:
            flat, lengths = np.insert(flat, np.cumsum(lengths), self._tokenizer.eod), lengths + 1
        return Encoded(flat, lengths, np.empty(0, np.uint8), bad)


class _BadConversation(Exception):
    """Raised for a conversation that cannot be encoded; the message says why."""


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, also those of keys."""
    left = [value]  # nested as deeply as JSON may be
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            left += [*value, *value.values()] if isinstance(value, dict) else value


def _dated(template: Any, folder: Path) -> Any:
    """Return a template, or those of several names, with `_TODAY` written in place of today's date.

    Raises `UserError` if one asks for the date in a computed format.
    """
    if isinstance(template, dict):
        return {name: _dated(text, folder) for name, text in template.items()}
    dated = _CLOCK.sub(lambda call: repr(_TODAY.strftime(call[2])), template)
    if re.search(r"\bstrftime_now\s*\(", dated):
        raise UserError(
            f"--chat: the template of {folder} prints today's date, on which tokens would depend: write a date there "
            "in place of strftime_now"
        )
    return dated


class ChatEncoder(Encoder):
    """Encodes conversations (as JSON) with the chat template next to a `tokenizer.json`.

    Raises `UserError` if there is no template, or transformers is missing.
    """

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool) -> None:
        super().__init__(tokenizer, append_eod=append_eod)
        require("--chat", "transformers")
        from transformers import PreTrainedTokenizerFast

        # Here, since each worker without --chat would import sentencepiece too.
        from plt_megatron.data.hf_tokenizer import PLAIN_CLASS, class_defaults

        folder = Path(tokenizer.path).parent
        if Path(tokenizer.path).name != "tokenizer.json":  # the one that transformers reads
            beside = folder / "tokenizer.json"
            where = f"pass {beside}" if beside.is_file() else "pass a folder with a tokenizer.json"
            raise UserError(f"--chat: {tokenizer.path} has no chat template; {where}")
        path = folder / "tokenizer_config.json"
        config = read_json_object(path) if path.is_file() else {}
        # Not the class that `config` names: it may rebuild parts of tokenizer.json, which texts are encoded with.
        kind = config.get("tokenizer_class")
        # Earlier versions encoded with it: their data may be other data.
        self._by_class = [] if kind in (None, PLAIN_CLASS, "TokenizersBackend") else [kind]
        try:
            defaults = class_defaults(config, tokenizer.path)
            self._templates = PreTrainedTokenizerFast.from_pretrained(folder, **defaults)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--chat: transformers cannot read the tokenizer in {folder} ({first_line(error)})"
            ) from error
        self._was_split = bool(self._templates.split_special_tokens)
        self._templates.split_special_tokens = False  # the template writes them
        added = (token.content for token in self._templates.added_tokens_decoder.values() if token.special)
        named = self._templates.all_special_tokens
        self._unnamed = sorted(set(added) - set(named))
        self._special = [*named, *self._unnamed]
        template = self._templates.chat_template
        if not template:
            raise UserError(
                f"--chat: {folder} has no chat template: put chat_template.jinja there, or the template into "
                "tokenizer_config.json"
            )
        self._templates.chat_template = _dated(template, folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template and of the special tokens, which it may print."""
        # What earlier versions spelled as text is other data.
        was_split = ["special tokens"] if self._was_split else []
        content = [self._templates.chat_template, self._templates.special_tokens_map]
        content += [*was_split, *self._unnamed, *self._by_class]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Encoded:
        found: list[tuple[np.ndarray, np.ndarray]] = []
        bad: dict[int, tuple[str, str]] = {}
        for number, text in enumerate(texts):
            try:
                found.append(self._encode(**json.loads(text)))
            except _BadConversation as error:
                bad[number] = "no conversation", str(error)
        dtype = self._tokenizer.dtype
        flat = np.concatenate([np.empty(0, dtype), *(ids for ids, _ in found)], dtype=dtype, casting="unsafe")
        mask = np.concatenate([np.empty(0, np.uint8), *(counted for _, counted in found)])
        return Encoded(flat, np.asarray([len(ids) for ids, _ in found], np.int64), mask, bad)

    def _encode(self, messages: list[Any], tools: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's tokens, and its loss mask, uint8 of the same length.

        A token counts that has a character of an answer, though it may begin with the prompt's last space.
        """
        # As `apply_chat_template` does; the marked answers are found without it.
        messages = [{name: value for name, value in each.items() if value is not None} for each in messages]
        self._check_texts(messages, tools)
        text = self._apply(messages, tools)
        encoded = self._templates(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        ids, counted = np.asarray(encoded["input_ids"], np.int64), np.zeros(len(starts), np.uint8)
        self._check_ids(ids)
        for begin, end in self._answers(text, messages, tools):
            counted[(ends > begin) & (starts < end)] = 1
        if not counted.any():
            raise _BadConversation("the chat template renders no token of an answer")
        last, eod = int((starts < len(text.rstrip())).sum()) - 1, self._tokenizer.eod
        if self._append_eod and ids[last] != eod:
            # Where the template does not end an answer, this token does.
            ids = np.append(ids, eod)
            counted = np.append(counted, np.uint8(messages[-1]["role"] == "assistant"))
        return ids, counted

    def _check_texts(self, messages: list[Any], tools: Any) -> None:
        """Raise `_BadConversation` if a message or tool has a special token's name, which would be that token."""
        named = [(f"message {number}", message) for number, message in enumerate(messages, 1)]
        for what, value in [*named, ("the list of tools", tools)]:
            texts = list(_texts(value))
            for name in self._special:
                if any(name in text for text in texts):
                    raise _BadConversation(f"{what} spells the special token {name}")

    def _check_ids(self, ids: np.ndarray) -> None:
        foreign = ids[ids >= self._tokenizer.vocab_size]
        if foreign.size:
            names = ", ".join(self._templates.convert_ids_to_tokens(sorted(set(foreign.tolist()))))
            raise UserError(f"--chat: {self._tokenizer.path} lacks tokens that tokenizer_config.json names: {names}")

    def _answers(self, text: str, messages: list[Any], tools: Any) -> Iterator[tuple[int, int]]:
        """Yield the character range [begin, end) of each answer in the conversation's text."""
        template = self._templates.get_chat_template(tools=tools)  # some tokenizers have one for tools, too
        if _MARK.search(template):
            yield from self._marked_answers(template, messages, tools)
            return
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            answered = self._apply(messages[: number + 1], tools)
            asked = self._before_answer(messages[:number], answered, messages[: number + 1], tools)
            if not answered.startswith(asked) or not text.startswith(answered):
                raise _BadConversation(
                    f"the chat template renders the text up to message {number + 1} differently when more follows: "
                    "mark the answers in the template with {% generation %}"
                )
            yield len(asked), len(answered.rstrip())

    def _before_answer(self, before: list[Any], answered: str, messages: list[Any], tools: Any) -> str:
        """Return the text before the answer with which `messages`, whose text is `answered`, end."""
        if before:
            return self._apply(before, tools, add_generation_prompt=True)
        # No template renders an empty conversation, but each says how an answer begins after this one.
        prompt = self._apply(messages, tools, add_generation_prompt=True).removeprefix(answered)
        return answered[: answered.find(prompt)] + prompt

    def _marked_answers(self, template: str, messages: list[Any], tools: Any) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render, names = cast(Any, render_jinja_template), self._templates.special_tokens_map
        with _rejecting():
            _, spans = render(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **names
            )
        return spans[0]

    def _apply(self, messages: Sequence[Any], tools: Any, **options: Any) -> str:
        with _rejecting():
            return str(self._templates.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Raise `_BadConversation` for what a template, or its rendering, raises."""
    import jinja2

    try:
        yield
    except (
        *(jinja2.TemplateError, TypeError, ValueError, RecursionError),
        *(ArithmeticError, LookupError, AttributeError, AssertionError),  # of expressions in it
    ) as error:
        raise _BadConversation(f"the chat template rejects it: {first_line(error)}") from error
