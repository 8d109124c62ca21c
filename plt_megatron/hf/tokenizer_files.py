"""A model's tokenizer files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from plt_megatron.data.hf_tokenizer import PLAIN_CLASS, build_tokenizer_json, class_defaults
from plt_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import read_json_object, write_json

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# Other tokenizer files of Hugging Face folders.
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", *_TEMPLATES)
# Texts to compare before trusting a tokenizer.json found beside a sentencepiece model.
_SAMPLES = (
    *("The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x ** 2  # ok\n\n\n", "12,345.678e-9"),
    *("  two  spaces and\ttabs", "\u65e5\u672c\u8a9e \u00e9\u00e8\u00fc \U0001f600", "CamelCase snake_case"),
)


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `bos_token_id` and so on; texts end with the token that ended documents in training."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    return {name: value for name, value in ids.items() if value is not None}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's generation_config.json, empty if there is none.

    Raises:
        UserError: the file is broken.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    settings = read_json_object(path)
    return {key: settings[key] for key in settings if key not in ("transformers_version", "_from_model_config")}


def token_ids(tokens: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ids of special tokens and further settings of generation, whose own ids prevail: it may have more ends."""
    own = {name: generation[name] for name in _TOKEN_IDS if generation.get(name) is not None}
    return {**tokens, **own}, {name: value for name, value in generation.items() if name not in _TOKEN_IDS}


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, trained_with: str | None) -> None:
    """Raise `UserError` if the tokenizer cannot be that of a model with at most `vocab_size` ids, `trained_with` the
    tokenizer of this fingerprint, if that is known."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model's vocabulary {vocab_size}: "
            "it belongs to another model"
        )
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise UserError(f"tokenizer {tokenizer.path} is not the file the model was trained with: its content differs")


def hf_tokenizer_file(folder: Path, family: str) -> Path | None:
    """Return the file of a Hugging Face folder that training reads, or None. In our exports it is the sentencepiece
    model if the data was tokenized with it; other families' `tokenizer.model` may be anything."""
    names = (MODEL, JSON) if family == "plt" else (JSON, MODEL)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_hf_tokenizer(path: Path, tokens: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder. Texts end with config.json's `eos_token_id` if it has one."""
    ends = tokens.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    if path.name != JSON or not isinstance(end, int):
        return load_tokenizer(path)
    try:
        name = tokenizers.Tokenizer.from_file(str(path)).id_to_token(end)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json ({error})") from error
    return load_tokenizer(path, name)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, adds_tokens: bool = True) -> None:
    """Write everything that `AutoTokenizer.from_pretrained(folder)` needs.

    Args:
        adds_tokens: whether it may put special tokens around a text; False: training never saw them.

    Raises:
        UserError: a sentencepiece model has no equivalent tokenizer.json beside it, and none can be made.
    """
    source = tokenizer.path.parent
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_from_sentencepiece(tokenizer, folder)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        shutil.copyfile(tokenizer.path, folder / JSON)
        # Without a MODEL beside it: an import of the export would read that instead (`hf_tokenizer_file`).
        _copy_found((CONFIG, *_OTHERS), source, folder)
        if not (folder / CONFIG).exists():
            end = tokenizer.token_name(tokenizer.eod)
            write_json(folder / CONFIG, {"eos_token": end, "clean_up_tokenization_spaces": False})
    _write_config(folder, exported=True, adds_tokens=adds_tokens)


def _write_config(folder: Path, *, exported: bool, adds_tokens: bool = True) -> None:
    """Make transformers read tokenizer.json as it is. Its classes rebuild parts of it, unless the config.json of some
    families is beside it; code of the model's folder is not copied, nor fetched from where `auto_map` says.

    Args:
        exported: also make it read a chat template's special tokens as such, as `plt preprocess --chat` does.
        adds_tokens: False: make it put no special tokens around a text.
    """
    path, described = folder / CONFIG, folder / JSON
    if not path.is_file():
        return
    config = read_json_object(path)
    if not described.is_file() and "auto_map" not in config:
        return
    own = {name: value for name, value in config.items() if name != "auto_map"}
    if described.is_file():
        own |= class_defaults(config, described)
    own["tokenizer_class"] = PLAIN_CLASS
    has_template = "chat_template" in config or any(any(folder.glob(pattern)) for pattern in _TEMPLATES)
    if exported and has_template and config.get("split_special_tokens"):
        own["split_special_tokens"] = False
    if not adds_tokens:
        fast = tokenizers.Tokenizer.from_file(str(described))
        if fast.encode("a").ids != fast.encode("a", add_special_tokens=False).ids:
            write_json(described, read_json_object(described) | {"post_processor": None})
            own |= {"add_bos_token": False, "add_eos_token": False}
    write_json(path, own)


def _write_from_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    for name, text in _described(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer.path, folder / MODEL)
    # The other files may name tokens that a sentencepiece model does not have.
    _copy_found(_TEMPLATES, tokenizer.path.parent, folder)


def _described(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    """Return the texts of a sentencepiece model's tokenizer.json and tokenizer_config.json: those beside it, or made
    from it. Raises `UserError` if one is broken or differs from the model, or none can be made."""
    path = tokenizer.path
    beside = {name: path.with_name(name) for name in (JSON, CONFIG)}
    if not all(file.is_file() for file in beside.values()):
        return build_tokenizer_json(path)
    read_json_object(beside[CONFIG])
    try:
        texts = {name: file.read_text(encoding="utf-8") for name, file in beside.items()}
        fast = tokenizers.Tokenizer.from_str(texts[JSON])
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{beside[JSON]}: not a tokenizer.json ({error})") from error
    for text in _SAMPLES:
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UserError(f"{beside[JSON]} does not encode like {path}, for example {text!r}")
    return texts


def _copy_found(patterns: Iterable[str], source: Path, folder: Path) -> None:
    files = [file for pattern in patterns for file in source.glob(pattern) if file.is_file()]
    for file in files:
        _check_link(file, source)
        if file.name == CONFIG:
            read_json_object(file)  # so that an error names this file, not the copy
    for file in files:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _check_link(file: Path, source: Path) -> None:
    """Raise `UserError` if a downloaded folder's file is one of this machine, other than of the hub's cache."""
    target = file.resolve()
    cached = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if not cached and not target.is_relative_to(source.resolve()):
        raise UserError(f"{file} is a link out of its folder, to {target}: put the file itself there if it is yours")


def copy_tokenizer(source: Path, folder: Path, family: str, vocab_size: int, tokens: dict[str, Any]) -> Path | None:
    """Copy a Hugging Face folder's tokenizer files, without code, into `folder`, which is created.

    A generation_config.json with the ids in `tokens` is written too, for later exports.

    Returns:
        The file that training reads, or None if there is no tokenizer in `source`.

    Raises:
        UserError: the tokenizer has more ids than the model, is a sentencepiece model that no export could be written
            with, or a file is a link to another folder's.
    """
    read = hf_tokenizer_file(source, family)
    if read is None:
        return None
    tokenizer = load_hf_tokenizer(read, tokens)
    check_vocabulary(tokenizer, vocab_size, None)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _described(tokenizer)  # else no export could have its tokenizer
    _copy_found((MODEL, JSON, CONFIG, *_OTHERS), source, folder)
    _write_config(folder, exported=False)
    ids, generation = token_ids(tokens, read_generation_config(source))
    write_json(folder / GENERATION_CONFIG, ids | generation, indent=2)
    return folder / read.name
