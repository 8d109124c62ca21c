"""`data.stages`: each stage is a mix of its own, and a source goes on from one to the next."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import data_helpers
import numpy as np
import pytest
from data_helpers import write_source

from plt_megatron.config.schedules import stage_samples
from plt_megatron.config.schema import DataConfig, DataSource, DataStage, FimConfig, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.data.mix import consumed_epochs, describe_mix, fingerprint, fingerprint_differences, mix_shares
from plt_megatron.errors import UserError

LENGTH = 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three sources of 100 documents of 40 tokens, each token a number of its own but for the sources' own 64 ends."""
    folder = tmp_path_factory.mktemp("stages")
    for number, name in enumerate("abc"):
        write_source(folder / name, np.arange(4000) + 10_000 * number, np.full(100, 40))
    return {name: str(folder / name) for name in "abc"}


def mixes(paths: dict[str, str], last: dict[str, float], stages: list[tuple[int, dict[str, float]]], **settings: Any):
    def sources(mix: dict[str, float]) -> list[DataSource]:
        return [DataSource(paths[name], weight) for name, weight in mix.items()]

    given = {"split": "100,0,0"} | settings
    return DataConfig(
        sources=sources(last),
        stages=[DataStage(until, sources(mix)) for until, mix in stages],
        sequence_length=LENGTH,
        **given,
    )


def build(data: DataConfig, cache: Path, samples: int = 300, validation: int = 0) -> Any:
    return data_helpers.build(data, (samples, validation, 0), cache, seed=3)


def read(built: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Source and tokens of each training sample."""
    texts = [tuple(item["tokens"].tolist()) for item in (built.train[index] for index in range(len(built.train)))]
    return [("abc"[text[0] // 10_000], text) for text in texts]


STAGES = [(800, {"a": 3.0, "b": 1.0}), (1607, {"c": 1.0, "a": 1.0})]  # 100 samples, 100 (and 7 tokens), and the rest


def test_each_stage_has_its_own_mix_from_its_token_on(paths, tmp_path):
    samples = read(build(mixes(paths, {"b": 2.0, "c": 1.0}, STAGES), tmp_path))
    counts = [Counter(name for name, _ in samples[first : first + 100]) for first in (0, 100, 200)]
    assert counts == [{"a": 75, "b": 25}, {"c": 50, "a": 50}, {"b": 67, "c": 33}]
    # Within a stage they are mixed as megatron-core mixes, evenly.
    assert all(Counter(name for name, _ in samples[at : at + 4]) == {"a": 3, "b": 1} for at in range(0, 100, 4))


def test_a_source_goes_on_where_it_stood(paths, tmp_path):
    """No sample comes twice before a source's epoch ends, and its samples are those of a run of that source alone."""
    samples = read(build(mixes(paths, {"b": 2.0, "c": 1.0}, STAGES), tmp_path / "staged"))
    assert len({text for _, text in samples}) == 300
    for name, count in Counter(name for name, _ in samples).items():
        own = [text for source, text in samples if source == name]
        assert own == [text for _, text in read(build(mixes(paths, {name: 1.0}, []), tmp_path / name, count))]
        starts = [text[0] for text in own]
        assert len(set(starts)) == count and all((start % 10_000) % LENGTH == 0 for start in starts)


def test_equal_stages_are_none(paths, tmp_path):
    """With the same weights in a stage whose end leaves no remainder, the samples are those of one mix."""
    mix = {"a": 3.0, "b": 1.0}
    staged = read(build(mixes(paths, mix, [(800, mix)]), tmp_path / "staged"))
    assert staged == read(build(mixes(paths, mix, []), tmp_path / "plain"))


def test_documents_and_the_rest_of_the_data_are_as_without_stages(paths, tmp_path):
    """The training part of every source is cut by the split; validation is that of data.sources."""
    last = {"b": 2.0, "c": 1.0}
    staged, plain = (
        build(mixes(paths, last, stages, split="80,20,0"), tmp_path / str(len(stages)), 250, 30)
        for stages in (STAGES, [])
    )
    for index in range(30):
        assert staged.validation[index]["tokens"].tolist() == plain.validation[index]["tokens"].tolist()
        assert staged.validation.documents(index) == plain.validation.documents(index)
    seen: dict[str, set[int]] = {}
    for index in range(250):
        name, documents = staged.train.documents(index)
        number, tokens = "abc".index(name), staged.train[index]["tokens"].tolist()
        assert {(token - 10_000 * number) // 40 for token in tokens} <= set(documents)
        seen.setdefault(name, set()).update(documents)
    assert seen.keys() == {"a", "b", "c"} and all(max(documents) < 80 for documents in seen.values())


def test_the_index_is_built_once_and_read_again(paths, tmp_path):
    data = mixes(paths, {"b": 2.0, "c": 1.0}, STAGES)
    first = build(data, tmp_path)
    (folder,) = tmp_path.iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert read(build(data, tmp_path)) == read(first)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps and stamps
    assert stage_samples(data, 300) == [range(100), range(100, 200), range(200, 300)]
    assert stage_samples(data, 150) == [range(100), range(100, 150), range(150, 150)]
    short = build(data, tmp_path / "short", 150)  # as for a trial of a few steps: of the stages that it reaches
    assert Counter(name for name, _ in read(short)[100:]) == {"a": 25, "c": 25} and len(short.shares) == 4


def test_sources_of_their_own_for_each_part(paths, tmp_path):
    """With train_sources a stage reads whole files, as they do."""
    data = mixes(paths, {"b": 2.0, "c": 1.0}, STAGES)
    by_part = dataclasses.replace(data, sources=[], train_sources=data.sources, validation_sources=data.sources[:1])
    built = build(by_part, tmp_path / "parts", 300, 20)
    assert read(built) == read(build(data, tmp_path / "split"))
    assert built.validation.documents(0)[0] == "b"


def test_shares_and_epochs_are_counted_over_stages(paths):
    data = mixes(paths, {"b": 2.0, "c": 1.0}, STAGES)
    shares = mix_shares(data, (300, 0, 0))
    assert [(share.name, share.samples) for share in shares] == [
        ("a", 75), ("b", 25), ("c", 50), ("a", 50), ("b", 67), ("c", 34),
    ]  # fmt: skip
    epoch = 500  # samples
    assert shares[3].epochs_before == pytest.approx(75 / epoch, abs=0.001)
    half = consumed_epochs(shares, 150, 300)
    assert half == pytest.approx({"a": 100 / epoch, "b": 25 / epoch, "c": 25 / epoch}, abs=0.001)
    whole = consumed_epochs(shares, 300, 300)
    assert whole == pytest.approx({"a": 125 / epoch, "b": 92 / epoch, "c": 84 / epoch}, abs=0.001)
    assert [" ".join(line.split()) for line in describe_mix(data, shares).splitlines()[2:]] == [
        "train, to 800 tokens a 100 4,000 0.75 600 0.15",
        "train, to 800 tokens b 100 4,000 0.25 200 0.05",
        "train, to 1,600 tokens c 100 4,000 0.5 400 0.10",
        "train, to 1,600 tokens a 100 4,000 0.5 400 0.25",
        "train, to 2,400 tokens b 100 4,000 0.6667 536 0.18",
        "train, to 2,400 tokens c 100 4,000 0.3333 272 0.17",
    ]
    data.stages[1].sources[1] = dataclasses.replace(data.stages[1].sources[1], max_epochs=0.2)
    too_many = r"source a: 50 train samples .* 0\.10 epochs .* after 0\.15 in earlier stages, over"
    with pytest.raises(UserError, match=too_many):
        mix_shares(data, (300, 0, 0))


def test_the_fingerprint_covers_the_stages(paths):
    data = mixes(paths, {"b": 2.0}, STAGES)
    value = fingerprint(data, None, num_samples=300)
    for other in (
        mixes(paths, {"b": 2.0}, []),
        mixes(paths, {"b": 2.0}, [(808, STAGES[0][1]), STAGES[1]]),
        mixes(paths, {"b": 2.0}, [(800, {"a": 2.0, "b": 1.0}), STAGES[1]]),
        mixes(paths, {"b": 2.0}, [(800, {"c": 3.0, "b": 1.0}), STAGES[1]]),
    ):
        assert fingerprint_differences(value, fingerprint(other, None, num_samples=300)) == ["other data.stages"]
    assert "stages" not in fingerprint(mixes(paths, {"b": 2.0}, []), None), "as it was before there were any"


A, B = [DataSource("a")], [DataSource("b")]


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        ([DataStage(100, [])], {}, "data.stages[0].sources is empty: give at least one tokenized source"),
        ([DataStage(0, A)], {}, "data.stages[0].until must be at least 1, got 0"),
        ([DataStage(7, A)], {}, "data.stages[0].until 7: no sample of 8 tokens ends in this stage"),
        ([DataStage(16, A), DataStage(23, B)], {}, "[1].until 23: no sample of 8 tokens ends in this stage"),
        ([DataStage(16, [*A, DataSource("./a", 2.0)])], {}, "data.stages[0].sources: "),
        ([DataStage(16, [DataSource("a", -1.0)])], {}, "data.stages[0].sources[0].weight must be above 0, got -1.0"),
        ([DataStage(16, A)], {"sources": B + B}, "data.sources: "),
        ([DataStage(16, A)], {"fim": FimConfig(0.5), "tokenizer": "t"}, "data.stages with data.fim is not verified"),
        ([DataStage(16, [DataSource("a", fim_rate=0.5)])], {"tokenizer": "t"}, "data.stages with data.fim is not"),
    ],
)  # fmt: skip
def test_bad_stages_are_refused_in_one_line(stages, changes, expected):
    config = RunConfig(data=DataConfig(sources=B, sequence_length=LENGTH, stages=stages))
    config.data = dataclasses.replace(config.data, **changes)
    config.model.vocab_size, config.training.train_iters = 64, 10
    (problem,) = find_problems(config, check_files=False)
    assert expected in problem


def test_a_stages_missing_file_is_named(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), data=DataConfig(sources=B, stages=[DataStage(5000, A)]))
    config.model.vocab_size, config.training.train_iters = 64, 10
    problems = [problem for problem in find_problems(config) if "not found" in problem]
    assert any(problem.startswith("data.stages[0].sources[0].path: a.bin and a.idx not found") for problem in problems)
