"""`data.length_schedule`: the rows of each step, what they cost, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import LengthSchedule
from plt_megatron.config.schema import BatchStage, DataSource, DeepSpeedConfig, LengthStage, LoopStage, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.predict.flops import run_flops_per_token, training_flops_per_token
from plt_megatron.predict.run_estimate import estimate_run

STAGES = [LengthStage(1000, 16), LengthStage(2500, 32)]


def run(stages: list[LengthStage], **training: object) -> RunConfig:
    config = RunConfig()
    config.model.vocab_size, config.data.sequence_length = 64, 64
    config.data.sources, config.data.length_schedule = [DataSource("corpus")], stages
    for name, value in ({"train_tokens": 6400, "global_batch_size": 4} | training).items():
        setattr(config.training, name, value)
    return config


def walked(config: RunConfig) -> list[tuple[int, int, int, int]]:
    """(tokens before it, loops, batch, row length) of each step, one after another."""
    found, tokens = [], 0
    loops = LoopSchedule(config)
    while True:
        batch = next((s.global_batch_size for s in config.training.batch_schedule if tokens < s.until),
                     config.training.global_batch_size)  # fmt: skip
        length = next((s.sequence_length for s in config.data.length_schedule if tokens < s.until), 64)
        if tokens + batch * 64 > config.training.train_tokens:
            return found
        found.append((tokens, loops.loop_count(len(found), tokens), batch, length))
        tokens += batch * 64


@pytest.mark.parametrize("stages", [STAGES, [LengthStage(1, 8)], [LengthStage(10**6, 32)], []], ids=str)
@pytest.mark.parametrize("batches", [[], [BatchStage(1100, 1), BatchStage(2000, 2)]], ids=["one batch", "batches"])
def test_steps_are_those_of_a_walk_and_cost_what_they_read(stages, batches):
    config = run(stages, batch_schedule=batches, loop_schedule=[LoopStage(0.5, 1), LoopStage(loop_count=2)])
    steps, lengths = walked(config), LengthSchedule(config)
    assert [lengths.sequence_length(tokens) for tokens, *_ in steps] == [length for *_, length in steps]
    counted: dict[tuple[int, int, int], float] = {}
    for _, *kind in steps:
        counted[tuple(kind)] = counted.get(tuple(kind), 0) + 1 / len(steps)
    assert LoopSchedule(config).step_shares() == pytest.approx(counted)
    flops = sum(
        batch * 64 * training_flops_per_token(config.model, length, 128, loops).total
        for _, loops, batch, length in steps
    )
    tokens = sum(64 * batch for *_, batch, _ in steps)
    assert run_flops_per_token(config, 128).total == pytest.approx(flops / tokens)


def test_short_rows_are_cheaper_and_no_other_step():
    short, long = estimate_run(run([LengthStage(6400, 16)])), estimate_run(run([]))
    assert short.total_flops < long.total_flops and short.flops.ffn == long.flops.ffn
    assert short.memory == long.memory and short.tokens == long.tokens
    assert short.times.total < long.times.total and short.times.attention < long.times.attention / 2


REFUSED = {
    "no divisor": ([LengthStage(100, 24)], "[0].sequence_length 24: samples have data.sequence_length 64 tokens"),
    "longer": ([LengthStage(100, 128)], "give a smaller number that divides it"),
    "the same": ([LengthStage(100, 64)], "give a smaller number that divides it"),
    "backwards": ([LengthStage(100, 16), LengthStage(100, 32)], "[1].until 100 must be above 100"),
}


@pytest.mark.parametrize(("stages", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_schedule_is_refused(stages, words):
    (problem,) = find_problems(run(stages), check_files=False)
    assert words in problem


def test_each_length_divides_among_the_ranks_of_a_sequence():
    config = run([LengthStage(1000, 4)])
    config.parallel.context_parallel_size, config.model.backend = 4, "torch"
    problems = find_problems(config, check_files=False)
    assert any("data.length_schedule[0].sequence_length 4 is not divisible by 8" in problem for problem in problems)
    config = run([LengthStage(1000, 1)])
    config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel = 2, True
    (problem,) = find_problems(config, check_files=False)
    assert "data.length_schedule[0].sequence_length 1 is not divisible by 2: parallel.sequence_parallel" in problem
    config = run(STAGES)
    config.deepspeed = DeepSpeedConfig()
    assert any("data.length_schedule is not" in problem for problem in find_problems(config, check_files=False))


def test_a_schedule_is_read_and_written(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(run(STAGES)))
    assert load_config(path).data.length_schedule == STAGES
    assert load_config(path, ["data.length_schedule=[]"]).data.length_schedule == []


def test_rows_have_positions_and_documents_of_their_own():
    from plt_megatron.train.data import in_rows

    documents = [(5, 3), (2, 6)]  # of two samples of eight tokens
    batch = {
        "tokens": torch.arange(16).view(2, 8),
        "loss_mask": torch.ones(2, 8),
        "position_ids": torch.tensor([[at for part in parts for at in range(part)] for parts in documents]),
        "document_starts": torch.tensor([[at == 0 for part in parts for at in range(part)] for parts in documents]),
        "sample_ids": torch.tensor([7, 9]),
    }
    before = {name: value.clone() for name, value in batch.items()}
    rows = in_rows(batch, 4)
    assert rows["tokens"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert rows["document_starts"].long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]
    assert rows["sample_ids"].tolist() == [7, 9] and in_rows(batch, 8) is batch
    assert all(torch.equal(batch[name], value) for name, value in before.items())
