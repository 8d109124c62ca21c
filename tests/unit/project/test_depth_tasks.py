"""Pointer chains: rows against a recomputation token by token, decoding against `generate`, bars on planted scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from plt_megatron.config import schedules
from plt_megatron.config.loader import load_config
from plt_megatron.data.indexed import read_index
from plt_megatron.errors import UserError
from tests.distributed.cases import NAIVE
from tests.running import ROOT
from tests.unit.project.test_sweep_benchmarks import load


@pytest.fixture(scope="module")
def depth() -> ModuleType:
    return load("depth_tasks")


def read_row(depth: ModuleType, row: list[int]) -> list[tuple[int, int, int]]:
    """(hops, pauses, index of the answer) of a row's questions, each token checked by a reader of its own."""
    bos, sep, pause, eod = 44, 45, 46, 47
    assert row[0] == bos and row[17] == sep and row[1:17:2] == list(range(8))
    successor = {start: end - 8 for start, end in zip(row[1:17:2], row[2:17:2], strict=True)}
    walk = [0]
    while successor[walk[-1]] != 0:
        walk.append(successor[walk[-1]])
    assert len(walk) == 8, "one cycle: no chain comes back early"
    questions, at = [], 18
    while at < len(row) and row[at] != eod:
        hops, pauses = divmod(row[at] - 32, 3)
        assert 0 <= hops < 4
        symbol = row[at + 1] - 16
        for _ in range(hops + 1):
            symbol = successor[symbol]
        answer = at + 2 + pauses
        assert row[at + 2 : answer] == [pause] * pauses and row[answer] == 24 + symbol
        questions.append((hops + 1, pauses, answer))
        at = answer + 1
    assert set(row[at:]) <= {eod} and len(row) - at < 5, "as many questions as there is room for"
    return questions


def test_every_answer_is_what_its_pairs_say(depth):
    rows = depth.draw_rows(np.random.default_rng(5), depth.Part(400))
    assert rows.shape == (400, 128) and rows.dtype == np.uint8
    read = [(number, *question) for number, row in enumerate(rows.tolist()) for question in read_row(depth, row)]
    found = [(int(r), int(k), int(p), int(a)) for r, a, k, p in zip(*depth.find_questions(rows), strict=True)]
    assert found == read
    pauses, counts = np.unique([p for _, _, p, _ in read], return_counts=True)
    assert pauses.tolist() == [0, 1, 2] and counts.min() > 0.9 * counts.max()
    hops, counts = np.unique([k for _, k, _, _ in read], return_counts=True)
    assert hops.tolist() == [1, 2, 3, 4] and counts.min() > 0.85 * counts.max()


def test_a_run_begins_with_lookups(depth):
    rows = depth.draw_rows(np.random.default_rng(5), depth.Part(20, hops=1, pauses=1))
    for row in rows.tolist():
        questions = read_row(depth, row)
        assert {(k, p) for k, p, _ in questions} == {(1, 0)} and len(questions) == 36


def test_every_cycle_is_as_likely(depth):
    rows = depth.draw_rows(np.random.default_rng(6), depth.Part(10_000))
    _, counts = np.unique(rows[:, 1:17], axis=0, return_counts=True)
    assert 4250 < len(counts) < 4450, "of 5,040, all but one in seven by chance"
    assert counts.max() < 15, "two each in the mean"


def test_data_are_the_same_again_and_parts_differ(depth, tmp_path):
    for name in ("one", "two"):
        depth.write_data(tmp_path / name, {"train": depth.Part(64), "validation": depth.Part(64)})
    files = ("train.bin", "train.idx", "validation.bin", "validation.idx")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert (tmp_path / "one/train.bin").read_bytes() != (tmp_path / "one/validation.bin").read_bytes()
    depth.write_data(tmp_path / "other", {"train": depth.Part(64)}, seed=2)
    assert (tmp_path / "other/train.bin").read_bytes() != (tmp_path / "one/train.bin").read_bytes()
    index = read_index(tmp_path / "one/train")
    assert index.documents == 64 and set(index.lengths.tolist()) == {128}


def test_the_sweep_reads_what_is_written(depth):
    config = load_config(ROOT / "configs/sweeps/base/depth_tasks.yaml")
    read = {Path(source.path) for _, source in schedules.all_sources(config.data)}
    assert read == {Path(".demo/depth_tasks") / name for name in depth.PARTS}
    assert config.model.vocab_size == depth.VOCABULARY and config.data.sequence_length == depth.ROW
    ends = [stage.until for stage in config.data.stages] + [config.training.train_tokens]
    names = ["lookups", *(f"hops_{k}" for k in range(1, depth.HOPS)), "train"]
    for name, first, last in zip(names, [0, *ends], ends, strict=False):
        assert last - first <= depth.PARTS[name].rows * depth.ROW, "no row twice"


def test_a_run_reads_whole_rows(depth, tmp_path):
    from plt_megatron.config.schema import DataConfig, DataSource, RunConfig
    from plt_megatron.data.datasets import build_datasets

    depth.write_data(tmp_path, {"train": depth.Part(40)})
    data = DataConfig(train_sources=[DataSource(path=str(tmp_path / "train"))], sequence_length=128)
    data.index_cache = str(tmp_path / "cache")
    built = build_datasets(RunConfig(data=data), (32, 0, 0), None)
    written = {bytes(row) for row in np.fromfile(tmp_path / "train.bin", np.uint8).reshape(-1, 128)}
    read = [bytes(built.train[number]["tokens"].numpy().astype(np.uint8)) for number in range(32)]
    assert set(read) <= written and len(set(read)) == 32


# ---------------------------------------------------------------- scores

ROWS = {"one loop": {"loop_count": 1}, "naive loop": NAIVE, "PLT-3": {"loop_count": 3}}


@pytest.fixture(scope="module", params=ROWS)
def model(request, depth):
    """A tiny model, untrained."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "window_size": 5}
    torch.manual_seed(3)
    config = PLTConfig(vocab_size=depth.VOCABULARY, key_shift="heads", **sizes, **ROWS[request.param])
    with torch.no_grad():
        model = PLTForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # else its answers hardly depend on what it reads
    return model


def test_answers_are_what_generate_gives(depth, model):
    """Question by question, each prompt by itself."""
    import torch

    rows = depth.draw_rows(np.random.default_rng(7), depth.Part(3))
    decoded = depth.answer(model, rows, batch=2)
    row, at, _, _ = depth.find_questions(rows)
    for r, a in list(zip(row.tolist(), at.tolist(), strict=True))[::4]:
        prompt = torch.from_numpy(rows[r : r + 1, :a].astype(np.int64))
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        assert decoded[r, a] == expected[0, -1]


def test_an_untrained_model_answers_by_chance(depth, model):
    rows = depth.draw_rows(np.random.default_rng(8), depth.Part(64))
    scores = depth.score(rows, depth.answer(model, rows))
    row, _, _, _ = depth.find_questions(rows)
    assert sum(map(sum, scores["asked"].values())) == len(row)
    assert set(scores["right"]) == {"0", "1", "2"} and {len(shares) for shares in scores["right"].values()} == {4}
    assert np.mean(list(scores["right"].values())) < 0.14, "1/8 by guessing symbols alone"


def test_an_exported_run_is_scored_beside_it(depth, model, tmp_path):
    depth.write_data(tmp_path / "data", {"validation": depth.Part(8)})
    model.save_pretrained(tmp_path / "run" / depth.EXPORT)
    depth.score_runs([tmp_path / "run"], tmp_path / "data", 4)
    rows = np.fromfile(tmp_path / "data/validation.bin", np.uint8).reshape(-1, 128)[:4]
    expected = depth.score(rows, depth.answer(model, rows))
    assert json.loads((tmp_path / "run" / depth.SCORES).read_text()) == expected


def test_the_score_counts_right_answers_by_hops_and_pauses(depth):
    """Answers that are right where asked for two hops after a pause, and nowhere else."""
    rows = depth.draw_rows(np.random.default_rng(9), depth.Part(64))
    row, at, hops, pauses = depth.find_questions(rows)
    answers = np.full(rows.shape, -1)
    chosen = (hops == 2) & (pauses == 1)
    answers[row[chosen], at[chosen]] = rows[row[chosen], at[chosen]]
    scores = depth.score(rows, answers)
    assert scores["right"] == {"0": [0.0] * 4, "1": [0.0, 1.0, 0.0, 0.0], "2": [0.0] * 4}
    assert scores["asked"]["1"][1] == chosen.sum()


# ---------------------------------------------------------------- report

FULL, HALF = [1.0, 1.0, 1.0, 0.9], [1.0, 1.0, 0.3, 0.1]


def planted(one: list[float], plt: list[float], twice: list[float]) -> dict[str, dict[int, list[list[float]]]]:
    """Two seeds that agree, the same with every number of pauses."""
    shares = {"k layers": one, "PLT-2": plt, "2k layers": twice}
    return {name: {p: [values, values] for p in range(3)} for name, values in shares.items()}


@pytest.mark.parametrize(
    ("one", "plt", "twice", "missed"),
    [
        (HALF, FULL, FULL, ""),
        (HALF, [1, 1, 0.97, 0.3], FULL, ""),
        (HALF, [1, 1, 0.94, 0.3], FULL, "B"),  # between, and nowhere over 95 %
        (HALF, HALF, FULL, "AB"),
        ([1, 1, 0.7, 0.1], [1, 1, 1, 0.1], FULL, "B"),  # solved, but k layers do not fail there
        (HALF, [1.0] * 4, FULL, "A"),  # beyond 2k layers
    ],
)
def test_bars(depth, one, plt, twice, missed):
    assert "".join(line[0] for line in depth.missed_bars(planted(one, plt, twice))) == missed


def test_rows_are_compared_with_the_pauses_that_suit_them(depth):
    rows = planted(HALF, FULL, FULL)
    rows["PLT-2"] = {0: [HALF, HALF], 1: [FULL, FULL], 2: [HALF, HALF]}
    rows["2k layers"] = {0: [FULL, FULL], 1: [HALF, HALF], 2: [HALF, HALF]}
    assert depth.missed_bars(rows) == []
    rows["k layers"][2] = [FULL, FULL]
    assert [line[0] for line in depth.missed_bars(rows)] == ["A", "B"]


def test_the_table_and_the_figure_show_every_row(depth, tmp_path):
    rows = planted(HALF, FULL, FULL)
    lines = depth.table(rows)
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    assert cells["k layers"] == ["2", "0", "100.0%", "100.0%", "30.0%", "10.0%", "60.0%", "60.0% to 60.0%", "0%"]
    assert [row[-1] for row in cells.values()] == ["0%", "100%", "100%"]
    depth.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_finished_runs_without_scores_are_named(depth, tmp_path):
    """Others are left out; a row that the bars compare must be there."""
    from tests.unit.experiments.sweep_helpers import finish, saved_plan

    plan = saved_plan(tmp_path)
    with pytest.raises(UserError, match="no finished run of 2k layers, PLT-2, k layers"):
        depth.read(plan.folder)
    finish(plan.runs[1], 3.0)
    with pytest.raises(UserError, match=plan.runs[1].name):
        depth.read(plan.folder)
