from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import build, make_texts, run_of, run_preprocess, tool_environment, train, write_jsonl, write_source
from megatron.core.datasets.indexed_dataset import IndexedDataset

from plt_megatron.config.schema import DataConfig, DataSource, RunConfig
from plt_megatron.data import mix
from plt_megatron.data.datasets import Samples, build_datasets, make_sample
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from tests.running import ROOT

LENGTH = 32
EOD = 2


@pytest.fixture(scope="module")
def tokenizer(bpe_model: Path) -> Tokenizer:
    return load_tokenizer(bpe_model)


@pytest.fixture(scope="module")
def prefix(corpus: Path, bpe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("data") / "a"
    run_preprocess([corpus], target, bpe_model)
    return str(target)


@pytest.fixture
def copy(prefix: str, tmp_path: Path) -> str:
    """Files a test may damage."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(prefix + suffix, tmp_path / f"a{suffix}")
    return str(tmp_path / "a")


def config(*paths: str, **settings: Any) -> DataConfig:
    return DataConfig(sources=[DataSource(path) for path in paths], sequence_length=LENGTH, **settings)


def texts_of(samples: Samples) -> list[list[int]]:
    """Each sample's tokens with the one after the last."""
    items = map(samples.__getitem__, range(len(samples)))
    return [[*item["tokens"].tolist(), int(item["labels"][-1])] for item in items]


def assert_cut_from(prefix: str, samples: Samples) -> None:
    """The named documents, and no others, are what each sample is cut from."""
    documents = [document.tolist() for document in IndexedDataset(prefix)]
    for index, text in enumerate(texts_of(samples)):
        name, numbers = samples.documents(index)
        joined = sum((documents[number] for number in numbers), [])
        assert name == "a" and any(joined[at : at + len(text)] == text for at in range(len(joined)))


def test_items(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    built = build(config(prefix), (50, 7, 0), tmp_path, tokenizer)
    train = built.train
    assert (len(train), len(built.validation), built.test) == (50, 7, None)
    item = train[3]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "tokens": (torch.int64, (LENGTH,)),
        "labels": (torch.int64, (LENGTH,)),
        "loss_mask": (torch.float32, (LENGTH,)),
        "position_ids": (torch.int64, (LENGTH,)),
    }
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert item["position_ids"].tolist() == list(range(LENGTH)) and item["loss_mask"].all()
    for index in (50, -1):
        with pytest.raises(IndexError):
            train[index]


def test_an_epoch_is_every_document_once(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Put the samples back in the order they were cut in: the train documents, each once, end to end."""
    part = [tuple(document.tolist()) for document in IndexedDataset(prefix)][:285]
    total = sum(map(len, part))
    train = build(config(prefix), ((total - 1) // LENGTH, 0, 0), tmp_path, tokenizer).train
    samples = texts_of(train)
    order = np.argsort(np.asarray(train._dataset.shuffle_index)[: len(train)])
    stream = [token for index in order for token in samples[index][:-1]] + [samples[order[-1]][-1]]
    found, current = Counter[tuple[int, ...]](), list[int]()
    for token in stream:
        current.append(token)
        if token == EOD:
            found[tuple(current)] += 1
            current = []
    assert not found - Counter(part)
    missing = Counter(part) - found
    assert sum(len(document) * count for document, count in missing.items()) == len(current) + total - len(stream)
    assert total - len(stream) < LENGTH


def test_a_blend_may_use_up_a_source(tmp_path: Path) -> None:
    """megatron-core makes it four samples longer than the sixteen asked for, and draws one too many from the first."""
    sources = [DataSource(write_source(tmp_path / "0", [5] * 131, [131]), 10.0)]
    sources += [DataSource(write_source(tmp_path / str(number), [5] * 50, [50])) for number in range(1, 5)]
    train = build(DataConfig(train_sources=sources, sequence_length=10), (16, 0, 0), tmp_path / "cache").train
    assert len(train) == 16 and all(train[number]["tokens"].shape == (10,) for number in range(16))


def test_split_keeps_parts_apart(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = build(config(prefix, split="80,1e+1,10"), (400, 100, 100), tmp_path, tokenizer)
    seen = []
    for samples in (parts.train, parts.validation, parts.test):
        seen.append({document for index in range(len(samples)) for document in samples.documents(index)[1]})
    assert seen[0] <= set(range(240)) and seen[1] <= set(range(240, 270)) and seen[2] <= set(range(270, 300))
    assert all(len(documents) > 5 for documents in seen)


def test_documents_of_a_sample(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert_cut_from(prefix, build(config(prefix), (100, 0, 0), tmp_path, tokenizer).train)


def test_resetting_at_boundaries(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """By the rule in words, token by token: what follows an end-of-document token is a new document."""
    data = config(prefix, reset_at_document_boundaries=True)
    train = build(data, (1500, 0, 0), tmp_path, tokenizer).train
    plain = build(config(prefix), (1500, 0, 0), tmp_path, tokenizer).train
    crossings = last = position = 0
    for index in range(len(train)):
        assert train[index]["document_starts"].dtype == torch.bool
        item = {name: values.tolist() for name, values in train[index].items()}
        tokens = item["tokens"]
        assert tokens == plain[index]["tokens"].tolist()
        for place, token in enumerate(tokens):
            start = place == 0 or tokens[place - 1] == EOD
            position = 0 if start else position + 1
            assert (item["document_starts"][place], item["position_ids"][place]) == (start, position)
            assert item["loss_mask"][place] == (0.0 if token == EOD else 1.0)
        crossings += tokens.count(EOD)
        last += tokens[-1] == EOD
    assert crossings > 200 and last > 0


def test_boundaries_are_those_of_the_file_not_of_a_token() -> None:
    """Data without end-of-document tokens, one-token documents, and a boundary right after the last token."""
    sample = make_sample(np.arange(10, 17), [1, 2, 1, 2, 1], reset=True)
    assert sample["document_starts"].tolist() == [True, True, False, True, True, False]
    assert sample["position_ids"].tolist() == [0, 0, 1, 0, 0, 1]
    assert sample["loss_mask"].tolist() == [0, 1, 0, 0, 1, 0]
    assert sample["labels"].tolist() == [11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("by_file", [False, True])
def test_blend(by_file: bool, prefix: str, copy: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = [DataSource(prefix, 7, "large"), DataSource(copy, 3, "small")]
    data = (
        DataConfig(train_sources=sources, validation_sources=sources[:1], sequence_length=LENGTH)
        if by_file
        else DataConfig(sources=sources, split="9,1,0", sequence_length=LENGTH)
    )
    built = build(data, (800, 10, 0), tmp_path / "cache", tokenizer)
    train = built.train
    assert len(built.validation) == 10 and built.test is None
    counts = Counter(train.documents(index)[0] for index in range(len(train)))
    assert counts == {"large": 560, "small": 240}
    early = Counter(train.documents(index)[0] for index in range(100))
    assert 65 <= early["large"] <= 75
    assert set(train[0]) == {"tokens", "labels", "loss_mask", "position_ids"}


def test_order_depends_on_the_seed_alone(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def tokens(seed: int, cache: str) -> list[list[int]]:
        return texts_of(build(config(prefix), (60, 0, 0), tmp_path / cache, tokenizer, seed).train)

    state = torch.get_rng_state()
    first = tokens(1, "a")
    np.random.seed(5)
    assert tokens(1, "b") == first == tokens(1, "a")
    assert tokens(2, "a") != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_index_is_built_once(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "plt_megatron")
    for _ in range(2):
        build(config(prefix), (60, 5, 0), tmp_path, tokenizer)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("plt_megatron")]
    assert len(messages) == 2
    assert messages[0].startswith(f"building the sample index in {tmp_path}/") and "built" in messages[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_another_end_token_has_an_index_of_its_own(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the names of megatron-core's files, which ranks other than the first only read."""
    build(config(prefix), (60, 0, 0), tmp_path, tokenizer)
    (first,) = tmp_path.iterdir()
    files = sorted(first.iterdir())
    monkeypatch.setattr(tokenizer, "eod", tokenizer.eod + 1)
    build(config(prefix), (60, 0, 0), tmp_path, tokenizer)
    assert sorted(first.iterdir()) == files and len(list(tmp_path.iterdir())) == 2


def test_a_killed_build_leaves_no_index(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = np.save

    def save(path: Any, *arguments: Any, **settings: Any) -> None:
        real(path, *arguments, **settings)
        if "shuffle" in str(path):
            os.truncate(path, 10)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", save)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed with SIGKILL
        build(config(prefix), (60, 0, 0), tmp_path, tokenizer)
    (left,) = tmp_path.iterdir()
    for path in (left, *left.iterdir()):
        os.utime(path, (1, 1))
    train = build(config(prefix), (60, 0, 0), tmp_path, tokenizer).train
    assert len(texts_of(train)) == 60 and len(list(tmp_path.iterdir())) == 1


def test_new_data_at_an_old_path(copy: str, tokenizer: Tokenizer, bpe_model: Path, tmp_path: Path) -> None:
    """megatron-core's own cache goes by the path and would give the old documents' order, and read past the end."""
    build(config(copy), (60, 0, 0), tmp_path / "cache", tokenizer)
    new = write_jsonl(tmp_path / "new.jsonl", make_texts(40, seed=8))
    run_preprocess([new], Path(copy), bpe_model, overwrite=True)
    assert_cut_from(copy, build(config(copy), (60, 0, 0), tmp_path / "cache", tokenizer).train)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("remove .bin", r"a\.bin not found: tokenize the data with plt preprocess"),
        ("remove .idx", r"a\.idx not found"),
        ("cut .bin", r"a\.bin has \d+ bytes where its index expects \d+"),
        ("cut .idx", r"a\.idx is truncated at \d+ bytes"),
        ("negative lengths", r"a\.idx .* -1 tokens"),
        ("other tokenizer", r"a was tokenized with .*tokenizer\.model, not with .* as it is now: tokenize it again"),
        ("no manifest", r"a contains token \d+, but .* has \d+ tokens: it was tokenized with another tokenizer"),
        ("broken manifest {", r"a\.manifest\.json is not valid JSON"),
        ("broken manifest []", r"a\.manifest\.json is not a JSON object"),
    ],
)
def test_unusable_data(
    damage: str, message: str, copy: str, tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    what, _, suffix = damage.partition(" ")
    if what == "remove":
        os.unlink(copy + suffix)
    elif what == "cut":
        os.truncate(copy + suffix, os.path.getsize(copy + suffix) - 10)
    elif what == "negative":
        lengths = np.memmap(f"{copy}.idx", np.int32, "r+", 34, (2,))
        lengths[:] = -1, lengths.sum() + 1
        lengths.flush()
    elif what == "broken":
        Path(f"{copy}.manifest.json").write_text(damage.split()[-1])
    else:
        tokenizer = load_tokenizer(train(corpus, tmp_path / "other", 400))
        if damage == "no manifest":
            os.unlink(f"{copy}.manifest.json")
    with pytest.raises(UserError, match=message) as error:
        build(config(copy), (10, 0, 0), tmp_path / "cache", tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "counts", "message"),
    [
        ({"split": "1,0,0"}, (10, 5, 0), "the data has no validation part: give it a share in data.split"),
        ({"split": "99999,1,0"}, (10, 5, 0), r"a has no text for the validation part \(0 documents "),
        ({"split": "many"}, (10, 0, 0), "data.split must be three numbers"),
        ({"max_epochs": 2}, (100_000, 0, 0), r"100,000 train samples of 32 tokens are .* over max_epochs 2"),
    ],
)  # fmt: skip
def test_unusable_mixes(
    data: dict[str, Any], counts: tuple[int, int, int], message: str, prefix: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = DataSource(prefix, max_epochs=data.pop("max_epochs", None))
    with pytest.raises(UserError, match=message):
        build(DataConfig(sources=[source], sequence_length=LENGTH, **data), counts, tmp_path, tokenizer)


def test_unwritable_cache(prefix: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the sample index cannot be written: /dev/null/.*: Not a directory"):
        build(config(prefix), (10, 0, 0), Path("/dev/null/cache"), tokenizer)


def test_without_a_tokenizer(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = config(prefix, reset_at_document_boundaries=True)
    with_one, without = (build(data, (20, 0, 0), tmp_path, used).train for used in (tokenizer, None))
    assert all(torch.equal(with_one[3][name], without[3][name]) for name in with_one[3])


@pytest.mark.parametrize("token", [-5, 380, 100_000])
def test_ids_outside_the_vocabulary(token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found before training, and in a source too large to be read before it, in their batch."""
    path = write_source(tmp_path / "a", [1] * 50 + [token] + [379] * 49, [100], np.int32)

    def samples() -> Samples:
        run = run_of(DataConfig(sources=[DataSource(path)], sequence_length=32), tmp_path / "cache")
        run.model.vocab_size = 380
        return build_datasets(run, (3, 0, 0), None).train

    with pytest.raises(UserError, match=rf"{path} contains token {token}, .* has 380 "):
        samples()
    monkeypatch.setattr(mix, "_starts", lambda length, size: [])
    read = samples()
    with pytest.raises(UserError, match=rf"{path} contains token {token}, .* has 380 "):
        texts_of(read)


WORKER = """
import sys, json, datetime
import torch.distributed as dist
from plt_megatron.config.schema import DataConfig, DataSource, RunConfig, TrainingConfig
from plt_megatron.data import datasets
from plt_megatron.errors import UserError
rank, folder, prefix = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
store = dist.distributed_c10d._get_default_store()
real = datasets._build_index
for mode in ("good", "fails", "bug", "late"):
    data = DataConfig(sources=[DataSource(prefix)], sequence_length=32, index_cache=f"{folder}/cache")
    run = RunConfig(data=data, training=TrainingConfig(seed=1))
    datasets.INDEX_TIMEOUT_MINUTES = 0.02 if mode == "late" else 5
    def build(*arguments):
        if mode == "late":
            store.wait(["rank 1 gave up"], datetime.timedelta(seconds=120))
        if mode == "bug":
            raise ZeroDivisionError("a bug")
        raise UserError("rank 0 says why")
    datasets._build_index = real if mode == "good" else build
    dist.barrier()
    try:
        train = datasets.build_datasets(run, (40, 4, 0), None).train
        print(json.dumps([int(train[i]["tokens"].sum()) for i in range(40)]))
    except Exception as error:
        print(type(error).__name__, error)
    if mode == "late" and rank == 1:
        store.set("rank 1 gave up", "")
"""


def test_two_ranks(prefix: str, tmp_path: Path, warm_python: str) -> None:
    """Rank 0 builds and rank 1 waits; errors of rank 0, foreseen or not, reach rank 1; waiting ends."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = tool_environment(PYTHONPATH=str(ROOT))
    ranks = [
        subprocess.Popen(
            [warm_python, str(script), str(rank), str(tmp_path), prefix],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [rank.communicate(timeout=300) for rank in ranks]
    first, second = (output.splitlines() for output, _ in results)
    assert len(second) == 4, results
    alone = build(config(prefix), (40, 4, 0), tmp_path / "other", None).train
    expected = [int(alone[index]["tokens"].sum()) for index in range(40)]
    assert json.loads(first[0]) == json.loads(second[0]) == expected
    assert first[1] == second[1] == "UserError rank 0 says why"
    assert first[2] == "ZeroDivisionError a bug"
    assert second[2] == "UserError rank 0 could not build the sample index: ZeroDivisionError('a bug')"
    assert second[3].startswith("UserError rank 1 waited 0.02 minutes") and "--build-index" in second[3]


def test_the_data_are_hashed_once_for_index_and_checkpoints(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    hash_of = mix.content_hash
    monkeypatch.setattr(mix, "content_hash", lambda path: hashed.append(path) or hash_of(path))
    built = build(config(prefix), (60, 5, 0), tmp_path, tokenizer, seed=3)
    assert hashed == [prefix]
    assert built.fingerprint == mix.fingerprint(config(prefix), tokenizer, seed=3, num_samples=60)
    assert built.shares == mix.mix_shares(config(prefix), (60, 5, 0))


def test_what_a_run_needs() -> None:
    run = RunConfig()
    run.training.train_iters, run.training.global_batch_size, run.validation.iters = 10, 8, 3
    assert mix.required_samples(run) == (80, 24, 0)
    assert mix.index_folder(run) == "runs/run/index_cache"
    run.data.index_cache = "/elsewhere"
    assert mix.index_folder(run) == "/elsewhere"
