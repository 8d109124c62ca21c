from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from data_helpers import Tool, build, write_source

from plt_megatron.config.schema import DataConfig, DataSource
from plt_megatron.data import datasets, mix
from plt_megatron.data.indexed import write_index
from plt_megatron.data.joining import join
from plt_megatron.data.mix import consumed_epochs, describe_mix, fingerprint, fingerprint_differences, mix_shares
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import AttemptFailed, UserError


def source(folder: Path, name: str, lengths: list[int]) -> str:
    rng = np.random.default_rng(sum(lengths))
    return write_source(folder / name, rng.integers(4, 500, sum(lengths)), lengths)


def test_shares(tmp_path: Path) -> None:
    """Sizes, weights and epochs by hand."""
    a, b = source(tmp_path, "a", [100] * 20), source(tmp_path, "b", [50] * 10)
    data = DataConfig(sources=[DataSource(a, 3.0, "first"), DataSource(b, 1.0)], split="80,20,0", sequence_length=10)
    shares = mix_shares(data, (1000, 10, 0))
    assert [
        (share.part, share.name, share.documents, share.tokens, share.weight, share.samples) for share in shares
    ] == [
        ("train", "first", 16, 1600, 0.75, 750),
        ("train", "b", 8, 400, 0.25, 250),
        ("validation", "first", 4, 400, 0.75, 8),
        ("validation", "b", 2, 100, 0.25, 3),
    ]
    assert shares[0].epochs == 7501 / 1600 and shares[1].epochs == 2501 / 400
    assert consumed_epochs(shares, 500, 1000) == {"first": 7501 / 3200, "b": 2501 / 800}
    alike = [dataclasses.replace(share, name="text") for share in shares]
    assert consumed_epochs(alike, 500, 1000) == {a: 7501 / 3200, b: 2501 / 800}
    assert describe_mix(data, shares[:2]).splitlines() == [
        "part   source  documents  tokens  weight  to draw  epochs",
        "---------------------------------------------------------",
        "train  first          16   1,600    0.75    7,500    4.69",
        "train  b               8     400    0.25    2,500    6.25",
    ]


def test_fingerprint(tmp_path: Path, bpe_model: Path, unigram_model: Path) -> None:
    tokenizer, other = load_tokenizer(bpe_model), load_tokenizer(unigram_model)
    a, b = source(tmp_path, "a", [100] * 20), source(tmp_path, "b", [50] * 10)
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(a + suffix, tmp_path / "moved" / f"c{suffix}")
    data = DataConfig(sources=[DataSource(a, 3.0)])
    value = fingerprint(data, tokenizer, seed=1, num_samples=[10, 2, 0])
    assert json.loads(json.dumps(value)) == value

    def differences(changed: DataConfig, **sampling: object) -> list[str]:
        now = fingerprint(changed, tokenizer, **{"seed": 1, "num_samples": [10, 2, 0], **sampling})
        return fingerprint_differences(value, now)

    assert differences(DataConfig(sources=[DataSource(str(tmp_path / "moved" / "c"), 3.0, "renamed", 2)])) == []
    everywhere = "other train and validation and test data or weights"
    assert differences(DataConfig(sources=[DataSource(b, 3.0)])) == [everywhere]
    assert differences(DataConfig(sources=[DataSource(a, 3.0), DataSource(b, 1.0)])) == [everywhere]
    assert differences(DataConfig(sources=[DataSource(a, 3.0)], sequence_length=128)) == [
        "sequence_length was 256, is 128"
    ]
    assert differences(data, seed=2) == [
        'sampling was {"seed": 1, "num_samples": [10, 2, 0]}, is {"seed": 2, "num_samples": [10, 2, 0]}'
    ]
    assert fingerprint_differences(fingerprint(data, tokenizer), fingerprint(data, other)) == ["another tokenizer"]
    np.memmap(f"{a}.bin", np.uint8, "r+")[1234] ^= 1  # one token
    assert differences(data) == [everywhere]


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, AttemptFailed), (errno.EACCES, UserError)])
def test_data_on_a_disk_that_does_not_answer_may_be_there_next_time(tmp_path, monkeypatch, number, kind):
    data = DataConfig(sources=[DataSource(source(tmp_path, "a", [100] * 20))], sequence_length=10)
    error = OSError(number, os.strerror(number))
    for place, name in ((mix, "map_files"), (datasets, "_build_index")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=os.strerror(number)) as raised:
            patch.setattr(place, name, Mock(side_effect=error))
            build(data, (10, 0, 0), tmp_path)
        assert type(raised.value) is kind and "[" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "place"),
    [("a.idx", "builtins.open"), ("a.idx", "os.stat"), ("a.bin", "os.stat"), ("joined.parts.json", "os.stat"),
     ("a.loss_mask.bin", "os.stat")],
)  # fmt: skip
def test_a_file_that_does_not_answer_is_not_a_missing_one(tmp_path, monkeypatch, name, place):
    prefix = str(tmp_path / "joined")
    join([source(tmp_path, "a", [100] * 20)], prefix)
    act = getattr(builtins if "open" in place else os, place.split(".")[1])

    def away(path, *rest, **named):
        if str(path).endswith(name):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return act(path, *rest, **named)

    data = DataConfig(sources=[DataSource(prefix if name != "a.idx" else str(tmp_path / "a"))], sequence_length=10)
    monkeypatch.setattr(place, away)
    with pytest.raises(AttemptFailed, match=os.strerror(errno.ESTALE)):
        build(data, (10, 0, 0), tmp_path)


def test_building_the_index_ahead(tmp_path: Path, run_tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    from plt_megatron.commands import preprocess
    from plt_megatron.config.loader import load_config

    path = source(tmp_path, "a", [100] * 200)
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{sources: [{{path: {path}, max_epochs: 1}}], index_cache: {tmp_path}/cache}}\n"
                    "model: {vocab_size: 500}\ntraining: {train_iters: 4}\nvalidation: {iters: 0}\n")  # fmt: skip
    result = run_tool("preprocess.py", "--build-index", file, "training.train_iters=3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "the sample index of 24 train and 0 validation samples is ready"
    (folder,) = (tmp_path / "cache").iterdir()
    stamp = folder.stat().st_mtime_ns
    config = load_config(file, ["training.train_iters=3"])
    build(config.data, mix.required_samples(config), Path(mix.index_folder(config)), seed=config.training.seed)
    assert [folder] == list((tmp_path / "cache").iterdir()) and folder.stat().st_mtime_ns == stamp
    assert preprocess.main(["--build-index", str(file), "training.train_iters=3000"]) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert refused.startswith("error: data source a: 24,000 train samples of 256 tokens are 323")
    assert preprocess.main(["--build-index", str(file), "training.train_iterss=3"]) == 2
    assert "train_iters" in capsys.readouterr().err


def test_max_epochs_counts_training_alone(tmp_path: Path) -> None:
    """A tenth of the text, validated on a hundred times, is trained on less than once."""
    data = DataConfig([DataSource(source(tmp_path, "a", [100] * 200), max_epochs=1)], split="90,10,0")
    trained, validated = mix_shares(data, (60, 1000, 0))
    assert trained.epochs < 1 < 100 < validated.epochs
    data.order_samples = 1000  # a branch's, which is longer
    with pytest.raises(UserError, match="over max_epochs 1: lower order_samples"):
        mix_shares(data, (1000, 10, 0))


def test_more_documents_than_megatron_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "_MOST_DOCUMENTS", 199)
    with pytest.raises(UserError, match="200 documents"):
        mix_shares(DataConfig([DataSource(source(tmp_path, "a", [100] * 200))]), (10, 0, 0))


def test_indices_are_written_in_parts(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    path = source(tmp_path, "a", lengths)
    write_index(Path(f"{path}.idx"), np.uint16, lambda: [np.array(lengths[:3]), np.array(lengths[3:])])
    dataset = IndexedDataset(path)
    assert [len(document) for document in dataset] == lengths
    assert np.array_equal(np.concatenate(list(dataset)), np.fromfile(f"{path}.bin", np.uint16))


@pytest.mark.parametrize("size", [0, 1, 10**9])
def test_evenly_spaced_blocks(size: int) -> None:
    starts = mix._starts(size, 1000)
    assert len(starts) <= 64 and starts == sorted(set(starts))
    if size:
        assert starts[0] == 0 and starts[-1] >= size - 1000
