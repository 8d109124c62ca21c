"""A decay branch of a run that was stopped is the run of the branch's length; an average is the mean of checkpoints.

Bit for bit: a branch has the layout of its trunk.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config.branching import branch_settings
from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import save_config
from plt_megatron.run_folder.resuming import branch_config
from tests.distributed.whole_runs import folder, numbers
from tests.fuzz import data, draw, resume
from tests.fuzz.search import Kind

STEP, DECAY = 4, 2  # where the branch begins, and its length
_STOP = {"how": "stop", "step": 2, "rank": 0}
_GOOD = {"nonfinite": [], "spikes": [], "planned": False}


class Branch(Kind):
    """See the module's docstring."""

    name = "branch"
    fixed = {
        "training.train_iters": 8,
        "optimizer.lr_decay_style": "WSD",
        "checkpoint.save_interval": 1,
        "checkpoint.keep_last": 8,
    }

    def find_problems(self, config: RunConfig) -> Iterator[str]:
        yield from resume.find_problems(config)
        try:
            branch_settings(config, "", STEP, DECAY)
        except UserError as error:
            yield str(error)

    def draw(self, seed: int, number: int) -> draw.Settings:
        sections = ("model", "parallel", "data", "training", "optimizer", "validation", "logging")
        return draw.draw(f"{seed} {self.name}", number, self.fixed, self.find_problems, sections=sections)

    def check(self, settings: draw.Settings) -> str | None:
        place = Path(tempfile.mkdtemp(dir=data.FOLDER))
        try:
            trunk = dataclasses.replace(draw.load(settings), name="trunk", output_dir=str(place))
            self._train(trunk, _STOP)
            self._train(trunk)
            save_config(trunk, folder(trunk) / "config.yaml")
            branch = branch_config(f"{folder(trunk)}@{STEP}", ["name=branch"], DECAY)
            whole = dataclasses.replace(
                branch, name="whole", checkpoint=dataclasses.replace(branch.checkpoint, load=None)
            )
            for run in (branch, whole):
                self._train(run)
            ours, theirs = ([r for r in numbers(run) if r["step"] > STEP] for run in (branch, whole))
            wrong = resume._first_difference(ours, theirs, 0.0, "records") or resume._other_tensors(branch, whole, 0.0)
            if wrong is not None:
                return f"a branch is not the run of its length: {wrong}"
            return self.run(averaged, 1, folder(trunk), place / "average", timeout_s=300)
        finally:
            shutil.rmtree(place)

    def _train(self, config: RunConfig, end: object = None) -> None:
        ended, _ = self.run(resume.run_leg, layout_of(config).world_size, config, end, _GOOD, timeout_s=600)
        if ended is not (end is None):
            raise AssertionError(f"{config.name} ended with {ended}")


def averaged(run: Path, output: Path) -> str | None:
    """Average two checkpoints of a run; say what is not their mean. Run by the pool."""
    from plt_megatron.hf.averaging import AverageOptions, average
    from plt_megatron.train.checkpoint.reading import read_weights

    sources = [f"{run}@{step}" for step in (STEP, STEP + 2)]
    result = average(AverageOptions(sources, output, precision="fp32"), lambda line: None)
    parts = [dict(read_weights(path, part="main weights")) for path in result.checkpoints]
    mean = dict(read_weights(result.checkpoint))
    if mean.keys() != parts[0].keys():
        return f"an average has other tensors: {mean.keys() ^ parts[0].keys()}"
    for name, tensor in mean.items():
        expected = sum(part[name].double() for part in parts) / len(parts)
        off = float((tensor.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not off <= 1e-6:
            return f"an average is not the mean of {name}: off by {off:.1e}"
    return None
