"""Tokenizers: sentencepiece `.model` files and Hugging Face `tokenizer.json` files behind one interface.

Text is always text: the name of a control token inside a document ("</s>") is encoded as characters, so that no
document can forge an end-of-document token. Neither a beginning nor an end token is added by encoding.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.data.segments import COARSE, SegmentEncoder, chunks, crosses_no_piece, word_pattern
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import read_json_object

# Tried in this order if the tokenizer does not say which token ends a document.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>")

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")  # those of a trained tokenizer
_NAMES = "tokenizer_config.json"  # beside a tokenizer.json: names its special tokens
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte-fallback token

# Unigram scores that are multiples of this step add up exactly in sentencepiece's float32 over a chunk of
# `_UNIGRAM_CHUNK` characters: 2^13 characters * a score under 2^5 / 2^-6 < 2^24 is met by real text with room to spare.
UNIGRAM_SCORE_STEP = 2.0**-6
_UNIGRAM_CHUNK = 1 << 13


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype of ids on disk: uint16 if every id fits, else int32."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32


class Tokenizer(ABC):
    """The tokenizer interface of training and preprocessing.

    `fingerprint` is the SHA-256 of the file. `bos`, `eos` and `pad` are None where the tokenizer has none;
    `eod`, the end-of-document token, always exists. `spelling` is what stands in documents for a special token that
    text could spell, where earlier versions wrote that token: "unknown" (the unknown token), "text", "nothing" (such
    documents are bad, by `refused`); "" if none can. `refused` are ids that no document may have.
    """

    vocab_size: int
    eod: int
    bos: int | None
    eos: int | None
    pad: int | None
    spelling: str = ""
    refused: Sequence[int] = ()

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """The dtype of the ids that `encode_flat` returns."""
        return token_dtype(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, which must have no lone surrogates."""
        return self.encode_flat([text])[0].tolist()

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return all texts' ids concatenated (`dtype`), and the number of ids of each (int64). The fast path."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without control tokens."""

    @abstractmethod
    def token_id(self, name: str) -> int | None:
        """Return the id of the token of this name; None if there is none."""

    @abstractmethod
    def token_name(self, index: int) -> str:
        """Return the name of a token, as in the tokenizer's file."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Return the bytes of UTF-8 text that each token stands for, int64 [vocab_size]; 0 for control tokens.

        Raises `UserError` if the tokenizer's file does not tell.
        """

    def prefix_bytes(self, lengths: np.ndarray) -> int:
        """Return the bytes that a text's tokens stand for beyond it, by their `byte_lengths`: 1 for a tokenizer that
        puts a space first."""
        return max(0, int(lengths[self.encode("a")].sum()) - 1)

    def _find_eod(self, name: str | None, own: str | None, remedy: str) -> int:
        """Return the id of the token `name`; by default of `own`, the tokenizer's end token, or of `EOD_NAMES`.

        Raises `UserError` if there is none, which says by `remedy` how to give the tokenizer one.
        """
        for candidate in [name] if name is not None else filter(None, (own, *EOD_NAMES)):
            index = self.token_id(candidate)
            if index is not None:
                return index
        if name is not None:
            raise UserError(f"{self.path}: the tokenizer has no token {name!r} to end documents with")
        raise UserError(
            f"{self.path}: cannot tell which token ends a document (looked for {', '.join(EOD_NAMES)}): {remedy}"
        )


def normalizes(proto: Any) -> bool:
    """Return whether a sentencepiece model changes texts before it encodes them."""
    spec = proto.normalizer_spec
    return bool(spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)


def pieces_of(proto: Any, *kinds: str) -> list[str]:
    """Return the pieces of a sentencepiece model that are of these kinds, such as `NORMAL`."""
    types = [getattr(proto.SentencePiece, kind) for kind in kinds]
    return [piece.piece for piece in proto.pieces if piece.type in types]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece BPE or unigram model, encoded segment by segment where that is exact."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import sentencepiece
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        content = path.read_bytes()
        super().__init__(path, content)
        try:
            proto = ModelProto.FromString(content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # protobuf and sentencepiece raise types of their own
            raise UserError(f"{path}: not a sentencepiece model ({str(error).strip()})") from error
        if not proto.pieces:
            raise UserError(f"{path}: not a sentencepiece model (it is empty)")
        processor = self._processor
        self.vocab_size = processor.get_piece_size()
        self.bos, self.eos, self.pad = (
            index if index >= 0 else None for index in (processor.bos_id(), processor.eos_id(), processor.pad_id())
        )
        own = None if self.eos is None else self.token_name(self.eos)
        remedy = "train it with one of them as a control symbol, or with an end token (eos_id)"
        self.eod = self._find_eod(eod_token, own, remedy)
        if proto.pieces[self.eod].type in (proto.SentencePiece.USER_DEFINED, proto.SentencePiece.NORMAL):
            self.spelling = "unknown"
        self._segments: SegmentEncoder | None = None
        self._exact_chunks = False
        if self._splits_exactly(proto):
            symbols, kind = pieces_of(proto, "USER_DEFINED"), proto.trainer_spec.model_type
            if kind == proto.trainer_spec.BPE:
                pattern = word_pattern(pieces_of(proto, "NORMAL", "UNUSED")) or COARSE
                self._segments = SegmentEncoder(self._encode_segment, pattern, symbols)
            elif kind == proto.trainer_spec.UNIGRAM and not symbols:
                # Cutting long texts then changes nothing but the rounding of long sums of scores.
                self._exact_chunks = not any(piece.score % UNIGRAM_SCORE_STEP for piece in proto.pieces)

    def token_id(self, name: str) -> int | None:
        index = self._processor.piece_to_id(name)
        return index if self._processor.id_to_piece(index) == name else None

    def token_name(self, index: int) -> str:
        return self._processor.id_to_piece(int(index))

    def _splits_exactly(self, proto: Any) -> bool:
        """Return whether parts cut at `COARSE` borders encode to the ids of the whole."""
        escapes = proto.normalizer_spec.escape_whitespaces and not proto.trainer_spec.treat_whitespace_as_suffix
        if normalizes(proto) or not escapes:
            return False  # normalization looks across borders
        if len(pieces_of(proto, "BYTE")) != 256:
            return False  # adjacent unknown characters become one token
        spaced = set("".join(pieces_of(proto, "USER_DEFINED"))) & set(" \u2581")
        return not spaced and crosses_no_piece(COARSE, pieces_of(proto, "NORMAL", "UNUSED"))

    def _encode_segment(self, segment: str) -> bytes:
        return self._processor.encode(segment, out_type="numpy").astype(self.dtype).tobytes()

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        flat, lengths = self._encode_flat(texts)
        if self.spelling:
            flat = np.where(flat == self.eod, self.dtype(self._processor.unk_id()), flat)
        return flat, lengths

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._segments is not None:
            encoded = list(map(self._segments.encode, texts))
            item = np.dtype(self.dtype).itemsize
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // item
            return np.frombuffer(b"".join(encoded), self.dtype), lengths
        parts = [list(chunks(text, _UNIGRAM_CHUNK)) if self._exact_chunks else [text] for text in texts]
        arrays = self._processor.encode(list(chain.from_iterable(parts)), out_type="numpy", num_threads=1)
        sizes = np.cumsum([0, *map(len, arrays)])
        flat = np.concatenate([np.empty(0, self.dtype), *arrays], dtype=self.dtype, casting="unsafe")
        return flat, np.diff(sizes[np.cumsum([0, *map(len, parts)])])

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def byte_lengths(self) -> np.ndarray:
        processor = self._processor
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(self.vocab_size):
            if processor.is_byte(index):
                lengths[index] = 1
            elif not (processor.is_control(index) or processor.is_unknown(index)):
                lengths[index] = _utf8_length(processor.id_to_piece(index))
        return lengths


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. A `tokenizer_config.json` beside it names its special tokens."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import tokenizers

        content = path.read_bytes()
        super().__init__(path, content)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from error
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named_in = path.with_name(_NAMES)
        names = _token_names(named_in)
        self._control_names = set(names.values())
        named = [names.get(key) for key in ("bos_token", "eos_token", "pad_token")]
        self.bos, self.eos, self.pad = (None if name is None else self.token_id(name) for name in named)
        self.eod = self._find_eod(eod_token, names.get("eos_token"), f'name it as "eos_token" in {named_in}')
        ends = {index for index in (self.eod, self.bos, self.eos, self.pad) if index is not None}
        described = json.loads(self._tokenizer.to_str())
        plain = [token for token in described["added_tokens"] if token["id"] in ends and not token["special"]]
        if plain:  # which `encode_special_tokens` would leave alone
            for token in plain:
                token["special"] = True
            self._tokenizer, self.spelling = tokenizers.Tokenizer.from_str(json.dumps(described)), "text"
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        special = ends | {token["id"] for token in described["added_tokens"] if token["special"]}
        by_name = {self.token_name(index): index for index in special}
        spelled, self._unknown = _spelled_by_text(described["model"], by_name)
        self._spelled = sorted(spelled - {self._unknown})
        if self._spelled:
            self.spelling = "unknown"
        if self._spelled and self._unknown in (None, self.eod):
            self._spelled, self.refused, self.spelling = [], sorted(spelled), "nothing"

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def token_name(self, index: int) -> str:
        return self._tokenizer.id_to_token(int(index)) or f"<{index}>"

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum()))
        if self._spelled:
            assert self._unknown is not None, "else they are `refused`"
            flat[np.isin(flat, self._spelled)] = self._unknown
        return flat, lengths

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        described = json.loads(self._tokenizer.to_str())
        decoders = _types(described.get("decoder"))
        if not decoders & {"ByteLevel", "ByteFallback"}:
            raise UserError(
                f"{self.path}: cannot tell how many bytes a token stands for: its decoder has neither ByteLevel nor "
                "ByteFallback"
            )
        added = {token["id"]: token for token in described["added_tokens"]}
        names = {described["model"].get("unk_token"), *self._control_names}
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for text, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if text in names or (index in added and added[index]["special"]):
                continue
            if index in added:
                lengths[index] = len(text.encode())
            elif "ByteLevel" in decoders:
                lengths[index] = len(text)  # one character per byte
            else:
                lengths[index] = 1 if _BYTE.fullmatch(text) else _utf8_length(text)
        return lengths


def _spelled_by_text(model: dict[str, Any], special: dict[str, int]) -> tuple[set[int], int | None]:
    """Return the ids of those special tokens that a tokenizer.json's model may find in a text, whatever
    `encode_special_tokens` says, and the id of its unknown token."""
    if model["type"] == "Unigram":
        return set(special.values()), model["unk_id"]
    vocab: dict[str, int] = model["vocab"]
    found = special.keys() & vocab.keys()
    if model["type"] == "BPE" and not model["ignore_merges"] and any(len(name) > 1 for name in found):
        prefix = model["continuing_subword_prefix"] or ""
        merged = {first + second.removeprefix(prefix) for first, second in model["merges"]}
        found = {name for name in found if len(name) == 1 or name in merged}
    return {special[name] for name in found}, vocab.get(model["unk_token"])


def _utf8_length(piece: str) -> int:
    """Return the UTF-8 bytes of a sentencepiece piece, in which U+2581 stands for a space."""
    return len(piece.replace("\u2581", " ").encode())


def _types(decoder: dict[str, Any] | None) -> set[str]:
    """Return the types of a tokenizer.json's decoder and of those nested in it."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", [])))


def _token_names(config: Path) -> dict[str, str]:
    """Read the bos, eos, pad and unk tokens and further control tokens named in a tokenizer_config.json, if any."""
    if not config.is_file():
        return {}
    values = read_json_object(config)
    others = values.get("additional_special_tokens")
    names = {key: values.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    names |= {str(place): name for place, name in enumerate(others)} if isinstance(others, list) else {}
    plain = {key: name.get("content") if isinstance(name, dict) else name for key, name in names.items()}
    return {key: name for key, name in plain.items() if isinstance(name, str)}


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Load a sentencepiece `.model`, a `tokenizer.json`, or the folder that holds one of them.

    `eod_token` names the token that ends a document; by default the tokenizer's own end-of-sentence token or one
    of `EOD_NAMES`. Raises `UserError` if the file is missing, is neither, or has no such token.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not inside:
            raise UserError(f"{path}: the folder holds neither tokenizer.model nor tokenizer.json")
        path = inside[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; train one with plt train-tokenizer")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod_token)
    return SentencePieceTokenizer(path, eod_token)
