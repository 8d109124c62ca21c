"""A sentencepiece model written as a Hugging Face `tokenizer.json`, and what transformers' classes add to one."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import decoders, models, normalizers, pre_tokenizers

from plt_megatron.data.segments import COARSE, crosses_no_piece
from plt_megatron.data.tokenizer import Tokenizer, normalizes, pieces_of
from plt_megatron.errors import UserError

PLAIN_CLASS = "PreTrainedTokenizerFast"  # of transformers: needs no code, and adds nothing of its own

_SPACE = "\u2581"
# Below any real score, so that the name of a control or byte token in a text never wins over its characters.
_NEVER = -1e9


def build_tokenizer_json(model: Path) -> dict[str, str]:
    """Return the contents of `tokenizer.json` and `tokenizer_config.json` for a sentencepiece model.

    What cannot be expressed raises `UserError`. Of two divisions of a text that score alike, as only unigram models not
    trained here have them, the library may choose the other one.
    Control tokens are part of the vocabulary and not "added tokens": as in sentencepiece, their names in a text
    are just text. The configuration tells transformers the same (`split_special_tokens`).
    """
    proto = ModelProto.FromString(model.read_bytes())
    if problem := _problem(proto):
        raise UserError(
            f"{model} cannot be written as tokenizer.json ({problem}): put one that encodes like it, and a "
            "tokenizer_config.json, beside it"
        )
    bytewise = bool(pieces_of(proto, "BYTE"))  # else adjacent unknown characters become one token
    splittable = bytewise and crosses_no_piece(COARSE, pieces_of(proto, "NORMAL"))
    files = {"tokenizer.json": json.loads(_tokenizer(proto, splittable)), "tokenizer_config.json": _config(proto)}
    return {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in files.items()}


def _problem(proto: Any) -> str | None:
    """Return why a model cannot be written as tokenizer.json, or None."""
    spec = proto.trainer_spec
    if normalizes(proto) or not proto.normalizer_spec.escape_whitespaces:
        return "it normalizes text, or does not mark spaces"
    if spec.model_type == spec.WORD:
        return "its tokens are whole words"
    # An unknown character costs more than `_NEVER`; BPE, which has no scores, finds a name of one character alone.
    known = set(pieces_of(proto, "NORMAL", "USER_DEFINED"))
    for name in pieces_of(proto, "CONTROL", "BYTE", "UNKNOWN", "UNUSED"):
        if not known.issuperset(name) and (spec.model_type != spec.BPE or len(name) == 1):
            return f"text could spell its token {name}, of whose characters it lacks some"
    return None


def _tokenizer(proto: Any, splittable: bool) -> str:
    bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    built = tokenizers.Tokenizer(_bpe(proto) if bpe else _unigram(proto))
    built.normalizer = normalizers.Replace(" ", _SPACE)
    if splittable:  # changes no id, but lets the library cache words
        words = tokenizers.Regex(rf"\n|{_SPACE}+[^{_SPACE}\n]*|[^{_SPACE}\n]+")
        built.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in pieces_of(proto, "USER_DEFINED")])
    return built.to_str()


def _bpe(proto: Any) -> models.BPE:
    """Return the BPE model. Sentencepiece merges the neighbors whose joint piece has the best score, so every split of
    a piece into two pieces is a merge, ordered by score."""
    normal = proto.SentencePiece.NORMAL
    rank = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == normal}
    merges = []
    for piece in proto.pieces:
        text = piece.piece
        if piece.type == normal:
            pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            known = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
            known.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
            merges += [(-piece.score, pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return models.BPE(vocab, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(proto: Any) -> models.Unigram:
    normal = proto.SentencePiece.NORMAL
    vocab = [(piece.piece, piece.score if piece.type == normal else _NEVER) for piece in proto.pieces]
    return models.Unigram(vocab, proto.trainer_spec.unk_id, byte_fallback=True)


def _config(proto: Any) -> dict[str, Any]:
    ids = {f"{name}_token": getattr(proto.trainer_spec, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    named = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    return {
        "tokenizer_class": PLAIN_CLASS,
        **named,
        "additional_special_tokens": [piece for piece in pieces_of(proto, "CONTROL") if piece not in named.values()],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }


def class_defaults(config: Mapping[str, Any], tokenizer_json: Path) -> dict[str, Any]:
    """Return the special tokens and the padding side that a tokenizer has by the class that its tokenizer_config.json
    names, and not by that file: those to state where transformers reads tokenizer.json without the class."""
    import transformers

    kind = getattr(transformers, str(config.get("tokenizer_class")), None)
    if not isinstance(kind, type):
        return {}
    known = tokenizers.Tokenizer.from_file(str(tokenizer_json)).get_vocab(with_added_tokens=True)
    given = inspect.signature(kind).parameters
    names = [name for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name in given]
    tokens = {name: str(given[name].default) for name in names if str(given[name].default) in known}
    sides = {"padding_side": "left"} if getattr(kind, "padding_side", None) == "left" else {}
    return {name: value for name, value in {**tokens, **sides}.items() if name not in config}


def first_difference(tokenizer: Tokenizer, model: bytes, tokenizer_json: str, texts: Sequence[str]) -> str | None:
    """Describe the first text for which `tokenizer`, sentencepiece itself and the `tokenizers` library give different
    ids, or whose ids do not decode to it; None if there is none."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = tokenizers.Tokenizer.from_str(tokenizer_json)
    for start in range(0, len(texts), 256):
        batch = list(texts[start : start + 256])
        ours = map(tokenizer.encode, batch)
        reference = processor.encode(batch, num_threads=1)
        theirs = [encoding.ids for encoding in fast.encode_batch_fast(batch, add_special_tokens=False)]
        for text, *ids in zip(batch, ours, reference, theirs, strict=True):
            if not ids[0] == ids[1] == ids[2]:
                return _show_difference(text, ids)
            if tokenizer.decode(ids[0]) != text.replace(_SPACE, " "):
                return f"{text[:80]!r} does not decode to itself"
            if fast.decode(ids[0]) != text.replace(_SPACE, " "):
                return f"{text[:80]!r} does not decode to itself with tokenizer.json"
    return None


def _show_difference(text: str, ids: Sequence[Sequence[int]]) -> str:
    ours, reference, theirs = ids
    place = next(i for i, same in enumerate(itertools.zip_longest(*ids)) if len(set(same)) > 1)
    window = slice(max(0, place - 2), place + 4)
    return (
        f"at token {place} of {text[:80]!r}: sentencepiece {list(reference[window])}, "
        f"tokenizer.json {list(theirs[window])}, in segments {list(ours[window])}"
    )
