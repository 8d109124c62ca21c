from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    Tool,
    bad_lines,
    digest,
    documents,
    expected,
    make_texts,
    run_preprocess,
    tool_environment,
    write_jsonl,
    write_parquet,
)

from plt_megatron.commands import preprocess as command
from plt_megatron.config.schema import DataConfig, DataSource
from plt_megatron.data import joining
from plt_megatron.data import preprocess as module
from plt_megatron.data.formats import Quality, ReadOptions
from plt_megatron.data.indexed import open_index, read_index
from plt_megatron.data.mix import check_tokenizer, document_record
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.slurm import start_checks
from tests.running import ROOT, run


def test_upstream_reads_what_the_command_writes(
    corpus: Path, texts: list[str], bpe_model: Path, tmp_path: Path, run_tool: Tool
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    arguments = ("--input", corpus, "--output-prefix", tmp_path / "out" / "x", "--tokenizer", bpe_model, "--workers", 2)
    result = run_tool("preprocess.py", *arguments)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["x.bin", "x.idx", "x.manifest.json"]
    dataset = IndexedDataset(str(tmp_path / "out" / "x"))
    assert [document.tolist() for document in dataset] == expected(bpe_model, texts)
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    manifest = json.loads((tmp_path / "out" / "x.manifest.json").read_text())
    assert manifest["documents"] == len(texts)
    assert manifest["tokens"] == sum(map(len, expected(bpe_model, texts)))
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(bpe_model.read_bytes()).hexdigest()
    assert manifest["bin_sha256"] == digest(tmp_path / "out" / "x")[0]
    again = run_tool("preprocess.py", *arguments)
    assert again.returncode == 0 and "already done" in again.stderr


def test_all_formats_together(texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    """Files of every kind, divided into shards in every way: spooled, in groups, in ranges, by row groups."""
    zstandard = pytest.importorskip("zstandard")
    plain = write_jsonl(tmp_path / "a.jsonl", texts[:80])
    packed, tiny = write_jsonl(tmp_path / "b.jsonl.gz", texts[80:200]), tmp_path / "c.jsonl.zst"
    tiny.write_bytes(zstandard.compress(write_jsonl(tmp_path / "c.txt", texts[200:203]).read_bytes()))
    table = write_parquet(tmp_path / "d.parquet", {"text": texts[203:280]}, row_group_size=10)
    singles = [tmp_path / f"e{number:03d}.txt" for number in range(20)]
    for path, text in zip(singles, texts[280:], strict=True):
        path.write_text(text, encoding="utf-8", newline="")
    inputs = [plain, packed, tiny, table, *singles]
    manifest = run_preprocess(inputs, tmp_path / "x", bpe_model, shard_bytes=6000)
    assert documents(tmp_path / "x") == expected(bpe_model, texts)
    assert [source["documents"] for source in manifest["sources"]] == [80, 120, 3, 77] + [1] * 20
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    run_preprocess(inputs, tmp_path / "y", bpe_model, workers=2, shard_bytes=1 << 20)
    assert digest(tmp_path / "x") == digest(tmp_path / "y")
    assert not list(tmp_path.glob("*.partial"))


def test_hugging_face_tokenizer_and_large_vocabulary(
    corpus: Path, texts: list[str], bpe_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that names no token that ends documents is of no use to runs."""
    fast = bpe_model.with_name("tokenizer.json")
    run_preprocess([corpus], tmp_path / "x", fast, append_eod=False)
    assert documents(tmp_path / "x") == [ids[:-1] for ids in expected(bpe_model, texts)]
    value = json.loads(fast.read_text(encoding="utf-8"))
    value["model"]["vocab"]["<far>"] = 70_000
    large = tmp_path / "tokenizer.json"
    large.write_text(json.dumps(value).replace("</s>", "<fin>"), encoding="utf-8")
    assert "warning" not in capsys.readouterr().err
    manifest = run_preprocess([corpus], tmp_path / "y", large, eod_token="<far>")
    assert "warning: no run can load" in capsys.readouterr().err
    assert manifest["dtype"] == "int32"
    assert documents(tmp_path / "y") == [[*ids[:-1], 70_000] for ids in expected(bpe_model, texts)]


BAD = [
    (b'{"text": "a', "broken JSON (Unterminated string starting at: line 1 column 10 (char 9))"),
    (b'{"body": "a"}', "missing field 'text'"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at offset 13)"),
    (b'{"text": ""}', "field 'text' is empty"),
    (
        b'{"text": "' + b"x" * 20_000_000 + b'"}',
        "document of 20000013 bytes is longer than --max-document-bytes 16777216",
    ),
]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(*bad, id=bad[1][:12], marks=[pytest.mark.slow] if 0 < number < len(BAD) - 1 else [])
        for number, bad in enumerate(BAD)
    ],
)
def test_a_bad_line(
    line: bytes, reason: str, texts: list[str], bpe_model: Path, tmp_path: Path, run_tool: Tool
) -> None:
    """Skipped: counted, reported with file and line, the rest complete. Fatal: status 2 and the same report."""
    path = tmp_path / "a.jsonl"
    good = write_jsonl(path, texts[:40]).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(good[:30]) + line + b"\n" + b"".join(good[30:]))
    arguments = ["--input", path, "--output-prefix", tmp_path / "x", "--tokenizer", bpe_model, "--workers", 1]
    arguments += ["--shard-mb", 8 if len(line) > 1000 else 0.004]  # the line, or the file, spans several shards
    fatal = run_tool("preprocess.py", *arguments, "--on-bad-line", "fail")
    assert fatal.returncode == 2
    assert fatal.stderr.splitlines()[-1] == f"error: {path}:31: {reason}: fix it, or pass --on-bad-line skip"
    assert "Traceback" not in fatal.stderr and not (tmp_path / "x.bin").exists()
    skipped = run_tool("preprocess.py", *arguments)
    assert skipped.returncode == 0, skipped.stderr
    assert f"bad line {path}:31: {reason}\n" in skipped.stderr
    assert "skipped 1 bad lines: 1 " in skipped.stderr
    assert documents(tmp_path / "x") == expected(bpe_model, texts[:40])
    assert bad_lines(tmp_path / "x") == [{"file": str(path), "line": 31, "reason": reason}]


@pytest.mark.parametrize("suffix", [".gz", ".parquet"])
def test_where_a_fatal_line_is(suffix: str, texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    """The line's number is that in the (decompressed) file, the row's that in the whole Parquet file."""
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [*texts[:150], "", *texts[150:160]]
    if suffix == ".gz":
        write_jsonl(path, lines)
    else:
        write_parquet(path, {"text": lines}, row_group_size=20)
    with pytest.raises(UserError) as error:
        run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=5000, fail_on_bad_line=True)
    place = f"{path}:151" if suffix == ".gz" else f"{path}:row 151"
    assert str(error.value) == f"{place}: field 'text' is empty: fix it, or pass --on-bad-line skip"


@pytest.mark.parametrize("spooled", [True, False])
def test_a_file_that_breaks_off(spooled: bool, texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    """What can be read of a damaged .gz is kept, and the loss reported; the other files are complete."""
    path, after = write_jsonl(tmp_path / "a.jsonl.gz", texts), write_jsonl(tmp_path / "b.jsonl", texts[:5])
    path.write_bytes(path.read_bytes()[:-5000])
    manifest = run_preprocess([path, after], tmp_path / "x", bpe_model, shard_bytes=8000 if spooled else 64 << 20)
    found = documents(tmp_path / "x")
    read = len(found) - 5
    assert 100 < read < len(texts)
    assert found == expected(bpe_model, texts[:read] + texts[:5])
    reason = bad_lines(tmp_path / "x")[-1]["reason"]
    assert "broken gzip data" in reason and reason.endswith("the rest is lost")
    assert manifest["bad_lines"]["broken file"] == 1


@pytest.mark.parametrize("spooled", [True, False])
def test_lines_do_not_depend_on_where_blocks_end(spooled: bool, bpe_model: Path, tmp_path: Path) -> None:
    """A mark of byte order in the middle, as of joined files, stays; a line that is cut off is lost."""
    lines = [f"\ufeff{random.Random(number).randbytes(40).hex()}" for number in range(400)]
    whole, damaged = tmp_path / "a.txt.gz", tmp_path / "b.txt.gz"
    whole.write_bytes(gzip.compress("\n".join(lines).encode()))
    damaged.write_bytes(whole.read_bytes()[:-5000])
    lines[0] = lines[0].removeprefix("\ufeff")
    options = {"shard_bytes": 90 if spooled else 64 << 20, "read": ReadOptions(text_documents="line")}
    run_preprocess([whole], tmp_path / "x", bpe_model, **options)
    assert documents(tmp_path / "x") == expected(bpe_model, lines)
    run_preprocess([damaged], tmp_path / "y", bpe_model, **options)
    found = documents(tmp_path / "y")
    assert 100 < len(found) < 400 and found == expected(bpe_model, lines[: len(found)])


def test_a_damaged_page_loses_the_rest_of_its_shard(texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    """The footer, read before the start, is sound; a disk's error is no damage."""
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=100)
    content = bytearray(path.read_bytes())
    content[4 + len(content) // 3 : 204 + len(content) // 3] = bytes(200)
    path.write_bytes(content)
    manifest = run_preprocess([path], tmp_path / "x", bpe_model, shard_bytes=1)
    (bad,) = bad_lines(tmp_path / "x")
    assert "broken Parquet data" in bad["reason"] and manifest["bad_lines"]["broken file"] == 1
    assert documents(tmp_path / "x")[:100] == expected(bpe_model, texts[:100])
    assert documents(tmp_path / "x")[-100:] == expected(bpe_model, texts[-100:])


def test_line_numbers_across_shards(texts: list[str], bpe_model: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [json.dumps({"text": text}) for text in texts]
    bad = [7, 8, 100, 222, 299]
    for number in bad:
        lines[number - 1] = "broken"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    run_preprocess([path], tmp_path / "x", bpe_model, workers=2, shard_bytes=3000)
    assert [entry["line"] for entry in bad_lines(tmp_path / "x")] == bad
    assert "skipped 5 bad lines: 5 broken JSON" in capsys.readouterr().err


def test_nothing_usable(bpe_model: Path, tmp_path: Path, run_tool: Tool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    result = run_tool("preprocess.py", "--input", path, "--output-prefix", tmp_path / "x", "--tokenizer", bpe_model)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: no usable document in 1 input files (2 bad lines: 2 empty)"
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl"], "error: input 'none.jsonl' matches no file"),
        (["--tokenizer", "none.model"], "error: none.model: no such tokenizer; train one with plt train-tokenizer"),
        (["--eod-token", "<end>"], "the tokenizer has no token '<end>' to end documents with"),
        (["--output-prefix", "/dev/null/x"], "/dev/null/x.partial: Not a directory"),
        (["--shard-mb", "0"], "error: --shard-mb must be a number above 0"),
        (["--max-document-bytes", "0"], "error: --max-document-bytes must be above 0, got 0"),
        (["--on-bad-line", "ignore"], "invalid choice: 'ignore'"),
        (["surplus"], "surplus"),
        (["--time", "1:00:00"], "without --cluster does not use --time"),
        (["--cluster", "any", "--shard", "1/2"], "--cluster does not use --shard"),
        (["--build-index", "run.yaml"], "--build-index without --cluster does not use --input"),
        (["--join", "a"], "--join does not use --input"),
        (["--min-quality", "1"], "error: --min-quality and --max-quality need --quality-key, the numeric"),
        (["--quality-key", "q"], "error: --quality-key needs --min-quality, --max-quality or both"),
        (
            ["--quality-key", "q", "--min-quality", "1", "--max-quality", "nan"],
            "error: --min-quality 1.0 and --max-quality nan leave no document: the minimum must be smaller",
        ),
    ],
)
def test_unusable_arguments(
    arguments: list[str], message: str, corpus: Path, bpe_model: Path, tmp_path: Path, run_tool: Tool
) -> None:
    defaults = ["--input", corpus, "--output-prefix", tmp_path / "x", "--tokenizer", bpe_model]
    result = run_tool("preprocess.py", *defaults, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "ignored",
    [["--build-index", "run.yaml"], ["--overwrite", "surplus"], ["--cluster", "any"], ["--tokenizer", "t"], ["--chat"]],
)
def test_a_join_refuses_what_it_would_ignore(ignored: list[str], tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--join", "a", *ignored, "--output-prefix", str(tmp_path / "x")])
    error = capsys.readouterr().err
    assert error.startswith("error: --join does not use ") and any(word in error for word in ignored)
    assert error.count("\n") == 1


def test_other_output_is_not_overwritten(corpus: Path, texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "a.jsonl"
    mine.write_bytes(corpus.read_bytes())
    run_preprocess([mine], tmp_path / "x", bpe_model)
    before = digest(tmp_path / "x")
    os.utime(mine, (1, 1))  # another date, the same content: nothing to do
    run_preprocess([mine], tmp_path / "x", bpe_model)
    write_jsonl(mine, texts[:10])
    with pytest.raises(UserError, match="was not made from these inputs and settings: choose another --output-prefix"):
        run_preprocess([mine], tmp_path / "x", bpe_model)
    with pytest.raises(UserError, match="pass --overwrite"):
        run_preprocess([corpus], tmp_path / "x", bpe_model, append_eod=False)
    assert digest(tmp_path / "x") == before
    run_preprocess([mine], tmp_path / "x", bpe_model, overwrite=True)
    assert documents(tmp_path / "x") == expected(bpe_model, texts[:10])
    written = (tmp_path / "x.bin").stat().st_mtime_ns
    run_preprocess([mine], tmp_path / "x", bpe_model, overwrite=True)
    assert (tmp_path / "x.bin").stat().st_mtime_ns == written, "what is asked for is there already"


def test_input_changes_while_it_is_read(
    corpus: Path, bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(corpus.read_bytes())
    real = module._Job.encode

    def encode(self: Any) -> None:
        real(self)
        path.write_bytes(corpus.read_bytes() + b"{}\n")

    monkeypatch.setattr(module._Job, "encode", encode)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read: run the command again"):
        run_preprocess([path], tmp_path / "x", bpe_model)


MEASURE = """
import os, re, sys
from plt_megatron.data import preprocess as module
from plt_megatron.data.shards import run_in_worker

def peak():
    return re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)

def measured(shard):
    key = run_in_worker(shard)
    open(sys.argv[1] + ".worker", "w").write(peak())
    return key

if __name__ == "__main__":
    module.run_in_worker = measured
    module.preprocess(module.PreprocessOptions(sys.argv[3:], sys.argv[1], sys.argv[2], 1, shard_bytes=1 << 20))
    print(peak())
"""


def test_hashes_of_many_files_are_saved_seldom(
    bpe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", ["a"]) for number in range(20)]
    saved, publish = [], module.publish_json
    monkeypatch.setattr(module, "publish_json", lambda path, value: [saved.append(path.name), publish(path, value)])
    made = run_preprocess(inputs, tmp_path / "text", bpe_model)
    assert saved.count("hashes.json") == 1 and all(entry["sha256"] for entry in made["sources"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(bpe_model: Path, tmp_path: Path) -> None:
    """Peak of the command and of its worker, in KiB: 8 times the text, at most a few MB more."""
    texts = make_texts(2000, seed=4)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    peaks = []
    for copies in (1, 8):
        inputs = [write_jsonl(tmp_path / f"{copies}.{suffix}", texts * copies) for suffix in ("jsonl", "jsonl.gz")]
        command = [sys.executable, script, tmp_path / f"x{copies}", bpe_model, *inputs]
        result = run(command, env=tool_environment(PYTHONPATH=str(ROOT)))
        peaks.append([int(result.stdout), int((tmp_path / f"x{copies}.worker").read_text())])
    assert all(10_000 < before and after < before + 12_000 for before, after in zip(*peaks, strict=True)), peaks


def test_reading_an_index(corpus: Path, bpe_model: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / "x")

    run_preprocess([corpus], tmp_path / "x", bpe_model)
    index = read_index(tmp_path / "x")
    assert (index.documents, index.dtype) == (300, np.uint16)
    tokens, lengths = tmp_path / "x.bin", tmp_path / "x.idx"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    refused(rf"x\.bin has {len(content) - 2} bytes where its index expects {len(content)}")
    tokens.write_bytes(content)
    np.memmap(lengths, np.uint8, "r+")[34] ^= 1  # the first length
    assert open_index(tmp_path / "x").documents == 300, "only what is at the ends is looked at"
    refused(rf"x\.bin has {len(content)} bytes where its index expects")
    lengths.write_bytes(b"MMIDIDX\0\0" + bytes(5))
    refused("not an index of megatron-core's indexed format")
    lengths.unlink()
    refused(r"x\.idx not found: tokenize the data with plt preprocess")


def test_options_reach_the_reader(bpe_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("one\ntwo\n\nthree and more\n")
    settings = ReadOptions(text_documents="line", max_document_bytes=10)
    manifest = run_preprocess([path], tmp_path / "x", bpe_model, read=settings)
    assert documents(tmp_path / "x") == expected(bpe_model, ["one", "two"])
    assert manifest["bad_lines"] == {"empty": 1, "too long": 1}


def test_documents_are_chosen_by_their_quality(texts: list[str], bpe_model: Path, tmp_path: Path, capsys: Any) -> None:
    """Buckets are disjoint and miss nothing but the documents without a number, which are bad lines."""
    qualities = [0, 0.25, 0.5, 0.75, 1.0, -3, None, "high", True] * 4
    chosen = list(zip(texts, qualities, strict=False))
    path = tmp_path / "a.jsonl"
    lines = [{"text": text, "score": score} for text, score in chosen] + [{"text": "no score"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = [(text, score) for text, score in chosen if type(score) in (int, float)]
    found = []
    for name, low, high in (("low", None, 0.5), ("middle", 0.5, 0.75), ("high", 0.75, None)):
        read = ReadOptions(quality=Quality("score", low, high))
        manifest = run_preprocess([path], tmp_path / name, bpe_model, read=read, shard_bytes=1000)
        wanted = [text for text, score in numbers if (low is None or score >= low) and (high is None or score < high)]
        assert documents(tmp_path / name) == expected(bpe_model, wanted) and wanted
        assert manifest["text_bytes"] == sum(len(text.encode()) for text in wanted)
        assert manifest["left_out"] == len(numbers) - len(wanted) and manifest["bad_lines"] == {"no quality": 13}
        assert f"{manifest['left_out']} documents left out for their quality" in capsys.readouterr().err
        found += wanted
    assert sorted(found) == sorted(text for text, _ in numbers)
    with pytest.raises(UserError, match=r"no usable document in 1 input files \(.* 24 left out for their quality\)"):
        run_preprocess([path], tmp_path / "none", bpe_model, read=ReadOptions(quality=Quality("score", 7)))


def test_outputs_of_before_qualities_are_known_again(corpus: Path, bpe_model: Path, tmp_path: Path) -> None:
    manifest = run_preprocess([corpus], tmp_path / "x", bpe_model)
    assert "quality" not in manifest["identity"]["read"]
    assert run_preprocess([corpus], tmp_path / "x", bpe_model) == manifest
    with pytest.raises(UserError, match="was not made from these inputs and settings"):
        run_preprocess([corpus], tmp_path / "x", bpe_model, read=ReadOptions(quality=Quality("score", 0.5)))


def test_the_token_that_ends_documents_is_known(texts: list[str], bpe_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts[:3])
    for name, token in (("a", None), ("b", "<pad>"), ("c", "<pad>")):
        run_preprocess([path], tmp_path / name, bpe_model, eod_token=token)
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"b{suffix}", tmp_path / f"d{suffix}")
    tokenizer, elsewhere = load_tokenizer(bpe_model), {"document_end": 3, "made_elsewhere": True}
    for names, record in (("a", {}), ("bc", {"document_end": 3}), ("ab", {}), ("bd", elsewhere)):
        data = DataConfig(sources=[DataSource(str(tmp_path / name)) for name in names])
        assert document_record(data, tokenizer) == record
    for names, record in (("bc", {"document_end": 3}), ("ab", {}), ("ba", {}), ("ad", {"made_elsewhere": True})):
        joining.join([str(tmp_path / name) for name in names], str(tmp_path / "joined" / names))
        data = DataConfig(sources=[DataSource(str(tmp_path / "joined" / names))])
        assert document_record(data, tokenizer) == record
        check_tokenizer(data, tokenizer)
        assert not list(start_checks._source_problems(data.sources[0].path, tokenizer, None))
