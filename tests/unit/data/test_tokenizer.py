from __future__ import annotations

import hashlib
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_helpers import chat_tokenizer, reference
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from plt_megatron.data.encoders import TextEncoder
from plt_megatron.data.hf_tokenizer import build_tokenizer_json
from plt_megatron.data.segments import COARSE, chunks, crosses_no_piece, word_pattern
from plt_megatron.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, token_dtype
from plt_megatron.data.tokenizer_training import hostile_strings
from plt_megatron.errors import UserError
from plt_megatron.run_folder.metrics import bits_per_byte

UNCHANGED = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


def train_plainly(lines: list[str], path: Path, **settings: object) -> Path:
    """A sentencepiece model with other settings than ours."""
    writer = io.BytesIO()
    defaults = {"vocab_size": 200, "model_type": "bpe", "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=writer, **{**defaults, **settings}
    )
    path.write_bytes(writer.getvalue())
    return path


def lines_of(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.strip()]


def saved(fast: FastTokenizer, folder: Path) -> Tokenizer:
    """Ours, of a tokenizer.json in this folder."""
    fast.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_model")


def test_encodes_exactly_as_sentencepiece_does(model: Path, texts: list[str]) -> None:
    tokenizer, plain = load_tokenizer(model), reference(model)
    for text in texts + hostile_strings(("</s>", "<pad>")):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_long_texts_and_long_runs(model: Path, texts: list[str]) -> None:
    tokenizer, plain = load_tokenizer(model), reference(model)
    for text in ("\n".join(texts) * 4, "a" * 70_000, "ab1/" * 20_000, " " * 70_000 + "x"):
        assert tokenizer.encode(text) == plain.encode(text)


def test_batches_are_the_single_texts(model: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(model)
    batch = ["", *texts[:20], ""]
    flat, lengths = tokenizer.encode_flat(batch)
    assert flat.dtype == np.uint16 and lengths.dtype == np.int64
    single = [tokenizer.encode(text) for text in batch]
    assert flat.tolist() == sum(single, []) and lengths.tolist() == [len(ids) for ids in single]
    assert [len(array) for array in tokenizer.encode_flat([])] == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True},  # a dummy prefix and NFKC
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "normalization_rule_name": "identity", "treat_whitespace_as_suffix": True},
        {"byte_fallback": True, "split_by_whitespace": False, "normalization_rule_name": "identity"},
        {"model_type": "unigram", "byte_fallback": True},
        {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<|fim|>", "<|f", "token"],
        },
    ],
)
def test_models_of_others(settings: dict[str, object], tmp_path: Path, texts: list[str]) -> None:
    """Whatever a model does that forbids cutting, the ids are sentencepiece's."""
    path = train_plainly(lines_of(texts), tmp_path / "m.model", **{"vocab_size": 600, **settings})
    tokenizer, plain = load_tokenizer(path), reference(path)
    for text in texts[:50] + hostile_strings(("<|fim|>", "<|f", "token")):
        assert tokenizer.encode(text) == plain.encode(text)


@pytest.mark.parametrize(("model_type", "byte_fallback"), [("bpe", True), ("bpe", False), ("unigram", False)])
def test_models_of_others_are_written_as_they_encode(model_type, byte_fallback, tmp_path, texts):
    """Without byte fallback, adjacent unknown characters are one token. Or they are refused."""
    lines, settings = lines_of(texts), {"model_type": model_type, "byte_fallback": byte_fallback, **UNCHANGED}
    path = train_plainly(lines, tmp_path / "m.model", vocab_size=600, required_chars="<>/", **settings)
    tokenizer, fast = load_tokenizer(path), FastTokenizer.from_str(build_tokenizer_json(path)["tokenizer.json"])
    for text in ["the fox\n\nthe dog", *texts[:50], "a</s>b<unk>", "\n \t\0", "\u65e5\n\n"]:
        assert fast.encode(text).ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "word"}, "its tokens are whole words"),
        ({"model_type": "unigram", "byte_fallback": True}, "text could spell its token <unk>"),  # without a <
        ({"byte_fallback": True, "control_symbols": ["\u00a7"]}, "text could spell its token \u00a7"),
        ({"add_dummy_prefix": True}, "it normalizes text"),
    ],
)
def test_models_that_no_file_can_express(settings, reason, tmp_path):
    path = train_plainly(["a b ab ba abc"] * 50, tmp_path / "m.model", **{"vocab_size": 290, **UNCHANGED, **settings})
    with pytest.raises(UserError, match=rf"m\.model cannot be written as tokenizer\.json \({reason}"):
        build_tokenizer_json(path)


def test_cutting_is_exact_for_any_border(bpe_model: Path, texts: list[str]) -> None:
    """Ids of segments, cut by either pattern and encoded on their own, add up to the ids of the whole."""
    plain = reference(bpe_model)
    ids = range(4, plain.get_piece_size())  # after the control tokens
    pieces = [plain.id_to_piece(index) for index in ids if not plain.is_byte(index)]
    rng = random.Random(3)
    noise = ["".join(rng.choices("aA1_. \n\u2581\u00e9\u65e5\t-", k=60)) for _ in range(200)]
    words = word_pattern(pieces)
    assert words is not None
    for pattern in (COARSE, words):
        assert crosses_no_piece(pattern, pieces)
        for text in texts[:50] + noise:
            segments = pattern.findall(text)
            assert "".join(segments) == text
            assert sum(map(plain.encode, segments), []) == plain.encode(text)
    assert not crosses_no_piece(COARSE, ["a\u2581b"])


def test_words_are_cut_as_finely_as_the_vocabulary_allows() -> None:
    def cut(pieces: list[str], text: str) -> list[str] | None:
        pattern = word_pattern(pieces)
        return None if pattern is None else pattern.findall(text)

    plain = ["\u2581the", "ing", "))", "\t#", "\u00b0'", "ci\u00f3n", "\u65e5\u672c", "1"]
    text = "f(x1) = na\u00efve  \u65e5\u672c \u00b0'12\n\t#y"
    expected = ["f", "(", "x", "1", ")", " =", " na\u00efve", "  \u65e5\u672c", " \u00b0'", "1", "2", "\n", "\t#", "y"]
    assert cut(plain, text) == expected
    glued = [*plain, "\u00f7'", "\u2581'\u00f7'", "_a"]  # joins only where these two characters are
    assert cut(glued, text) == expected
    assert cut(glued, "a'b 7\u00f7'c_d1_ _") == ["a", "'", "b", " 7\u00f7'", "c_d", "1_", " _"]
    assert cut([*plain, "a1"], text) is None
    assert cut([*plain, "a\u2581b"], text) is None
    assert cut([*plain, "\n\n"], text) is None


def test_vocabularies_that_mix_kinds_of_characters(tmp_path: Path) -> None:
    """Pieces with accents, tabs and symbols beside ASCII: still cut into words, and still exact."""
    words = "ci\u00f3n|\u00f7'x|\u00e9t\u00e9|\t#a|\u0641'\u064b'|_a_b|\u00b0),|co\u0308op|\u2014'".split("|")
    rng = random.Random(5)
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    settings = {
        "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "split_by_unicode_script": False, "character_coverage": 1.0,
    }  # fmt: skip
    path = train_plainly(lines, tmp_path / "m.model", **settings)
    tokenizer, plain = load_tokenizer(path), reference(path)
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer._segments is not None
    assert tokenizer._segments._pattern is not COARSE
    alphabet = sorted(set("".join(words))) + [" ", "\n", "1"]
    noise = ["".join(rng.choices(alphabet, k=50)) for _ in range(500)]
    for text in lines + noise:
        assert tokenizer.encode(text) == plain.encode(text)


def test_chunks_cut_only_at_borders() -> None:
    text = "word  word\nx" * 50 + "y" * 100 + " z"
    parts = list(chunks(text, 7))
    assert "".join(parts) == text and len(parts) > 20
    segments = [segment for part in parts for segment in COARSE.findall(part)]
    assert segments == COARSE.findall(text)


def test_special_tokens_and_identity(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.eod) == (1, 2, 3, 2)
    assert tokenizer.fingerprint == hashlib.sha256(model.read_bytes()).hexdigest()
    assert tokenizer.vocab_size == reference(model).get_piece_size()
    assert load_tokenizer(model.parent).path == model
    assert load_tokenizer(model, "<pad>").eod == 3


def test_hugging_face_file(model: Path, texts: list[str]) -> None:
    ours, theirs = load_tokenizer(model), load_tokenizer(model.with_name("tokenizer.json"))
    assert (theirs.bos, theirs.eos, theirs.pad, theirs.eod) == (1, 2, 3, 2)
    assert theirs.vocab_size == ours.vocab_size
    strings = texts + hostile_strings(("</s>", "<pad>", "<unk>"))
    both = zip(theirs.encode_flat(strings), ours.encode_flat(strings), strict=True)
    assert all(np.array_equal(mine, other) for mine, other in both)
    assert all(theirs.decode(theirs.encode(text)) == text for text in texts)


def test_a_users_symbol_that_ends_documents_is_not_in_text(tmp_path: Path) -> None:
    path = train_plainly(["a b c"] * 50, tmp_path / "m.model", vocab_size=300, byte_fallback=True,
                         user_defined_symbols=["<|endoftext|>"])  # fmt: skip
    tokenizer, spelled = load_tokenizer(path, "<|endoftext|>"), "a<|endoftext|>b"
    assert tokenizer.eod in reference(path).encode(spelled) and tokenizer.eod not in tokenizer.encode(spelled)
    assert tokenizer.spelling == "unknown" and load_tokenizer(path).spelling == ""


@pytest.mark.parametrize("special", [True, False])
def test_hugging_face_file_of_others(tmp_path: Path, special: bool) -> None:
    """Truncation is undone, special tokens in a text stay text, ids may have holes, the end token is found."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    value = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": 9, "content": "<|endoftext|>", "special": special, **plain}],
        "model": {
            "type": "BPE",
            "unk_token": "x",
            "merges": [],
            "vocab": {"a": 0, "b": 1, "<": 2, "|": 3, ">": 4, "x": 5, "<|endoftext|>": 9},
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(value))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod == 9 and tokenizer.vocab_size == 10
    assert 9 not in tokenizer.encode("a<|endoftext|>b") and tokenizer.spelling == ("" if special else "text")
    assert tokenizer.encode("abab") == [0, 1, 0, 1]
    assert FastTokenizer.from_file(str(path)).encode("<|endoftext|>").ids == [9]


@pytest.mark.parametrize("added", [["<unk>", "</s>"], []], ids=["added", "pieces alone"])
def test_a_unigram_model_finds_no_special_token_in_text(added: list[str], tmp_path: Path) -> None:
    """Nor those among its pieces, whose score of zero is better than any other way to spell them."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -2.0) for character in "ab</s>")]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=0))
    fast.add_special_tokens(added)
    tokenizer = saved(fast, tmp_path)
    assert tokenizer.eod == 1
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eod not in ids and (ids[0], ids[-1]) == (2, 3)


@pytest.mark.parametrize("added", [["</s>"], []])
@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "BPE of words", "BPE without unknown"])
def test_no_model_finds_the_end_of_a_document_in_its_text(kind: str, added: list[str], tmp_path: Path) -> None:
    """Nor is a special token that text cannot spell replaced, or data that have it tokenized anew."""
    pieces = {name: index for index, name in enumerate(["<unk>", "a", "<", "/", "s", ">", "</", "s>", "</s>"])}
    merges, unknown = [("<", "/"), ("s", ">"), ("</", "s>")], {} if "without" in kind else {"unk_token": "<unk>"}
    fast = FastTokenizer(
        getattr(models, kind)(pieces, **unknown)
        if kind.startswith("Word")
        else models.BPE(pieces, [] if "words" in kind else merges, ignore_merges="words" in kind, **unknown)
    )
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast.add_special_tokens(added)
    tokenizer = saved(fast, tmp_path)
    encoded = TextEncoder(tokenizer, append_eod=True)(["a", "a </s> a", "", "a a"])
    if unknown:
        assert encoded.flat.tolist() == [1, 8, 1, 0, 1, 8, 1, 1, 8] and encoded.bad.keys() == {2}
        assert tokenizer.spelling == "unknown"
    else:
        assert encoded.flat.tolist() == [1, 8, 1, 1, 8] and encoded.bad.keys() == {1, 2}
        assert tokenizer.spelling == "nothing"
    if kind == "BPE":
        fast.model = models.BPE(pieces, merges[:2], unk_token="<unk>")  # type: ignore[assignment]
        assert saved(fast, tmp_path).spelling == ""


@pytest.mark.parametrize(("named", "size"), [(5, 3), (None, 3), (["<x>"], 0), ([{"content": "<x>"}, 5], 0)])
def test_further_special_tokens_are_named_in_any_form(named: object, size: int, tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE({"a": 0, "<x>": 1, "</s>": 2}, []))
    fast.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": named}))
    assert saved(fast, tmp_path).byte_lengths()[:2].tolist() == [1, size]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.model", None, "no such tokenizer; train one with plt train-tokenizer"),
        ("bad.model", b"\xff\xfe nonsense", "not a sentencepiece model"),
        ("empty.model", b"", "not a sentencepiece model"),
        ("bad.json", b"{}", "not a tokenizer.json"),
        ("latin.json", b"\xe9", "not a tokenizer.json"),
        ("noend.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "which token ends a document"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unusable_settings(bpe_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token '<none>' to end documents"):
        load_tokenizer(bpe_model, "<none>")
    with pytest.raises(UserError, match="holds neither"):
        load_tokenizer(tmp_path)


def test_a_token_that_ends_documents_is_given_beside_a_json_or_in_training(tmp_path: Path, texts: list[str]) -> None:
    words = models.WordLevel({"<fin>": 0, "word": 1}, unk_token="word")
    with pytest.raises(UserError, match=f'"eos_token" in {tmp_path / "tokenizer_config.json"}'):
        saved(FastTokenizer(words), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<fin>"}')
    assert load_tokenizer(tmp_path).eod == 0
    with pytest.raises(UserError, match="control symbol.*eos_id"):
        load_tokenizer(train_plainly(texts[:20], tmp_path / "t.model", eos_id=-1))
    for settings in ({"eos_piece": "<fin>"}, {"eos_id": -1, "control_symbols": ["<|endoftext|>"]}):
        tokenizer = load_tokenizer(train_plainly(texts[:20], tmp_path / "t.model", **settings))
        assert tokenizer.token_name(tokenizer.eod) in ("<fin>", "<|endoftext|>")


def test_types_of_ids() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.int32


def test_the_fast_way_is_taken(bpe_model: Path, unigram_model: Path) -> None:
    """Guards the speed: no other test notices if texts are no longer cut for our models."""
    bpe, unigram = load_tokenizer(bpe_model), load_tokenizer(unigram_model)
    assert isinstance(bpe, SentencePieceTokenizer) and isinstance(unigram, SentencePieceTokenizer)
    assert bpe._segments is not None and bpe._segments._pattern is not COARSE
    assert unigram._exact_chunks


def test_a_model_that_predicts_bytes_uniformly_has_eight_bits_per_byte(bpe_model, unigram_model, texts, tmp_path):
    """Whatever the tokenizer: a token of b bytes then costs b ln 256, and the end of a document nothing."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    paths = [
        bpe_model,
        unigram_model,
        bpe_model.with_name("tokenizer.json"),
        chat_tokenizer(tmp_path / "byte_level") / "tokenizer.json",
        train_plainly(lines_of(texts), tmp_path / "prefixed.model", vocab_size=600, **settings),  # as Llama 2's
    ]
    read = [text for text in [*texts, "naïve → 東京 \U0001f642\n\t  x"] if "\u2581" not in text]
    counts = set()
    for path in paths:
        tokenizer = load_tokenizer(path)
        lengths = tokenizer.byte_lengths()
        assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eod] == 0
        ids = [index for text in read for index in (*tokenizer.encode(text), tokenizer.eod)]
        loss_sum = math.fsum(lengths[index] * math.log(256) for index in ids)
        size = sum(len(text.encode()) for text in read)
        spaces = len(read) * tokenizer.prefix_bytes(lengths)
        assert int(lengths[ids].sum()) == size + spaces and (spaces > 0) == (path.stem == "prefixed"), path
        loss_sum -= spaces * math.log(256)
        assert bits_per_byte(loss_sum, size) == pytest.approx(8.0, rel=1e-12)
        counts.add(len(ids))
    assert len(counts) >= 3, "the tokenizers cut the texts differently"


def test_bytes_of_a_decoder_that_does_not_say_are_refused(tmp_path):
    with pytest.raises(UserError, match="how many bytes a token stands for"):
        saved(FastTokenizer(models.BPE({"a": 0, "</s>": 1}, [])), tmp_path).byte_lengths()
