"""Duplicates against a search by brute force, in sources made to share documents and spans."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_source

from plt_megatron.data import duplicates
from plt_megatron.data.duplicates import Place, WindowHasher, find_duplicates
from plt_megatron.data.mix import SourceShare
from plt_megatron.errors import UserError

Documents = list[list[int]]


def write(folder: Path, name: str, documents: Documents) -> str:
    return write_source(folder / name, sum(documents, []), list(map(len, documents)))


def share(path: str, first: int, last: int) -> SourceShare:
    return SourceShare("train", Path(path).name, path, 1.0, first, last, 1, 1, 1.0, None)


def texts(rng: random.Random, count: int, longest: int, vocabulary: int = 5000) -> Documents:
    return [[rng.randrange(vocabulary) for _ in range(rng.randrange(longest))] for _ in range(count)]


def spans_of(mine: list[int], theirs: list[int], least: int) -> set[tuple[int, int, int]]:
    """All longest common runs of two documents, by the definition: (start, start, length)."""
    found = set()
    for a in range(len(mine)):
        for b in range(len(theirs)):
            if mine[a] != theirs[b] or (a and b and mine[a - 1] == theirs[b - 1]):
                continue
            length = 0
            while a + length < len(mine) and b + length < len(theirs) and mine[a + length] == theirs[b + length]:
                length += 1
            if length >= least:
                found.add((a, b, length))
    return found


@pytest.mark.parametrize(("least", "vocabulary"), [(8, 5000), (9, 2), (24, 5000), (13, 3)])
def test_against_brute_force(least: int, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and groups far smaller than the documents, spans of just enough tokens and of one too few."""
    monkeypatch.setattr(duplicates, "_CHUNK", 37)
    monkeypatch.setattr(duplicates, "_GROUP", 3)
    rng = random.Random(least)
    validation, training = texts(rng, 12, 60, vocabulary), texts(rng, 14, 70, vocabulary)
    for number, length in enumerate((least - 1, least, least, least + 5)):
        source, target = rng.choice([text for text in training[5:13] if len(text) > 30]), validation[5 + number]
        at, to = rng.randrange(len(source) - length), rng.randrange(len(target) + 1)
        target[to:to] = source[at : at + length]
    validation[2] = [*validation[2], 1, 0]
    training[4] = list(validation[2])
    held = [("val", write(tmp_path, "val", validation), range(1, 12))]
    found = find_duplicates(held, [share(write(tmp_path, "t", training), 2, 13)], least, listed=10**6)
    expected = {
        (v, t, *span)
        for v in range(1, 12)
        for t in range(2, 13)
        for span in spans_of(validation[v], training[t], least)
    }
    listed = {
        (one.validation.document, one.training.document, one.validation.token, one.training.token, one.length)
        for one in found.spans
    }
    assert listed <= expected and found.span_documents == len({v for v, *_ in expected}) > 1
    equal = [v for v in range(1, 12) if len(validation[v]) > 1 and validation[v] in training[2:13]]
    assert found.equal_documents == len(equal) > 0
    assert [pair.validation.document for pair in found.equal_pairs] == equal
    assert (found.training_documents, found.training_tokens) == (11, sum(map(len, training[2:13])))
    covered = {(v, at) for v, _, first, _, length in listed for at in range(first, first + length)}
    assert found.span_tokens_shared == len(covered)
    assert found.by_source == {"val": (11, len(equal), found.span_documents)}


def test_nothing_is_found_across_documents(tmp_path: Path) -> None:
    """The same tokens, but with a document's edge in the middle, are no shared span."""
    text = list(range(100, 140))
    validation = write(tmp_path, "v", [text])
    broken = write(tmp_path, "t", [text[:20], text[20:]])
    assert find_duplicates([("v", validation, [0])], [share(broken, 0, 2)], 21).span_documents == 0
    assert find_duplicates([("v", validation, [0])], [share(broken, 0, 2)], 20).span_documents == 1


def test_places_and_sources(tmp_path: Path) -> None:
    rng = random.Random(5)
    first, second, train = texts(rng, 5, 80), texts(rng, 5, 80), texts(rng, 9, 80)
    span = [7000 + at for at in range(30)]
    second[3] = [1, 2, 3, *span, 4]
    train[8] = [9, *span, 5, 6]
    held = [("one", write(tmp_path, "a", first), range(5)), ("two", write(tmp_path, "b", second), [0, 3])]
    path = write(tmp_path, "t", train)
    found = find_duplicates(held, [share(path, 0, 9), share(path, 0, 9)], 30)
    (shared,) = found.spans
    assert (shared.validation, shared.training) == (Place("two", 3, 3), Place("t", 8, 1))
    assert (shared.length, list(shared.tokens)) == (30, span)
    assert found.by_source == {"one": (5, 0, 0), "two": (2, 0, 1)}
    assert found.training_documents == 9  # one path, searched once


def test_hashes_are_those_of_the_windows() -> None:
    tokens = np.random.default_rng(1).integers(0, 3, 500, dtype=np.uint16)
    hashes = WindowHasher(6, 500)(tokens)
    by_text: dict[tuple[int, ...], set[int]] = {}
    for at, value in enumerate(hashes):
        by_text.setdefault(tuple(tokens[at : at + 6].tolist()), set()).add(int(value))
    assert len(hashes) == 495 and all(len(values) == 1 for values in by_text.values())
    assert len(set.union(*by_text.values())) == len(by_text) > 300


def test_memory_does_not_grow_with_the_training_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CHUNK", 1 << 12)
    monkeypatch.setattr(duplicates, "_GROUP", 16)
    rng = np.random.default_rng(2)
    validation = write(tmp_path, "v", [rng.integers(0, 9000, 200).tolist()])
    peaks = []
    for documents in (20, 400):
        path = write(tmp_path, f"t{documents}", [rng.integers(0, 9000, 500).tolist() for _ in range(documents)])
        tracemalloc.start()
        find_duplicates([("v", validation, [0])], [share(path, 0, documents)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    path = write(tmp_path, "t", [[1, 2, 3]])
    with pytest.raises(UserError, match="no validation documents"):
        find_duplicates([], [share(path, 0, 1)])
    with pytest.raises(UserError, match=r"missing\.idx not found"):
        find_duplicates([("t", path, [0])], [share(str(tmp_path / "missing"), 0, 1)])
    empty = write(tmp_path, "empty", [[], [], [5]])
    found = find_duplicates([("t", empty, [0, 1, 2])], [share(empty, 0, 3)])
    assert found.equal_documents == found.span_documents == 0  # an end-of-document token alone is no document
