"""The random search itself, and a handful of its cases; `make fuzz` runs as many as there is time for."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Literal

import pytest

from plt_megatron.config.fields import Range
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from tests.fuzz import data, draw, search
from tests.fuzz.parity import Parity, before_chaos
from tests.fuzz.refusals import Refusals, ways
from tests.fuzz.round_trip import RoundTrip
from tests.fuzz.sections import value_of
from tests.running import ROOT, run


def test_every_setting_is_drawn_or_left_out_for_a_reason():
    keys = dict(draw.leaves())
    undrawn = [
        key
        for key, hint in keys.items()
        if draw.reason_not_drawn(key) is None and not draw.values(key, hint, value_of(draw.tiny(), key))
    ]
    assert not undrawn, "give these values in SCALED, or a reason in NOT_DRAWN"
    known = {*keys, *(key.rpartition(".")[0] for key in keys), *(key.partition(".")[0] for key in keys)}
    assert {*draw.SCALED, *draw.NOT_DRAWN} <= known


def test_a_setting_added_tomorrow_is_drawn_by_its_type():
    @dataclasses.dataclass
    class Tomorrow(ModelConfig):
        key_source: Literal["none", "previous", "both"] = "none"
        depth: Annotated[int, Range(1, 4)] = 2
        share: Annotated[float, Range(0, 1)] | None = None

    Tomorrow.__annotations__ = {
        "key_source": Literal["none", "previous", "both"],
        "depth": Annotated[int, Range(1, 4)],
        "share": Annotated[float, Range(0, 1)] | None,
    }
    new = [(name, hint) for name, hint in draw.leaves(Tomorrow) if name in Tomorrow.__annotations__]
    found = {name: draw.values(f"model.{name}", hint, getattr(Tomorrow(), name)) for name, hint in new}
    assert found["key_source"] == ["previous", "both"]
    assert {1, 4} <= set(found["depth"]) <= {1, 3, 4}
    assert {0.0, 1.0} <= set(found["share"]) and None not in found["share"]


def test_a_case_is_the_same_in_every_process_and_is_not_refused():
    code = "from tests.fuzz import draw; print(draw.draw('5 parity', 3, {}, lambda config: ()))"
    seen = {
        run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}).stdout
        for seed in ("1", "2")
    }
    settings = draw.draw("5 parity", 3, {}, lambda config: ())
    assert seen == {f"{settings}\n"} and len(settings) > 5
    assert draw.problems(draw.load(settings), lambda config: ()) == []


@pytest.mark.parametrize("needed", [{"c"}, {"a", "h"}, {"b", "c", "g"}], ids=lambda needed: "".join(sorted(needed)))
def test_a_finding_is_shortened_to_what_it_needs(needed):
    tried = []

    def shows(settings: draw.Settings) -> bool:
        tried.append(settings)
        return needed <= settings.keys() and ("e" in settings) == ("f" in settings)  # one is refused without the other

    everything = dict.fromkeys("abcdefgh", 1)
    assert search.shortened(everything, shows, [], deadline=float("inf")).keys() == needed
    assert len(tried) < 100


def test_an_error_of_the_code_is_a_finding():
    class Broken(search.Kind):
        fixed = {"model.loop_count": 3}

        def accepts(self, settings):
            return True

        def check(self, settings):
            if settings.keys() >= {"model.window_size", "model.qkv_bias"}:
                raise ZeroDivisionError(f"in case {len(settings)}")

    drawn = {"model.loop_count": 3, "model.window_size": 1, "model.qk_layernorm": True, "model.qkv_bias": True}
    found = search.find(Broken(None), drawn, "case 7")
    assert found is not None and "ZeroDivisionError" in found.problem and found.case == "case 7"
    assert found.shortest.keys() == {"model.loop_count", "model.window_size", "model.qkv_bias"}


@pytest.mark.slow
def test_one_case_of_each_kind():
    search = [sys.executable, "-m", "tests.fuzz", "--seed", "1", "--cases", "1", "--no-shrink"]
    done = run(search, timeout=3600)
    assert "1 parity, 1 refusals, 1 resume, 1 round_trip, 1 branch" in done.stdout and "nothing found" in done.stdout


def test_a_chaotic_run_is_compared_until_it_is_one():
    calm = {"loss 0": 1e-7, "gradient norm 0": 1e-5, "validation loss at 4": 1e-6, "loss 1": 1e-6, "layer.weight": 1e-4}
    assert before_chaos(calm) == list(calm)
    chaotic = {**calm, "gradient norm 1": 0.08, "loss 2": 1e-3, "gradient norm 2": 0.01}
    assert before_chaos(chaotic) == ["loss 0", "gradient norm 0"]
    assert before_chaos({**chaotic, "gradient norm 0": 0.02}) == ["loss 0"]


@pytest.mark.parametrize("number", [0, 13])
def test_layouts_of_drawn_models_give_one_processs_numbers(run_distributed, number):
    parity = Parity(run_distributed)
    settings = parity.draw(0, number)
    assert parity.check(settings) is None, draw.overrides(settings)


def test_a_drawn_model_is_the_same_exported_decoded_and_imported(run_distributed, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    round_trip = RoundTrip(run_distributed)
    settings = round_trip.draw(1, 0)
    assert round_trip.check(settings) is None, draw.overrides(settings)


def test_what_a_refusal_says_to_set_is_understood():
    line = "model.a 3 needs b: why; set model.b=true and model.c=[1, 2], or model.d=null, or leave out the section e"
    assert list(ways(line)) == [["model.b=true", "model.c=[1, 2]"], ["model.d=null"]]
    assert list(ways("model.a must be 4, got 3")) == list(ways("x: set model.a=8; leave this out")) == []


def test_a_refusal_that_stays_when_it_is_followed_is_a_finding(monkeypatch):
    def refuse(config, **_):
        raise UserError(f"model.window_size {config.model.window_size} is small; set model.window_size=64")

    monkeypatch.setattr("tests.fuzz.refusals.validate", refuse)
    assert "after model.window_size=64 as before" in (Refusals(None).refusal({"model.window_size": 8}) or "")


def test_what_is_refused_is_refused_by_name():
    refusals, refused = Refusals(None), 0
    for number in range(100):
        settings = draw.wild("0 refusals", number)
        problem = refusals.refusal(settings)
        assert not problem, f"{draw.overrides(settings)}: {problem}"
        refused += problem is not None
    assert 20 < refused < 95
