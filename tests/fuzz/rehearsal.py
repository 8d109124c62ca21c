"""A rehearsal finds nothing wrong: ranks communicate alike, and memory, traffic and FLOPs are as estimated.

Of a model that is large enough for estimates, whose smallest parts are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.parameters import Weights
from tests.fuzz import draw
from tests.fuzz.search import Kind
from tests.running import run

# Drawn for a tiny model -> how much larger they are here.
_LARGER = {"model.window_size": 16, "model.moe.ffn_hidden_size": 32, "model.moe.shared_expert_intermediate_size": 32}


class Rehearsal(Kind):
    """See the module's docstring."""

    name = "rehearsal"
    fixed = {
        "model.hidden_size": 512,
        "model.ffn_hidden_size": 1408,
        "model.num_attention_heads": 8,
        "model.kv_channels": 64,
        "model.vocab_size": 8192,
        "data.sequence_length": 512,
        "training.micro_batch_size": 1,
        "training.precision": "bf16",
    }

    def find_problems(self, config: RunConfig) -> Iterator[str]:
        moe = config.model.moe
        if moe is not None and (moe.expert_capacity_factor or 1) < 1:
            yield "model.moe.expert_capacity_factor below 1 drops tokens, which estimates count"
        alone = not layout_of(config).stage_layers(config.model.num_layers)[0]
        if alone and not Weights.trained(config, config.model.vocab_size).has("embedding"):
            yield "of a stage that is a frozen embedding, estimates leave out what autograd keeps"

    def draw(self, seed: int, number: int) -> draw.Settings:
        sections = ("model", "parallel", "training", "optimizer")
        settings = draw.draw(f"{seed} {self.name}", number, self.fixed, self.find_problems, sections=sections)
        larger = {key: value * _LARGER[key] for key, value in settings.items() if key in _LARGER and value}
        return settings | larger if self.accepts(settings | larger) else settings

    def check(self, settings: draw.Settings) -> str | None:
        ranks = layout_of(draw.load(settings)).world_size
        command = [sys.executable, "-m", "plt_megatron", "rehearse", str(draw.TINY), *draw.overrides(settings)]
        done = run([*command, "--gpus-per-node", str(ranks), "--processes", "2"], status=None, timeout=600)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("problem:", "error:"))]
        wrong = [line for line in said if not _is_uneven(line)]
        if done.returncode != (1 if said else 0):
            wrong += [f"failed: exit status {done.returncode}", done.stderr]
        return "\n".join(wrong) or None


def _is_uneven(problem: str) -> bool:
    """Tell whether whole tensors are only shared out less evenly than estimated, as with few tensors."""
    found = re.search(r"checkpoint, of one rank, .* rehearsed ([\d,]+), estimated ([\d,]+)", problem)
    if found is None:
        return False
    rehearsed, estimated = (int(number.replace(",", "")) for number in found.groups())
    return 0.75 < rehearsed / estimated < 1.33
