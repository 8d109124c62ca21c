"""A run that was stopped, and stopped again, is the undisturbed one, whatever it does besides its steps; in pairs.

Schedules of loops, batches, lengths and data, losses of loops, packed documents, fill-in-the-middle, validation by
source, averages, optimizers, bad steps and saving in the background, each with each other one, in small layouts.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from plt_megatron.config.schema import (
    BatchStage,
    DataConfig,
    DataSource,
    DataStage,
    FimConfig,
    LengthStage,
    LoopStage,
    RunConfig,
)
from plt_megatron.config.validation import find_problems
from plt_megatron.train.checkpoint.reading import read_weights
from tests.distributed.cases import Layout
from tests.distributed.covering import covering_design, pairs
from tests.distributed.training_jobs import make_data, run_config, train_in_turns
from tests.distributed.whole_runs import folder, numbers

LAYOUTS = [Layout.of(words) for words in ("DP2", "TP2 SP", "PP2", "CP2")]
Settings = dict[str, dict[str, Any]]
STEPS_OF_LOOPS = {
    "fixed": [],
    "staged": [LoopStage(until=0.5, loop_count=1), LoopStage(loop_count=2)],
    "drawn": [LoopStage(loop_shares=[0.5, 0.5])],
}
# Axis -> name -> settings by section. `data` holds the names of sources, which `_config` replaces.
AXES: dict[str, dict[str, Settings]] = {
    "loops": {name: {"training": {"loop_schedule": stages}} for name, stages in STEPS_OF_LOOPS.items()},
    "losses": {
        "last": {},
        "of loops": {"training": {"loop_loss_weights": [0.3]}},
        "z": {"training": {"z_loss_coeff": 0.01}},
    },
    "batch": {"even": {}, "staged": {"training": {"batch_schedule": [BatchStage(until=512, global_batch_size=4)]}}},
    "length": {"even": {}, "staged": {"data": {"length_schedule": [LengthStage(until=512, sequence_length=16)]}}},
    "mix": {"even": {}, "staged": {"data": {"stages": True}}},
    "documents": {
        "joined": {},
        "packed": {"data": {"reset_at_document_boundaries": True}},
        "masked": {"data": {"eod_mask_loss": True}},
        "filled": {"data": {"fim": FimConfig(rate=0.5)}},
    },
    "validation": {
        "plain": {},
        "by source": {"validation": {"by_source": True}},
        "each loop count": {"validation": {"loop_counts": [1, 2]}},
        "none": {"validation": {"iters": 0}},
    },
    "average": {"no": {}, "yes": {"training": {"ema_decay": 0.8}}},
    "saving": {"at once": {}, "behind": {"checkpoint": {"async_save": True}}},
    "optimizer": {name: {"optimizer": {"name": name}} for name in ("adam", "muon", "sgd")},
    "precision": {name: {"training": {"precision": name}} for name in ("fp32", "bf16")},
    "bad step": {name: {"training": {"on_nonfinite": name}} for name in ("fail", "skip", "rollback")},
    "ffn": {"dense": {}, "experts": {"model": {"moe.num_experts": 4, "moe.ffn_hidden_size": 16, "moe.router_topk": 2}}},
    "schedule": {"cosine": {}, "WSD": {"optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}}},
}


REFUSED = {(("average", "yes"), ("optimizer", "muon")), (("mix", "staged"), ("documents", "filled"))}
pytestmark = pytest.mark.slow


class Row(NamedTuple):
    """A combination: the layout, and the name of a value on each axis."""

    layout: Layout
    values: tuple[str, ...]

    def described(self) -> Iterator[tuple[Any, Any]]:
        yield "layout", self.layout
        yield from zip(AXES, self.values, strict=True)


def _config(row: Row, name: str, output: Path, data: DataConfig, other: DataConfig) -> RunConfig:
    sections: Settings = {"validation": {"interval": 3, "loop_counts": []}}
    for axis, value in zip(AXES, row.values, strict=True):
        for section, fields in AXES[axis][value].items():
            sections.setdefault(section, {}).update(fields)
    sections["parallel"] = row.layout.settings
    ours = [DataSource(path=source.sources[0].path, name=name) for name, source in (("one", data), ("two", other))]
    fields = sections.pop("data", {})
    if fields.pop("stages", False):
        fields["stages"] = [DataStage(until=768, sources=ours[1:])]
    return run_config(name, output, dataclasses.replace(data, sources=ours, **fields), **sections)


def _sample(count: int) -> list[Row]:
    """Combinations that are not refused: a product of all has a million."""
    rng, found = random.Random(5), {}
    data, other = (
        DataConfig([DataSource(path)], split="80,20,0", tokenizer="x.model", sequence_length=32) for path in "xy"
    )
    while len(found) < count:
        row = Row(rng.choice(LAYOUTS), tuple(rng.choice(list(values)) for values in AXES.values()))
        if not find_problems(_config(row, "row", Path(), data, other), world_size=2, check_files=False):
            found[row] = None
    return list(found)


@pytest.fixture(scope="module")
def covering() -> list[Row]:
    return covering_design(_sample(2500), Row.described)


def test_what_is_left_out_is_refused_by_name(covering):
    values = [("layout", layout) for layout in LAYOUTS] + [(axis, value) for axis in AXES for value in AXES[axis]]
    every = {(a, b) for at, a in enumerate(values) for b in values[at + 1 :] if a[0] != b[0]}
    assert every - pairs(covering, Row.described) == REFUSED


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[DataConfig, DataConfig]:
    """Two texts of one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    one = make_data(folder / "one", special=("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
    return one, make_data(folder / "two", seed=8, tokenizer=one.tokenizer)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_that_is_stopped_twice_is_the_undisturbed_one(covering, corpora, tmp_path, run_distributed, layout):
    different = []
    for number, row in enumerate(row for row in covering if row.layout == layout):
        whole, stopped = (_config(row, f"{kind}{number}", tmp_path, *corpora) for kind in ("whole", "stopped"))
        bad_step = {"fail": 0, "skip": 2, "rollback": 3}[whole.training.on_nonfinite]
        for config, stops in ((whole, 0), (stopped, 2)):
            train_in_turns(run_distributed, 2, config, stops, bad_step)
        ours, theirs = (dict(read_weights(folder(config))) for config in (stopped, whole))
        equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        if not equal or numbers(stopped) != numbers(whole):
            different.append(row)
    assert different == []
