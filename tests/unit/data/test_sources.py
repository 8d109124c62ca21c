from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from data_helpers import make_texts, write_jsonl

from plt_megatron.data.compressed import BrokenStream, open_stream
from plt_megatron.data.sources import Document, InputFile, ReadOptions, Span, expand_sources, read_span
from plt_megatron.errors import UserError


def read(path: Path, options: ReadOptions | None = None, **span: int) -> list[Document]:
    (source,) = expand_sources([str(path)])
    return list(read_span(Span(source, **span), options or ReadOptions()))


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.mark.parametrize("newline_at_end", [True, False])
def test_any_division_of_a_file_gives_every_line_once(tmp_path: Path, newline_at_end: bool) -> None:
    """Byte ranges that begin and end in the middle of lines, on newlines and inside characters."""
    rng = random.Random(1)
    lines = [f"{number} " + "\u00e9\u65e5" * rng.choice((1, 2, 40)) for number in range(60)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n" * newline_at_end, encoding="utf-8")
    size = path.stat().st_size
    options = ReadOptions(text_documents="line", max_document_bytes=100)
    whole = [document.text for document in read(path, options)]
    assert [text for text in whole if text] == [line for line in lines if len(line.encode()) <= 100]
    for _ in range(200):
        cuts = sorted({0, size, *rng.sample(range(1, size), rng.randrange(0, 9))})
        spans = zip(cuts[:-1], cuts[1:], strict=True)
        parts = [read(path, options, start=start, end=end) for start, end in spans]
        assert [document.text for part in parts for document in part] == whole
        assert sum(document.size for part in parts for document in part) == size


def test_long_lines_are_reported_whole_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    limit = 1000
    path.write_bytes(b"a" * limit + b"\n" + b"b" * (limit + 1) + b"\n" + b"c" * 3_000_000 + b"\nlast\n" + b"d" * 5000)
    documents = read(path, ReadOptions(text_documents="line", max_document_bytes=limit))
    assert [document.text for document in documents] == ["a" * limit, None, None, "last", None]
    assert [document.size for document in documents] == [limit + 1, limit + 2, 3_000_001, 5, 5000]
    assert documents[2].reason == "document of 3000001 bytes is longer than --max-document-bytes 1000"


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b'{"text": "a', "broken JSON", "broken JSON (Unterminated string"),
        (b"nonsense", "broken JSON", "broken JSON (Expecting value"),
        (b"[" * 100_000, "broken JSON", "broken JSON ("),
        (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON", "broken JSON (Exceeds the limit"),
        (b'["text"]', "broken JSON", "the line is not an object"),
        (b"3", "broken JSON", "the line is not an object"),
        (b"", "empty", "empty line"),
        (b"  \t", "empty", "empty line"),
        (b'{"text": ""}', "empty", "field 'text' is empty"),
        (b'{"text": " \\n "}', "empty", "field 'text' is empty"),
        (b'{"body": "a"}', "missing field", "missing field 'text'"),
        (b'{"text": null}', "missing field", "field 'text' is null, not a string"),
        (b'{"text": ["a"]}', "missing field", "field 'text' is list, not a string"),
        (b'{"text": "\xff"}', "not UTF-8", "not UTF-8 (byte 0xff at offset 10)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "not UTF-8 (byte 0xed"),
        (b'{"text": "\\ud800x"}', "not UTF-8", "not UTF-8 (lone surrogate in field 'text')"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, kind: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(path)
    assert (before.text, after.text) == ("before", "after")
    assert (bad.line, bad.text, bad.kind) == (2, None, kind)
    assert reason in bad.reason


def test_good_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\r\n{"id": 1, "text": "\\ud83d\\ude00 \\u0000", "text2": 3}\n{"text": "\xc3\xa9"}'
    )
    assert [document.text for document in read(path)] == ["bom", "\U0001f600 \0", "\u00e9"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    texts = make_texts(40)
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    compress = gzip.compress if suffix == ".gz" else zstd
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(compress(content[:5000]) + compress(content[5000:]))  # several members, as tools write them
    assert [document.text for document in read(path)] == texts
    path.write_bytes(compress(b""))
    assert read(path) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str, damage: str) -> None:
    content = "".join(make_texts(400)).encode()
    whole = bytearray((gzip.compress if suffix == ".gz" else zstd)(content))
    if damage == "cut":
        whole = whole[:-20]
    elif damage == "flipped":
        whole[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    else:
        whole = bytearray(content)
    path = tmp_path / f"b{suffix}"
    path.write_bytes(whole)
    with open_stream(path) as stream, pytest.raises(BrokenStream, match="broken (gzip|zstandard) data"):
        while stream.read(1 << 16):
            pass


def test_text_files(tmp_path: Path) -> None:
    good, empty, latin = tmp_path / "good.txt", tmp_path / "empty.md", tmp_path / "latin.py"
    good.write_text("one\n\ntwo\r\n", encoding="utf-8", newline="")
    empty.write_text("\n \n")
    latin.write_bytes(b"ok\nok\ncaf\xe9\n")
    assert [document.text for document in read(good)] == ["one\n\ntwo\r\n"]
    assert [document.reason for document in read(empty)] == ["document is empty"]
    assert [(document.line, document.reason) for document in read(latin)] == [(3, "not UTF-8 (byte 0xe9 at offset 9)")]
    (long,) = read(good, ReadOptions(max_document_bytes=3))
    assert long.reason == "document of 10 bytes is longer than --max-document-bytes 3"
    lines = read(good, ReadOptions(text_documents="line"))
    assert [document.text for document in lines] == ["one", None, "two"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    texts = [*make_texts(1200), "", None, "x" * 500_001]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=100)
    options = ReadOptions(max_document_bytes=500_000)
    documents = read(path, options)
    assert [document.text for document in documents] == [*texts[:-3], None, None, None]
    assert [document.reason for document in documents[-3:]] == [
        "field 'text' is empty",
        "field 'text' is null, not a string",
        "document of 500001 bytes is longer than --max-document-bytes 500000",
    ]
    part = read(path, options, start=3, end=5)
    assert [document.text for document in part] == texts[300:500]
    assert [part[0].line, part[-1].line] == [1, 200]


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    values = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": values}), path)
    good, bad = read(path)
    assert good.text == "good"
    assert (bad.line, bad.kind, bad.reason) == (2, "not UTF-8", "not UTF-8 (byte 0xe9 at offset 3)")


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"id": [1]}, "no column 'text'; it has id"), ({"text": [1, 2]}, "column 'text' holds int64, not strings")],
)
def test_parquet_without_the_column(tmp_path: Path, columns: dict[str, list[int]], message: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    from plt_megatron.data.parquet import row_group_sizes

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=message):
        row_group_sizes(str(path), "text")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        row_group_sizes(str(path), "text")


def test_expanding_inputs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl.gz", "e.parquet", "f.json", "g.txt.zst", "noext"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = expand_sources([str(tmp_path / "c.txt"), str(tmp_path / "*"), str(tmp_path / "**" / "*.gz")])
    names = [Path(source.path).name for source in found]
    assert names == ["c.txt", "a.jsonl", "b.jsonl", "e.parquet", "f.json", "g.txt.zst", "noext", "d.jsonl.gz"]
    formats = [source.format for source in found]
    assert formats == ["text", "jsonl", "jsonl", "parquet", "jsonl", "text", "text", "jsonl"]
    assert [source.compressed for source in found].count(True) == 2
    assert expand_sources([str(tmp_path / "noext")], "jsonl") == [InputFile(str(tmp_path / "noext"), "jsonl", 5)]
    with pytest.raises(UserError, match=r"input '.*\*\.csv' matches no file"):
        expand_sources([str(tmp_path / "*.csv")])
    with pytest.raises(UserError, match="is a folder: name its files"):
        expand_sources([str(tmp_path)])


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("zstandard", tmp_path / "a.jsonl.zst"), ("pyarrow", tmp_path / "a.parquet")):
        path.write_text(json.dumps({"text": "a"}))
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(UserError, match=f"needs the package {name}: pip install"):
            read(path)
