"""Checkpoints of the DeepSpeed engine are the megatron engine's: a run goes on wherever it is loaded.

A run that is saved after three steps goes on bit for bit where it was, and to 1e-5 relative (losses and gradient norms
of three more steps in float32, optimizer state included) on the other engine, at another ZeRO stage, at another
tensor-parallel size. On two processes: TP 1 x DP 2, TP 2 with sequence parallelism, PP 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.deepspeed_jobs import (
    MEGATRON,
    Journey,
    Place,
    Zero,
    arrive,
    save_copies_that_differ,
    save_from,
    set_out,
    weights_then_all,
)
from tests.distributed.params import slow
from tests.distributed.parity_checks import TOLERANCE, judge

ENGINES = [MEGATRON, Zero(1), Zero(2), Zero(3)]
PLACES = [Place(zero, tp) for zero in ENGINES for tp in (1, 2)]
SCHEDULED = Place(Zero(1), loop_schedule=True)  # every other step has one loop
OFFLOADED = [Place(Zero(1, "cpu")), Place(Zero(3, "cpu", "cpu"), 2)]


@pytest.fixture(scope="module")
def tensors(run_deepspeed, tmp_path_factory):
    """The shapes of the tensors in a megatron engine's checkpoint, by key."""
    shapes = run_deepspeed(set_out, 1, tmp_path_factory.mktemp("megatron"), Place()).shapes
    moments = sum("exp_avg_sq" in key for key in shapes)
    assert moments >= 10 and len(shapes) == 4 * moments, "weights, fp32 copies and two moments"
    return shapes


@pytest.fixture
def travel(run_deepspeed, tmp_path):
    """Train at a place, save, and go on there and elsewhere: a job for each place."""

    def travel(start: Place, ends: list[Place]) -> Journey:
        journey = run_deepspeed(set_out, 2, tmp_path, start)
        for end in ends:
            moved, log, digest = run_deepspeed(arrive, 2, tmp_path, end)
            journey.moved.append(moved)
            journey.logs.append(log)
            journey.digests.append(digest)
        return journey

    return travel


@pytest.fixture
def go_on(travel, record_property, tensors):
    """Train at a place, save, go on elsewhere, and compare; what was found goes into the table."""

    def check(start: Place, ends: list[Place]) -> Journey:
        journey = travel(start, ends)
        assert journey.shapes == {key: _padded(shape, start.tp) for key, shape in tensors.items()}
        assert all("in the checkpoint" not in line for log in journey.logs for line in log)
        failures = []
        for end, moved in zip(ends, journey.moved, strict=True):
            wrong = {f"from {start}": difference(moved, journey.stayed)}
            failures += judge(record_property, wrong, "DeepSpeed checkpoints, saved at", str(end), str(start))
        assert not failures, "\n".join(failures)
        return journey

    return check


def _padded(shape: tuple[int, ...], tensor_parallel_size: int) -> tuple[int, ...]:
    """The vocabulary's 119 rows at TP 1 are 126 at TP 2."""
    return tuple({119: 119 if tensor_parallel_size == 1 else 126}.get(size, size) for size in shape)


def difference(numbers: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest relative one."""
    pairs = zip(sum(numbers, ()), sum(expected, ()), strict=True)
    return max(abs(number - value) / abs(value) for number, value in pairs)


# ---------------------------------------------------------------- going on elsewhere


@pytest.mark.parametrize(
    ("start", "ends"),
    [
        # Whatever the start, the checkpoint is the same: one way on is enough.
        (Place(Zero(1), 2), [Place(Zero(3), 1)]),
        slow(Place(Zero(1), 2), [Place(MEGATRON, pp=2)]),
        slow(Place(MEGATRON, pp=2), [Place(Zero(3), 1)]),
        slow(SCHEDULED, [Place(MEGATRON, loop_schedule=True)]),
    ],
    ids=lambda value: str(value) if isinstance(value, Place) else "on",
)
def test_a_run_moves_between_engines_stages_and_tensor_parallel_sizes(go_on, start, ends):
    """And the checkpoint does not show where it is from: its tensors are those of a megatron engine's."""
    go_on(start, ends)


@pytest.mark.slow
@pytest.mark.parametrize("start", [*PLACES, *OFFLOADED], ids=str)
def test_a_run_moves_from_everywhere_to_everywhere(go_on, start):
    go_on(start, [*PLACES, *OFFLOADED])


# ---------------------------------------------------------------- going on where it was


@pytest.mark.parametrize(
    "place",
    [
        Place(Zero(1), 1, precision="bf16"),
        slow(Place(Zero(3, "cpu", "cpu"), 2, precision="bf16")),
        slow(Place(Zero(3), 1)),
        slow(Place(Zero(2), 2)),
        slow(Place(Zero(1), 2)),
        slow(Place(Zero(1, "cpu"), 1)),
        slow(Place(Zero(2, "cpu"), 1, precision="bf16")),
        slow(Place(Zero(2), 1)),
        slow(Place(Zero(3), 2)),
        slow(Place(Zero(3), 1, precision="bf16")),
        slow(SCHEDULED),
    ],
    ids=str,
)
def test_a_run_that_was_saved_goes_on_bit_for_bit(travel, place):
    """Losses, gradient norms, weights, fp32 copies and moments."""
    journey = travel(place, [place])
    assert len(journey.stayed) == 3 and len(set(journey.before + journey.stayed)) == 6
    assert journey.moved == [journey.stayed]
    assert journey.digests == [journey.digest] and len(journey.digest) == 2


@pytest.mark.parametrize("zero", [Zero(3), slow(Zero(1))], ids=str)
def test_copies_that_differ_are_not_written(run_deepspeed, tmp_path, zero):
    """Unless by rounding: tensor-parallel ranks' groups may sum in other orders. A save makes copies equal again."""
    error = run_deepspeed(save_copies_that_differ, 2, tmp_path, Place(zero, 2), 1.01)
    assert "ranks 0 and 1 hold different copies of " in error and "final_layernorm.weight" in error
    assert not list(tmp_path.iterdir())
    assert run_deepspeed(save_copies_that_differ, 2, tmp_path, Place(zero, 2), 1 + 1e-6) == "equal"


# ---------------------------------------------------------------- other models, weights alone, exports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "zero", "tp"), [(1, 2, Zero(3), 1), (2, 1, Zero(1), 2)], ids=["1 to 2 loops", "2 to 1 loops"]
)
def test_the_number_of_loops_changes_as_on_the_megatron_engine(travel, before, now, zero, tp):
    """New gates start as they are built, with zero moments; unused ones are dropped; the log says so."""
    start = Place(MEGATRON, loops=before)
    ends = [Place(engine, size, loops=now) for engine, size in ((MEGATRON, 1), (zero, tp))]
    journey = travel(start, ends)
    megatron, moved = journey.moved
    assert difference(megatron, journey.stayed) > 100 * TOLERANCE
    assert difference(moved, megatron) <= TOLERANCE
    assert journey.logs[0] == journey.logs[1] and any("gates" in line for line in journey.logs[1])


@pytest.mark.slow
def test_weights_alone_and_all_of_it_into_an_engine_that_has_trained(run_deepspeed, tmp_path):
    (saved,) = run_deepspeed(save_from, 2, tmp_path, [Place()])
    megatron = run_deepspeed(weights_then_all, 2, tmp_path / "0", Place())
    for place in (Place(Zero(2), 2), Place(Zero(3), 1)):
        ours = run_deepspeed(weights_then_all, 2, tmp_path / "0", place)
        assert abs(ours["fresh"] - saved) > 1e-3, "it has learned something"
        assert ours["weights"] == pytest.approx(saved, rel=TOLERANCE) == ours["all"]
        assert (ours["weights step"], ours["all step"]) == (0, 3)
        assert difference(ours["first"], megatron["first"]) <= TOLERANCE


@pytest.mark.parametrize(
    "places",
    [[Place(Zero(3), 1)], slow([Place(Zero(1), 2)]), slow([Place(Zero(2), 1), Place(Zero(3, "cpu", "cpu"), 2)])],
    ids=lambda places: ", ".join(map(str, places)),
)
def test_exports_do_not_know_the_engine(run_deepspeed, tmp_path, places):
    """To Hugging Face: the exported model has the training model's loss."""
    losses = run_deepspeed(save_from, 2, tmp_path, places)
    for number, (place, loss) in enumerate(zip(places, losses, strict=True)):
        assert _exported_loss(tmp_path / str(number), tmp_path / f"out{number}") == pytest.approx(loss, rel=1e-5), place


def _exported_loss(checkpoint: Path, folder: Path) -> Any:
    """On the data that `checkpoint_jobs.evaluate` uses."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from plt_megatron.hf.exporting import ExportOptions, export
    from tests.distributed import checkpoint_jobs as jobs

    export(ExportOptions(checkpoint, folder), say=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    text = torch.randint(0, jobs.VOCAB, (jobs.BATCH, jobs.LENGTH + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(text[:, :-1], use_cache=False).logits
    return float(F.cross_entropy(logits.transpose(1, 2), text[:, 1:]))
