"""Transformer Engine's layers over the stand-in of tests/te: fp32 against plain torch's, bf16 and FP8 against bf16.

Layers of Transformer Engine in any layout give one process's numbers on torch's layers; FP8 is close to bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from plt_megatron.config.layout import layout_of
from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.schema import RunConfig
from tests.distributed.cases import Outcome
from tests.fuzz import draw, parity
from tests.fuzz.parity import Parity, alone, before_chaos, differences

HOPPER = (9, 0)
# tests/te/test_te_fp8.py has them: FP8 has 3 bits of mantissa (gradients: 2).
BOUNDS = {"loss": 0.02, "validation": 0.02, "gradient": 0.2}
ROUTED_LOSS_BOUND = 0.04  # rounding sends a token that is near a tie to another expert
BF16_TO_FP8 = 32  # how much more FP8 rounds
CHAOS = 1 / BF16_TO_FP8  # where bf16 moves a number by so much, FP8 may move it, and every later one, by its size
# In Triton's interpreter it takes most of a case's time: tests/te/test_te_fusions.py has it.
_UNFUSED = {"parallel.cross_entropy_loss_fusion": False}


def train(config: RunConfig, rounded: bool = False) -> Outcome:
    """`parity_job.train` without the FP8 state of the jobs before."""
    from tests.fuzz import parity_job
    from tests.te.te_jobs import _forget_fp8_state

    _forget_fp8_state()
    return parity_job.train(config, rounded)


class TransformerEngine(Parity):
    """Its layers in fp32."""

    name = "te"
    often = 1
    fixed: Mapping[str, Any] = {"model.backend": "te", "training.precision": "fp32", **_UNFUSED}

    def reference(self, config: RunConfig) -> RunConfig:
        one = alone(config)
        return dataclasses.replace(one, model=dataclasses.replace(one.model, backend="torch"))

    def outcome(self, config: RunConfig, **options: Any) -> Outcome:
        return self.run(train, layout_of(config).world_size, config, timeout_s=400, **options)


class Fp8(TransformerEngine):
    """FP8, or none of it, in bf16."""

    name = "fp8"
    fixed: Mapping[str, Any] = {
        "model.backend": "te",
        "model.hidden_size": 64,  # sizes that Hopper's kernels take on two tensor-parallel ranks
        "model.ffn_hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.kv_channels": 16,
        "training.precision": "bf16",
        **_UNFUSED,
    }

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__(run)

    def draw(self, seed: int, number: int) -> draw.Settings:
        settings = super().draw(seed, number)
        with_fp8 = {**settings, "training.fp8.format": "hybrid"}
        return with_fp8 if number % 4 and self.accepts(with_fp8) else settings

    def find_problems(self, config: RunConfig) -> Iterator[str]:
        yield from parity.find_problems(config)
        yield from fp8_rules.find_problems(config, HOPPER)

    def check(self, settings: draw.Settings) -> str | None:
        config = draw.load(settings)
        one = alone(config)
        one = dataclasses.replace(one, training=dataclasses.replace(one.training, fp8=None))
        expected = self.outcome(one)
        outcome = self.outcome(config)
        off = {name: part for name, part in differences(outcome, expected).items() if name in expected.numbers}
        over = _over(off, config, {})
        if not over:
            return None
        exact = self.outcome(dataclasses.replace(one, training=dataclasses.replace(one.training, precision="fp32")))
        rounding = differences(exact, expected)
        comparable = before_chaos(rounding, CHAOS)
        still_over = [name for name in _over(off, config, rounding) if name in comparable]
        if not still_over:
            chaotic = not set(over) & set(comparable)
            self.note("chaotic after some steps" if chaotic else "rounding alone moves it by more", ", ".join(over))
            return None
        worst = max(still_over, key=lambda name: off[name])
        return f"is not close to bf16: {worst} is off by {off[worst]:.1%}"


def _over(off: dict[str, float], config: RunConfig, rounding: dict[str, float]) -> list[str]:
    """The numbers that are off by more than their bound, and more than what rounding does."""
    bounds = dict(BOUNDS)
    if config.model.moe is not None:
        bounds |= {"loss": ROUTED_LOSS_BOUND, "validation": ROUTED_LOSS_BOUND}
    limits = {name: bounds.get(name.split()[0], BOUNDS["gradient"]) for name in off}
    return [name for name in off if not off[name] <= max(limits[name], BF16_TO_FP8 * rounding.get(name, 0.0))]
