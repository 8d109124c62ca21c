"""Tokenizing on several machines: equal bytes, equal samples, and a source whose parts stay where they are."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import Tool, bad_lines, build, digest, run_preprocess, write_jsonl, write_parquet

from plt_megatron.config.schema import DataConfig, DataSource
from plt_megatron.data import joining, preprocess
from plt_megatron.data.indexed import JoinedArrays, flat_tokens, mask_path, part_prefixes, read_index
from plt_megatron.data.joining import check_output, join
from plt_megatron.data.preprocess import shard_prefix
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from tests.files import update_json
from tests.running import ROOT

SMALL = 6000  # bytes of a shard of work


@pytest.fixture(scope="module")
def inputs(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Lines, compressed lines that are read from their start, and small files."""
    folder = tmp_path_factory.mktemp("inputs")
    plain = write_jsonl(folder / "a.jsonl", texts[:120])
    packed = write_jsonl(folder / "b.jsonl.gz", texts[120:200])
    small = [write_jsonl(folder / f"c{number}.jsonl", [text]) for number, text in enumerate(texts[200:])]
    return [plain, packed, *small]


@pytest.fixture(scope="module")
def whole(inputs: list[Path], bpe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("whole") / "text"
    run_preprocess(inputs, prefix, bpe_model, shard_bytes=SMALL)
    return prefix


def tokenize(inputs: list[Path], prefix: Path, model: Path, machines: int, **settings: Any) -> list[Path]:
    for number in range(1, machines + 1):
        run_preprocess(inputs, prefix, model, shard=(number, machines), **{"shard_bytes": SMALL} | settings)
    return [Path(shard_prefix(str(prefix), number, machines)) for number in range(1, machines + 1)]


@pytest.fixture(scope="module")
def joined(inputs: list[Path], bpe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("joined") / "text"
    tokenize(inputs, prefix, bpe_model, 3)
    join([f"{prefix}.shard-*"], str(prefix))
    return prefix


@pytest.mark.parametrize("machines", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_machines_write_one_machines_bytes_between_them(machines, inputs, whole, bpe_model, tmp_path):
    shards = tokenize(inputs, tmp_path / "text", bpe_model, machines)
    tokens = b"".join(Path(f"{shard}.bin").read_bytes() for shard in shards)
    assert tokens == Path(f"{whole}.bin").read_bytes()
    made = join([str(shard) for shard in shards], str(tmp_path / "text"))
    assert Path(f"{tmp_path / 'text'}.idx").read_bytes() == Path(f"{whole}.idx").read_bytes()
    one = json.loads(Path(f"{whole}.manifest.json").read_text())
    same = ("documents", "tokens", "text_bytes", "lines", "bin_bytes", "dtype", "tokenizer", "bad_lines")
    assert {name: made[name] for name in same} == {name: one[name] for name in same}
    sizes = [os.path.getsize(f"{shard}.bin") for shard in shards]
    assert machines > 2 or max(sizes) < 2 * min(sizes)


def test_a_machine_may_have_nothing_to_do(texts, bpe_model, tmp_path):
    """An empty file, which is no document, is somebody's."""
    (tmp_path / "empty.txt").touch()
    inputs = [write_jsonl(tmp_path / "a.jsonl", texts[:2]), tmp_path / "empty.txt"]
    one = run_preprocess(inputs, tmp_path / "one", bpe_model)
    shards = tokenize(inputs, tmp_path / "text", bpe_model, 3)
    made = join([str(shard) for shard in shards], str(tmp_path / "text"))
    assert (made["documents"], made["bad_lines"]) == (2, one["bad_lines"]) and made["bad_lines"]
    assert [read_index(shard).documents for shard in shards] == [2, 0, 0]
    assert np.array_equal(flat_tokens(read_index(tmp_path / "text")), flat_tokens(read_index(tmp_path / "one")))


def samples(prefix: Path, cache: Path, tokenizer: Path, **settings: Any) -> Any:
    data = DataConfig(sources=[DataSource(str(prefix))], sequence_length=32, split="80,20,0", **settings)
    return build(data, (200, 20, 0), cache, load_tokenizer(tokenizer), seed=3)


@pytest.mark.parametrize("settings", [{}, {"reset_at_document_boundaries": True, "eod_mask_loss": True}])
def test_samples_and_fingerprint_are_those_of_one_file(settings, whole, joined, bpe_model, tmp_path):
    one, several = (
        samples(prefix, tmp_path / name, bpe_model, **settings)
        for prefix, name in ((whole, "one"), (joined, "several"))
    )
    assert several.fingerprint == one.fingerprint
    for ours, theirs in ((several.train, one.train), (several.validation, one.validation)):
        assert len(ours) == len(theirs) >= 20
        for number in range(len(theirs)):
            mine, expected = ours[number], theirs[number]
            assert mine.keys() == expected.keys()
            assert all(torch.equal(mine[name], expected[name]) for name in expected), number


def test_an_index_is_one_open_file(whole):
    """Joining holds the indices of all parts."""
    before = len(os.listdir("/proc/self/fd"))
    index = read_index(whole)
    assert len(os.listdir("/proc/self/fd")) == before + 1 and index.start(1) == index.lengths[0]


def test_a_source_in_parts_has_a_loss_mask_in_parts(whole, joined, bpe_model, tmp_path):
    counted = (np.random.default_rng(1).random(read_index(whole).tokens) < 0.3).astype(np.uint8)
    prefixes = []
    for name, source in (("one", whole), ("several", joined)):
        prefixes.append(tmp_path / name / "text")
        shutil.copytree(source.parent, tmp_path / name)
    start = 0
    for part in [str(prefixes[0]), *part_prefixes(prefixes[1])]:
        start = 0 if start == len(counted) else start
        size = read_index(part).tokens
        counted[start : start + size].tofile(mask_path(part))
        start += size
    join([f"{prefixes[1]}.shard-*"], str(prefixes[1]), overwrite=True)
    one, several = (samples(prefix, prefix.parent / "cache", bpe_model) for prefix in prefixes)
    assert several.fingerprint == one.fingerprint
    assert all(torch.equal(several.train[row]["loss_mask"], one.train[row]["loss_mask"]) for row in range(200))
    assert 0 < float(one.train[0]["loss_mask"].sum()) < 32


def test_bad_lines_have_the_numbers_that_they_have_in_the_file(bpe_model, tmp_path):
    lines = [json.dumps({"text": f"line {number} " * 40}) for number in range(60)]
    lines[7], lines[33], lines[58] = "{broken", '{"other": 1}', "{broken"
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    run_preprocess([corpus], tmp_path / "one", bpe_model, shard_bytes=SMALL)
    shards = tokenize([corpus], tmp_path / "text", bpe_model, 3)
    assert [bad["line"] for bad in bad_lines(tmp_path / "one")] == [8, 34, 59]
    reports = [shard for shard in shards if Path(f"{shard}.bad_lines.jsonl").exists()]
    assert [bad for shard in reports for bad in bad_lines(shard)] == bad_lines(tmp_path / "one")


def test_bad_rows_of_a_table_have_the_numbers_that_they_have_in_the_file(bpe_model, tmp_path):
    rows = [None if number in (7, 33, 58) else f"row {number} " * 40 for number in range(60)]
    table = write_parquet(tmp_path / "text.parquet", {"text": rows}, row_group_size=10)
    found = [bad_lines(shard) for shard in tokenize([table], tmp_path / "text", bpe_model, 2, shard_bytes=100)]
    assert [bad["line"] for lines in found for bad in lines] == [8, 34, 59] and all(found)


def test_arrays_end_to_end_read_like_one():
    rng = random.Random(5)
    arrays = [np.arange(rng.randrange(1, 40), dtype=np.uint16) + 100 * number for number in range(8)]
    one, several = np.concatenate(arrays), JoinedArrays(arrays)
    assert len(several) == len(one)
    places = [0, len(one), *(rng.randrange(len(one)) for _ in range(300))]
    assert all(np.array_equal(several[first:last], one[first:last]) for first, last in pairwise(places))
    assert all(several[place] == one[place] for place in (-1, 0, *places[2:]))
    assert several[2:2].dtype == one.dtype


def test_the_command_joins_what_it_has_tokenized(inputs, whole, bpe_model, tmp_path, run_tool: Tool):
    prefix = tmp_path / "text"
    common = ("--input", *inputs, "--output-prefix", prefix, "--tokenizer", bpe_model, "--workers", 1)
    for number in (2, 1):  # in any order
        done = run_tool("preprocess.py", *common, "--shard", f"{number}/2")
        assert done.returncode == 0, done.stderr
    again = run_tool("preprocess.py", *common, "--shard", "2/2")
    assert again.returncode == 0 and "already done" in again.stderr
    done = run_tool("preprocess.py", "--join", f"{prefix}.shard-*", "--output-prefix", prefix)
    assert done.returncode == 0 and "2 parts" in done.stderr, done.stderr
    assert np.array_equal(flat_tokens(read_index(prefix))[:], flat_tokens(read_index(whole)))
    refused = run_tool("preprocess.py", *common, "--shard", "3/2")
    assert refused.returncode == 2 and "--shard 3/2" in refused.stderr


def test_what_datatrove_has_written_is_a_source(tmp_path):
    """Two ranks of its MegatronDocumentTokenizer (0.10.1), which end each document with token 0."""
    folder = ROOT / "tests/fixtures/datatrove"
    made = join([str(folder / "*_tokens")], str(tmp_path / "text"))
    expected = json.loads((folder / "expected.json").read_text())
    index = read_index(tmp_path / "text")
    assert index.lengths.tolist() == [len(tokens) for tokens in expected]
    assert flat_tokens(index)[:].tolist() == [token for tokens in expected for token in tokens]
    assert (made["documents"], made["tokens"], len(made["parts"])) == (24, sum(map(len, expected)), 2)
    data = DataConfig(sources=[DataSource(str(tmp_path / "text"))], sequence_length=16)
    assert build(data, (8, 0, 0), tmp_path / "cache").train[7]["tokens"].shape == (16,)


@pytest.fixture
def shards(joined: Path, tmp_path: Path) -> list[Path]:
    """Those of three machines, which a test may damage."""
    shutil.copytree(joined.parent, tmp_path / "copy")
    return [Path(shard_prefix(str(tmp_path / "copy" / "text"), number, 3)) for number in (1, 2, 3)]


def test_a_single_machines_output_replaces_a_joined_source(shards, texts, bpe_model, tmp_path, monkeypatch):
    """Also when it was killed between its two files, beside the manifest of the joined source."""

    def cut_short(source, target):
        publish(source, target)
        raise KeyboardInterrupt

    target, publish = shards[0].with_name("text"), preprocess.publish
    inputs = [write_jsonl(tmp_path / "a.jsonl", texts[:9])]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preprocess, "publish", cut_short)
        run_preprocess(inputs, target, bpe_model, overwrite=True)
    run_preprocess(inputs, target, bpe_model, overwrite=True)
    assert read_index(target).documents == 9


def refusal(parts: list[Path], output: Path) -> str:
    with pytest.raises(UserError) as error:
        join([str(part) for part in parts], str(output))
    assert not list(output.parent.glob(f"{output.name}.*"))
    return str(error.value)


@pytest.mark.parametrize(("given", "named"), [((0, 2), "2/3"), ((1, 0, 2), "order")])
def test_a_missing_portion_and_another_order_are_refused(given, named, shards, tmp_path):
    assert named in refusal([shards[number] for number in given], tmp_path / "out")


def test_portions_of_other_inputs_are_refused(shards, inputs, bpe_model, tmp_path):
    run_preprocess(inputs[:2], tmp_path / "other", bpe_model, shard_bytes=SMALL, shard=(2, 3))
    other = Path(shard_prefix(str(tmp_path / "other"), 2, 3))
    assert str(other) in refusal([shards[0], other, shards[2]], tmp_path / "out")


@pytest.mark.parametrize("what", ["tokenizer", "ids", "mask", "bytes"])
def test_parts_of_two_kinds_are_refused(what, shards, tmp_path):
    if what == "tokenizer":
        path = Path(f"{shards[1]}.manifest.json")
        update_json(path, tokenizer=json.loads(path.read_text())["tokenizer"] | {"sha256": "0"})
    elif what == "ids":
        raw = bytearray(Path(f"{shards[1]}.idx").read_bytes())
        raw[17] = 3  # int16: as wide
        Path(f"{shards[1]}.idx").write_bytes(raw)
    elif what == "mask":
        np.ones(read_index(shards[1]).tokens, np.uint8).tofile(mask_path(shards[1]))
    else:
        with open(f"{shards[1]}.bin", "ab") as file:
            file.write(b"\0\0")
    assert str(shards[1]) in refusal(shards, tmp_path / "out")


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_part_that_changes_afterwards_is_named(damage, shards):
    part = Path(f"{shards[1]}.bin")
    if damage == "gone":
        part.unlink()
    else:
        os.truncate(part, 10)
    with pytest.raises(UserError, match=r"shard-00002-of-00003\.bin"):
        read_index(shards[0].parent / "text")


def test_a_machine_hashes_the_files_that_it_alone_reads(shards, inputs):
    manifests = [json.loads(Path(f"{shard}.manifest.json").read_text()) for shard in shards]
    read = [{entry["path"] for entry in manifest["sources"] if entry["sha256"]} for manifest in manifests]
    assert all(a.isdisjoint(b) for a, b in combinations(read, 2))
    assert str(inputs[0]) not in set().union(*read), "more than one read it"
    assert set(map(str, inputs[1:])) <= set().union(*read) | {str(inputs[0])}


def test_a_full_disk_is_one_line_with_the_output(shards, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(joining, "write_index", full)
    with pytest.raises(UserError, match="again.*No space left"):
        join([str(shard) for shard in shards], str(shards[0].with_name("again")))
    assert not list(shards[0].parent.glob("*again*"))


def test_its_own_parts_may_be_joined_again(shards):
    target = shards[0].parent / "text"
    check_output(target, overwrite=False, parts=list(map(str, shards)))
    with pytest.raises(UserError, match="--overwrite"):
        check_output(target, overwrite=False, parts=list(map(str, shards[:2])))


def test_a_portion_made_before_a_file_was_touched_joins(shards, tmp_path):
    path = Path(f"{shards[1]}.manifest.json")
    manifest = json.loads(path.read_text())
    manifest["identity"]["sources"][0][3] += 1
    path.write_text(json.dumps(manifest))
    join([f"{shards[0].parent}/text.shard-*"], str(tmp_path / "again"))
    manifest["identity"]["sources"][0][2] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="other inputs"):
        join([f"{shards[0].parent}/text.shard-*"], str(tmp_path / "third"))


def test_a_portion_is_made_again_where_its_own_input_may_have_changed(texts, bpe_model, tmp_path):
    """Of one that other machines read, too, a new date is enough; of another's input not even new contents matter."""
    shared, own = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, lines in ((shared, texts[:200]), (own, texts[200:220])):
        write_jsonl(path, lines)
    shards = tokenize([shared, own], tmp_path / "text", bpe_model, 2)
    os.utime(own, (1, 1))
    before = [digest(shard) for shard in tokenize([shared, own], tmp_path / "text", bpe_model, 2)]
    own.write_text(own.read_text().swapcase())
    run_preprocess([shared, own], tmp_path / "text", bpe_model, shard=(1, 2), shard_bytes=SMALL)
    with pytest.raises(UserError, match="pass --overwrite"):
        run_preprocess([shared, own], tmp_path / "text", bpe_model, shard=(2, 2), shard_bytes=SMALL)
    shared.write_text(shared.read_text().replace("the", "eht"))
    with pytest.raises(UserError, match="pass --overwrite"):
        tokenize([shared, own], tmp_path / "text", bpe_model, 2)
    tokenize([shared, own], tmp_path / "text", bpe_model, 2, overwrite=True)
    assert all(digest(shard) != old for shard, old in zip(shards, before, strict=True))


def test_a_join_that_was_cut_short_is_made_again(shards, tmp_path):
    target = tmp_path / "again"
    join(list(map(str, shards)), str(target))
    names = sorted(path.name for path in tmp_path.iterdir())
    for suffix in (".parts.json", ".manifest.json"):  # written after the index
        Path(f"{target}{suffix}").unlink()
    (tmp_path / ".again.idx.0123abcd").touch()
    join(list(map(str, shards)), str(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_is_there_already_stays(shards, whole, tmp_path):
    target = shards[0].parent / "text"
    before = digest(shards[0])
    with pytest.raises(UserError, match="--overwrite"):
        join([f"{target}.shard-*"], str(target))
    with pytest.raises(UserError, match=r"\.bin exists"):
        join([f"{target}.shard-*"], str(whole))
    with pytest.raises(UserError, match="is itself a source in parts"):
        join([str(target)], str(tmp_path / "again"))
    assert digest(shards[0]) == before


def test_parts_that_were_made_again_are_joined_again(inputs, bpe_model, tmp_path):
    """On a cluster the same command is given again for a corpus that has grown."""
    prefix = tmp_path / "text"
    for given in (inputs[:1], inputs):
        shards = [str(shard) for shard in tokenize(given, prefix, bpe_model, 2, overwrite=True)]
        check_output(prefix, overwrite=False, parts=shards)  # as at submission
        made = join(shards, str(prefix), overwrite=True)
        assert made["tokens"] == read_index(prefix).tokens
    Path(f"{shards[0]}.bin").unlink()
    check_output(prefix, overwrite=False, parts=shards)
    with pytest.raises(UserError, match="exists"):
        check_output(prefix, overwrite=False, parts=shards[:1])
    Path(f"{prefix}.parts.json").write_text("no JSON")
    check_output(prefix, overwrite=True)
