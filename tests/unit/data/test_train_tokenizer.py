from __future__ import annotations

import errno
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import Tool, make_texts, reference, train, write_jsonl, write_parquet
from tokenizers import Tokenizer as FastTokenizer

from plt_megatron.commands.train_tokenizer import main
from plt_megatron.data import tokenizer_training
from plt_megatron.data.formats import ReadOptions, open_inputs
from plt_megatron.data.hf_tokenizer import first_difference
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.data.tokenizer_training import Sample, TrainingOptions, hostile_strings
from plt_megatron.errors import UserError


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_transformers_encodes_identically(model_type: str, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    symbols = ("<|im_start|>", "<|im_end|>")
    model = train(corpus, tmp_path, model_type=model_type, control_symbols=symbols)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    bare = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = reference(model)
    for text in texts[:100] + hostile_strings(symbols):
        expected = plain.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected
        assert theirs(text)["input_ids"] == expected
        assert bare.encode(text).ids == expected
        assert theirs.decode(expected) == text.replace("\u2581", " ")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert len(theirs) == plain.get_piece_size()
    assert theirs.convert_tokens_to_ids("<|im_end|>") == plain.piece_to_id("<|im_end|>")
    assert theirs.decode([plain.piece_to_id("<|im_end|>"), 2], skip_special_tokens=True) == ""


def test_user_defined_symbols_are_found_in_text(corpus: Path, tmp_path: Path) -> None:
    symbols = ("<|fim|>", "<|fim|>x", "def")
    model = train(corpus, tmp_path, user_defined_symbols=symbols)
    tokenizer, plain = load_tokenizer(model), reference(model)
    bare = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a<|fim|>b", "<|fim|>x", "a <|fim|><|fim|>xdef undefined", "define def\ndef"):
        assert tokenizer.encode(text) == plain.encode(text) == bare.encode(text).ids
    assert plain.piece_to_id("<|fim|>x") in tokenizer.encode("a <|fim|>x")


def test_same_input_same_files_whatever_the_machine(corpus: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 3)):
        train(corpus, tmp_path / name, threads=threads)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_unigram_model_is_of_so_many_threads_on_every_machine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pieces depend on them."""
    for name, cores in (("a", 1), ("b", 3)):
        monkeypatch.setattr(tokenizer_training, "usable_cores", lambda cores=cores: cores)
        train(corpus, tmp_path / name, threads=None, model_type="unigram")
    models = [tmp_path / name / "tokenizer.model" for name in "ab"]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_differences_are_found_and_nothing_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break the export in a way only some texts show."""
    real = tokenizer_training.build_tokenizer_json

    def without_last_merges(model: Path) -> dict[str, str]:
        files = real(model)
        value = json.loads(files["tokenizer.json"])
        value["model"]["merges"] = value["model"]["merges"][:-40]
        return {**files, "tokenizer.json": json.dumps(value)}

    monkeypatch.setattr(tokenizer_training, "build_tokenizer_json", without_last_merges)
    differs = r"would not encode like the sentencepiece model: at token \d+ of .*: sentencepiece"
    with pytest.raises(UserError, match=differs):
        train(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_tokenizer_whole(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    train(corpus, tmp_path)
    before, sync = contents(), os.fsync
    syncs = iter(range(10))

    def full(descriptor: int) -> None:
        if next(syncs) == 2:  # of the last of three files
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            train(corpus, tmp_path, model_type="unigram", overwrite=True)
    assert contents() == before
    train(corpus, tmp_path, model_type="unigram", overwrite=True)
    assert contents().keys() == before.keys() and contents()["tokenizer.json"] != before["tokenizer.json"]


def test_a_lossy_decoder_is_found(bpe_model: Path) -> None:
    value = json.loads(bpe_model.with_name("tokenizer.json").read_text(encoding="utf-8"))
    value["decoder"]["decoders"] = value["decoder"]["decoders"][1:]
    found = first_difference(load_tokenizer(bpe_model), bpe_model.read_bytes(), json.dumps(value), ["a b"])
    assert found == "'a b' does not decode to itself with tokenizer.json"


def test_command(corpus: Path, tmp_path: Path, run_tool: Tool) -> None:
    arguments = ("--input", corpus.parent / "*.jsonl", "--output", tmp_path / "t", "--vocab-size", 400, "--threads", 1)
    result = run_tool("train_tokenizer.py", *arguments, "--special-token", "<|x|>")
    assert result.returncode == 0, result.stderr
    assert "400 pieces from 300 documents" in result.stdout and "encodes identically" in result.stdout
    made = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert made == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    repeated = run_tool("train_tokenizer.py", *arguments, "--input", "nothing*.jsonl")
    assert repeated.returncode == 2  # both inputs are read
    again = run_tool("train_tokenizer.py", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path}/t/tokenizer.model exists: choose another --output or pass --overwrite\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_another_tokenizer_are_not_replaced(corpus, tmp_path, name):
    (tmp_path / name).write_text("another's")
    with pytest.raises(UserError, match=name):
        train(corpus, tmp_path, 400)
    assert [path.read_text() for path in tmp_path.glob("*") if path != corpus] == ["another's"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nothing*.jsonl"], "input 'nothing*.jsonl' matches no file"),
        (["--vocab-size", "100000"], "--vocab-size 100000 is too high for this text: give more text or use at most "),
        (["--vocab-size", "300"], "--vocab-size 300 is too low: characters and bytes alone need "),
        (["--special-token", "a b"], "special token 'a b' is empty or contains a space"),
        (["--special-token", "</s>"], "special token '</s>' is built in"),
        (["--special-token", "<x>", "--user-defined-symbol", "<x>"], "a special token is given twice"),
        (["--json-key", "body"], "the input has no usable text to train a tokenizer on"),
        (["--output", "/dev/null/t"], "/dev/null/t"),
    ],
)
def test_bad_settings(
    arguments: list[str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "400", "--threads", "1"]
    monkeypatch.chdir(tmp_path)
    assert main([*defaults, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "t" / "tokenizer.model").exists()


def test_large_corpora_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times more text than wanted: about as much as wanted is read, from all parts of all files."""
    for number in range(2):
        lines = [f"file{number} place{place:05d} " + "x" * 400 for place in range(12_000)]
        write_jsonl(tmp_path / f"{number}.jsonl", lines)
    sources = open_inputs([str(tmp_path / "*.jsonl")], ReadOptions())
    size = sum(source.size for source in sources)
    monkeypatch.setattr(tokenizer_training, "_SPAN", 1 << 14)
    sample = Sample(sources, TrainingOptions([], "", 0, max_sample_bytes=size // 10))
    lines = list(sample.lines())
    assert 0.8 * size / 10 < sample.bytes < 1.1 * size / 10
    for number in range(2):
        places = sorted(int(line.split()[1][5:]) for line in lines if line.startswith(f"file{number}"))
        assert len(places) == len(set(places))
        quarters = [sum(lo <= place < lo + 3000 for place in places) for lo in range(0, 12_000, 3000)]
        assert min(quarters) > 0.5 * max(quarters)


def test_first_lines_are_sampled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one document have no other."""
    monkeypatch.setattr(tokenizer_training, "_SPAN", 1 << 14)
    for number in range(40):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"file{number} " + "x" * 8_000])
    write_jsonl(tmp_path / "more.jsonl", ["more " + "x" * 400] * 800)
    sources = open_inputs([str(tmp_path / "*.jsonl")], ReadOptions())
    sample = Sample(sources, TrainingOptions([], "", 0, max_sample_bytes=sum(s.size for s in sources) // 4))
    read = [line.split()[0] for line in sample.lines()]
    assert 3 <= sum(name.startswith("file") for name in read) <= 20 and 100 <= read.count("more") <= 300


def test_files_that_hold_more_text_than_bytes_leave_the_others_their_share(tmp_path: Path) -> None:
    for number in range(4):
        rows = [f"file{number} " + "again and " * 20] * 2000
        write_parquet(tmp_path / f"{number}.parquet", {"text": rows}, 100, compression="zstd", write_statistics=False)
    sources = open_inputs([str(tmp_path / "*.parquet")], ReadOptions())
    size = sum(source.size for source in sources)
    assert size < 4 * 2000 * 200 / 8, "the files hold far more text than bytes"
    sample = Sample(sources, TrainingOptions([], "", 0, max_sample_bytes=size))
    counts = Counter(line.split()[0] for line in sample.lines())
    assert len(counts) == 4 and min(counts.values()) > 5 and max(counts.values()) <= 1.5 * min(counts.values())


def test_a_file_that_holds_more_text_than_the_sample_is_read_to_its_end(tmp_path: Path) -> None:
    """Though it has fewer bytes."""
    rows = [f"place{place:05d} " + "again and " * 40 for place in range(20_000)]
    path = write_parquet(tmp_path / "a.parquet", {"text": rows}, row_group_size=200)
    sources = open_inputs([str(path)], ReadOptions())
    size = len(rows) * len(rows[0])
    assert sources[0].size < size // 10, "the file holds far more text than bytes"
    sample = Sample(sources, TrainingOptions([], "", 0, max_sample_bytes=size // 10))
    places = [int(line.split()[0][5:]) for line in sample.lines()]
    assert 0.5 * size / 10 < sample.bytes < 1.1 * size / 10
    assert min(places) < 2000 and max(places) > 18_000


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_one_document_is_sampled_evenly(tmp_path: Path, suffix: str) -> None:
    """Neither left out nor taken whole, however it is drawn; a short one is."""
    text = "".join(f"place{place:05d} " + "again " * 15 + "\n" for place in range(10_000))
    (tmp_path / "short.txt").write_text("short " * 100)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode(), 1) if suffix else text.encode())
    sources = open_inputs([str(path), str(tmp_path / "short.txt")], ReadOptions())
    limit = sum(source.text_size for source in sources) // 2
    for seed in range(20):
        sample = Sample(sources, TrainingOptions([], "", 0, max_sample_bytes=limit, seed=seed))
        lines = list(sample.lines())
        assert 0.8 * limit < sample.bytes < 1.1 * limit
        places = [int(found[1]) for line in lines if (found := re.match(r"place(\d{5})", line))]
        assert places[0] < 1000 and places[-1] > 9000 and places == sorted(set(places))
        assert "short " * 100 in lines or not any("short" in line for line in lines)


def test_sentencepiece_drops_no_long_line(tmp_path: Path) -> None:
    """It ignores lines of over 4192 bytes; ours arrive in parts."""
    text = "".join(make_texts(200, seed=5)).replace("\n", " ")
    sources = open_inputs([str(write_jsonl(tmp_path / "a.jsonl", [text]))], ReadOptions())
    sample = Sample(sources, TrainingOptions([], "", 0))
    lines = list(sample.lines())
    assert "".join(lines) == "".join(text.splitlines())
    assert max(len(line.encode()) for line in lines) < 4192
    assert (sample.documents, sample.bad_lines) == (1, 0)
