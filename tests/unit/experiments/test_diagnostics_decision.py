"""The rule on hand-made courses of the effective rank, the paper's among them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from plt_megatron.experiments.diagnostics.decision import decide
from plt_megatron.experiments.diagnostics.diagnose import DIFFERENCES, Diagnosis
from plt_megatron.experiments.intervals import Intervals
from plt_megatron.hf.configuration_plt import PLTConfig


def around(values, half):
    """Intervals of the given half width; NaN where there is no value, none at all for None."""
    mean = np.array(values, dtype=float)
    margin = math.nan if half is None else half
    return Intervals(mean, mean - margin, mean + margin)


def diagnosis(ranks, half=1.0, cosines=None, losses=None, peaks=None, sequences=64):
    """Of effective ranks of loops 1 .. L; loop 0 has that of loop 1."""
    loops = len(ranks)
    course = np.array([ranks[0], *ranks], dtype=float)
    loss = np.array([math.nan, *(losses or [3.0] * loops)])
    nothing = [math.nan] * (loops + 1)
    changes = {name: around(nothing, half) for name in DIFFERENCES}
    changes["effective_rank"] = around([math.nan, *np.diff(course)], half)
    changes["lens_loss"] = around([math.nan, *np.diff(loss)], half and half / 100)
    by_loop = {
        "effective_rank": around(course, half),
        "lens_loss": around(loss, half),
        "update_cosine": around(nothing if cosines is None else [math.nan] * 2 + cosines, half and half / 20),
        "peak_loop": around(nothing if peaks is None else [math.nan] * 2 + peaks, half),
    }
    config = PLTConfig(loop_count=loops, hidden_size=4096)
    return Diagnosis(config, [], by_loop, {}, changes, sequences)


def rule(*arguments, **options):
    return decide(diagnosis(*arguments, **options), sequence_length=2048)


def test_the_papers_model_of_four_loops_says_two():
    """LoopCoder-v2's PLT-4: effective rank 174.6, 172.5, 158.2 after loops 2, 3, 4, cosine -.72, -.46, .04."""
    found = rule([160.0, 174.6, 172.5, 158.2], cosines=[-0.72, -0.46, 0.04])
    assert (found.verdict, found.loops) == ("stop", 2)
    assert "falls with loop 3, by -2.10 [-3.10, -1.10]: by the rule, stop at 2 loops" in found.answer
    assert [step.direction for step in found.steps] == ["rises", "falls", "falls"]
    assert any("Loop 2 partly takes back" in sign for sign in found.signs)
    assert any("Loop 3 partly takes back" in sign for sign in found.signs)
    assert not any("Loop 4" in sign and "direction" in sign for sign in found.signs), "its interval has zero in it"


@pytest.mark.parametrize(
    ("ranks", "verdict", "loops", "said"),
    [
        ([100.0, 120.0, 130.0], "add", 3, ["try 4 loops"]),
        ([100.0, 90.0, 120.0], "stop", 1, ["stop at 1 loop."]),
        ([100.0, 120.0, 120.5], "undecided", 2, ["do not decide", "[-0.50, +1.50]"]),
    ],
    ids=["rises to the end", "falls at once", "an interval with zero in it"],
)
def test_the_rule(ranks, verdict, loops, said):
    found = rule(ranks)
    assert (found.verdict, found.loops) == (verdict, loops)
    assert all(text in found.answer for text in said)


def test_one_sequence_decides_nothing():
    found = rule([100.0, 150.0], half=None, sequences=1)
    assert found.verdict == "undecided" and found.steps[0].low is None
    assert found.cautions[0] == "A single sequence: no intervals, and nothing can be decided."


def test_one_loop_has_nothing_to_compare():
    found = rule([100.0])
    assert found.verdict == "one_loop" and not found.steps and "model.loop_count=2" in found.answer


def test_losses_and_peaks_are_said():
    found = rule([100.0, 120.0, 130.0], losses=[3.0, 2.5, 2.7], peaks=[0.7, 0.3])
    assert "Loop 2 lowers the loss: -0.5000 [-0.5100, -0.4900] nats per token." in found.signs
    assert "Loop 3 raises the loss: +0.2000 [+0.1900, +0.2100] nats per token." in found.signs
    assert "Predictions change most at loop 2 for 70 % of the tokens." in found.signs


@pytest.mark.parametrize(("sequences", "text"), [(3, "3 sequences are few"), (64, None)])
def test_cautions(sequences, text):
    found = rule([100.0, 120.0], sequences=sequences)
    assert any("are few" in caution for caution in found.cautions) == (text is not None)
    assert any("trained for 2 loops" in caution for caution in found.cautions)
    near = decide(diagnosis([100.0, 120.0]), sequence_length=128)
    assert any("near its bound" in caution for caution in near.cautions)
    assert json.loads(json.dumps(near.as_dict()))["rule"].startswith("add a loop while")
