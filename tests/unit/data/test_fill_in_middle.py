"""Fill-in-the-middle against its definition: PSM and SPM taken apart by hand give the documents back."""

from __future__ import annotations

from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import build, run_preprocess, train, write_source
from megatron.core.datasets.indexed_dataset import IndexedDataset

from plt_megatron.config.schema import DataConfig, DataSource, DataStage, FimConfig, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.data.datasets import Samples, make_sample
from plt_megatron.data.fill_in_middle import find_tokens, uniform
from plt_megatron.data.mix import fingerprint, fingerprint_differences, mix_shares
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.train.data import batches, micro_batch_indices
from tests.settings import changed

LENGTH = 32
EOD = 2
NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train(corpus, tmp_path_factory.mktemp("fim"), control_symbols=NAMES)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def prefix(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("data") / "a"
    run_preprocess([corpus], target, model)
    return str(target)


def config(path: str, **settings: Any) -> DataConfig:
    """`fim_rate` and the like are settings of the section `fim`."""
    source = DataSource(path, fim_rate=settings.pop("source_rate", None))
    return changed(DataConfig(sources=[source], sequence_length=LENGTH), in_section(settings))


def in_section(settings: dict[str, Any]) -> dict[str, Any]:
    own = {f"fim.{name.removeprefix('fim_')}": value for name, value in settings.items() if name.startswith("fim_")}
    others = {name: value for name, value in settings.items() if not name.startswith("fim_")}
    return others | ({"fim.rate": 0.0} | own if own else {})


def stream(samples: Samples) -> tuple[list[int], list[tuple[int, int, str | None]]]:
    """Samples put back in the order they were cut in: all tokens, and (document, place, order) of each token."""
    dataset = samples._dataset  # which has more samples than asked for: all of its last pass over the documents
    order = np.argsort(np.asarray(dataset.shuffle_index))
    tokens: list[int] = []
    origins: list[tuple[int, int, str | None]] = []
    for index in order.tolist():
        item, parts = dataset[index], dataset.parts(index)
        ids = [*item["tokens"].tolist(), int(item["labels"][-1])]
        of = [(p.document, p.place, p.fill_in_middle) for p in parts for _ in range(p.length)]
        assert len(of) == len(ids) == LENGTH + 1
        assert not tokens or (tokens[-1], origins[-1]) == (ids[0], of[0])  # the label is the next sample's first token
        tokens[-1:], origins[-1:] = ids, of
    return tokens, origins


def restore(text: list[int], order: str | None, special: tuple[int, int, int]) -> tuple[list[int], int, int]:
    """The document, and where it was cut, by the definition of the two orders."""
    pre, mid, suf = special
    if order is None:
        return text, 0, 0
    assert [text.count(token) for token in special] == [1, 1, 1] and text[0] == pre and text[-1] == EOD
    if order == "PSM":
        first, second = text.index(suf), text.index(mid)
        before, after, middle = text[1:first], text[first + 1 : second], text[second + 1 : -1]
        return [*before, *middle, *after, EOD], len(before), len(before) + len(middle)
    assert text[1] == suf
    second = text.index(mid)
    after, rest = text[2:second], text[second + 1 : -1]
    return [*rest, *after, EOD], -1, len(rest)


def test_documents_taken_apart(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Over three passes: every document is whole, its tokens and three more, each pass cut anew, at the rates."""
    data = config(prefix, fim_rate=0.5, fim_spm_rate=0.25)
    documents = [document.tolist() for document in IndexedDataset(prefix)][:285]
    samples = build(data, (3 * sum(map(len, documents)) // LENGTH, 0, 0), tmp_path, tokenizer).train
    tokens, origins = stream(samples)
    special = tuple(tokenizer.token_id(name) for name in NAMES)
    whole: dict[int, list[int]] = {}
    for token, (_, place, _) in zip(tokens, origins, strict=True):
        whole.setdefault(place, []).append(token)
    orders = {(document, place): order for document, place, order in origins}
    cuts: dict[int, set[tuple[int, int]]] = {}
    counts: Counter[str | None] = Counter()
    for (document, place), order in list(orders.items())[:-1]:  # the last may not be complete
        restored, low, high = restore(whole[place], order, special)  # type: ignore[arg-type]
        assert restored == documents[document]
        added = Counter(special) if order else Counter()
        assert Counter(whole[place]) - Counter(documents[document]) == added
        counts[order] += 1
        if order == "PSM" and len(restored) > 40:
            cuts.setdefault(document, set()).add((low, high))
    assert {document for document, _ in orders} == set(range(285)) and len(orders) > 800
    rearranged = {document for (document, _), order in orders.items() if order}
    assert not rearranged & {document for (document, _), order in orders.items() if order is None}
    assert 0.4 < len(rearranged) / 285 < 0.6
    assert 0.18 < counts["SPM"] / (counts["SPM"] + counts["PSM"]) < 0.32
    assert sum(len(found) > 1 for found in cuts.values()) > 0.5 * len(cuts)


def test_cuts_are_uniform() -> None:
    streams = ((1, 0), (2, 0), (1, 5), (3, 0))
    draws = np.array([[uniform(7, stream, n, place) for n in range(40_000)] for stream, place in streams])
    assert (draws >= 0).all() and (draws < 1).all()
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.02
    counts = np.stack([np.histogram(row, 50, (0, 1))[0] for row in draws])
    assert np.abs(counts / 800 - 1).max() < 0.15
    assert np.array_equal(draws[0], uniform(7, 1, np.arange(40_000, dtype=np.uint64)))
    assert not np.array_equal(draws[0], uniform(8, 1, np.arange(40_000, dtype=np.uint64)))


@pytest.mark.parametrize("reset", [False, True])
def test_masks_and_positions(reset: bool, prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As without it: what follows an end-of-document token is a new document, whatever the order inside."""
    data = config(prefix, fim_rate=1.0, reset_at_document_boundaries=reset, eod_mask_loss=not reset)
    samples = build(data, (300, 0, 0), tmp_path, tokenizer).train
    position = 0
    for index in range(len(samples)):
        item = {name: values.tolist() for name, values in samples[index].items()}
        tokens = item["tokens"]
        assert item["loss_mask"] == [float(token != EOD) for token in tokens]
        for place, token in enumerate(tokens):
            start = place == 0 or (reset and tokens[place - 1] == EOD)
            position = 0 if start else position + 1
            assert item["position_ids"][place] == position
            assert not reset or item["document_starts"][place] == start
            assert not reset or place == 0 or not start or token in (tokenizer.token_id(NAMES[0]), EOD)


def test_validation_is_never_rearranged(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    built = [
        build(config(prefix, fim_rate=rate, split="8,2,0"), (60, 60, 0), tmp_path, tokenizer) for rate in (0.0, 1.0)
    ]
    pairs = zip(*(map(part.validation.__getitem__, range(60)) for part in built), strict=True)
    assert all((plain[name] == other[name]).all() for plain, other in pairs for name in plain)
    special = set(map(tokenizer.token_id, NAMES))
    assert not special & {int(token) for i in range(60) for token in built[0].train[i]["tokens"]}
    assert special <= {int(token) for i in range(60) for token in built[1].train[i]["tokens"]}


def test_resumed_and_on_other_ranks(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One rank in order; two ranks from the middle on, with an index of their own, read the same samples."""
    data = config(prefix, fim_rate=0.7, reset_at_document_boundaries=True)

    def read(cache: str, ranks: int, consumed: int) -> dict[int, list[int]]:
        samples = build(data, (64, 0, 0), tmp_path / cache, tokenizer, seed=3).train
        found = {}
        for rank in range(ranks):
            indices = micro_batch_indices(
                64,
                consumed_samples=consumed,
                micro_batch_size=2,
                global_batch_sizes=repeat(8),
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            for batch in batches(samples, indices, prefetch=2):
                found |= dict(zip(batch["sample_ids"].tolist(), batch["tokens"].tolist(), strict=True))
        return found

    whole, resumed = read("a", 1, 0), read("b", 2, 24)
    assert sorted(whole) == list(range(64)) and resumed == {number: whole[number] for number in range(24, 64)}
    other = build(data, (64, 0, 0), tmp_path / "a", tokenizer, seed=4).train
    assert [other[index]["tokens"].tolist() for index in range(64)] != list(whole.values())


def test_rates_of_sources(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each source has its own rate: code is rearranged and prose is not."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"b{suffix}").write_bytes(Path(prefix + suffix).read_bytes())
    sources = [DataSource(prefix, fim_rate=1.0), DataSource(str(tmp_path / "b"), 2.0)]
    samples = build(DataConfig(train_sources=sources, sequence_length=LENGTH), (300, 0, 0), tmp_path, tokenizer).train
    special, seen = set(map(tokenizer.token_id, NAMES)), Counter[tuple[int, bool]]()
    for index in range(300):
        seen[samples.parts(index)[0], bool(special & set(samples[index]["tokens"].tolist()))] += 1
    assert seen[1, True] == 0 and seen[1, False] == 200 and seen[0, True] > 20


def test_fingerprints_and_epochs(prefix: str, tokenizer: Tokenizer) -> None:
    """Another rate, order or token is other data to a checkpoint; without them a fingerprint is what it was."""
    plain = fingerprint(config(prefix), tokenizer)
    assert "fill_in_middle" not in plain and "eod_mask_loss" not in plain
    assert plain == fingerprint(config(prefix, fim_spm_rate=0.9), tokenizer)
    base = fingerprint(config(prefix, fim_rate=0.5), tokenizer)
    assert base == fingerprint(config(prefix, source_rate=0.5), tokenizer)
    for other in (
        config(prefix),
        config(prefix, fim_rate=0.4),
        config(prefix, fim_rate=0.5, fim_spm_rate=0.1),
        config(prefix, fim_rate=0.5, eod_mask_loss=True),
    ):
        (line,) = fingerprint_differences(base, fingerprint(other, tokenizer))
        assert line.startswith(("fill_in_middle was", "eod_mask_loss was null, is true"))
    without, every = (mix_shares(config(prefix, fim_rate=rate), (500, 5, 0)) for rate in (0.0, 1.0))
    assert every[0].epochs == pytest.approx(without[0].epochs * every[0].tokens / (every[0].tokens + 3 * 285))
    assert every[1] == without[1]


def test_end_of_document_masks_without_packing() -> None:
    """Megatron-LM's rule in its own words: `loss_mask[data == eod_token] = 0.0`."""
    text = np.array([5, 2, 6, 7, 2, 2, 8])
    for lengths, reset in (([2, 3, 1, 1], False), ([2, 3, 1, 1], True), ([7], True)):  # inside of a document, too
        assert make_sample(text, lengths, reset=reset, masked_token=2)["loss_mask"].tolist() == [1, 0, 1, 1, 0, 0]
    assert make_sample(text, [7], reset=True)["loss_mask"].all()


def test_known_and_named_tokens(prefix: str, tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.token_id(name) for name in NAMES)
    assert find_tokens(config(prefix), tokenizer) == ids
    named = config(prefix, fim_tokens=list(NAMES[::-1]))
    assert find_tokens(named, tokenizer) == ids[::-1]
    fast = load_tokenizer(tokenizer.path.with_name("tokenizer.json"))
    assert find_tokens(config(prefix), fast) == ids
    assert not tokenizer.byte_lengths()[list(ids)].any()  # they count no bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokens": "none"},
            r"has no fill-in-the-middle tokens \(looked for <fim_prefix>, <\|fim_prefix\|>, .*\): name",
        ),
        ({"tokens": ("<fim_prefix>", "<mid>", "<fim_suffix>")}, "has no token '<mid>', which data.fim.tokens"),
        ({"tokens": ("<fim_prefix>", "</s>", "<fim_suffix>")}, "and the end-of-document token must be four different"),
        ({"tokenizer": None}, "data.fim.rate needs data.tokenizer"),
        ({"ends": 7}, r"data.fim.rate: document \d+ of .* does not end with the tokenizer's end-of-document token 2"),
        ({"ends": 7, "eod_mask_loss": True, "fim_rate": 0}, "data.eod_mask_loss: document 0 of .* does not end with"),
    ],
)
def test_unusable_data(
    settings: dict[str, Any], message: str, prefix: str, tokenizer: Tokenizer, bpe_model: Path, tmp_path: Path
) -> None:
    tokens, ends = settings.pop("tokens", None), settings.pop("ends", None)
    used = settings.pop("tokenizer", load_tokenizer(bpe_model) if tokens == "none" else tokenizer)
    if tokens and tokens != "none":
        settings["fim_tokens"] = list(tokens)
    if ends is not None or tokens == "none":
        prefix = write_source(tmp_path / "x", np.tile([9, 8, ends or EOD], 100), np.full(100, 3))
    with pytest.raises(UserError, match=message) as error:
        build(config(prefix, **{"fim_rate": 0.5, **settings}), (5, 0, 0), tmp_path / "cache", used)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fim_rate": 1.1}, "data.fim.rate must be at most 1, got 1.1"),
        ({"fim_spm_rate": -0.1}, "data.fim.spm_rate must be at least 0"),
        ({"fim_rate": 0.5, "tokenizer": None}, "data.fim.rate needs data.tokenizer"),
        ({"eod_mask_loss": True, "tokenizer": None}, "data.eod_mask_loss needs data.tokenizer"),
        ({"fim_tokens": ["<a>", "<b>"]}, "give three different tokens"),
        ({"fim_tokens": ["a", "a", "b"]}, "give three different tokens"),
        ({"fim_tokens": ["a", "", "b"]}, "give three different tokens"),
        (
            {"train_sources": [DataSource("a")], "validation_sources": [DataSource("v", fim_rate=0.5)]},
            "data.validation_sources[0].fim_rate: only training documents are rearranged; leave it out",
        ),
        (
            {"train_sources": [DataSource("a")], "validation_sources": [DataSource("v", max_epochs=1)]},
            "data.validation_sources[0].max_epochs: only training sources are counted; leave it out",
        ),
        (
            {"train_sources": [DataSource("a"), DataSource("./a", fim_rate=0.5)]},
            "a is listed twice, and its samples would come twice, in one order: add up its weights",
        ),
        (
            {"stages": [DataStage(100_000, sources=[DataSource("b"), DataSource("b")])]},
            "data.stages[0].sources: ",
        ),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    run = RunConfig()
    run.training.train_iters, run.validation.iters, run.model.vocab_size = 2, 0, 100
    data = {"sources": [DataSource("a")], "tokenizer": "t", **changes}
    if "train_sources" in data:
        del data["sources"]
    run.data = changed(run.data, in_section(data))
    (problem,) = find_problems(run, check_files=False)
    assert message in problem


def test_tiny_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An end-of-document token alone stays; one token of text is rearranged; documents may be empty."""
    documents = [[EOD], [9, EOD], [], [8, 7, EOD]] * 5
    path = write_source(tmp_path / "x", sum(documents, []), list(map(len, documents)))
    data = DataConfig(train_sources=[DataSource(path)], sequence_length=4, fim=FimConfig(1.0))
    samples = build(data, (14, 0, 0), tmp_path / "cache", tokenizer).train
    order = np.argsort(np.asarray(samples._dataset.shuffle_index))
    tokens = [token for index in order.tolist() for token in samples._dataset[index]["tokens"].tolist()]
    special = tuple(tokenizer.token_id(name) for name in NAMES)
    texts, current = Counter[tuple[int, ...]](), list[int]()
    for token in tokens:
        current.append(token)
        if token == EOD:
            spm = len(current) > 2 and current[1] == special[2] and current.index(special[1]) > 1
            psm_empty = spm and current[current.index(special[1]) - 1] == special[2]
            orders = ["SPM", "PSM"] if psm_empty else ["SPM" if spm else "PSM"]
            found = [restore(current, o if len(current) > 1 else None, special)[0] for o in orders]  # type: ignore[arg-type]
            assert any(text in documents for text in found)
            texts[tuple(next(text for text in found if text in documents))] += 1
            current = []
    assert set(texts) == {(EOD,), (9, EOD), (8, 7, EOD)}
