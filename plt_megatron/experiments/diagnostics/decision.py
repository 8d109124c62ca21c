"""LoopCoder-v2's rule in words: add a loop while the effective rank still rises; stop when it falls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from plt_megatron.experiments.diagnostics.diagnose import Diagnosis
from plt_megatron.experiments.intervals import FEW, LEVEL
from plt_megatron.run_folder.text import plural

RULE = "add a loop while the effective rank still rises; stop when it falls"
Direction = Literal["rises", "falls", "undecided"]


@dataclass(frozen=True)
class Step:
    """The change of the effective rank at loop `loop`: the paired difference to the loop before, and its interval."""

    loop: int
    difference: float
    low: float | None
    high: float | None
    direction: Direction


@dataclass(frozen=True)
class Decision:
    """The answer by the rule.

    Attributes:
        verdict: `add`: the rank rises up to the last loop; `stop`: it falls at loop `loops` + 1; `undecided`: the
            interval at loop `loops` + 1 includes zero; `one_loop`: there is nothing to compare.
        loops: number of loops up to which every step raised the rank.
        answer: one sentence.
        steps: change of the rank at each loop.
        signs: further observations, a sentence each.
        cautions: reservations about the answer, a sentence each.
    """

    verdict: Literal["add", "stop", "undecided", "one_loop"]
    loops: int
    answer: str
    steps: list[Step] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"rule": RULE, **asdict(self)}


def decide(diagnosis: Diagnosis, sequence_length: int) -> Decision:
    """Apply the rule from loop 2 on."""
    cautions = list(_cautions(diagnosis, sequence_length))
    if diagnosis.loop_count == 1:
        answer = (
            "The model has one loop: its states, attention and loss are measured, but the rule compares loops and "
            "needs at least two. Train the same model with model.loop_count=2 and diagnose that."
        )
        return Decision("one_loop", 1, answer, cautions=cautions)
    steps = [_step(diagnosis, loop) for loop in range(2, diagnosis.loop_count + 1)]
    signs = list(_signs(diagnosis))
    end = next((step for step in steps if step.direction != "rises"), None)
    if end is None:
        loops = diagnosis.loop_count
        answer = (
            f"The effective rank rises with every loop, with loop {loops} by {_signed(steps[-1])}: by the rule, try "
            f"{loops + 1} loops."
        )
        return Decision("add", loops, answer, steps, signs, cautions)
    loops = end.loop - 1
    many = plural(loops, "loop")
    if end.direction == "falls":
        answer = f"The effective rank falls with loop {end.loop}, by {_signed(end)}: by the rule, stop at {many}."
        return Decision("stop", loops, answer, steps, signs, cautions)
    answer = (
        f"The data do not decide: the effective rank changes with loop {end.loop} by {_signed(end)}. By the rule, "
        f"at least {many}; more sequences (--max-tokens) narrow the interval."
    )
    return Decision("undecided", loops, answer, steps, signs, cautions)


def _step(diagnosis: Diagnosis, loop: int) -> Step:
    found = diagnosis.differences["effective_rank"].at(loop)
    low, high = (found.low, found.high) if found.is_known else (None, None)
    direction: Direction = "rises" if found.sign > 0 else "falls" if found.sign < 0 else "undecided"
    return Step(loop, found.value, low, high, direction)


def _signed(step: Step) -> str:
    if step.low is None:
        return f"{step.difference:+.2f} (a single sequence: no interval)"
    return f"{step.difference:+.2f} [{step.low:+.2f}, {step.high:+.2f}]"


def _signs(diagnosis: Diagnosis) -> Iterator[str]:
    for loop in range(2, diagnosis.loop_count + 1):
        change = diagnosis.differences["lens_loss"].at(loop)
        if change.is_known:
            what = ("does not clearly change", "raises", "lowers")[change.sign]
            yield f"Loop {loop} {what} the loss: {change.text('+.4f')} nats per token."
    for loop in range(2, diagnosis.loop_count + 1):
        cosine = diagnosis.loops["update_cosine"].at(loop)
        if cosine.sign:
            back = f"partly takes back what loop {loop - 1} did (oscillation)"
            what = back if cosine.sign < 0 else f"continues in the direction of loop {loop - 1}"
            yield f"Loop {loop} {what}: update cosine {cosine.text('+.2f')}."
    if diagnosis.loop_count > 2:
        shares = diagnosis.loops["peak_loop"].mean
        loop = 2 + int(np.argmax(shares[2:]))
        if not math.isnan(shares[loop]):
            yield f"Predictions change most at loop {loop} for {100 * shares[loop]:.0f} % of the tokens."


def _cautions(diagnosis: Diagnosis, sequence_length: int) -> Iterator[str]:
    hidden_size = diagnosis.config.hidden_size
    if diagnosis.sequences == 1:
        yield "A single sequence: no intervals, and nothing can be decided."
    elif diagnosis.sequences < FEW:
        yield f"{diagnosis.sequences} sequences are few for {LEVEL:.0%} intervals."
    if diagnosis.loop_count > 1:
        yield (
            f"These weights were trained for {diagnosis.loop_count} loops, on the loss of the last one unless "
            "training.loop_loss_weights said otherwise: a model trained for fewer loops would be a different one. The "
            "rule proposes; a sweep over loop counts decides."
        )
    if diagnosis.windows_earlier_loops:
        yield (
            "Loops before the last attend to a window only, so part of what the last one changes is its longer view. "
            "With fewer loops the last of those would have that view: the losses here are not theirs."
        )
    if diagnosis.loops["effective_rank"].mean.max() > 0.9 * min(sequence_length, hidden_size):
        yield (
            f"The effective rank is near its bound, the smaller of sequence length ({sequence_length}) and hidden size "
            f"({hidden_size}): it can hardly rise."
        )
