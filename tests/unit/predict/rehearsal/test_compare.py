"""What a rehearsal finds wrong: ranks that do not fit their card, and a checkpoint that is not written once."""

from __future__ import annotations

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.predict.rehearsal.compare import Difference, memory_problems, saving_problems
from plt_megatron.predict.rehearsal.record import Box, RankRecord, Saving
from plt_megatron.predict.run_estimate import RunEstimate, estimate_run


def estimate(backend: str, micro_batch: int) -> RunEstimate:
    settings = [f"model.backend={backend}", f"training.micro_batch_size={micro_batch}", "training.global_batch_size=64"]
    return estimate_run(load_config("configs/runs/plt2_1b.yaml", settings), world_size=8, vocab_size=32_000)


@pytest.mark.parametrize(("micro_batch", "problems"), [(4, 0), (8, 1)])
def test_what_stood_in_for_transformer_engine_does_not_count(micro_batch, problems):
    """The shipped file fits the 8 cards that it names; rehearsed are the torch backend's layers, which would not."""
    rehearsed, given = estimate("torch", micro_batch), estimate("te", micro_batch)
    record = RankRecord(3, {"pp": 0}, memory={"activations": rehearsed.memory[0].total_bytes}, peak_phase="forward 2")
    assert memory_problems([record], rehearsed, rehearsed) != []
    found = memory_problems([record], rehearsed, given)
    assert len(found) == problems
    assert all(f"{given.memory[0].total_bytes:,}" in line and "rank 3" in line for line in found)


def test_padding_is_right_where_little_is_sent_and_nothing_at_all_is_not():
    def wrong(rehearsed: float, padding: int = 1000) -> bool:
        return Difference("bytes sent", "gradient reduction", 0, rehearsed, 500, padding=padding).is_wrong

    assert [wrong(sent) for sent in (0, 400, 500, 1500, 1501)] == [True, True, False, False, True]
    assert wrong(1500, padding=0)


def problems(*boxes: Box, shape: tuple[int, ...] = (4, 6)) -> list[str]:
    return saving_problems([Saving({"w": (shape, list(boxes))})])


def test_a_tensor_that_is_written_once_is_no_problem():
    """Rows divided in the middle, as optimizers' parts are, and columns, as tensor-parallel ranks hold them."""
    assert problems(((0, 0), (1, 6), 0), ((1, 0), (1, 2), 0), ((1, 2), (1, 4), 1), ((2, 0), (2, 6), 1)) == []
    assert problems(((0, 0), (4, 3), 0), ((0, 3), (3, 3), 1), ((3, 3), (1, 3), 2)) == []
    assert problems(((), (), 5), shape=()) == []


def test_what_nobody_writes_and_what_two_write_is_named():
    assert problems(((0, 0), (4, 3), 0), ((0, 3), (3, 3), 1)) == ["checkpoint: nobody writes w[3:4, 3:6]"]
    assert problems(((0, 0), (3, 6), 7), ((2, 0), (2, 6), 9)) == ["checkpoint: ranks 7 and 9 both write w[2:3, 0:6]"]
    assert problems() == ["checkpoint: nobody writes w[0:4, 0:6]"]
    assert len(problems(*(((row, 0), (1, 5), 0) for row in range(4)))) == 3, "a few of each tensor"


def test_stages_together_write_a_tensor():
    first = Saving({"w": ((2, 3), [((0, 0), (1, 3), 0)])})
    assert saving_problems([first, Saving({"w": ((2, 3), [((1, 0), (1, 3), 1)])})]) == []
    (problem, *_) = saving_problems([first, Saving({"w": ((2, 4), [((1, 0), (1, 3), 1)])})])
    assert "disagree on the shape of w: [2, 3] and [2, 4]" in problem
