from __future__ import annotations

import gzip
import json
import pickle
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import make_texts, write_jsonl, write_parquet

from plt_megatron.data.compressed import BrokenStream, open_stream
from plt_megatron.data.formats import LEFT_OUT, READERS, Document, Quality, Reader, ReadOptions, Span, open_inputs
from plt_megatron.data.formats import reader as registry
from plt_megatron.errors import UserError


def read(path: Path, options: ReadOptions | None = None, **span: int) -> list[Document]:
    (reader,) = open_inputs([str(path)], options or ReadOptions())
    return list(Span(reader, **span).documents())


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
    other = b'{"id": 1, "text": "\\ud83d\\ude00 \\u0000", "text2": 3}'
    path.write_bytes(b'\xef\xbb\xbf{"text": "bom"}\r\n' + other + b'\n{"text": "\xc3\xa9"}')
    assert [document.text for document in read(path)] == ["bom", "\U0001f600 \0", "\u00e9"]


def test_a_number_of_any_size_is_a_quality(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = (f'{{"text": "{name}", "score": {sign}{"9" * 400}}}\n' for name, sign in (("high", ""), ("low", "-")))
    path.write_text("".join(lines))
    documents = read(path, ReadOptions(quality=Quality("score", 0.0)))
    assert [(document.text, document.kind) for document in documents] == [("high", ""), (None, LEFT_OUT)]


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize(("suffix", "compress"), COMPRESS.items())
def test_compressed_files(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    texts = make_texts(40)
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    path = tmp_path / f"b.JSONL{suffix.upper()}"
    path.write_bytes(compress(content[:5000]) + compress(content[5000:]))  # several members, as tools write them
    assert [document.text for document in read(path)] == texts
    path.write_bytes(compress(b""))
    assert read(path) == []


def test_a_long_window_is_read_as_archives_have_it(tmp_path: Path) -> None:
    """`zstd --long=28` and more: the decompressor's own limit is 27."""
    zstandard = pytest.importorskip("zstandard")
    texts = make_texts(40)
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "b.jsonl.zst"
    path.write_bytes(stream.compress(content) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 28
    assert [document.text for document in read(path)] == texts


def test_a_small_file_takes_little_memory_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "b.zst"
    path.write_bytes(zstd(bytes(200 << 20)))
    tracemalloc.start()
    with open_stream(path) as stream:
        assert sum(iter(lambda: len(stream.read(1 << 20)), 0)) == 200 << 20
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str, damage: str) -> None:
    content = "".join(make_texts(400)).encode()
    whole = COMPRESS[suffix](content)
    half = len(whole) // 2
    damaged = {"cut": whole[:-20], "flipped": whole[:half] + bytes(64) + whole[half + 64 :], "other": content}
    path = tmp_path / f"b{suffix}"
    path.write_bytes(damaged[damage])
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
    texts = [*make_texts(1200), "", None, "x" * 500_001]
    columns = {"id": list(range(len(texts))), "text": texts}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=100)
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


def test_parquet_rows_of_a_quality(tmp_path: Path) -> None:
    columns = {"score": [1, 5, None, 9], "text": ["a", "b", "c", "d"], "word": ["x"] * 4}
    path = write_parquet(tmp_path / "a.parquet", columns)
    documents = read(path, ReadOptions(quality=Quality("score", 5, 9)))
    assert [(document.line, document.text, document.kind) for document in documents] == [
        (1, None, LEFT_OUT), (2, "b", ""), (3, None, "no quality"), (4, None, LEFT_OUT),
    ]  # fmt: skip
    with pytest.raises(UserError, match="a.parquet: no column 'stars'; it has score, text, word"):
        read(path, ReadOptions(quality=Quality("stars", 5)))
    with pytest.raises(UserError, match="column 'word' holds string, not numbers"):
        read(path, ReadOptions(quality=Quality("word", 5)))
    plain = tmp_path / "a.txt"
    plain.write_text("one\n")
    with pytest.raises(UserError, match="a.txt: text files have no field 'score'"):
        read(plain, ReadOptions(quality=Quality("score", 5)))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_parquet_has_strings_of_several_kinds(kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(["one", "two"], getattr(pyarrow, kind)())})
    assert [document.text for document in read(path)] == ["one", "two"]


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    values = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": values})
    good, bad = read(path)
    assert good.text == "good"
    assert (bad.line, bad.kind, bad.reason) == (2, "not UTF-8", "not UTF-8 (byte 0xe9 at offset 3)")


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"id": [1]}, "no column 'text'; it has id"), ({"text": [1, 2]}, "column 'text' holds int64, not strings")],
)
def test_parquet_without_the_column(tmp_path: Path, columns: dict[str, list[int]], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=message):
        open_inputs([str(path)], ReadOptions())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_inputs([str(path)], ReadOptions())


def test_opening_inputs(tmp_path: Path) -> None:
    options = ReadOptions()
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl.gz", "f.json", "g.txt.gz", "noext"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = open_inputs([str(tmp_path / "c.txt"), str(tmp_path / "*"), str(tmp_path / "**" / "*.gz")], options)
    names = ["c.txt", "a.jsonl", "b.jsonl", "f.json", "g.txt.gz", "noext", "d.jsonl.gz"]
    assert [Path(reader.path).name for reader in found] == names
    assert [reader.name for reader in found] == ["text", "jsonl", "jsonl", "jsonl", "text", "text", "jsonl"]
    assert [reader.compressed for reader in found].count(True) == 2
    noext = str(tmp_path / "noext")
    assert open_inputs([noext], options, "jsonl") == [READERS["jsonl"](noext, 5, options)]
    with pytest.raises(UserError, match=r"input '.*\*\.csv' matches no file"):
        open_inputs([str(tmp_path / "*.csv")], options)
    with pytest.raises(UserError, match="is a folder: name its files"):
        open_inputs([str(tmp_path)], options)
    for name in ("a.tar.gz", "a.tgz", "a.zip", "a.jsonl.xz", "a.txt.BZ2"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"{name}' is packed: .*gz"):
            open_inputs([str(tmp_path / name)], options)
    assert open_inputs([str(tmp_path / "a.zip")], options, "text")
    (tmp_path / "corpus.br").write_text("Breton")  # OPUS names files by their language
    assert open_inputs([str(tmp_path / "corpus.br")], options)[0].name == "text"


def test_a_file_of_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "z.txt").symlink_to("a.txt")
    names = ["./a.txt", "a.txt", str(tmp_path / "a.txt"), "*.txt", "z.txt"]
    assert [reader.path for reader in open_inputs(names, ReadOptions())] == ["./a.txt"]
    for given in ("a.txt", Path("a.txt"), [Path("a.txt")]):
        assert [reader.path for reader in open_inputs(given, ReadOptions())] == ["a.txt"]


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when inputs are opened, not by the worker that comes to read them."""
    for module, path in (("zstandard", tmp_path / "a.jsonl.zst"), ("pyarrow", tmp_path / "a.parquet")):
        path.write_text(json.dumps({"text": "a"}))
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"needs the package {module}: pip install"):
            open_inputs([str(path)], ReadOptions())


# ---------------------------------------------------------------- what holds for every format


# How a file of each format is written; a new format adds its own.
WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "jsonl": write_jsonl,
    "parquet": lambda path, texts: write_parquet(path, {"text": texts}, row_group_size=7),
    "text": lambda path, texts: path.write_text("\n".join(texts), encoding="utf-8"),
}


@pytest.fixture(params=sorted(READERS))
def any_reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    """A file of 100 documents, or bad ones: the second is empty, the third too long."""
    cls = READERS[request.param]
    path = tmp_path / f"corpus{cls.suffixes[0]}"
    texts = [" ".join(text.split()) for text in make_texts(100)]
    WRITERS[request.param](path, [texts[0], "", "x" * 5000, *texts[3:]])
    (reader,) = open_inputs([str(path)], ReadOptions(text_documents="line", max_document_bytes=4000))
    assert type(reader) is cls
    return reader


@pytest.mark.parametrize("size", [1, 300, 5000, 1 << 30])
def test_spans_cover_a_file_of_any_format(any_reader: Reader, size: int) -> None:
    whole = list(any_reader.read())
    assert [document.text is None for document in whole] == [False, True, True] + [False] * 97
    assert [document.kind for document in whole[1:3]] == ["empty", "too long"]
    assert [document.line for document in whole] == list(range(1, 101))
    spans = list(any_reader.spans(size))
    assert [document.text for span in spans for document in span.documents()] == [document.text for document in whole]
    assert sum(span.disk_bytes for span in spans) <= any_reader.size
    assert len(spans) == 1 or max(span.disk_bytes for span in spans) < any_reader.size


def test_any_format_says_where_a_document_is(any_reader: Reader) -> None:
    """The place in the file of each document is the same, however the file is cut."""
    for size in (1, 300, 1 << 30):
        found = [(span.start, document.line) for span in any_reader.spans(size) for document in span.documents()]
        assert [int(any_reader.place(*each).split()[-1]) for each in found] == list(range(1, 101))


def test_readers_of_any_format_travel_to_workers(any_reader: Reader) -> None:
    spans = list(any_reader.spans(300))
    arrived = pickle.loads(pickle.dumps(spans))
    assert [list(span.documents()) for span in arrived] == [list(span.documents()) for span in spans]


def test_a_name_or_suffix_is_taken_once() -> None:
    for attributes in ({"name": "jsonl"}, {"name": "new", "suffixes": (".parquet",)}):
        with pytest.raises(AssertionError, match="already taken"):
            type("Another", (Reader,), attributes)
    assert sorted(READERS) == sorted(WRITERS)


def test_a_class_that_is_defined_again_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a notebook's cell that runs twice."""
    monkeypatch.setattr(registry, "READERS", {})
    attributes = {"name": "mine", "suffixes": (".mine",), "__module__": "__main__"}
    _, second = (type("Mine", (Reader,), attributes) for _ in range(2))
    assert registry.READERS == {"mine": second}
